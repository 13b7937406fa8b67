"""Notices damaged checkpoints and caches before they are used: a flipped bit would change weights or tokens silently.

All checksums are CRC-32, which notices any error of up to 32 bits in a row, and others but for one in 4e9. torch writes
one for each tensor into a checkpoint file, and checks none when it reads. Folders have theirs in `checksums.json`, with
the sizes. Those that older versions wrote have no list, and are read without a check.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from oumi_pl.errors import UserError
from oumi_pl.runs.files import remove, write

LIST = "checksums.json"
"""File of a folder with sizes and checksums of the others, `{name: [bytes, CRC-32]}`, and one of its own."""
MODEL = "model_checksums.json"
"""The same of a model folder, for weights and tokenizer alone: people edit the others, which are text."""
WEIGHTS = ("*.safetensors",)
"""Files of weights in a model folder."""
TOKENIZER = ("tokenizer.json", "*.model", "vocab.*", "merges.txt")
"""Files of a tokenizer in a model folder."""
BLOCK = 1 << 20
"""Bytes that are read at once."""

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged list can raise."""
_whole: set[tuple[str, int, int, int]] = set()
"""Files that this process has checked, by path, file number, size and time of change."""


class DamagedError(UserError):
    """A file is not as it was written."""


def of_file(path: Path) -> int:
    """The checksum of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def of_files(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Sizes and checksums of files, by name."""
    return {path.name: [path.stat().st_size, of_file(path)] for path in paths}


def is_other(path: Path, expected: int | None) -> bool:
    """Whether a file has another checksum than it should have, if that is known. Reads a file once per process."""
    if expected is None or _is_known(path):
        return False
    if of_file(path) != expected:
        return True
    _whole.add(stamp(path))
    return False


def of_blocks(path: Path, size: int) -> list[int]:
    """The checksums of a file's blocks of `size` bytes."""
    with path.open("rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(size), b"")]


def of_json(value: object) -> int:
    """The checksum of a JSON value, whatever the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True, default=str).encode())


def write_list(folder: Path, listed: dict[str, list[int]] | None = None) -> None:
    """Writes the list of a folder that is complete and has no other name yet; `listed` if it is known already."""
    if listed is None:
        listed = of_files(sorted(path for path in folder.iterdir() if path.is_file() and path.name != LIST))
    (folder / LIST).write_text(_as_list(listed))


def add_list(folder: Path) -> None:
    """Writes the list of a folder that has its name already, in one step: a kill leaves it or none."""
    remove(folder / LIST)
    listed = of_files(sorted(path for path in folder.iterdir() if path.is_file()))
    write(folder / LIST, _as_list(listed))


@contextmanager
def model_files(folder: Path) -> Iterator[None]:
    """Removes the list of a model folder whose weights or tokenizer are written in this block, and writes it after it.

    A kill in the block leaves a folder without a list, not one whose list is wrong.
    """
    remove(folder / MODEL)
    yield
    paths = [path for name in (*WEIGHTS, *TOKENIZER) for path in sorted(folder.glob(name))]
    write(folder / MODEL, _as_list(of_files(paths)))


def refuse_damaged_weights(folder: Path, key: str) -> None:
    """Refuses a model folder of ours with damaged weights; does nothing for other folders and hub ids.

    Args:
        folder: The folder.
        key: The key or option that names it, for the message.

    Raises:
        DamagedError: says which file, and what to do if it was replaced on purpose.
    """
    _refuse_damaged_model(folder, key, WEIGHTS)


def refuse_damaged_tokenizer(folder: Path, key: str) -> None:
    """Refuses a model folder of ours with a damaged tokenizer; does nothing for other folders and hub ids.

    Args:
        folder: The folder.
        key: The key or option that names it, for the message.

    Raises:
        DamagedError: says which file, and what to do if it was replaced on purpose.
    """
    _refuse_damaged_model(folder, key, TOKENIZER)


def _refuse_damaged_model(folder: Path, key: str, names: tuple[str, ...]) -> None:
    if not (folder / MODEL).is_file():
        return
    try:
        why = _damage_of_folder(folder, MODEL, names)
    except UNREADABLE as error:
        why = f"its {MODEL} can't be read ({error})"
    if why:
        raise DamagedError(f"{key}: {folder} is damaged: {why}; if that was on purpose, delete {MODEL}")


def _as_list(listed: dict[str, list[int]]) -> str:
    return json.dumps({"files": listed, "crc32": of_json(listed)}) + "\n"


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or a folder that has a list; None if it is whole.

    Reads everything at the first call in a process; later ones look at sizes and times of change only.
    """
    try:
        if path.is_dir():
            return _damage_of_folder(path, LIST) if (path / LIST).exists() else None
        if not path.is_file():
            return "it is no file"  # reading a pipe would wait for ever
        return None if _is_known(path) else _damage_of_archive(path)
    except UNREADABLE as error:
        return f"it can't be read ({getattr(error, 'strerror', None) or error})"


def refuse_damaged(path: Path) -> None:
    """Refuses a damaged checkpoint or folder.

    Raises:
        DamagedError: names it and says what is wrong.
    """
    if why := damage(path):
        raise DamagedError(f"{path} is damaged: {why}")


def is_archive(path: Path) -> bool:
    """Whether a file has the index of a zip archive, which comes last."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _damage_of_archive(path: Path) -> str | None:
    """What is wrong with a file of `torch.save`, a zip archive with a checksum for each tensor."""
    if not is_archive(path):
        return "it can't be read as a checkpoint: it was cut short, or is none"
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception as error:  # a damaged index can raise anything
        return f"its index can't be read ({error})"
    if wrong is not None:
        return f"its part {wrong.partition('/')[2] or wrong} is not what its checksum says"
    _whole.add(stamp(path))
    return None


def _damage_of_folder(folder: Path, name_of_list: str, names: tuple[str, ...] = ("*",)) -> str | None:
    content = json.loads((folder / name_of_list).read_text())
    listed = content["files"]
    if of_json(listed) != content["crc32"]:
        return f"its {name_of_list} is not what its checksum says"
    for name, (size, crc32) in listed.items():
        if not any(fnmatch(name, pattern) for pattern in names):
            continue
        file = folder / name
        if not file.is_file():
            return f"its file {name} is missing"
        if file.stat().st_size != size:
            return f"its file {name} has {file.stat().st_size} bytes instead of {size}"
        if is_other(file, crc32):
            return f"its file {name} is not what its checksum says"
    return None


def _is_known(path: Path) -> bool:
    return stamp(path) in _whole


def stamp(path: Path) -> tuple[str, int, int, int]:
    """Identifies a version of a file by path, file number, size and time of change."""
    status = path.stat()
    return os.path.realpath(path), status.st_ino, status.st_size, status.st_mtime_ns
