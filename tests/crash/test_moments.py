"""Runs that are stopped or killed between phases, then resumed, equal an uninterrupted run."""

import json
import re
import signal

import pytest

from tests.crash.harness import Child, copy, deviations, outcome, prepare, works

RESUME = ("fit", "--config", "r.yaml", "--resume", "auto")
OWN = """
import os
import signal
from lightning.pytorch.callbacks import Callback

class Ends(Callback):
    '''Sends a signal to this process in a hook, at a step.'''

    def act(self, hook, trainer):
        if os.environ.get("HOOK") == hook and trainer.global_step == int(os.environ["STEP"]):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))

    def on_train_batch_end(self, trainer, *_):
        self.act("update", trainer)

    def on_validation_start(self, trainer, _):
        self.act("validation", trainer)

    def on_train_end(self, trainer, _):
        self.act("end", trainer)

    def on_train_batch_start(self, trainer, *_):
        for _ in range(2):
            self.act("twice", trainer)

class StopsAtThree(Callback):
    '''Ends the run without raising its limit, as `EarlyStopping` does; a resumed run does not know of it.'''

    def on_validation_end(self, trainer, _):
        if trainer.global_step == 3:
            trainer.should_stop = True
"""
ENDS = {"class_path": "crash_moments.Ends"}


def start(folder, callbacks=(ENDS,), **changes):
    prepare(folder, changes={"trainer.callbacks": list(callbacks)} | changes)
    (folder / "crash_moments.py").write_text(OWN)
    return folder


def ended(folder, hook, step, signum):
    """The exit code and the output of a run that gets a signal."""
    environment = {"HOOK": hook, "STEP": str(step), "SIGNAL": str(int(signum))}
    child = Child(folder, *RESUME, environment=environment)
    return child.wait(), child.text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("moments")
    start(root / "start")
    done = copy(root / "start", root / "whole")
    works(done, *RESUME)
    copy(done / "cache", root / "start" / "cache")
    return root / "start", outcome(done / "runs/r")


@pytest.mark.parametrize(
    ("hook", "step", "signum", "said"),
    [
        ("update", 3, signal.SIGTERM, "stopped by SIGTERM after step 3"),  # before its validation
        pytest.param("update", 5, signal.SIGTERM, "stopped by SIGTERM after step 5", marks=pytest.mark.slow),
        pytest.param("update", 2, signal.SIGINT, "stopped by SIGINT after step 2", marks=pytest.mark.slow),
        ("validation", 5, signal.SIGKILL, ""),  # the last validation
        pytest.param("end", 5, signal.SIGTERM, "stopped by SIGTERM after step 5", marks=pytest.mark.slow),
    ],
)
def test_a_resume_completes_the_missing_phases(tmp_path, whole, hook, step, signum, said):
    source, expected = whole
    folder = copy(source, tmp_path / "ended")
    code, text = ended(folder, hook, step, signum)
    assert code == (-signum if signum == signal.SIGKILL else 128 + signum), text
    assert said in text
    resumed = works(folder, *RESUME)
    assert f"from step-{step:08d}.ckpt" in resumed
    assert deviations(folder / "runs/r", expected) == []


def test_a_run_that_a_callback_ended_is_not_trained_further_by_a_resume(tmp_path):
    folder = start(tmp_path / "start", [{"class_path": "crash_moments.StopsAtThree"}, ENDS])
    done = copy(folder, tmp_path / "whole")
    works(done, *RESUME)
    expected = outcome(done / "runs/r")
    assert expected["step"] == 3
    assert ended(folder, "end", 3, signal.SIGKILL)[0] == -signal.SIGKILL
    works(folder, *RESUME)
    assert deviations(folder / "runs/r", expected) == []


@pytest.mark.slow
def test_a_checkpoint_callback_of_the_recipe_keeps_its_best_in_a_moved_run(tmp_path):
    best = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/loss", "mode": "max", "filename": "{step}"}}
    folder = start(tmp_path / "start", [best, ENDS])
    assert ended(folder, "update", 5, signal.SIGKILL)[0] == -signal.SIGKILL
    (folder / "runs" / "r").rename(folder / "moved")
    text = works(folder, "fit", "--resume", "moved")
    assert "dirpath has changed" not in text
    names = sorted(path.name for path in (folder / "moved" / "checkpoints").glob("step=*"))
    assert names == ["step=3.ckpt"]  # its loss is higher than that of step 5


def test_ctrl_c_twice_before_the_first_checkpoint_says_how_to_start_again(tmp_path):
    folder = start(tmp_path / "start")
    code, text = ended(folder, "twice", 1, signal.SIGINT)
    assert code == 130
    assert "interrupted before the first checkpoint; to start it again: oumi_pl fit --resume runs/r" in text
    state = json.loads((folder / "runs/r/run.json").read_text())
    assert (state["status"], state["reason"]) == ("stopped", "Ctrl-C")
    code = (exporting := Child(folder, "export", "--checkpoint", "runs/r", "--output", "out")).wait()
    assert code == 2
    assert "runs/r has no checkpoint yet; to train it: oumi_pl fit --resume runs/r" in exporting.text


def test_a_run_whose_time_is_up_says_how_to_train_it_further(tmp_path):
    folder = start(tmp_path / "start", **{"trainer.max_steps": 10**6, "trainer.max_time": "00:00:00:01"})
    text = works(folder, *RESUME)
    assert re.search(r"ended by trainer.max_time after step \d+ of 1000000", text)
    assert "to train it further: oumi_pl fit --resume runs/r --trainer.max_time LONGER" in text
