"""`fit --engine hf` and `--engine trl` from the command line: what a run leaves, resuming, and mistakes."""

import json
import signal
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from oumi_pl.adapters import checkpoints
from tests.command_line import GONE, CommandLine
from tests.data.corpora import documents
from tests.tiny import conversations, pairs, write_jsonl

FIT = ("fit", "--config", "r.yaml")
SETTINGS = {
    "data.init_args.train": "train.jsonl",
    "data.init_args.validation": 0.2,
    "model.init_args.config.attention_dropout": 0.2,
    "model.init_args.optimizer.class_path": "own.Stops",
    "trainer.max_steps": 7,
    "trainer.accumulate_grad_batches": 4,
    "trainer.gradient_clip_val": 0.5,
    "val_every": 3,
    "checkpoint": {"every": 2},
}
PREFERENCES = {"model.class_path": "DPO", "data.class_path": "DPOData", "data.init_args.train": "pairs.jsonl"}
PRETRAINING = {
    "model.class_path": "Pretrain",
    "data.class_path": "PretrainData",
    "data.init_args.train": "documents.jsonl",
    "data.init_args.streaming": True,
    "data.init_args.shuffle_buffer": 5,
    "data.init_args.exhausted": "restart",
    "data.init_args.max_length": 32,
}
# every engine calls the optimizer's step between two updates
OWN = """
import os, signal
from torch.optim import AdamW

class Stops(AdamW):
    done = 0

    def step(self, *args, **kwargs):
        loss = super().step(*args, **kwargs)
        Stops.done += 1
        if str(Stops.done) == os.environ.get("STOP_AFTER"):
            if os.environ["STOP_WITH"] == "signal":
                signal.raise_signal(signal.SIGTERM)
            else:
                raise InterruptedError
        return loss
"""


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    write_jsonl(tmp_path / "train.jsonl", conversations(21))
    write_jsonl(tmp_path / "pairs.jsonl", pairs(21))
    write_jsonl(tmp_path / "documents.jsonl", [{"text": text} for text in documents(12)])
    line.write("own.py", OWN)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    line.recipe(SETTINGS)
    return line


def columns(cli, run):
    return (cli.directory / run / "metrics.csv").read_text().partition("\n")[0].split(",")


def weights(cli, run):
    return AutoModelForCausalLM.from_pretrained(cli.directory / run / "model").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ("hf", {}),
        slow("hf", {"data.init_args.packing": True}),  # `test_equal.py` compares the losses of these by default
        slow("hf", PRETRAINING),
        slow("trl", {}),
        ("trl", PREFERENCES),
    ],
)
def test_a_run_writes_the_same_files_as_with_lightning(cli, engine, changes):
    # with dropout, engines draw in another order
    cli.recipe(SETTINGS | {"model.init_args.config.attention_dropout": 0.0} | changes)
    cli.works(*FIT, "--name", "ours")
    _, out, err = cli.run(*FIT, "--name", "theirs", "--engine", engine)
    assert f"engine: {'transformers.Trainer' if engine == 'hf' else 'trl.'}" in err
    assert "model -> runs/theirs/model" in out
    assert columns(cli, "runs/theirs") == columns(cli, "runs/ours")
    for name in ("train/loss", "train/grad_norm", "train/lr", "train/target_tokens", "val/loss", "epoch"):
        ours, theirs = (cli.column(f"runs/{run}", name) for run in ("ours", "theirs"))
        assert list(theirs) == list(ours)
        assert [float(x) for x in theirs.values()] == pytest.approx([float(x) for x in ours.values()], rel=1e-5)
    assert list(cli.column("runs/theirs", "val/loss")) == [3, 6, 7]
    ours, theirs = weights(cli, "runs/ours"), weights(cli, "runs/theirs")
    assert all(torch.allclose(theirs[name], ours[name], rtol=1e-4, atol=1e-5) for name in ours)
    names = [{p.name for p in (cli.directory / "runs" / run / "model").iterdir()} for run in ("ours", "theirs")]
    assert names[0] == names[1]
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        ours, theirs = ((cli.directory / "runs" / run / "model" / file).read_text() for run in ("ours", "theirs"))
        assert theirs == ours
    assert cli.state("runs/theirs")["status"] == "finished"
    assert cli.state("runs/theirs").keys() == cli.state("runs/ours").keys()
    ours, theirs = (json.loads((cli.directory / "runs" / run / "data.json").read_text()) for run in ("ours", "theirs"))
    assert theirs == ours
    assert [p.name for p in (cli.directory / "runs/theirs/checkpoints").iterdir()] == ["checkpoint-7"]


