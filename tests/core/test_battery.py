"""Oumi's configs, as its recipes write them, run two steps each, or are refused by the name of what is wrong."""

import json
import logging
import math

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file

from oumi_pl.config.files import merge
from oumi_pl.core.configs import TrainingConfig
from tests.command_line import CommandLine, jsonl
from tests.core.battery import COMMON, COMPLETIONS, EVALUATED, HELD_OUT, OWN, REFUSED, RUNS, lora, model, reads, sft
from tests.core.oumi import tiny_model
from tests.tiny import conversations, pairs, write_jsonl

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model, and the same rows in all the shapes that Oumi reads."""
    folder = tmp_path_factory.mktemp("home")
    tiny_model(folder / "tiny")
    rows, texts = conversations(16), [f"document {i} " * 9 for i in range(20)]
    said = [[turn["content"] for turn in row["messages"]] for row in rows]
    alpaca = [{"instruction": q, "input": q[:2] * (i % 2), "output": r} for i, (q, r) in enumerate(said)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "turns").mkdir()
    for name, content in {
        "oumi": [{"conversation": row} for row in rows],
        "alpaca": alpaca,
        "turns/train": [{"chat": row["messages"]} for row in rows],
        "texts": [{"text": text} for text in texts],
        "pairs": pairs(8),
        "rendered": [{"prompt": f"Q {i}", "chosen": f" yes {i}", "rejected": " no"} for i in range(8)],
    }.items():
        write_jsonl(folder / f"{name}.jsonl", content)
    datasets.Dataset.from_list([{"q": q, "r": r} for q, r in said]).to_parquet(str(folder / "asked.parquet"))
    for name, content in {"disk": rows, "pairs_disk": pairs(8), "texts_disk": [{"body": t} for t in texts]}.items():
        datasets.Dataset.from_list(content).save_to_disk(str(folder / name))
    return folder


@pytest.fixture
def cli(home, tmp_path, monkeypatch, capsys):
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return CommandLine(tmp_path, monkeypatch, capsys)


def written(cli, text):
    """The config that a text makes with what all share, written to `oumi.yaml`."""
    tree = merge(COMMON, yaml.safe_load(text))
    cli.write("oumi.yaml", yaml.safe_dump(tree))
    return tree


def trained(cli, text, *args):
    """Trains, and returns the rows of the log of training, of evaluation, and what was printed."""
    written(cli, text)
    code, _, err = cli.run("train", "-c", "oumi.yaml", "-v", *args)
    assert code == 0, err
    rows = [json.loads(line) for line in (cli.directory / "out/run/metrics_rank0000.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row], err


def files_of(tree):
    """The weights that a run should leave, and those that it should not."""
    training, mode = tree["training"], tree.get("peft", {}).get("peft_save_mode", "ADAPTER_ONLY")
    if training.get("save_final_model") is False:
        return set()
    if not training.get("use_peft"):
        return {"model.safetensors"}
    adapter = {"adapter_model.safetensors"}
    return {"ADAPTER_ONLY": adapter, "ADAPTER_AND_BASE_MODEL": adapter | {"model.safetensors"}}.get(
        mode, {"model.safetensors"}
    )


def check(cli, text, *args):
    tree = merge(COMMON, yaml.safe_load(text))
    rows, _, _ = trained(cli, text, *args)
    out, steps = cli.directory / "out/run", tree["training"]["max_steps"]
    assert [row["step"] for row in rows] == list(range(1, (steps if steps > 0 else 4) + 1))
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == rows[-1]["step"]
    weights = {path.name for path in out.glob("*.safetensors")}
    assert weights == files_of(tree)
    assert all((out / name).exists() == bool(weights) for name in ("tokenizer.json", "generation_config.json"))
    place = tree["training"].get("telemetry", {}).get("telemetry_dir", "telemetry")
    if place is None:
        assert not (out / "telemetry").exists()
    else:
        assert TrainingConfig.from_yaml(out / place / "training_config.yaml").training.max_steps == steps
    return out


@pytest.mark.parametrize("name", RUNS)
def test_runs(cli, name):
    check(cli, RUNS[name], "--engine", "lightning")


@pytest.mark.parametrize("name", OWN)
def test_runs_on_the_engine_of_its_trainer_type(cli, name):
    out = check(cli, RUNS[name])
    if OWN[name] == "lightning":
        assert any(out.glob("checkpoints/step-*.ckpt"))
    else:
        assert (out / "checkpoint-2" / "trainer_state.json").exists()
    assert yaml.safe_load((out / "config.yaml").read_text())["engine"] == OWN[name]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(cli, name):
    text, path, words = REFUSED[name]
    written(cli, text)
    message = cli.fails("train", "-c", "oumi.yaml")
    assert message.startswith(f"error: {path}")
    assert words in message


def test_an_address_is_refused(cli):
    for command in (("train", "-c"), ("convert",)):
        assert "is an address" in cli.fails(*command, "oumi://configs/recipes/smollm/sft/135m/train.yaml")


def test_options_of_the_command(cli, monkeypatch):
    levels = []
    monkeypatch.setattr(logging.getLogger("oumi_pl"), "setLevel", levels.append)
    written(cli, sft("max_steps: 1"))
    assert "NO_SUCH" in cli.fails("train", "-c", "oumi.yaml", "-log", "no_such")
    cli.works("train", "-c", "oumi.yaml", "-log", "error", "--training.per_device_train_batch_size=1")
    assert levels == ["ERROR"]
    assert "batch_size: 1" in (cli.directory / "out/run/config.yaml").read_text()


# --- what they mean ---------------------------------------------------------------------------------------------------


SCHEDULES = {
    "linear": ("warmup_steps: 2", [0, 0.5, 1, 0.5]),
    "cosine": ("warmup_ratio: 0.3", [0, 0.5, 1, 0.5]),  # a share is rounded up: two steps
    "cosine_with_min_lr": ("lr_scheduler_kwargs: {min_lr: 4e-5}", [1, 0.912132, 0.7, 0.487868]),
    "cosine_with_restarts": ("lr_scheduler_kwargs: {num_cycles: 2}", [1, 0.5, 1, 0.5]),
    "constant": ("warmup_steps: 2", [1, 1, 1, 1]),  # transformers' has no warm-up
    "constant_with_warmup": ("warmup_steps: 2", [0, 0.5, 1, 1]),
}


@pytest.mark.parametrize(("name", "engine"), [*((name, "lightning") for name in SCHEDULES), ("cosine", "trl")])
def test_learning_rates(cli, name, engine):
    options, factors = SCHEDULES[name]
    rows, _, _ = trained(
        cli, sft(f"max_steps: 4, learning_rate: 1e-4, lr_scheduler_type: {name}, {options}"), "--engine", engine
    )
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-4 * factor for factor in factors], abs=1e-10)


CHAT = {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)]}
CHAT_TOKENS = {  # `<|im_start|>` and `<|im_end|>` are tokens, all else are bytes
    "all": ("", 4 * (1 + 1 + 1 + 2) + 2 * (4 + 9) - 1),  # begin, newline, text, end and newline; roles; not the first
    "all_turns": (f"{COMPLETIONS}, train_target: ALL_ASSISTANT_TURNS", 2 * 2),
    "final_turn": (f"{COMPLETIONS}, train_target: FINAL_ASSISTANT_TURN", 2),
    "template": (f"{COMPLETIONS}, collator_kwargs: {{response_template: x}}", 2),
    "two_templates": (f"{COMPLETIONS}, collator_kwargs: {{response_template: x, end_of_turn_template: y}}", 2 * 2),
}


@pytest.mark.parametrize("name", CHAT_TOKENS)
def test_tokens_that_are_trained(cli, name):
    split, tokens = CHAT_TOKENS[name]
    cli.write("chat.jsonl", jsonl(*[CHAT] * 4))
    rows, _, _ = trained(cli, reads("dataset_name: text_sft, dataset_path: chat.jsonl", split), "--engine", "lightning")
    assert [row["target_tokens"] for row in rows] == [2 * tokens, 4 * tokens]


def test_a_proportion_of_one_is_all_that_is_read(cli):
    cli.write("chat.jsonl", jsonl(*[CHAT] * 4))
    text = (
        "data: {train: {datasets: ["
        "{dataset_name: text_sft, dataset_path: chat.jsonl, mixture_proportion: 1.0},"
        "{dataset_name: text_sft, dataset_path: rows.jsonl, mixture_proportion: 0.0}]}}\n"
        "training: {trainer_type: TRL_SFT}\n"
    )
    rows, _, _ = trained(cli, text, "--engine", "lightning")
    assert [row["target_tokens"] for row in rows] == [90, 180]


@pytest.mark.parametrize(("sample_count", "steps"), [(5, 3), (40, 20)])
def test_as_many_rows_as_were_asked_for(cli, sample_count, steps):
    dataset = f"dataset_name: text_sft, dataset_path: rows.jsonl, sample_count: {sample_count}, shuffle: true, seed: 1"
    rows, _, _ = trained(cli, reads(dataset, training="max_steps: -1, num_train_epochs: 1"), "--engine", "lightning")
    assert len(rows) == steps


@pytest.mark.parametrize("args", [(), ("--engine", "lightning")])
def test_updates_of_an_epoch_that_ends_within_one(cli, args):
    rows, _, _ = trained(cli, sft("max_steps: -1, num_train_epochs: 1, gradient_accumulation_steps: 3"), *args)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["epoch"] == 1.0


def test_a_warm_up_of_all_of_the_run_in_oumis_own_trainer(cli):
    text = RUNS["oumi"].replace("warmup_steps: 1", "warmup_ratio: 1.0, max_steps: 4, learning_rate: 1e-4")
    rows, _, _ = trained(cli, text)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0, 2.5e-5, 5e-5, 7.5e-5])


# --- what is left -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_per_epoch_whatever_the_trainer_type(cli):
    *_, err = trained(cli, RUNS["checkpoints by epoch"])
    assert [path.name for path in sorted((cli.directory / "out/run/checkpoints").iterdir())] == [
        "step-00000002.ckpt",
        "step-00000004.ckpt",
    ]
    assert "note: Lightning drives it, and not trl" in err


def test_the_base_beside_the_adapter_is_what_it_was(cli):
    trained(cli, RUNS["adapter and base"])
    before, after = (load_file(cli.directory / folder / "model.safetensors") for folder in ("tiny", "out/run"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_merged_model_is_not_its_base(cli):
    trained(cli, lora("peft_save_mode: MERGED", "learning_rate: 0.1, lr_scheduler_type: constant"))
    before, after = (load_file(cli.directory / folder / "model.safetensors") for folder in ("tiny", "out/run"))
    assert before.keys() == after.keys()
    assert not torch.equal(before[Q_PROJ], after[Q_PROJ])


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_adapters_are_float32_on_a_base_of_bfloat16(cli):
    trained(cli, RUNS["llama lora"])
    adapter = load_file(cli.directory / "out/run/adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}


def test_weights_are_trained_and_left_in_their_type(cli):
    trained(cli, model("torch_dtype_str: bf16"))
    weights = load_file(cli.directory / "out/run/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluations(cli, name):
    options, steps, args = EVALUATED[name]
    _, rows, _ = trained(cli, f"{HELD_OUT}training: {{trainer_type: TRL_SFT, {options}}}\n", *args)
    assert [row["step"] for row in rows] == steps


def test_the_modules_of_the_model_are_listed(cli):
    trained(cli, sft("log_model_summary: true"))
    assert "LlamaDecoderLayer" in (cli.directory / "out/run/telemetry/model_summary.txt").read_text()


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "last"), [("trl", "checkpoint-2"), ("lightning", "checkpoints/step-00000002.ckpt")])
def test_going_on(cli, engine, last):
    args = ("--engine", engine)
    trained(cli, sft("try_resume_from_last_checkpoint: true, save_steps: 1"), *args)
    assert "nothing left to train" in cli.works("train", "-c", "oumi.yaml", *args)
    rows, _, _ = trained(cli, sft("try_resume_from_last_checkpoint: true, max_steps: 3"), *args)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert not (cli.directory / "out/run-2").exists()
    written(cli, sft(f"resume_from_checkpoint: out/run/{last}, max_steps: 4"))
    assert "from its newest checkpoint" in cli.fails("train", "-c", "oumi.yaml", *args)
    newest = last.replace("2", "3")
    rows, _, _ = trained(cli, sft(f"resume_from_checkpoint: out/run/{newest}, max_steps: 4"), *args)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_a_run_to_go_on_with_has_to_be_there(cli):
    written(cli, sft("resume_from_checkpoint: out/nothing"))
    message = cli.fails("train", "-c", "oumi.yaml")
    assert message.startswith("error: training.resume_from_checkpoint: no run folder out/nothing")
