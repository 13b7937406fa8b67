"""Licences of data sources, where known: from the card of a hub data set, or a file beside local ones."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from oumi_pl.data.sources import find_files
from oumi_pl.errors import UserError

_CARD = "README.md"
_FILES = ("LICENSE", "LICENCE", "LICENSE.txt", "LICENCE.txt", "LICENSE.md", "LICENCE.md")
_LONGEST = 1 << 16
"""Most characters of a file that are read."""
_NAME = re.compile(r"[\w][\w .,+/()-]{0,79}")
"""What a licence may be called: the model card is Markdown, and a file beside data may hold anything."""


def licence_of(path: str, revision: str | None = None) -> str | None:
    """The licence of a data source, where known.

    Nothing is downloaded: the card of a hub data set is read from the hub's cache, where loading the data left it.

    Args:
        path: Its path or hub id.
        revision: Of a hub data set.
    """
    return next(_licences(path, revision), None)


def _licences(path: str, revision: str | None) -> Iterator[str]:
    for folder in _folders(path, revision):
        if licence := _of_card(folder / _CARD):
            yield licence
        for name in _FILES:
            if (folder / name).is_file() and (title := _first_line(folder / name)):
                yield f"{title}, in {name}"


def _folders(path: str, revision: str | None) -> Iterator[Path]:
    """Folders with a card: that of the hub's cache, or those of the files and of the source itself."""
    try:
        files = find_files(path)
    except UserError:  # the data may have been moved since the run
        return
    if files is None:
        from huggingface_hub import try_to_load_from_cache

        card = try_to_load_from_cache(path, _CARD, repo_type="dataset", revision=revision)
        if isinstance(card, str):
            yield Path(card).parent
        return
    if Path(path).expanduser().is_dir():
        yield Path(path).expanduser()
    yield from dict.fromkeys(file.parent for paths in files.values() for file in paths)


def _of_card(file: Path) -> str | None:
    """The licence in the header of a card, as on the hub."""
    text = _start(file)
    if not text.startswith("---"):
        return None
    try:
        header = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---"))
    except (yaml.YAMLError, RecursionError):
        return None
    values = header.get("license") if isinstance(header, dict) else None
    names = [str(value) for value in (values if isinstance(values, list) else [values]) if value]
    if names in (["other"], ["unknown"]) and isinstance(header, dict):
        names = [str(header.get("license_name") or names[0])]
    return ", ".join(names) if names and all(_NAME.fullmatch(name) for name in names) else None


def _first_line(file: Path) -> str | None:
    lines = (line.strip(" #\t") for line in _start(file).splitlines())
    first = next((line for line in lines if line), "")
    return first if _NAME.fullmatch(first) else None


def _start(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            return opened.read(_LONGEST).removeprefix("\ufeff")
    except OSError:
        return ""