def stopped(cli, monkeypatch, after, how, *args):
    monkeypatch.setenv("STOP_AFTER", str(after))
    monkeypatch.setenv("STOP_WITH", how)
    sys.modules.pop("own", None)
    code, _, _ = cli.run(*FIT, *args)
    monkeypatch.delenv("STOP_AFTER")
    return code


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        slow("hf", {}),
        ("hf", {"data.init_args.packing": True, "model.init_args.lora": {"r": 4, "lora_dropout": 0.1}}),
        slow("hf", PRETRAINING),
        slow("trl", {}),
        slow("trl", PREFERENCES),
        ("trl", PREFERENCES | {"model.init_args.lora": {"r": 4}}),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(cli, monkeypatch, engine, changes):
    cli.recipe(SETTINGS | changes)
    cli.works(*FIT, "--engine", engine, "--name", "whole")
    assert stopped(cli, monkeypatch, 6, "error", "--engine", engine, "--name", "killed") == 1
    assert cli.state("runs/killed")["status"] == "failed"
    assert checkpoints.newest_whole(cli.directory / "runs/killed/checkpoints")[0].name == "checkpoint-4"
    out = cli.works("fit", "--resume", "runs/killed")
    assert "resuming from runs/killed/checkpoints/checkpoint-4" in out
    assert same(weights(cli, "runs/killed"), weights(cli, "runs/whole"))
    for name in ("step", "epoch", "train/loss", "train/grad_norm", "train/lr", "train/num_tokens", "val/loss"):
        assert cli.column("runs/killed", name) == cli.column("runs/whole", name)
    assert cli.state("runs/killed")["status"] == "finished"


def test_a_signal_stops_the_run_after_the_update(cli, monkeypatch):
    """It saves after the current update, and resumes from there."""
    cli.works(*FIT, "--engine", "hf", "--name", "whole")
    before = signal.getsignal(signal.SIGTERM)
    assert stopped(cli, monkeypatch, 3, "signal", "--engine", "hf", "--name", "stopped") == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert cli.state("runs/stopped")["status"] == "stopped"
    assert checkpoints.newest_whole(cli.directory / "runs/stopped/checkpoints")[0].name == "checkpoint-3"
    cli.works("fit", "--resume", "runs/stopped")
    assert same(weights(cli, "runs/stopped"), weights(cli, "runs/whole"))
    assert cli.column("runs/stopped", "val/loss") == cli.column("runs/whole", "val/loss")


def test_an_incomplete_checkpoint_is_skipped(cli, monkeypatch):
    cli.recipe(SETTINGS | {"checkpoint": {"every": 2, "keep": 2}})
    stopped(cli, monkeypatch, 5, "error", "--engine", "hf")
    newest = cli.directory / "runs/r/checkpoints/checkpoint-4"
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert checkpoints.newest_whole(newest.parent)[0].name == "checkpoint-2"
    state.unlink()
    assert checkpoints.newest_whole(newest.parent)[0].name == "checkpoint-2"


