"""A lock that lets one process at a time write to a run folder.

`lock.json` in the folder names its owner by host, process id and start time. The file survives kills and reboots, so
the lock of a process that no longer runs is taken over. Another host can't see the owner's process; instead, an owner
touches the file every few seconds, and the other host waits to see whether the file changes. So the clocks of two hosts
are never compared.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oumi_pl.errors import UserError
from oumi_pl.runs import files
from oumi_pl.terminal.text import echo

LOCK = "lock.json"
TOUCHED = 5.0
"""Seconds between two touches of the file."""
WATCHED = 20.0
"""Seconds to watch the lock of another host; network file systems may show changes late."""

_held: dict[Path, threading.Event] = {}
"""The run folders that this process has locked -> an event that stops the touching."""


def process() -> dict[str, Any]:
    """Returns host, process id and start time of this process."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": began(os.getpid())}


def is_alive(owner: Any) -> bool | None:
    """Whether the process that `process` described is still running; None if that can't be known here."""
    if not isinstance(owner, dict) or owner.get("host") != socket.gethostname() or not owner.get("began"):
        return None
    return began(owner.get("pid")) == owner["began"]


def began(pid: object) -> str | None:
    """Returns the start time of a process, as the system prints it; None if it doesn't run or the time is unknown.

    A process id alone does not identify a process, since systems reuse ids.
    """
    if not isinstance(pid, int):  # from a damaged file
        return None
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"  # X is dead, Z a zombie
    if shutil.which("ps") is None:
        return None
    printed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return printed.stdout.strip() or None


def acquire(run: Path) -> None:
    """Locks a run folder for this process; does nothing if this process has locked it already.

    Raises:
        UserError: a running process has locked it.
    """
    run = run.resolve()
    with _alone(run):
        if run in _held and owner(run) == process():
            return
        other = owner(run)
        if other and other.get("pid") == os.getppid() and is_alive(other):
            return  # spawned by the owner (`ddp_spawn`), which holds the lock for its children
        if other and other != process():
            name = f"process {other.get('pid')} on {other.get('host')}"
            alive = is_alive(other)
            if alive or (alive is None and _is_touched(run)):
                raise UserError(
                    f"{run} is being written by {name}; wait until it ends, or stop it (SIGTERM saves first)"
                )
            echo(f"{run}: taking the lock of {name}, which no longer runs", file=sys.stderr)
        write(run)
    released = threading.Event()
    threading.Thread(target=_touch, args=(run / LOCK, released), daemon=True, name="lock of the run").start()
    _held[run] = released


def write(run: Path) -> None:
    """Writes the lock of a new run folder, whose path no other process knows yet."""
    files.write(run / LOCK, json.dumps(process()) + "\n")


def release(run: Path) -> None:
    """Releases the lock of a run folder, if this process holds it."""
    run = run.resolve()
    released = _held.pop(run, None)
    if released is None:
        return
    released.set()
    if owner(run) == process():  # after a fork, `_held` also has the locks of the parent
        with contextlib.suppress(OSError):
            (run / LOCK).unlink()


def held() -> list[Path]:
    """The run folders that this process has locked."""
    return [*_held]


def release_all() -> None:
    """Releases all locks of this process."""
    for run in [*_held]:
        release(run)


def owner(run: Path) -> dict[str, Any] | None:
    """The process that holds the lock, as `process` describes it; None if there is no readable lock."""
    try:
        owner = files.parse(files.read(run / LOCK))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _is_touched(run: Path) -> bool:
    """Watches another host's lock: True if it is touched, False if it doesn't change or is released."""
    echo(f"{run} is locked by a process on another host; checking for {WATCHED:.0f} s if it runs", file=sys.stderr)
    before, end = _stamp(run), time.monotonic() + WATCHED
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCHED / 4))
        if _stamp(run) != before:
            return (run / LOCK).exists()
    return False


def _stamp(run: Path) -> tuple[int, int] | None:
    """Inode and modification time of a lock. Opening it makes network file systems refresh them."""
    try:
        with (run / LOCK).open() as file:
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _touch(lock: Path, released: threading.Event) -> None:
    while not released.wait(TOUCHED):
        with contextlib.suppress(OSError):
            os.utime(lock)


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Keeps two processes of this host from checking and taking a lock at the same time."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(run, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without such locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
