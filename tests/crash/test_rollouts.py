"""Online training that is killed, also while it samples, is completed by a resume as if nothing had happened."""

import random
import signal
import subprocess
import sys
import time

import pytest

from tests.crash.harness import Child, copy, deviations, outcome, prepare, works

RESUME = ("fit", "--config", "r.yaml", "--resume", "auto")

FORGETFUL = """
from oumi_pl.data.rollout_loader import RolloutLoader

load = RolloutLoader.load_state_dict
RolloutLoader.load_state_dict = lambda self, state: load(self, {**state, "rollouts": []})
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder to copy, and what its uninterrupted run left after how many seconds."""
    root = tmp_path_factory.mktemp("rollouts")
    prepare(root / "start", "GRPO")
    done = copy(root / "start", root / "whole")
    started = time.monotonic()
    works(done, *RESUME)
    seconds = time.monotonic() - started
    return root / "start", outcome(done / "runs" / "r"), seconds


def killed_in(folder, call):
    return Child(folder, *RESUME, environment={"KILL_IN_CALL": str(call)}).wait() == -signal.SIGKILL


# the engine is called 6 times for 3 updates, twice for a validation, and so again; a checkpoint follows update 2
IN_VALIDATION = 8


@pytest.mark.parametrize("call", [IN_VALIDATION, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 9, 12, 16))])
def test_a_run_that_was_killed_while_it_sampled_is_completed_by_a_resume(tmp_path, whole, call):
    start, expected, _ = whole
    assert expected["rollouts"]
    folder = copy(start, tmp_path / "killed")
    assert killed_in(folder, call)
    works(folder, *RESUME)
    assert deviations(folder / "runs" / "r", expected) == []


@pytest.mark.slow
def test_thirty_kills_at_random_moments(tmp_path, whole):
    start, expected, seconds = whole
    rng, killed, trial = random.Random(17), 0, 0
    while killed < 30:
        folder, trial = copy(start, tmp_path / str(trial)), trial + 1
        began, moment = time.monotonic(), rng.uniform(0.1, 1.0) * seconds
        child = Child(folder, *RESUME)
        while time.monotonic() < began + moment and child.poll() is None:
            time.sleep(0.005)
        if child.poll() is not None:  # complete before the moment: the machine has got faster
            seconds = time.monotonic() - began
            continue
        child.kill(signal.SIGKILL)
        if (code := child.wait()) == 0:  # it was complete by the time of the signal
            continue
        assert code == -signal.SIGKILL
        killed += 1
        works(folder, *RESUME)
        assert deviations(folder / "runs" / "r", expected) == [], trial


@pytest.mark.slow
def test_rollouts_that_a_checkpoint_lacks_would_be_noticed(tmp_path, whole):
    start, expected, _ = whole
    folder = copy(start, tmp_path / "killed")
    assert killed_in(folder, IN_VALIDATION)
    assert (folder / "runs/r/checkpoints/step-00000002.ckpt").exists()
    with (folder / "own_rollouts.py").open("a") as file:
        file.write(FORGETFUL)
    works(folder, *RESUME)
    assert "weights" in deviations(folder / "runs" / "r", expected)


# ---- with a vLLM server, which outlives the run

SERVER = """
import os
import signal

from oumi_pl.rollouts.vllm import VLLMServer

class Killed(VLLMServer):
    calls = 0

    def complete(self, *args):
        Killed.calls += 1
        if str(Killed.calls) == os.environ.get("KILL_IN_CALL"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().complete(*args)
"""


@pytest.fixture(scope="module")
def whole_of_server(tmp_path_factory):
    """The same as `whole`, with a stand-in for vLLM."""
    root = tmp_path_factory.mktemp("server")
    prepare(root / "model", "GRPO", {"trainer.max_steps": 1, "val_every": None})
    works(root / "model", *RESUME)
    program = [sys.executable, "-m", "tests.rollouts.stand_ins", str(root / "model/runs/r/model")]
    server = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    url = server.stdout.readline().strip()
    engine = {"class_path": "own_server.Killed", "init_args": {"url": url}}
    prepare(root / "start", "GRPO", {"data.init_args.engine": engine, "data.init_args.iterations": 2})
    (root / "start/own_server.py").write_text(SERVER)
    done = copy(root / "start", root / "whole")
    works(done, *RESUME)
    yield root / "start", outcome(done / "runs" / "r")
    server.terminate()
    server.wait()


@pytest.mark.parametrize("call", [1, 4, 8, 9])
def test_a_run_that_was_killed_while_a_server_sampled_is_completed_by_a_resume(tmp_path, whole_of_server, call):
    start, expected = whole_of_server
    assert expected["rollouts"]
    folder = copy(start, tmp_path / "killed")
    assert killed_in(folder, call)
    works(folder, *RESUME)
    assert deviations(folder / "runs" / "r", expected) == []
