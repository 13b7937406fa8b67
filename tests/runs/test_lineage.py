"""Where a run comes from, why it ended, and what it did in effect: in `run.json`, header, lists, report and card."""

import logging

import pytest

from oumi_pl.report.record import Record
from oumi_pl.report.sections import headline
from tests.command_line import CommandLine

FIT = ("fit", "--config", "r.yaml")
CHECKPOINT = "runs/base/checkpoints/step-00000002.ckpt"


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_a_branch_names_its_parent_everywhere(cli):
    cli.works(*FIT, "--name", "base")
    options = ("--trainer.max_steps", "3", "--model.optimizer.lr", "0.004")
    code, _, err = cli.run(*FIT, "--name", "branch", "--ckpt_path", CHECKPOINT, *options)
    assert code == 0, err
    parent = {"run": "base", "folder": str(cli.directory / "runs/base"), "checkpoint": "step-00000002.ckpt", "step": 2}
    assert cli.state("runs/branch")["parent"] == parent
    assert "parent" not in cli.state("runs/base")
    text = "base, step 2 (step-00000002.ckpt)"
    assert f"parent: {text}" in err
    assert "lr 0.004 (0.002 at step 2 of its schedule)" in err
    assert f"Training went on from {text}." in (cli.directory / "runs/branch/model/README.md").read_text()
    assert f"begun from {text}" in headline(Record(cli.directory / "runs/branch"))["summary"]
    listed = cli.works("runs").splitlines()
    assert "parent" in listed[0]
    assert text in next(line for line in listed if line.startswith("branch"))
    assert text in next(
        line for line in cli.works("runs", "compare", "base", "branch").splitlines() if "parent" in line
    )
    cli.works("export", "--checkpoint", "runs/branch", "--output", "out")
    assert f"Training went on from {text}." in (cli.directory / "out/README.md").read_text()
    # a resumed branch keeps its parent, and a run on the model of another one has it as its parent
    cli.works("fit", "--resume", "runs/branch", "--trainer.max_steps", "4")
    assert cli.state("runs/branch")["parent"] == parent
    cli.recipe({"model.init_args.config": None, "model.init_args.model": "runs/branch/model"}, "next.yaml")
    cli.works("fit", "--config", "next.yaml", "--name", "next")
    after = cli.state("runs/next")["parent"]
    assert (after["run"], after["checkpoint"], after["step"]) == ("branch", "model", 4)


def test_runs_say_why_a_run_ended_before_its_last_update(cli):
    stopping = {
        "class_path": "EarlyStopping",
        "init_args": {"monitor": "val/loss", "stopping_threshold": 100.0},
    }
    changes = {
        "data.init_args.validation": 0.3,
        "trainer.max_steps": 9,
        "trainer.callbacks": [stopping],
        "val_every": 2,
    }
    cli.recipe(changes)
    cli.works(*FIT)
    assert cli.state("runs/r")["why"] == "early stopping on val/loss"
    (line,) = (line for line in cli.works("runs").splitlines() if line.startswith("r "))
    assert "finished (early stopping on val/loss)" in line
    assert "2/9" in line
    cli.recipe({"trainer.callbacks": []})
    cli.works(*FIT, "--name", "whole")
    assert cli.state("runs/whole")["why"] is None


def test_the_profiler_prints_its_table(cli):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.profilers.profiler")
    logger.addHandler(handler)
    try:
        cli.works(*FIT, "--trainer.profiler", "simple")
    finally:
        logger.removeHandler(handler)
    assert any("run_training_batch" in text for text in records)


def test_the_header_names_a_schedule_of_accumulation(cli):
    schedule = {"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 1, 1: 4}}}
    cli.recipe({"trainer.callbacks": [schedule], "trainer.max_epochs": 2, "trainer.max_steps": -1})
    code, _, err = cli.run(*FIT)
    assert code == 0, err
    assert "of 2 rows each, of 8 from epoch 2 on" in err
