"""Writes files atomically: a kill, a full disk or a power cut leaves the old file or the new one, never a part.

A new file is written beside its target under a name that ends in `.half`, synced to disk, and renamed; then the folder
is synced, so that the new name survives a power cut as well.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

HALF = ".half"
"""Suffix of a file or folder that is still being written."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write a new file or folder to, which replaces `path` at the end of the block.

    If the block fails, `path` stays as it was. Two processes that write the same file don't disturb each other: the
    last one wins.
    """
    half = path.with_name(f"{path.name}.{os.getpid()}{HALF}")
    remove(half)
    try:
        yield half
        put(half, path)
    finally:
        remove(half)


def put(half: Path, path: Path) -> None:
    """Syncs a finished file or folder, and renames it to `path`, which it replaces."""
    sync_all(half)
    if path.is_dir() and not path.is_symlink():  # nothing can be renamed onto a non-empty folder
        remove(path)
    half.replace(path)
    sync(path.parent)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, atomically and durably."""
    with replacing(path) as half, half.open("xb") as file:  # `x`: never write through a link at that path
        file.write(content.encode() if isinstance(content, str) else content)


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
