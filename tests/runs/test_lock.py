"""One process at a time writes to a run folder; the lock of a killed process is taken over."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from oumi_pl.errors import UserError
from oumi_pl.runs import lock


@pytest.fixture(autouse=True)
def released():
    yield
    lock.release_all()


def locked_by(run, **owner):
    (run / lock.LOCK).write_text(json.dumps(lock.process() | owner))


def test_a_process_can_take_its_lock_again_and_release_it(tmp_path):
    lock.acquire(tmp_path)
    lock.acquire(tmp_path)
    assert lock.owner(tmp_path) == lock.process()
    lock.release(tmp_path)
    assert not (tmp_path / lock.LOCK).exists()


def test_the_lock_of_a_running_process_is_respected(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        locked_by(tmp_path, pid=other.pid, began=lock.began(other.pid))
        with pytest.raises(UserError, match=f"is being written by process {other.pid} on "):
            lock.acquire(tmp_path)
        other.communicate(b"\n")
    lock.acquire(tmp_path)


def test_the_ranks_of_a_run_share_the_lock_of_the_process_that_started_them(tmp_path):
    parent = {"pid": os.getppid(), "began": lock.began(os.getppid())}
    locked_by(tmp_path, **parent)
    lock.acquire(tmp_path)
    lock.release_all()
    assert lock.owner(tmp_path) == lock.process() | parent


@pytest.mark.parametrize(
    "owner",
    [{"pid": 2**22 - 1}, {"began": "boot-before-this:17"}],
    ids=["of a process that was killed", "of a process with the same number, before a reboot"],
)
def test_a_stale_lock_is_taken_over_with_a_line(tmp_path, capsys, owner):
    locked_by(tmp_path, **owner)
    lock.acquire(tmp_path)
    assert "which no longer runs" in capsys.readouterr().err
    assert lock.owner(tmp_path) == lock.process()


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_an_unreadable_lock_does_not_block(tmp_path, content):
    (tmp_path / lock.LOCK).write_text(content)
    lock.acquire(tmp_path)
    assert lock.owner(tmp_path) == lock.process()


@pytest.mark.parametrize("runs", [True, False])
def test_a_lock_of_another_host_is_watched(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(lock, "WATCHED", 0.3)
    locked_by(tmp_path, host="elsewhere")
    ends = threading.Event()

    def touch():
        while not ends.wait(0.02):
            os.utime(tmp_path / lock.LOCK)

    toucher = threading.Thread(target=touch)
    if runs:
        toucher.start()
        with pytest.raises(UserError, match="on elsewhere"):
            lock.acquire(tmp_path)
        ends.set()
        toucher.join()
    else:
        lock.acquire(tmp_path)
        assert lock.owner(tmp_path) == lock.process()


def test_a_held_lock_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCHED", 0.01)
    lock.acquire(tmp_path)
    os.utime(tmp_path / lock.LOCK, (0, 0))
    end = time.monotonic() + 5
    while (tmp_path / lock.LOCK).stat().st_mtime == 0 and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / lock.LOCK).stat().st_mtime > 0
