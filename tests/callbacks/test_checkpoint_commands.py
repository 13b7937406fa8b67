"""Which checkpoints a command leaves behind, where, and what goes on from them."""

import pytest
import torch
from lightning.pytorch.callbacks import Timer
from safetensors.torch import load_file

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.models.export import read_checkpoint
from tests.command_line import GONE, CommandLine
from tests.tiny import conversations, write_jsonl

CALLBACKS = "lightning.pytorch.callbacks"


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    built = CommandLine(tmp_path, monkeypatch, capsys)
    write_jsonl(tmp_path / "val.jsonl", conversations(3, seed=8))
    return built


def checkpoints(cli, run="r"):
    return sorted(path.name for path in (cli.directory / f"runs/{run}").rglob("*.ckpt"))


# ---- the best weights are those of this run


def exported(cli, run):
    return load_file(cli.directory / f"runs/{run}/model/model.safetensors")["model.norm.weight"]


def best(cli, run):
    return read_checkpoint(cli.directory / f"runs/{run}/checkpoints/best.ckpt")["state_dict"][
        "model.hf.model.norm.weight"
    ]


WORSE = ("--model.optimizer.lr=3", "--model.schedule=Constant")


def branched(cli):
    """A run whose last weights are the best; and one from its second step that gets worse and worse."""
    cli.recipe(
        {
            "data.init_args.validation": "val.jsonl",
            "val_every": 1,
            "checkpoint": {"every": 2, "keep": 9, "monitor": "val/loss"},
        }
    )
    cli.works("fit", "--config", "r.yaml", "--name=a", "--trainer.max_steps=4")
    start = "runs/a/checkpoints/step-00000002.ckpt"
    cli.works("fit", "--config", "r.yaml", "--name=b", f"--ckpt_path={start}", "--trainer.max_steps=4", *WORSE)
    losses = {run: [float(loss) for loss in cli.column(f"runs/{run}", "val/loss").values()] for run in "ab"}
    assert losses["a"][-1] == min(losses["a"])
    assert min(losses["b"][1:]) > losses["a"][1], "the second run never beats what the first had when it branched"


def test_a_branched_run_exports_its_own_best_weights(cli):
    branched(cli)
    assert torch.equal(exported(cli, "b"), best(cli, "b"))
    assert not torch.equal(exported(cli, "b"), best(cli, "a"))


def test_a_checkpoint_does_not_store_the_path_of_its_folder(cli, monkeypatch):
    """So another run's best weights can't be exported even if nothing looks for those of this run."""
    monkeypatch.setattr(Checkpoints, "on_train_start", lambda *args: None)
    branched(cli)
    assert not torch.equal(exported(cli, "b"), best(cli, "a"))
    for checkpoint in (cli.directory / "runs/a/checkpoints").iterdir():
        state = torch.load(checkpoint, weights_only=True).get("callbacks", {})
        assert "runs/a" not in str(state), checkpoint


def test_a_resumed_run_keeps_its_best_weights(cli):
    branched(cli)
    before = best(cli, "a")
    cli.works("fit", "--resume", "runs/a", "--trainer.max_steps=6", *WORSE)
    assert cli.state("runs/a")["step"] == 6
    assert torch.equal(exported(cli, "a"), before)


def test_best_weights_that_are_newer_than_the_checkpoint_are_ignored(cli):
    """They are of updates that a resumed run makes anew, maybe otherwise."""
    branched(cli)
    for later in ("step-00000004.ckpt",):
        (cli.directory / "runs/a/checkpoints" / later).unlink()
    abandoned = best(cli, "a")
    cli.works("fit", "--resume", "runs/a", "--trainer.max_steps=4", *WORSE)
    assert not torch.equal(exported(cli, "a"), abandoned)
    assert torch.equal(exported(cli, "a"), best(cli, "a"))


# ---- when, and whether


def test_a_run_that_min_steps_keeps_going_after_early_stopping_saves_once(cli):
    stopping = {"monitor": "val/loss", "min_delta": 100.0, "patience": 1}
    cli.recipe(
        {
            "data.init_args.validation": "val.jsonl",
            "val_every": 1,
            "trainer.callbacks": [{"class_path": f"{CALLBACKS}.EarlyStopping", "init_args": stopping}],
            "trainer.min_steps": 6,  # for Lightning a whole epoch, too, unless min_epochs says otherwise
            "trainer.max_steps": 20,
            "checkpoint": {"every": 100, "keep": 9},
        }
    )
    cli.works("fit", "--config", "r.yaml")
    assert checkpoints(cli) == ["step-00000008.ckpt"]
    assert cli.state("runs/r")["step"] == 8


