"""Runs whose checkpoints are written while they train on lose nothing, wherever they are killed."""

import errno
import json
import os
import random
import signal
import time

import pytest

from tests.crash.harness import Child, Faults, copy, deviations, ended, outcome, prepare, ranks, torchrun, works

RESUME = ("fit", "--config", "r.yaml", "--resume", "auto")
WRITER = "oumi_pl-background"
"""Name of the thread that writes."""
ASYNCHRONOUS = {"checkpoint.asynchronous": True}
SHARDED = ASYNCHRONOUS | {"trainer.strategy": "fsdp2"}
REPLICATED = ASYNCHRONOUS | {"trainer.strategy": {"class_path": "Sharded", "init_args": {"replicas": 2}}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with warm caches, what its uninterrupted run left, and the file operations of the writing thread."""
    root = tmp_path_factory.mktemp("asynchronous")
    prepare(root / "start", changes=ASYNCHRONOUS)
    done = copy(root / "start", root / "whole")
    works(done, *RESUME, faults=Faults(done, thread=WRITER))
    operations = json.loads((done / "operations.json").read_text())
    copy(done / "cache", root / "start" / "cache")
    return root / "start", outcome(done / "runs" / "r"), operations


def test_the_run_is_that_of_synchronous_saves(tmp_path, whole):
    _, expected, operations = whole
    prepare(tmp_path / "waits")
    works(tmp_path / "waits", *RESUME)
    assert deviations(tmp_path / "waits/runs/r", {k: v for k, v in expected.items() if k != "config"}) == []
    names = [operation.rpartition("/")[2] for operation in operations if operation.startswith("replace")]
    assert {"best.ckpt", "step-00000002.ckpt", "step-00000004.ckpt", "step-00000005.ckpt"} <= {*names}


@pytest.mark.parametrize(
    ("operation", "file"),
    [
        pytest.param("open", "step-00000004.ckpt.half.half", marks=pytest.mark.slow),
        ("replace", "checkpoints/step-00000004.ckpt"),
        pytest.param("unlink", "checkpoints/step-00000002.ckpt", marks=pytest.mark.slow),
    ],
)
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(tmp_path, whole, operation, file):
    start, expected, _ = whole
    folder = copy(start, tmp_path / "killed")
    killed = Child(folder, *RESUME, faults=Faults(folder, kill_on=(operation, file), thread=WRITER))
    assert killed.wait() == -signal.SIGKILL
    works(folder, *RESUME)
    assert deviations(folder / "runs" / "r", expected) == []


@pytest.mark.slow
def test_a_kill_at_any_file_operation_of_the_writing_thread_loses_nothing(tmp_path, whole):
    start, expected, operations = whole
    assert len(operations) > 30
    for number, operation in enumerate(operations):
        folder = copy(start, tmp_path / f"killed-{number}")
        assert Child(folder, *RESUME, faults=Faults(folder, number, thread=WRITER)).wait() == -signal.SIGKILL
        works(folder, *RESUME)
        assert deviations(folder / "runs" / "r", expected) == [], operation


@pytest.mark.parametrize("option", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_with_the_message_of_a_synchronous_save(tmp_path, whole, option):
    start, _, _ = whole
    folder = copy(start, tmp_path / "full")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "step-00000004.ckpt")
    thread = WRITER if option == "true" else None
    faults = Faults(folder, kill_on=("open", "step-00000004.ckpt.half.half"), error=full, thread=thread)
    failed = Child(folder, *RESUME, f"--checkpoint.asynchronous={option}", faults=faults)
    assert failed.wait() == 2
    message = "error: No space left on device to write step-00000004.ckpt; free some space and continue with --resume"
    assert [line for line in failed.text.splitlines() if "error" in line] == [
        f"{message}, or choose another --runs_dir"
    ]
    assert json.loads((folder / "runs/r/run.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_runs_of_two_processes_are_those_of_synchronous_saves(tmp_path, strategy):
    finished = []
    for asynchronous in (False, True):
        folder = tmp_path / str(asynchronous)
        prepare(folder, changes={"checkpoint.asynchronous": asynchronous, "trainer.strategy": strategy})
        torchrun(folder, *RESUME)
        finished.append({k: v for k, v in outcome(folder / "runs" / "r").items() if k != "config"})
    assert deviations(tmp_path / "True/runs/r", finished[0]) == []
    assert finished[0]["checkpoints"] == ["best.ckpt", "step-00000005.ckpt"]


def kills(tmp_path, changes, processes, trials, seed):
    """Kills runs of several processes while they write checkpoints, and resumes each: how they deviate."""
    rng, wrong = random.Random(seed), []
    prepare(tmp_path / "start", changes=changes)
    done = copy(tmp_path / "start", tmp_path / "whole")
    children = ranks(done, *RESUME, processes=processes, faults={0: Faults(done, thread=WRITER)})
    assert ended(children) == [0] * processes, children[0].text
    operations = json.loads((done / "operations.json").read_text())
    expected = outcome(done / "runs" / "r")
    copy(done / "cache", tmp_path / "start" / "cache")
    for trial in range(trials):
        folder = copy(tmp_path / "start", tmp_path / f"trial-{trial}")
        if trial % 2:  # the first rank, at a file operation of its writing thread
            faults = {0: Faults(folder, rng.randrange(len(operations)), thread=WRITER)}
            codes = ended(ranks(folder, *RESUME, processes=processes, faults=faults))
        else:  # one or all, at a random moment once there is something of a checkpoint
            children = ranks(folder, *RESUME, processes=processes)
            children[0].wait_until(lambda at=folder: any((at / "runs").glob("r/checkpoints/*")))
            time.sleep(rng.random() * 0.6)
            for child in children if rng.random() < 0.5 else [rng.choice(children)]:
                child.kill(signal.SIGKILL)
            codes = ended(children)
        text = torchrun(folder, *RESUME, processes=processes)
        wrong += [f"trial {trial}, {codes}: {name}" for name in deviations(folder / "runs" / "r", expected)]
        wrong += [f"trial {trial}: damaged"] * ("damaged" in text)
    return wrong


@pytest.mark.slow
def test_forty_kills_of_two_shards_lose_nothing(tmp_path):
    assert kills(tmp_path, SHARDED, 2, trials=40, seed=1) == []


@pytest.mark.slow
def test_kills_of_two_replicas_of_two_shards_lose_nothing(tmp_path):
    assert kills(tmp_path, REPLICATED, 4, trials=6, seed=2) == []
