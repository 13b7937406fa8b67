"""Distillation in updates of both kinds from the command line: preview, dry run, training, resuming, validation."""

import json
import re

import pytest

from oumi_pl.runs import folders
from tests.command_line import CommandLine
from tests.models.test_lora import pretrained

FIT = ("fit", "--config", "r.yaml")
DISTILL = {
    "model.class_path": "Distill",
    "model.init_args.teacher": "teacher",
    "data.class_path": "DistillData",
    "data.init_args.validation": "rows.jsonl",
    "data.init_args.completions": 2,
    "data.init_args.sampling": {"max_new_tokens": 6},
    "data.init_args.seed": 3,
    "trainer.max_steps": 6,
    "checkpoint": {"every": 1, "keep": 9},
    "val_every": 3,
}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    pretrained(tmp_path / "teacher", initializer_range=0.3)
    line.recipe(DISTILL)
    return line


def test_a_preview_shows_answers_and_says_what_the_first_update_trains_on(cli):
    out = cli.works("preview", "--config", "r.yaml", "-n", 2)
    assert "train row 2" in out
    assert out.count("⟦") == 3  # in the legend, and around each answer
    assert "lengths of train, examples" in out
    out = cli.works("preview", "--config", "r.yaml", "--rollouts", 2)
    assert "group 2" in out
    assert "the first update of a run with the same seed trains on such completions; of all updates, 50% sample" in out
    assert not re.search("reward|advantage|variance", out)
    out = cli.works("preview", "--config", "r.yaml", "--rollouts", 1, "--data.lmbda", 0)
    assert "the first update of a run with the same seed trains on the answers, and samples none" in out


def test_a_dry_run_measures_updates_of_both_kinds(cli):
    before = cli.files()
    out = cli.works(*FIT, "--dry_run", "--trainer.max_steps", 100)
    assert cli.files() == before
    sampled = int(re.search(r"sampled +(\d+) of them train on completions that the model samples", out)[1])
    assert 35 < sampled < 65
    assert "one update" in out
    assert re.search(r"about .*: mean of both kinds, by their shares, of [35]", out)
    assert re.search(r"of which +generating [1-9]", out)
    out = cli.works(*FIT, "--dry_run", "--data.lmbda", 1)
    assert "of them train on completions" not in out
    assert "median of" in out


def test_a_run_of_both_kinds_is_resumed_and_validated(cli):
    cli.works(*FIT)
    kinds = {step: float(value) for step, value in cli.column("runs/r", "train/sampled").items()}
    assert {*kinds.values()} == {0, 1}
    assert list(cli.column("runs/r", "val/nll")) == [3, 6]
    lines = (cli.directory / "runs/r/rollouts.jsonl").read_bytes()
    entries = [json.loads(line) for line in lines.decode().splitlines()]
    assert {entry["update"] for entry in entries} == {step for step, is_sampled in kinds.items() if is_sampled}
    assert re.match(r".*rows.jsonl.*, example \d+$", entries[0]["origin"])
    losses = cli.column("runs/r", "train/loss")
    for step in (4, 5, 6):
        (cli.directory / f"runs/r/checkpoints/step-0000000{step}.ckpt").unlink()
    folders.write_state(cli.directory / "runs/r", status="stopped")
    cli.works("fit", "--resume", "runs/r")
    assert cli.column("runs/r", "train/loss") == losses
    assert (cli.directory / "runs/r/rollouts.jsonl").read_bytes() == lines
