"""What a run leaves for those who look at it: report, recipe, environment and times; and what goes wrong on the way."""

import errno
import json
import os
import sys

import lightning as L
import pytest

from oumi_pl.callbacks.report import Report
from oumi_pl.callbacks.run_folder import RunFolder, _command
from oumi_pl.callbacks.stopping import Preemption
from oumi_pl.report import page
from oumi_pl.report.clock import Clock
from oumi_pl.runs import folders, lock
from oumi_pl.runs.metrics import MetricsCSV
from tests.command_line import CommandLine
from tests.tiny import data, module, trainer

FIT = ("fit", "--config", "r.yaml", "--report", "true", "--data.validation", "0.2", "--val_every", "1")


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_a_run_writes_its_report(cli, monkeypatch):
    cli.write("r.yaml", "# a comment of mine\n" + (cli.directory / "r.yaml").read_text())
    out = cli.works(*FIT)
    assert "report -> runs/r/report.html" in out
    folder = cli.directory / "runs/r"
    assert (folder / folders.RECIPE).read_bytes() == (cli.directory / "r.yaml").read_bytes()
    state = cli.state("runs/r")
    assert state["status"] == "finished"
    assert state["steps"] == state["step"] == 2
    assert state["process"]["began"] == lock.process()["began"]
    assert state["model"]["trainer"] == "SFT"
    assert state["model"]["parameters"] == state["model"]["trainable"] > 0
    assert state["environment"]["packages"]["torch"]
    command, times = state["command"], state["times"]
    assert {"data", "model", "training", "validation", "saving", "end"} <= times.keys()
    assert all(seconds >= 0 for seconds in times.values())
    text = (folder / page.PAGE).read_text()
    assert "a comment of mine" in text
    assert "step 2 of 2" in text
    assert cli.column("runs/r", "train/loss").keys() == {1, 2}, (
        "the report ends the last line, and no line is there twice"
    )
    assert cli.column("runs/r", "val/loss").keys() == {1, 2}

    before = sum(times.values())
    monkeypatch.setattr("sys.argv", ["/an/environment/bin/oumi_pl", "fit", "--resume", "runs/r"])
    cli.works("fit", "--resume", "runs/r", "--trainer.max_steps", "3")
    state = cli.state("runs/r")
    assert state["resumed"] == [2]
    assert state["command"] == command
    assert state["resumed_by"] == "oumi_pl fit --resume runs/r"
    assert "oumi_pl fit --resume runs/r" in (folder / page.PAGE).read_text()
    assert sum(state["times"].values()) > before
    assert "resumed at step 2" in (folder / page.PAGE).read_text()
    assert (folder / folders.RECIPE).read_bytes() == (cli.directory / "r.yaml").read_bytes()


def fit(tmp_path, *callbacks, **limits):
    folder = RunFolder(tmp_path, "run", "run", "{}")
    built = trainer(callbacks=[folder, *callbacks, Preemption(), Report()], logger=[MetricsCSV()], **limits)
    built.fit(module(), data(tmp_path, batch_size=2))
    return folder.directory


def test_a_failure_to_draw_is_printed_and_the_run_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("oumi_pl.report.page.make", lambda run, condition: {}[run])
    folder = fit(tmp_path, max_steps=1)
    assert folders.read_state(folder)["status"] == "finished"
    output = capsys.readouterr().err
    assert f"warning: no report: KeyError: {folder!r}" in output
    assert f"to try again: oumi_pl runs report {folder}" in output


def test_a_full_disk_leaves_the_report_to_a_resume(tmp_path, monkeypatch):
    def make(run, condition):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.html")

    monkeypatch.setattr("oumi_pl.report.page.make", make)
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, max_steps=1)
    state = folders.read_state(tmp_path / "run")
    assert state["status"] == "failed"
    assert "train" in state["phases"]
    assert "report" not in state["phases"]


class Failing(L.Callback):
    """Raises before the third update."""

    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            raise self.error


def test_a_run_that_fails_is_reported_with_its_reason(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Failing(ZeroDivisionError("<of mine>")), max_steps=4)
    state = json.loads((tmp_path / "run" / folders.RUN).read_text())
    assert (state["status"], state["reason"]) == ("failed", "ZeroDivisionError: <of mine>")
    assert "ZeroDivisionError: &lt;of mine&gt;" in (tmp_path / "run" / page.PAGE).read_text()


def test_a_second_ctrl_c_skips_the_report(tmp_path):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, Failing(KeyboardInterrupt()), max_steps=4)
    assert folders.read_state(tmp_path / "run")["status"] == "stopped"
    assert not (tmp_path / "run" / page.PAGE).exists()


def test_the_phases_of_a_clock_sum_to_the_whole(monkeypatch):
    now = iter([0.0, 2.0, 5.0, 6.0])
    monkeypatch.setattr("oumi_pl.report.clock.time.perf_counter", lambda: next(now))
    clock = Clock()
    clock.enter("training")
    clock.enter("validation")
    assert clock.read({"training": 10.0, "saving": 1.0}) == {
        "data": 2.0,
        "training": 13.0,
        "validation": 1.0,
        "saving": 1.0,
    }


def test_the_command_is_recorded_quoted_for_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/oumi_pl/__main__.py", "fit", "--config", "my file.yaml"])
    assert _command() == "oumi_pl fit --config 'my file.yaml'"
