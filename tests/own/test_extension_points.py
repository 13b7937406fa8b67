"""What a researcher adds from outside the package, each with public names alone."""

import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from oumi_pl.__main__ import main
from oumi_pl.commands.export import load_checkpoint
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.plan import Plan
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.losses.preference import Sigmoid
from oumi_pl.models.lm import States
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.reference import OtherModel
from oumi_pl.modules.sft import SFT
from oumi_pl.types import TokenLoss
from tests.tiny import (
    LLAMA,
    conversations,
    data,
    distance,
    dpo,
    dpo_data,
    fit,
    module,
    pairs,
    sgd,
    trainer,
    weights,
    write_jsonl,
)

HERE = Path(__file__).parent
ROWS = 12


def packed_batch(tmp_path, sft, **kwargs):
    """A built module, and a batch of three documents in one row."""
    rows = data(tmp_path, ROWS, packing=True, **kwargs)
    rows.prepare_data()
    rows.setup("fit")
    L.seed_everything(1)
    sft.assemble(rows.tokenizer, branching=rows.branching)
    return rows, rows.batch("train", [0, 1, 2])


def plain_logits(hf, rows, ids):
    """Logits that predict the targets, and the targets, one document at a time."""
    logits, targets = [], []
    for i in ids:
        example = rows.examples("train")[i]
        tokens = torch.tensor(example.input_ids, dtype=torch.long)[None]
        mask = torch.tensor(example.loss_mask[1:])
        logits.append(hf(input_ids=tokens).logits[0, :-1][mask])
        targets.append(tokens[0, 1:][mask])
    return torch.cat(logits), torch.cat(targets)


# ---- the model on a batch


class Focal(TokenLoss):
    def __call__(self, logits, targets):
        nll = F.cross_entropy(logits, targets, reduction="none")
        return (1 - (-nll).exp()) ** 2 * nll

    def metrics(self, logits, targets):
        logps = logits.log_softmax(-1)
        return {"entropy": -(logps.exp() * logps).sum(-1), "sure": (logps.amax(-1).exp() > 0.5).float()}


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba", "state_size": 4, "num_hidden_layers": 1}])
def test_logits_losses_and_log_probabilities_of_a_batch(tmp_path, config):
    """Packed, in each layout: those of the documents alone."""
    sft = SFT(config=config or LLAMA, optimizer=sgd)
    rows, batch = packed_batch(tmp_path, sft)
    logits, targets = plain_logits(sft.causal_lm.hf, rows, [0, 1, 2])
    assert torch.equal(batch["targets"], targets)
    for got, expected in [
        (sft.causal_lm(batch, States.logits), logits),
        (sft.causal_lm(batch), -F.cross_entropy(logits, targets, reduction="none")),
        (sft.causal_lm(batch, lambda states: states.token_losses(Focal())), Focal()(logits, targets)),
        (sft.causal_lm(batch, lambda states: states.loss_sum(Focal()).loss_sum), Focal()(logits, targets).sum()),
    ]:
        assert torch.allclose(got, expected, atol=1e-4 if config else 1e-5, rtol=1e-4)


def test_the_model_inside_refuses_a_row_of_several_documents(tmp_path):
    sft = module()
    rows, batch = packed_batch(tmp_path, sft)
    with pytest.raises(UserError, match=r"LlamaForCausalLM was called on a row of several documents.*causal_lm\(batch"):
        sft.causal_lm.hf(batch["input_ids"], position_ids=batch["position_ids"])
    one = rows.batch("train", [0])
    sft.causal_lm.hf(one["input_ids"], position_ids=one["position_ids"])
    sft.causal_lm.hf(one["input_ids"])


def test_hessian_vector_products_through_the_model(tmp_path):
    sft = module(config={"num_hidden_layers": 1}, dtype="float32")
    rows, batch = packed_batch(tmp_path, sft)
    parameters = list(sft.parameters())
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(p.shape, generator=generator) for p in parameters]

    def product(loss):
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        value = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
        return torch.autograd.grad(value, parameters)

    with sdpa_kernel(SDPBackend.MATH):
        expected = product(F.cross_entropy(*plain_logits(sft.causal_lm.hf, rows, [0, 1, 2]), reduction="sum"))
        for loss in (
            sft.causal_lm(batch, lambda states: states.loss_sum(CrossEntropy()).loss_sum),
            -sft.causal_lm(batch).sum(),
        ):
            for got, wanted in zip(product(loss), expected, strict=True):
                assert (got - wanted).norm() < 1e-4 * wanted.norm().clamp(min=1e-3)