@pytest.mark.parametrize("name", ["model.safetensors", pytest.param("trainer_state.json", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(cli, monkeypatch, name):
    cli.recipe(SETTINGS | {"checkpoint": {"every": 2, "keep": 2}})
    cli.works(*FIT, "--engine", "hf", "--name", "whole")
    stopped(cli, monkeypatch, 5, "error", "--engine", "hf", "--name", "killed")
    newest = cli.directory / "runs/killed/checkpoints/checkpoint-4"
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    out = cli.works("fit", "--resume", "runs/killed")
    assert "checkpoint-4 is damaged: its file" in out
    assert "resuming from runs/killed/checkpoints/checkpoint-2" in out
    assert same(weights(cli, "runs/killed"), weights(cli, "runs/whole"))


def test_no_whole_checkpoint_is_a_mistake(cli, monkeypatch):
    stopped(cli, monkeypatch, 3, "error", "--engine", "hf")
    (cli.directory / "runs/r/checkpoints/checkpoint-2/model.safetensors").write_bytes(b"")
    assert "all checkpoints in runs/r/checkpoints are damaged" in cli.fails("fit", "--resume", "runs/r")


def test_a_resumed_run_can_be_longer(cli):
    cli.works(*FIT, "--engine", "hf", "--trainer.max_steps", "4", "--model.schedule", "Constant")
    cli.works("fit", "--resume", "runs/r", "--trainer.max_steps", "7")
    cli.works(*FIT, "--engine", "hf", "--name", "whole", "--model.schedule", "Constant")
    assert same(weights(cli, "runs/r"), weights(cli, "runs/whole"))


def test_the_recipe_wins_over_the_optimizer_settings_in_the_checkpoint(cli):
    constant = ("--model.schedule", "Constant", "--trainer.max_steps")
    cli.works(*FIT, "--engine", "trl", *constant, "2")
    cli.works("fit", "--resume", "runs/r", *constant, "4", "--model.optimizer.lr", "5e-4")
    assert [float(x) for x in cli.column("runs/r", "train/lr").values()] == pytest.approx([0, 1e-3, 5e-4, 5e-4])


def test_a_finished_run_has_nothing_left_to_train(cli):
    cli.recipe(SETTINGS | {"trainer.max_steps": GONE, "trainer.max_epochs": 2})
    cli.works(*FIT, "--engine", "hf")
    assert "nothing is left to train" in cli.fails("fit", "--resume", "runs/r", "--trainer.max_epochs", "2")


def test_a_run_killed_during_export_only_exports_when_resumed(cli, monkeypatch):
    """The best weights, although they are of an earlier session."""
    monitored = {"checkpoint": {"every": 100, "monitor": "val/loss", "mode": "max"}, "model.init_args.schedule": GONE}
    cli.recipe(SETTINGS | monitored)
    with monkeypatch.context() as patched:
        patched.setattr("oumi_pl.callbacks.export.Export.write", lambda *_: 1 / 0)
        assert cli.run(*FIT, "--engine", "hf", "--name", "killed")[0] == 1
    assert not (cli.directory / "runs/killed/model").exists()
    out = cli.works("fit", "--resume", "runs/killed")
    assert "its training is complete; what is left: export, report" in out
    cli.works(*FIT, "--engine", "hf", "--name", "whole")
    assert same(weights(cli, "runs/killed"), weights(cli, "runs/whole"))
    assert cli.column("runs/killed", "train/loss") == cli.column("runs/whole", "train/loss")
    assert cli.state("runs/killed")["status"] == "finished"


def test_the_best_weights_are_exported(cli):
    monitored = {"checkpoint": {"every": 100, "monitor": "val/loss", "mode": "max"}, "model.init_args.schedule": GONE}
    cli.recipe(SETTINGS | monitored | {"model.init_args.config.attention_dropout": 0.0})
    for engine in ("lightning", "hf"):
        cli.works(*FIT, "--engine", engine, "--name", engine)
        assert (cli.directory / f"runs/{engine}/checkpoints/best.ckpt").is_file()
    ours, theirs = weights(cli, "runs/lightning"), weights(cli, "runs/hf")
    assert all(torch.allclose(theirs[name], ours[name], rtol=1e-4, atol=1e-5) for name in ours)
    last = AutoModelForCausalLM.from_pretrained(cli.directory / "runs/hf/checkpoints/checkpoint-7").state_dict()
    assert not same(theirs, last)


def test_callbacks_that_observe_run_too(cli):
    cli.recipe(SETTINGS | {"trainer.callbacks": [{"class_path": "Answers", "init_args": {"rows": 3}}]})
    assert "exact match" in cli.works(*FIT, "--engine", "hf", "--trainer.max_steps", "2")
    assert set(cli.column("runs/r", "val/exact_match")) == {2}


def test_mistakes(cli):
    assert "engine: hf can only run fit" in cli.fails("validate", "--config", "r.yaml", "--engine", "hf")
    assert "these can: lightning, trl" in cli.fails(*FIT, "--engine", "hf", "--model", "DPO", "--data", "DPOData")
    assert "'hf'" in cli.fails(*FIT, "--engine", "HF")


def test_checkpoints_of_another_engine_are_refused(cli):
    cli.works(*FIT, "--trainer.max_steps", "2")
    checkpoint = "runs/r/checkpoints/step-00000002.ckpt"
    assert "is a Lightning checkpoint" in cli.fails(*FIT, "--engine", "hf", "--ckpt_path", checkpoint)
    longer = ("--trainer.max_steps", "4")
    assert "is a Lightning checkpoint" in cli.fails("fit", "--resume", "runs/r", "--engine", "hf", *longer)
    cli.works(*FIT, "--trainer.max_steps", "2", "--engine", "hf", "--name", "other")
    err = cli.fails("fit", "--resume", "runs/other", "--engine", "lightning", *longer)
    assert "was trained by another engine" in err
