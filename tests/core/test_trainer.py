"""Oumi's own trainer: what a user writes, what it leaves behind, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_model
from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import oumi_pl.core.trainers
from oumi_pl.core.configs import TelemetryParams, TrainerType, TrainingParams
from oumi_pl.core.trainers import BaseTrainer, Trainer
from oumi_pl.core.trainers.honoured import NOT_HONOURED
from oumi_pl.core.trainers.loggers import loggers
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError


def llama(**config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**({"vocab_size": 300, "num_hidden_layers": 2} | sizes | config)))


def token_rows(n, seed=0):
    """Rows of ragged length, of which the first tokens carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        ids = torch.randint(3, 250, (int(torch.randint(4, 13, (1,), generator=generator)),), generator=generator)
        prompt = int(torch.randint(0, 3, (1,), generator=generator))
        rows.append({"input_ids": ids.tolist(), "labels": [-100] * prompt + ids[prompt:].tolist()})
    return rows


def params(path, **values):
    quiet = {"enable_tensorboard": False, "logging_steps": 1, "per_device_train_batch_size": 2, "save_steps": 0}
    return TrainingParams(**({"output_dir": str(path), "max_steps": 3, "seed": 1} | quiet | values))


def rows_of(path):
    return [json.loads(line) for line in (path / "metrics_rank0000.jsonl").read_text().splitlines()]


def logged(path, name="train/loss"):
    return [row[name] for row in rows_of(path) if name in row]