def test_transforms_of_torch_func_through_the_model(tmp_path):
    sft = module(config={"num_hidden_layers": 1})
    rows, batch = packed_batch(tmp_path, sft)
    model = sft.causal_lm
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}

    def loss(values):
        return functional_call(model, values, (batch, lambda states: states.loss_sum(CrossEntropy()).loss_sum))

    def plain(values):
        hf = {name.removeprefix("hf."): value for name, value in values.items()}
        total = 0.0
        for i in (0, 1, 2):
            example = rows.examples("train")[i]
            ids, mask = torch.tensor(example.input_ids, dtype=torch.long)[None], torch.tensor(example.loss_mask[1:])
            logits = functional_call(model.hf, hf, (), {"input_ids": ids}).logits[0, :-1][mask]
            total = total + F.cross_entropy(logits, ids[0, 1:][mask], reduction="sum")
        return total

    with sdpa_kernel(SDPBackend.MATH):
        ours, theirs = torch.func.grad(loss)(parameters), torch.func.grad(plain)(parameters)
        assert distance(ours, theirs) < 1e-5
        for got, expected in zip(*(torch.func.jvp(f, (parameters,), (tangents,)) for f in (loss, plain)), strict=True):
            assert float(got) == pytest.approx(float(expected), rel=1e-4)


# ---- losses


def test_metrics_of_a_token_loss_are_logged_in_training_and_validation(tmp_path):
    sft = module(loss=Focal())
    L.seed_everything(1)
    run = trainer(max_epochs=1)
    run.fit(sft, data(tmp_path, ROWS, validation=0.3, batch_size=ROWS))
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert 0 < logged["train/entropy"] < np.log(260) + 1e-3 and logged["val/sure"] == 0
    rows = run.datamodule
    logits, _ = plain_logits(sft.eval().causal_lm.hf, HeldOut(rows), range(len(rows.examples("validation"))))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert logged["val/entropy"] == pytest.approx(float(entropy), rel=1e-4)


class HeldOut:
    """The validation rows under the name of the training rows."""

    def __init__(self, rows):
        self.examples = lambda _: rows.examples("validation")


class Certain(Sigmoid):
    def metrics(self, pairs):
        return {"certain": ((pairs.chosen_logratios - pairs.rejected_logratios).abs() > 1).float()}


def test_metrics_of_a_preference_loss_are_logged_in_training_and_validation(tmp_path):
    run = trainer(max_steps=2)
    run.fit(dpo(loss=Certain()), dpo_data(tmp_path, ROWS, validation=0.3))
    assert {"train/certain", "val/certain"} <= run.callback_metrics.keys()
    assert 0 <= float(run.callback_metrics["val/certain"]) <= 1


class Temperature(TokenLoss, nn.Module):
    """Cross entropy at a learned temperature."""

    def __init__(self):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(0.3))
        self.calls = 0

    def __call__(self, logits, targets):
        self.calls += len(targets)
        return F.cross_entropy(logits / self.log_temperature.exp(), targets, reduction="none")


def test_a_learned_parameter_of_a_token_loss_moves_as_in_plain_torch_and_is_resumed(tmp_path):
    sft = module(loss=Temperature())
    fit(sft, data(tmp_path, ROWS, batch_size=ROWS), max_epochs=1)
    other = module(loss=Temperature())
    rows, _ = packed_batch(tmp_path, other)
    logits, targets = plain_logits(other.causal_lm.hf, rows, range(ROWS))
    scale = torch.tensor(0.3, requires_grad=True)
    F.cross_entropy(logits.detach() / scale.exp(), targets).backward()
    assert float(sft.loss.log_temperature.detach()) == pytest.approx(0.3 - 0.1 * float(scale.grad), rel=1e-5)
    assert sft.trainer.lightning_module.state_dict()["loss.log_temperature"] == sft.loss.log_temperature
    sft.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = SFT.load_from_checkpoint(
        tmp_path / "a.ckpt", config=LLAMA, loss=Temperature(), tokenizer=rows.tokenizer, optimizer=sgd
    )
    assert loaded.loss.log_temperature == sft.loss.log_temperature
    assert distance(weights(loaded), weights(sft)) == 0


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["lm_head", "q_proj"]}])
def test_a_token_loss_is_called_once_per_token_of_a_run(tmp_path, lora):
    loss = Temperature()
    sft = module(loss=loss, lora=lora)
    fit(sft, data(tmp_path, ROWS, batch_size=4), max_epochs=1)
    assert loss.calls == sft.tokens_seen["targets"]


# ---- references and other models


def test_policy_and_reference_on_a_batch(tmp_path):
    for kwargs in ({"reference": "online"}, {"lora": {"r": 2}}):
        policy, rows = dpo(optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0), **kwargs), dpo_data(tmp_path, ROWS)
        L.seed_everything(1)
        run = trainer(max_steps=3)
        run.fit(policy, rows)
        batch = rows.batch("train", [0, 1])
        both = policy.compare(batch, "train")
        assert torch.equal(both.logps, policy.causal_lm(batch)) and both.logps.requires_grad
        assert not both.ref_logps.requires_grad
        assert (both.logps - both.ref_logps).abs().max() > 1e-4
    with pytest.raises(UserError, match="SFT has no reference"):
        module().compare(batch, "train")


