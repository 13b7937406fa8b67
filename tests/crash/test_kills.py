"""A killed and resumed run writes the same files as an uninterrupted one, wherever it is killed."""

import contextlib
import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.crash.harness import YEAR, Child, Faults, copy, deviations, ended, outcome, prepare, ranks, torchrun, works

RESUME = ("fit", "--config", "r.yaml", "--resume", "auto")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with warm caches to copy, and what its uninterrupted run left."""
    root = tmp_path_factory.mktemp("crash")
    prepare(root / "start")
    done = copy(root / "start", root / "whole")
    works(done, *RESUME, faults=Faults(done))
    copy(done / "cache", root / "start" / "cache")
    return root / "start", outcome(done / "runs" / "r")


@pytest.mark.parametrize(
    ("operation", "file"),
    [
        pytest.param("rename", "runs/r", marks=pytest.mark.slow),  # the folder is complete, but has no name yet
        ("replace", "checkpoints/step-00000004.ckpt"),
        pytest.param("replace", "checkpoints/best.ckpt", marks=pytest.mark.slow),
        ("rename", "runs/r/model"),  # exported, but not in its place
        pytest.param("unlink", "checkpoints/step-00000002.ckpt", marks=pytest.mark.slow),  # one of the older ones
        ("unlink", "checkpoints/step-00000004.ckpt"),  # the last that is removed
        pytest.param("unlink", "runs/r/lock.json", marks=pytest.mark.slow),  # the very end
    ],
)
def test_a_run_killed_at_a_file_operation_is_completed_by_a_resume(tmp_path, whole, operation, file):
    start, expected = whole
    folder = copy(start, tmp_path / "killed")
    killed = Child(folder, *RESUME, faults=Faults(folder, kill_on=(operation, file)))
    assert killed.wait() == -signal.SIGKILL
    text = works(folder, *RESUME)
    assert deviations(folder / "runs" / "r", expected) == []
    if file.endswith("model"):
        assert "its training is complete; what is left: export, report" in text
        assert "step 1/5" not in text


def test_a_clock_that_jumps_changes_nothing(tmp_path, whole):
    start, expected = whole
    folder = copy(start, tmp_path / "clock")
    kill = ("replace", "checkpoints/step-00000004.ckpt")
    assert Child(folder, *RESUME, faults=Faults(folder, kill_on=kill, clock=1)).wait() == -signal.SIGKILL
    for number, path in enumerate(sorted(folder.rglob("*"))):
        at = time.time() + (YEAR if number % 2 else -YEAR)
        os.utime(path, (at, at))
    works(folder, *RESUME, faults=Faults(folder, clock=2))
    assert deviations(folder / "runs" / "r", expected) == []


@pytest.mark.slow
def test_two_processes_go_on_together_after_one_was_killed(tmp_path):
    prepare(tmp_path / "start")
    done = copy(tmp_path / "start", tmp_path / "whole")
    torchrun(done, *RESUME)
    folder = copy(tmp_path / "start", tmp_path / "killed")
    first, second = ranks(folder, *RESUME)
    first.wait_until(lambda: any((folder / "runs").glob("r/checkpoints/step-*.ckpt")))
    os.kill(second.pid, signal.SIGKILL)
    assert ended([first, second]) in ([2, -9], [0, -9])
    torchrun(folder, *RESUME)
    assert deviations(folder / "runs" / "r", outcome(done / "runs" / "r")) == []


def test_files_are_written_under_another_name_and_only_metrics_grow_in_their_place(whole):
    start, _ = whole
    operations = json.loads((start.with_name("whole") / "operations.json").read_text())
    opened = {Path(operation.split(" ")[1]) for operation in operations if operation.startswith("open ")}
    in_place = [path for path in opened if not any(p.startswith(".") or p.endswith(".half") for p in path.parts)]
    assert in_place == [Path("/runs/r/metrics.csv")]
    assert len(opened) > 20


def test_others_can_read_the_files_of_caches_and_runs(whole):
    start, _ = whole
    for path in start.with_name("whole").rglob("*"):
        needed = 0o005 if path.is_dir() else 0o004
        assert path.stat().st_mode & needed == needed, path


def test_a_full_disk_under_the_cache_is_named_with_the_variable_that_moves_it(tmp_path):
    prepare(tmp_path / "full")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "full/cache/origins.txt"))
    faults = Faults(tmp_path / "full", kill_on=("open", "origins.txt"), error=full)
    failed = Child(tmp_path / "full", *RESUME, faults=faults)
    assert failed.wait() == 2
    assert "in the cache; free some space" in failed.text
    assert "or set OUMI_PL_CACHE to a folder on another disk" in failed.text
    works(tmp_path / "full", *RESUME)
    assert not [*(tmp_path / "full/cache/examples").glob(".*")]


@pytest.mark.parametrize("kill", [("open", "origins.txt"), ("replace", "000000.bin")])  # of examples, of the reference
def test_what_a_killed_run_left_in_the_cache_is_removed_by_the_next_that_writes_there(tmp_path, kill):
    prepare(tmp_path / "killed", "DPO")
    works(copy(tmp_path / "killed", tmp_path / "whole"), *RESUME)
    expected = outcome(tmp_path / "whole/runs/r")
    faults = Faults(tmp_path / "killed", kill_on=kill)
    assert Child(tmp_path / "killed", *RESUME, faults=faults).wait() == -signal.SIGKILL
    assert [*(tmp_path / "killed/cache").rglob("*.half")]
    works(tmp_path / "killed", *RESUME)
    assert deviations(tmp_path / "killed/runs/r", expected) == []


def test_a_resume_lists_the_code_that_only_the_run_names(tmp_path):
    prepare(tmp_path / "r", "GRPO", {"trainer.max_steps": 1, "val_every": None})
    assert "runs code" not in works(tmp_path / "r", *RESUME)
    note = "note: runs/r runs code that its config.yaml names: "
    resumed = works(tmp_path / "r", "fit", "--resume", "runs/r", "--trainer.max_steps", "2")
    assert f"{note}data.reward: own_rollouts.letters, data.engine.class_path: own_rollouts.Killed" in resumed
    assert note not in works(tmp_path / "r", *RESUME, "--trainer.max_steps", "3")


def test_a_finished_run_keeps_no_leftover_of_a_killed_resume(tmp_path, whole):
    start, expected = whole
    folder = copy(start, tmp_path / "killed")
    for operation in ("unlink", "replace"):
        Child(folder, *RESUME, faults=Faults(folder, kill_on=(operation, "lock.json"))).wait()
    assert [*(folder / "runs/r").glob("lock.json.*.half")]
    works(folder, *RESUME)
    assert deviations(folder / "runs/r", expected) == []


@pytest.mark.slow
def test_repeating_the_command_does_nothing(tmp_path, whole):
    start, _ = whole
    folder = copy(start, tmp_path / "twice")
    works(folder, *RESUME)
    assert "runs/r is finished, at step 5; to train it further: --resume runs/r" in works(folder, *RESUME)


def test_a_full_disk_in_the_export_costs_only_the_export(tmp_path, whole):
    start, expected = whole
    folder = copy(start, tmp_path / "full")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model")
    failed = Child(folder, *RESUME, faults=Faults(folder, kill_on=("open", "config.json"), error=full))
    assert failed.wait() == 2
    assert "No space left on device to write model; free some space and continue with --resume" in failed.text
    state = json.loads((folder / "runs/r/run.json").read_text())
    assert (state["status"], state["phases"][-1]) == ("failed", "samples")
    works(folder, *RESUME)
    assert deviations(folder / "runs" / "r", expected) == []


def test_a_full_disk_in_the_report_costs_only_the_report(tmp_path):
    folder = tmp_path / "full"
    prepare(folder, changes={"report": True})
    full = OSError(errno.EROFS, os.strerror(errno.EROFS), "report.html")
    failed = Child(folder, *RESUME, faults=Faults(folder, kill_on=("replace", "report.html"), error=full))
    assert failed.wait() == 2
    assert "Read-only file system to write report.html; mount it writable and continue with --resume" in failed.text
    assert "its training is complete; what is left: report" in works(folder, *RESUME)
    state = json.loads((folder / "runs/r/run.json").read_text())
    assert (state["status"], state["phases"][-1]) == ("finished", "report")


def test_a_moved_run_is_resumed_from_elsewhere_with_its_own_best_weights(tmp_path, whole):
    start, expected = whole
    folder = copy(start, tmp_path / "moved")
    Child(folder, *RESUME, faults=Faults(folder, kill_on=("rename", "runs/r/model"))).wait()
    original = folder / "runs" / "r"
    copied = copy(original, folder / "elsewhere" / "other")
    for checkpoint in (original / "checkpoints").iterdir():
        checkpoint.write_bytes(b"")  # whatever is read of the original fails
    works(folder, "fit", "--resume", "elsewhere/other")
    assert deviations(copied, expected) == []


def test_a_second_process_does_not_write_to_the_folder_of_a_live_run(tmp_path, whole):
    start, expected = whole
    folder = copy(start, tmp_path / "two")
    first = Child(folder, *RESUME)
    first.wait_until((folder / "runs" / "r" / "metrics.csv").exists)
    os.kill(first.pid, signal.SIGSTOP)
    second = Child(folder, *RESUME)
    assert second.wait() == 2
    assert f"is being written by process {first.pid} on" in second.text
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 0
    assert deviations(folder / "runs" / "r", expected) == []


def test_a_stop_of_the_whole_process_group_saves_although_there_are_loader_workers(tmp_path):
    folder = tmp_path / "stopped"
    prepare(folder, changes={"data.init_args.workers": 2, "trainer.max_steps": 3000, "val_every": 4000})
    child = Child(folder, *RESUME)
    child.wait_until((folder / "runs" / "r" / "metrics.csv").exists)
    time.sleep(1.0)
    child.kill(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM, child.text
    assert "stopped by SIGTERM after step" in child.text
    state = json.loads((folder / "runs/r/run.json").read_text())
    assert (state["status"], state["reason"].partition(" after")[0]) == ("stopped", "stopped by SIGTERM")
    newest = max((folder / "runs/r/checkpoints").glob("step-*.ckpt"))
    assert newest.name == f"step-{state['step']:08d}.ckpt"


ENDLESS = {"trainer.max_steps": 10**6, "val_every": 10**6, "checkpoint.every": 10**6}


def started(child):
    child.wait_until((child.folder / "runs" / "r" / "metrics.csv").exists)
    time.sleep(0.5)


@pytest.mark.slow
def test_a_loader_process_that_was_killed_is_named(tmp_path):
    folder = tmp_path / "run"
    prepare(folder, changes=ENDLESS | {"data.init_args.workers": 1})
    child = Child(folder, *RESUME)
    started(child)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")

    def kill_workers():
        for worker in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)

    # the process of an epoch that has delivered its last batch is not missed: a single kill may come just then
    child.wait_until(kill_workers, ends=True)
    assert child.code == 2
    assert "error: a loader process was killed, which is what the system does to a process when memory" in child.text
    assert "Traceback" not in child.text


@pytest.mark.slow
def test_a_rank_that_was_killed_is_named_by_the_others(tmp_path):
    folder = tmp_path / "run"
    prepare(folder, changes=ENDLESS)
    first, second = ranks(folder, *RESUME)
    started(first)
    os.kill(second.pid, signal.SIGKILL)
    assert first.wait() == 2, first.text
    assert "error: another rank exited; see its output for the cause. If it says nothing, it was killed" in first.text
    second.wait()


@pytest.mark.slow
def test_a_stop_of_all_ranks_saves_once_and_each_ends_with_its_exit_code(tmp_path):
    folder = tmp_path / "run"
    prepare(folder, changes=ENDLESS)
    children = ranks(folder, *RESUME)
    started(children[0])
    for child in children:
        os.kill(child.pid, signal.SIGTERM)
    assert [child.wait() for child in children] == [143, 143], children[0].text
    assert len(list((folder / "runs/r/checkpoints").iterdir())) == 1
