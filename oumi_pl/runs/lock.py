"""Lets one process at a time write to a run folder.

`lock.json` in the folder names the process by host, process id and start time. It survives kills and reboots; the lock
of a process that no longer runs is taken over. Whether a process of another host still runs can't be asked: while a
process holds a lock it touches the file every few seconds, and another host watches whether that happens. So no
clocks are compared.
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

LOCK = "lock.json"
TOUCHED = 5.0
"""Seconds between two touches of a lock."""
WATCHED = 20.0
"""Seconds for which another host's lock is watched. Network file systems may show changes late."""

_held: dict[Path, threading.Event] = {}
"""The locks of this process -> what ends their touching."""


def process() -> dict[str, Any]:
    """Identifies this process by host, process id and start time."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": began(os.getpid())}


def is_alive(owner: Any) -> bool | None:
    """Whether the process that `process` described still runs; None if that can't be asked from here."""
    if not isinstance(owner, dict) or owner.get("host") != socket.gethostname() or not owner.get("began"):
        return None
    return began(owner.get("pid")) == owner["began"]


def began(pid: object) -> str | None:
    """Start time of a process as the system prints it; None if there is no such process, or it is unknown.

    A process id alone does not identify a process, since systems reuse ids.
    """
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
    """Takes the lock of a run folder for this process, which may have it already.

    Raises:
        UserError: another process that still runs has it.
    """
    run = run.resolve()
    with _alone(run):
        if run in _held and owner(run) == process():
            return
        other = owner(run)
        if other and other.get("pid") == os.getppid() and is_alive(other):
            return  # by `ddp_spawn` and the like: the process that started this one has the lock for it
        if other and other != process():
            name = f"process {other.get('pid')} on {other.get('host')}"
            alive = is_alive(other)
            if alive or (alive is None and _is_touched(run)):
                raise UserError(f"{run} is being written by {name}; wait for its end, or stop it (SIGTERM saves first)")
            print(f"{run}: its {name} was killed; going on in its place", file=sys.stderr)
        write(run)
    ends = threading.Event()
    threading.Thread(target=_touch, args=(run / LOCK, ends), daemon=True, name="lock of the run").start()
    _held[run] = ends


def write(run: Path) -> None:
    """Writes the lock of a run folder that no other process can know yet."""
    files.write(run / LOCK, json.dumps(process()) + "\n")


def release(run: Path) -> None:
    """Gives up the lock of a run folder, if this process has it."""
    run = run.resolve()
    ends = _held.pop(run, None)
    if ends is None:
        return
    ends.set()
    if owner(run) == process():  # not of a parent that this process was forked from
        with contextlib.suppress(OSError):
            (run / LOCK).unlink()


def held() -> list[Path]:
    """The run folders whose locks this process has."""
    return [*_held]


def release_all() -> None:
    """Gives up all locks of this process."""
    for run in [*_held]:
        release(run)


def owner(run: Path) -> dict[str, Any] | None:
    """The process that a lock names; None without a lock or a readable one."""
    try:
        owner = files.parse(files.read(run / LOCK))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _is_touched(run: Path) -> bool:
    """Whether another host's process touches its lock now, or gives it up."""
    print(f"{run} is locked by a process of another host; watching for {WATCHED:.0f} s if it runs", file=sys.stderr)
    before, end = _stamp(run), time.monotonic() + WATCHED
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCHED / 4))
        if _stamp(run) != before:
            return (run / LOCK).exists()
    return False


def _stamp(run: Path) -> tuple[int, int] | None:
    """File number and time of change of a lock; opened, since network file systems look anew when a file is opened."""
    try:
        with (run / LOCK).open() as file:
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _touch(lock: Path, ends: threading.Event) -> None:
    while not ends.wait(TOUCHED):
        with contextlib.suppress(OSError):
            os.utime(lock)


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Keeps two processes of this host from looking at a lock and taking it at the same time."""
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