class WithTeacher(DPO):
    """DPO, and a third model whose responses the policy also learns."""

    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = OtherModel(self, teacher)

    def loss_sums(self, batch, split):
        sums = super().loss_sums(batch, split)
        gap = (self.causal_lm(batch) - self.teacher(batch)).square().sum()
        return sums | {"gap": gap.detach(), "loss": sums["loss"] + 0.1 * gap}


def test_a_third_model(tmp_path):
    teacher, rows = dpo(), dpo_data(tmp_path, ROWS, validation=0.3)
    fit(teacher, rows, max_steps=2)
    teacher.save(tmp_path / "teacher", tokenizer=rows.tokenizer)
    student = WithTeacher(config=LLAMA, teacher=str(tmp_path / "teacher"), optimizer=sgd)
    run = trainer(max_steps=4)
    L.seed_everything(5)
    run.fit(student, dpo_data(tmp_path, ROWS, validation=0.3))
    assert float(run.callback_metrics["val/gap"]) > 0
    assert not [name for name, _ in student.named_parameters() if "teacher" in name]
    batch = rows.batch("train", [0, 1])
    assert torch.allclose(student.teacher(batch), teacher.causal_lm(batch).detach(), atol=1e-5)
    assert student.teacher(batch, States.logits).shape == (len(batch["targets"]), 260)


# ---- data


def scored(tmp_path, rows, name="scored.jsonl"):
    return write_jsonl(tmp_path / name, [row | {"score": i / 2 if i else None} for i, row in enumerate(rows)])


def test_columns_of_the_rows_are_in_the_batch(tmp_path):
    rows = SFTData(scored(tmp_path, conversations(6)), tokenizer=ByteTokenizer(), fields=["score"])
    rows.prepare_data()
    batch = rows.batch("train", [2, 0, 5])
    assert batch["fields"]["score"].isnan().tolist() == [False, True, False]
    assert batch["fields"]["score"][[0, 2]].tolist() == [1.0, 2.5]
    preferences = DPOData(scored(tmp_path, pairs(4), "pairs.jsonl"), tokenizer=ByteTokenizer(), fields=["score"])
    preferences.prepare_data()
    assert preferences.batch("train", [3])["fields"]["score"].tolist() == [1.5]
    for column, message in {
        "scroe": r"no column 'scroe'; did you mean 'score'",
        "messages": "a field is a number",
    }.items():
        with pytest.raises(UserError, match=message):
            SFTData(scored(tmp_path, conversations(6)), tokenizer=ByteTokenizer(), fields=[column]).prepare_data()


