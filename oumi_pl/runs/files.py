"""Writes files atomically: a kill, a full disk or a power cut leaves the old file or the new one, never a part.

A new file is written beside its target under a name that ends in `.half`, synced to disk, and renamed; then the folder
is synced, so that the new name survives a power cut as well.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HALF = ".half"
"""Suffix of a file or folder that is still being written."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write a new file or folder to, which replaces `path` at the end of the block.

    If the block fails, `path` stays as it was. Two processes that write the same file don't disturb each other: the
    last one wins.
    """
    half = path.with_name(f"{path.name}.{os.getpid()}@{socket.gethostname()}{HALF}")
    remove(half)
    try:
        yield half
        put(half, path)
    finally:
        remove(half)


def put(half: Path, path: Path) -> None:
    """Syncs a finished file or folder, and renames it to `path`, which it replaces.

    A folder that is replaced has another name for a moment. A kill just then leaves none of this name, but never a part
    of one.
    """
    sync_all(half)
    before = None
    if path.is_dir() and not path.is_symlink():  # nothing can be renamed onto a non-empty folder
        before = path.with_name(f"{path.name}.before{HALF}")
        remove(before)
        path.rename(before)
    half.replace(path)
    sync(path.parent)
    if before is not None:
        remove(before)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, atomically and durably. Bytes of odd paths are written in hex."""
    with replacing(path) as half, half.open("xb") as file:  # `x`: never write through a link at that path
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def read(path: Path) -> bytes:
    """Reads a file of a run folder, which may come from somebody else.

    Raises:
        OSError: it can't be read, or is a link, a pipe or something else than a file.
    """
    # a link could lead to any file of this user, and a pipe would wait for ever
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        return file.read()


def parse(text: str | bytes) -> Any:
    """Parses JSON. Numbers that are not finite, and integers of more than 300 digits, become None.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None, parse_float=_finite, parse_int=_short)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _short(digits: str) -> int | None:
    return int(digits) if len(digits) <= LONGEST else None


def refuse_expanding(node: Any) -> None:
    """Refuses composed YAML whose aliases (`*name`) stand for more than it could say without them, or for themselves.

    A few lines can stand for gigabytes: nine names, each a list of nine times the one before.

    Raises:
        ValueError: it has more than `MOST_VALUES` values.
    """
    sizes: dict[int, float] = {}

    def size(part: Any) -> float:
        if isinstance(part, tuple):
            return sum(map(size, part))
        if id(part) not in sizes:
            sizes[id(part)] = math.inf  # if it is met again within itself
            sizes[id(part)] = 1 + (sum(map(size, part.value)) if isinstance(part.value, list) else 0)
        return sizes[id(part)]

    if node is not None and size(node) > MOST_VALUES:
        raise ValueError(f"its aliases (*name) stand for more than {MOST_VALUES:,} values")


MOST_VALUES = 100_000
"""Most values of a file of YAML."""
LONGEST = 300
"""Most characters of an integer: with more, formatting and converting to float can fail."""


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of entries, is on disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        # some network file systems refuse to sync folders; they do so by themselves
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(path: Path) -> None:
    """Syncs a file, or a folder with everything in it."""
    for inner in sorted(path.rglob("*")) if path.is_dir() else ():
        if not inner.is_symlink():
            sync(inner)
    sync(path)


def remove(path: Path) -> None:
    """Deletes a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
