"""Which files on this machine a recipe's `path` means."""

import glob
import re
from pathlib import Path

from oumi_pl.data.files import KINDS, kind_of
from oumi_pl.errors import UserError, nearby

BUNDLED = Path(__file__).parent / "bundled"
"""Data that come with the package: `bundled/NAME` is `NAME/train.jsonl` or `.txt`, `bundled/NAME/SPLIT` another."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|validation|test)(?![a-z])", re.IGNORECASE)
_NOT_DATA = ("dataset_info.json", "dataset_infos.json")  # descriptions that lie beside data


def find_files(name: str) -> dict[str, list[Path]] | None:
    """The data files that a recipe's `path` names, by split; None if it has the form of a hub id.

    A path is local if it exists, holds a wildcard, starts with `.`, `/` or `~`, or ends like a data file; then there
    is no looking at the hub for it, so that a typing error is told as one. Only a directory has other splits than
    `train`: those that its files, or the directories in it, are named after.

    Raises:
        UserError: nothing is there, or no data file.
    """
    path = Path(name).expanduser()
    if not name:
        raise UserError("a source has an empty path; name a file, a directory or a data set on the hub")
    if "://" in name:
        raise UserError(f"{name}: URLs are not read; download the file, or name a data set on the hub as org/name")
    if path.is_dir():
        if next(path.rglob("tokens-00000.bin"), None):
            raise UserError(f"{name}: these are token shards, which only PretrainData reads; name the texts themselves")
        return _by_split(sorted(p for p in path.rglob("*") if _is_data(p, path)), path)
    if path.exists():
        if kind_of(path) is None:
            raise UserError(f"{name}: no reader for {path.suffix!r} files; known: {', '.join(KINDS)}")
        return {"train": [path]}
    if glob.has_magic(name):
        # not Path.glob, which takes hidden files for data and refuses `**.jsonl`
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
        matches = [match for match in matches if match.is_file() and kind_of(match)]
        if not matches:
            raise UserError(f"{name}: no data file matches ({', '.join(KINDS)})")
        return {"train": matches}
    if name.startswith("bundled/"):
        return {"train": [_bundled(name)]}
    if name.startswith((".", "/", "~")) or kind_of(path) or not _HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such file or directory{nearby(path, could_be_meant)}")
    return None


def _is_data(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.name not in _NOT_DATA and kind_of(path) is not None and path.is_file()


def _by_split(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Groups a directory's files by the split that they, or the directories in it, are named after, if they are."""
    if not files:
        raise UserError(f"{root}: no data files in this directory ({', '.join(KINDS)})")
    splits: dict[str, list[Path]] = {}
    for path in files:
        words = (_SPLIT_WORD.search(part) for part in reversed(path.relative_to(root).parts))
        word = next((match[1].lower() for match in words if match), "")
        splits.setdefault(word, []).append(path)
    others = splits.pop("", [])
    if splits and others:
        named = next(iter(splits.values()))[0].relative_to(root)
        other = others[0].relative_to(root)
        raise UserError(f"{root}: {named} is named after a split and {other} is not; choose files with a glob")
    return splits or {"train": others}


def _bundled(name: str) -> Path:
    files = sorted(p for p in BUNDLED.glob("*/*") if p.suffix in (".jsonl", ".txt"))
    known = {f"bundled/{p.parent.name}/{p.stem}": p for p in files}
    known |= {key.removesuffix("/train"): path for key, path in known.items() if key.endswith("/train")}
    if name not in known:
        raise UserError(f"no bundled data {name!r}; there are: {', '.join(sorted(known))}")
    return known[name]


def could_be_meant(path: Path) -> bool:
    """Whether what is there may be data: a directory, or a file of a kind that is read."""
    return path.is_dir() or kind_of(path) is not None