class Curriculum(SFTData):
    """The shortest half in the first epoch, all rows from short to long in the others."""

    def plan(self, epoch):
        ids = np.argsort(self.lengths("train"), kind="stable")
        ids = ids if epoch else ids[: len(ids) // 2]
        return Plan(ids, np.arange(len(ids) + 1), self.layout.rows_per_update)


class Seen(L.Callback):
    def __init__(self, stop=None, path=None):
        self.ids, self.stop, self.path = [], stop, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ids.append(batch["sample_ids"])
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_a_curriculum_trains_in_its_order_and_resumes(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", conversations(ROWS))

    def run(seen, ckpt_path=None):
        rows, sft = Curriculum(file, tokenizer=ByteTokenizer(), max_length=256, batch_size=2, seed=0), module()
        L.seed_everything(1)
        trainer(max_epochs=2, callbacks=[seen]).fit(sft, rows, ckpt_path=ckpt_path)
        assert sft.total_steps() == 3 + 6
        return rows, weights(sft)

    whole, part, rest = Seen(), Seen(4, tmp_path / "part.ckpt"), Seen()
    rows, expected = run(whole)
    order = np.argsort(rows.lengths("train"), kind="stable").tolist()
    assert [i for ids in whole.ids for i in ids] == order[: ROWS // 2] + order
    run(part)
    _, got = run(rest, tmp_path / "part.ckpt")
    assert part.ids + rest.ids == whole.ids
    assert distance(got, expected) == 0


# ---- an own architecture, and checkpoints


RECIPE = """
seed_everything: 1
model: {class_path: SFT, init_args: {architecture: gla.GLA, config: {hidden_size: 16},
        optimizer: {class_path: AdamW, init_args: {lr: 0.01}}}}
data: {class_path: SFTData, init_args: {train: rows.jsonl, validation: 0.2, batch_size: 2, packing: true,
       max_length: 64, tokenizer: {class_path: ByteTokenizer}}}
trainer: {accelerator: cpu, max_steps: 3}
samples: {max_new_tokens: 3}
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    (tmp_path / "r.yaml").write_text(RECIPE)
    write_jsonl(tmp_path / "rows.jsonl", conversations(ROWS, longest=4))
    return tmp_path


def test_an_architecture_by_class_path_fits_exports_and_generates(work, capsys):
    assert main(["fit", "--config", "r.yaml", "--name", "gla"]) == 0
    assert "packed documents are computed in rows of their own" in capsys.readouterr().err
    assert main(["export", "--checkpoint", "runs/gla", "--output", "exported", "--trust"]) == 0
    capsys.readouterr()
    answers = []
    for source in (
        ["--model", "runs/gla/model", "--architecture", "gla.GLA"],
        ["--model", "exported", "--trust_remote_code"],
        ["--checkpoint", "runs/gla", "--trust"],
    ):
        assert main(["generate", *source, "--prompt", "abc", "--max_new_tokens", "4", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["completion"])
    assert len(set(answers)) == 1
    main(
        ["fit", "--config", "r.yaml", "--name", "again", "--model.model", "runs/gla/model", "--trainer.max_steps", "1"]
    )
    # elsewhere, without this package and without the file
    code = (
        "import torch; from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained({str(work / 'exported')!r}, trust_remote_code=True); "
        "print(float(m(torch.arange(9)[None]).logits.detach().double().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    here = load_checkpoint("runs/gla", trust=True).module.causal_lm.hf(torch.arange(9)[None]).logits.double().sum()
    assert float(done.stdout) == pytest.approx(float(here.detach()), rel=1e-5)


OWN_STEP = """
from oumi_pl.modules.sft import SFT


class OwnStep(SFT):
    def training_step(self, batch, batch_idx):
        return -self.causal_lm(batch).mean()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = 1

    def on_load_checkpoint(self, checkpoint):
        assert checkpoint["mine"] == 1
"""


def test_a_recipe_with_a_custom_step_and_hooks_is_logged_resumed_and_exported(work):
    (work / "own_step.py").write_text(OWN_STEP)
    recipe = yaml.safe_load(RECIPE)
    recipe["model"] = {"class_path": "own_step.OwnStep", "init_args": {"config": LLAMA}}
    (work / "own.yaml").write_text(yaml.safe_dump(recipe | {"checkpoint": {"every": 2, "keep": 9}}))
    assert main(["fit", "--config", "own.yaml", "--name", "own", "--checkpoint.monitor", "val/loss"]) == 0
    lines = (work / "runs/own/metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    assert {"train/loss", "train/grad_norm", "train/tokens_per_second", "val/loss"} <= set(names)
    assert float(lines[1].split(",")[names.index("train/num_tokens")]) > 0
    assert main(["export", "--checkpoint", "runs/own/checkpoints/best.ckpt", "--output", "exported", "--trust"]) == 0
    step = "runs/own/checkpoints/step-00000002.ckpt"
    assert main(["fit", "--config", "own.yaml", "--name", "again", "--ckpt_path", step]) == 0
    ours, theirs = (load_checkpoint(work / "runs" / name, trust=True).module.state_dict() for name in ("own", "again"))
    assert distance(ours, theirs) == 0


def test_invalid_architectures_are_refused(work):
    for path, message in {
        "gla.GLAX": r"model\.architecture: can't import 'gla\.GLAX'",
        "gla.Block": r"gla\.Block is no subclass of transformers\.PreTrainedModel",
    }.items():
        with pytest.raises(UserError, match=message):
            SFT(architecture=path)


def test_load_checkpoint_gives_module_and_tokenizer(work):
    recipe = yaml.safe_load(RECIPE)
    recipe["model"]["init_args"] = {"config": LLAMA, "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}}
    (work / "llama.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", "llama.yaml", "--name", "a"]) == 0
    loaded = load_checkpoint("runs/a")
    assert isinstance(loaded.module, SFT) and not loaded.module.training
    assert loaded.tokenizer.decode(loaded.tokenizer("abc")["input_ids"]).endswith("abc")
    assert "train/loss" in loaded.metrics and loaded.config["trainer"]["max_steps"] == 3
    loaded.data.prepare_data()
    loaded.data.setup("fit")
    batch = loaded.data.batch("train", [0, 1, 2])
    logits, targets = plain_logits(loaded.module.causal_lm.hf, loaded.data, [0, 1, 2])
    expected = -F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(loaded.module.causal_lm(batch), expected, atol=1e-5), "packed documents see each other"
    with pytest.raises(UserError, match=r"checkpoints hold no arguments; .*load_checkpoint\(path\)"):
        SFT.load_from_checkpoint(next(Path("runs/a/checkpoints").glob("*.ckpt")))