@pytest.mark.parametrize("option", ["--checkpoint.enabled=false", "--trainer.enable_checkpointing=false"])
def test_a_run_without_checkpoints_exports_its_model(cli, option):
    cli.works("fit", "--config", "r.yaml", option)
    assert checkpoints(cli) == []
    assert (cli.directory / "runs/r/model/model.safetensors").is_file()
    assert cli.state("runs/r")["status"] == "finished"
    if "enabled" in option:
        assert "none: checkpoint.enabled" in cli.works("fit", "--config", "r.yaml", option, "--dry_run")


def test_contradictory_checkpoint_settings_are_refused(cli):
    args = ("fit", "--config", "r.yaml", "--data.validation=0.2", "--checkpoint.monitor=val/loss")
    assert "checkpoint.monitor" in cli.fails(*args, "--checkpoint.enabled=false")
    assert "trainer.enable_checkpointing is false, but checkpoint.monitor" in cli.fails(
        *args, "--trainer.enable_checkpointing=false"
    )
    cli.recipe({"trainer.callbacks": [{"class_path": f"{CALLBACKS}.ModelCheckpoint"}]})
    refused = cli.fails("fit", "--config", "r.yaml", "--trainer.enable_checkpointing=false")
    assert "trainer.callbacks: ModelCheckpoint keeps checkpoints" in refused


# ---- where


def test_a_checkpoint_callback_of_the_recipe_writes_to_the_run_folder(cli):
    kept = {"every_n_train_steps": 1, "save_top_k": -1}
    cli.recipe({"trainer.callbacks": [{"class_path": f"{CALLBACKS}.ModelCheckpoint", "init_args": kept}]})
    cli.works("fit", "--config", "r.yaml")
    own = ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"]
    assert checkpoints(cli) == [*own, "step-00000002.ckpt"]
    assert not [name for name in cli.files() if name.endswith(".ckpt") and not name.startswith("runs/r/")]
    cli.works("fit", "--resume", "runs/r", "--trainer.max_steps=3")
    assert "epoch=0-step=3.ckpt" in checkpoints(cli)
    cli.works("fit", "--config", "r.yaml", f"--ckpt_path=runs/r/checkpoints/{own[0]}")
    assert cli.state("runs/r-2")["step"] == 2


def test_a_checkpoint_callback_with_a_folder_writes_there(cli):
    there = {"dirpath": "mine", "filename": "last"}
    cli.recipe({"trainer.callbacks": [{"class_path": f"{CALLBACKS}.ModelCheckpoint", "init_args": there}]})
    cli.works("fit", "--config", "r.yaml")
    assert (cli.directory / "mine/last.ckpt").is_file()
    assert checkpoints(cli) == ["step-00000002.ckpt"]


# ---- runs that end by the clock


@pytest.fixture
def a_second_per_batch(monkeypatch):
    """The clock of Lightning's `Timer`."""
    counted = Timer.on_train_batch_end

    def on_train_batch_end(self, *args, **kwargs):
        self.batches = getattr(self, "batches", 0) + 1
        counted(self, *args, **kwargs)

    monkeypatch.setattr(Timer, "on_train_batch_end", on_train_batch_end)
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage="train": self._offset + getattr(self, "batches", 0))


def test_a_run_that_max_time_ended_prints_how_to_extend_it(cli, a_second_per_batch):
    cli.recipe({"trainer.max_steps": GONE, "trainer.max_epochs": 2, "trainer.max_time": "00:00:00:03"})
    cli.works("fit", "--config", "r.yaml")
    assert cli.state("runs/r")["step"] == 3
    for args in (("--resume", "runs/r"), ("--config", "r.yaml", "--resume")):
        refused = cli.fails("fit", *args)
        assert "--resume runs/r --trainer.max_time LONGER" in refused
    assert "by trainer.max_time" in cli.fails("fit", "--resume", "runs/r", "--trainer.max_steps=9")
    cli.works("fit", "--resume", "runs/r", "--trainer.max_time=00:00:00:05")
    assert cli.state("runs/r")["step"] == 5
    cli.works("fit", "--resume", "runs/r", "--trainer.max_time=null")
    assert cli.state("runs/r")["step"] == 16
    assert "--trainer.max_steps MORE" in cli.fails("fit", "--resume", "runs/r")
