"""Writes files so that a kill, a full disk or a power cut leaves either the old file or the new one, never a part.

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
    """Yields a path beside `path` to write a new file or folder to, and puts it in the place of `path` at the end.

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
    """Syncs a file or folder that is written, and renames it to `path`, which it replaces."""
    sync_all(half)
    if path.is_dir() and not path.is_symlink():  # neither a file nor a folder can be renamed onto a folder with files
        remove(path)
    half.replace(path)
    sync(path.parent)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, atomically and durably."""
    with replacing(path) as half, half.open("xb") as file:  # `x`: never through a link that someone put there
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        # some network file systems refuse to sync folders, and do it by themselves
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(path: Path) -> None:
    """Syncs a file, or a folder with all that is in it."""
    for inner in sorted(path.rglob("*")) if path.is_dir() else ():
        if not inner.is_symlink():
            sync(inner)
    sync(path)


def remove(path: Path) -> None:
    """Deletes a file, a link, or a folder with its content; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