class Regression(nn.Module):
    """No model of transformers: named inputs in, a dict with a loss out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x, y):
        return {"loss": (self.layer(self.dropout(x)).squeeze(-1) - y).square().mean()}


class Worse(Regression):
    """Evaluates worse from the third evaluation on."""

    def __init__(self):
        super().__init__()
        self.evaluations = 0

    def forward(self, x, y):
        loss = super().forward(x, y)["loss"]
        if self.training:
            return {"loss": loss}
        self.evaluations += 1
        return {"loss": loss * 0 + abs(self.evaluations - 2)}


class Points(torch.utils.data.Dataset):
    def __init__(self, n=10):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(n, 3, generator=generator), torch.randn(n, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i]}


def test_the_snippet_of_the_document(tmp_path):
    model, tokenizer, dataset = llama(), ByteTokenizer().build(), token_rows(6)
    params = TrainingParams(output_dir=str(tmp_path), max_steps=2)

    trainer = Trainer(model=model, tokenizer=tokenizer, args=params, train_dataset=dataset)
    trainer.train()

    assert isinstance(trainer, BaseTrainer)
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids == tokenizer("a").input_ids
    ids = torch.tensor([[5, 6, 7]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_run_tells_how_it_went(tmp_path):
    trainer = Trainer(llama(), ByteTokenizer().build(), params(tmp_path, save_steps=2), token_rows(6))
    trainer.train()
    rows = rows_of(tmp_path)
    assert [row["global_step"] for row in rows] == [1, 2, 3, 3]
    seen = sum(len(row["input_ids"]) for row in token_rows(6))
    first = rows[0]
    assert {"train/loss", "train/grad_norm", "learning_rate", "epoch", "tokens_per_second"} <= first.keys()
    assert (rows[2]["total_tokens_seen"], rows[2]["epoch"]) == (seen, 1.0)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"], state["total_tokens_seen"]) == (3, 1.0, seen)
    assert [row["step"] for row in state["log_history"]] == [1, 2, 3, 3]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_rows_without_labels_are_trained_on_all_their_tokens(tmp_path):
    rows = [{"input_ids": row["input_ids"], "note": "text stays out of the batch"} for row in token_rows(4)]
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    for name, dataset in (("a", rows), ("b", labelled)):
        Trainer(llama(), ByteTokenizer().build(), params(tmp_path / name), dataset).train()
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


def test_any_module_that_returns_a_loss_is_trained(tmp_path):
    model = Regression()
    before = model.layer.weight.clone()
    Trainer(model, args=params(tmp_path, learning_rate=0.1, optimizer="sgd"), train_dataset=Points()).train()
    fresh = Regression()
    load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh.layer.weight, model.layer.weight)
    assert not torch.equal(before, model.layer.weight)


def test_a_loss_may_be_an_attribute_or_the_output_itself(tmp_path):
    class Bare(Regression):
        def forward(self, x, y):
            return super().forward(x, y)["loss"]

    for name, model in (("a", Regression()), ("b", Bare())):
        Trainer(model, args=params(tmp_path / name), train_dataset=Points()).train()
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_an_iterable_dataset_is_read_in_its_order_epoch_after_epoch(tmp_path):
    seen = []

    class Spy(Regression):
        def forward(self, x, y):
            seen.extend(y.tolist())
            return super().forward(x, y)

    points = [Points()[i] for i in range(5)]
    Trainer(Spy(), args=params(tmp_path, max_steps=5), train_dataset=Stream(points)).train()
    y = [float(p["y"]) for p in points]
    assert seen == y + y[:4]  # windows of 2, 2, 1, 2, 2 rows
    assert [row["epoch"] for row in rows_of(tmp_path)][2] == 1.0


def test_a_short_last_update_runs_the_model_on_its_own_rows_only(tmp_path):
    seen = []

    class Spy(Regression):
        def forward(self, x, y):
            seen.append(len(y))
            return super().forward(x, y)

    for dataset in (Points(7), Stream([Points(7)[i] for i in range(7)])):
        values = params(tmp_path, gradient_accumulation_steps=3, max_steps=4)
        Trainer(Spy(), args=values, train_dataset=dataset).train()
        assert seen == [2, 2, 2, 1] * 2
        assert [row["epoch"] for row in rows_of(tmp_path)][1:4:2] == [1.0, 2.0]
        seen.clear()


def test_evaluation_is_the_mean_over_all_targets_however_it_is_cut(tmp_path):
    found = []
    for size in (1, 4):
        run = tmp_path / str(size)
        values = params(run, eval_strategy="epoch", per_device_eval_batch_size=size, learning_rate=1e-12)
        trainer = Trainer(llama(), ByteTokenizer().build(), values, token_rows(6), eval_dataset=token_rows(5, seed=3))
        trainer.train()
        found.append(trainer.get_last_eval_metrics()["eval_loss"])
        assert logged(run, "val/loss") == [found[-1]]
    model, total, targets = llama().eval(), 0.0, 0
    for row in token_rows(5, seed=3):
        labels = torch.tensor(row["labels"])[1:]
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        targets += int((labels != -100).sum())
    assert found == pytest.approx([total / targets] * 2, rel=1e-5)


def test_telemetry_holds_timings(tmp_path):
    values = params(tmp_path, include_performance_metrics=True, log_model_summary=True)
    Trainer(Regression(), args=values, train_dataset=Points()).train()
    timers = json.loads((tmp_path / "telemetry" / "telemetry_rank0000.json").read_text())["timers"]
    assert timers["optimizer step"]["count"] == 3
    assert "Linear" in (tmp_path / "telemetry" / "model_summary.txt").read_text()
    assert "train_tokens_per_second" in rows_of(tmp_path)[0]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    class Broken(Regression):
        def forward(self, x, y):
            return {"loss": super().forward(x, y)["loss"] * float("nan")}

    with pytest.raises(UserError, match=r"train/loss became nan at step 1; .* max_grad_norm: 1.0 usually helps"):
        Trainer(Broken(), args=params(tmp_path), train_dataset=Points()).train()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adamw_torc"}, "optimizer: no counterpart of 'adamw_torc'; did you mean 'adamw_torch'"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 1}}, "did you mean 'num_cycles'"),
        ({"metrics_function": "accuracy"}, "training.metrics_function"),
        ({"dataloader_main_process_only": True}, "training.dataloader_main_process_only"),
        ({"telemetry": TelemetryParams(track_gpu_temperature=True)}, "training.telemetry.track_gpu_temperature"),
        ({"trainer_kwargs": {"metric_for_best": "x"}}, "did you mean 'metric_for_best_model'"),
        ({"eval_strategy": "steps"}, "there is no eval_dataset"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1, "trainer_type": TrainerType.HF}, "say the same thing"),
        ({"enable_gradient_checkpointing": True}, "Regression has no gradient_checkpointing_enable"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        Trainer(Regression(), args=params(tmp_path, **values), train_dataset=Points())


def test_missing_data_and_missing_losses_are_reported(tmp_path):
    with pytest.raises(UserError, match="nothing to train on"):
        Trainer(Regression(), args=params(tmp_path))
    with pytest.raises(UserError, match="has no rows"):
        Trainer(Regression(), args=params(tmp_path), train_dataset=[]).train()
    with pytest.raises(UserError, match="gave no rows"):
        Trainer(Regression(), args=params(tmp_path), train_dataset=Stream([])).train()
    with pytest.raises(UserError, match=r"training\.max_steps: set it"):
        Trainer(Regression(), args=params(tmp_path, max_steps=-1), train_dataset=Stream([])).train()
    with pytest.raises(UserError, match="returned no loss for a batch of input_ids"):
        Trainer(llama(), args=params(tmp_path), train_dataset=[{"input_ids": torch.tensor([3, 4])}] * 4).train()


def test_every_parameter_is_honoured_or_refused():
    """Read somewhere in the package, or in the table of those that are refused."""
    elsewhere = {"use_peft", "trainer_type"}  # decided before there is a trainer
    # read by transformers' own flow
    elsewhere |= {"logging_strategy", "logging_steps", "logging_first_step", "eval_steps", "save_steps"}
    folder = Path(oumi_pl.core.trainers.__file__).parent
    files = [f for f in folder.glob("*.py") if f.name != "hyperparameters.py"]
    native = "".join(f.read_text() for f in [*files, folder.parent / "recipe" / "optimisation.py"])
    refused = {name.partition(".")[0] for name in NOT_HONOURED}
    for field in dataclasses.fields(TrainingParams):
        read = f"params.{field.name}" in native or f"args.{field.name}" in native
        assert read or field.name in refused | elsewhere, field.name


def test_trackers_that_are_missing_are_named_and_tensorboard_is_done_without(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("oumi_pl.core.trainers.loggers.missing", lambda name: [name])
    for name in ("wandb", "mlflow"):
        with pytest.raises(UserError, match=rf"enable_{name}: {name} is not installed; .*oumi_pl\[tracking\]"):
            loggers(params(tmp_path, **{f"enable_{name}": True}))
    with caplog.at_level("WARNING", "oumi_pl"):
        assert loggers(params(tmp_path, enable_tensorboard=True)) == []
    assert "oumi_pl[tracking]" in caplog.text


def test_loggers_of_lightning_get_each_row(tmp_path, monkeypatch):
    csv = CSVLogger(tmp_path, name="", version="")
    monkeypatch.setattr("oumi_pl.core.trainers.trainer.loggers", lambda params: [csv])
    Trainer(Regression(), args=params(tmp_path), train_dataset=Points()).train()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "train/loss" in lines[0]
    assert len(lines) == 1 + 3 + 1  # the names, the updates, how the run went


def test_data_read_ahead_by_workers_are_the_same(tmp_path):
    for number in (0, 2):
        values = params(tmp_path / str(number), dataloader_num_workers=number, max_steps=12)
        Trainer(Regression(), args=values, train_dataset=Points()).train()
    assert logged(tmp_path / "0") == logged(tmp_path / "2")


def test_one_example_is_shown_on_request(tmp_path, caplog):
    rows = [{"input_ids": ByteTokenizer().build()("hello").input_ids}] * 4
    with caplog.at_level("INFO", "oumi_pl"):
        Trainer(llama(), ByteTokenizer().build(), params(tmp_path, log_examples=True), rows).train()
    assert [r.message for r in caplog.records if "an example" in r.message] == ["an example: 'hello'"]
