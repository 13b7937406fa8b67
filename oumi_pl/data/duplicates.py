"""Duplicates: rows that are repeated within a split, and held-out rows whose prompt is in training too."""

import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from oumi_pl.data.splitting import content_hash, prompt_hash
from oumi_pl.data.tokenize import Dropped
from oumi_pl.runs.files import sync
from oumi_pl.runs.folders import half_of
from oumi_pl.types import BadRow, Record

Duplicates = Literal["keep", "drop"]

REPEATED = "repeats an earlier row"
"""Reason for dropping a row, as it is in reports."""
LISTED = 5
"""Maximum number of pairs of rows in a report."""


class Keyed(Protocol):
    """Rows with their keys, such as an `ExampleStore`."""

    @property
    def origins(self) -> Sequence[str]:
        """File and line of each row."""

    @property
    def record_keys(self) -> np.ndarray:
        """Hash of what each row says, `[rows]` uint64."""

    @property
    def prompt_keys(self) -> np.ndarray:
        """Hash of each row's prompt, `[rows]` uint64."""


class RowKeys:
    """The keys of rows, collected one by one."""

    def __init__(self) -> None:
        self.origins: list[str] = []
        self.columns: dict[str, list[Any]] = {}
        """Values that rows are drawn or ordered by."""
        self._records = array("Q")
        self._prompts = array("Q")

    def add(self, origin: str, record: Record, columns: Mapping[str, Any] | None = None) -> None:
        """Adds a row."""
        self.origins.append(origin)
        for name, value in (columns or {}).items():
            self.columns.setdefault(name, []).append(value)
        self._records.append(content_hash(record.content_key()))
        self._prompts.append(prompt_hash(record.split_key()))

    @property
    def record_keys(self) -> np.ndarray:
        """Hash of what each row says, `[rows]` uint64."""
        return np.array(self._records, dtype=np.uint64)

    @property
    def prompt_keys(self) -> np.ndarray:
        """Hash of each row's prompt, `[rows]` uint64."""
        return np.array(self._prompts, dtype=np.uint64)


class KeyFiles:
    """The keys of rows, written to files one by one: a corpus may have more rows than fit into memory.

    Args:
        directory: Their folder. The files get their names when `close` is called.
    """

    KEYS = "keys.bin"
    """Hashes of what each row says and of its prompt, `[rows, 2]` uint64."""
    ORIGINS = "origins.txt"
    """File and line of each row."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = {name: half_of(directory / name).open("wb") for name in (self.KEYS, self.ORIGINS)}

    def add(self, origin: str, record: Record) -> None:
        """Adds a row."""
        keys = content_hash(record.content_key()), prompt_hash(record.split_key())
        self._files[self.KEYS].write(struct.pack("<QQ", *keys))
        self._files[self.ORIGINS].write(line_of(origin))

    def close(self, *, keep: bool) -> None:
        """Closes the files, and names or removes them."""
        for name, file in self._files.items():
            file.close()
            half = Path(file.name)
            if keep:
                sync(half)
                half.replace(self.directory / name)
            else:
                half.unlink(missing_ok=True)


def line_of(origin: str) -> bytes:
    """The line of a file that holds an origin."""
    # a file's name may have bytes that aren't UTF-8, which Python reads as halves of surrogate pairs
    return origin.replace("\n", " ").encode(errors="surrogateescape") + b"\n"


def read_lines(file: Path) -> list[str]:
    """The origins that a file holds."""
    content = file.read_bytes().decode(errors="surrogateescape")
    return content.removesuffix("\n").split("\n") if content else []


class Lines(Sequence[str]):
    """As `read_lines`, but a line is only decoded when it is asked for."""

    def __init__(self, file: Path) -> None:
        self._bytes = np.fromfile(file, dtype=np.uint8)
        self._ends = np.flatnonzero(self._bytes == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self._bytes[start : int(self._ends[index])].tobytes().decode(errors="surrogateescape")


class Repeats:
    """Leaves out rows that repeat an earlier one, and counts them.

    Args:
        before: Rows of the sources before this one; None keeps every row.
    """

    def __init__(self, before: Iterable[Keyed] | None) -> None:
        self.rows = 0
        self.first: list[list[str]] = []
        """The first repeated rows, each with the one that it repeats."""
        self._keeps_all = before is None
        self._origins: dict[int, str] = {}
        self._earlier: dict[int, str] = {}
        for rows in before or ():
            for key, origin in zip(rows.record_keys.tolist(), rows.origins, strict=True):
                self._earlier.setdefault(key, origin)

    def leave_out(
        self, records: Iterable[tuple[str, Record | Dropped | BadRow]]
    ) -> Iterator[tuple[str, Record | Dropped | BadRow]]:
        """Yields the records; `Dropped` in place of one that repeats another row.

        A row that is read twice, because `sample` asks for more rows than there are, is not a duplicate; a row of a
        file that is also in an earlier source is one.
        """
        for origin, record in records:
            if isinstance(record, Record) and self.is_repeated(origin, record):
                yield origin, Dropped(REPEATED)
            else:
                yield origin, record

    def is_repeated(self, origin: str, record: Record) -> bool:
        """Whether the record repeats one of an earlier row; counts it."""
        if self._keeps_all:
            return False
        key = content_hash(record.content_key())
        before, here = self._earlier.get(key), self._origins.setdefault(key, origin)
        if before is None and here == origin:
            return False
        self.rows += 1
        self.first = [*self.first, [origin, here if before is None else before]][:LISTED]
        return True

    def add_to(self, report: dict[str, Any]) -> None:
        """Adds the number of rows that were left out, and the first of them, to a report."""
        if self.rows:
            report["duplicates"] = {"rows": self.rows, "first": self.first}


def repeated(sources: Sequence[Keyed]) -> dict[str, Any]:
    """Counts the rows that repeat an earlier one, with the first of them and the rows that they repeat."""
    keys = np.concatenate([rows.record_keys for rows in sources])
    _, first_places, numbers = np.unique(keys, return_index=True, return_inverse=True)
    earliest = first_places[numbers]
    again = np.flatnonzero(earliest != np.arange(len(keys)))
    if not len(again):
        return {"rows": 0, "first": []}
    place = Places(sources)
    pairs = ((place(i), place(earliest[i])) for i in again.tolist())
    # not the same row, which `sample` reads several times
    others = [(row, earlier) for row, earlier in pairs if row != earlier]
    return {"rows": len(others), "first": [[row[1], earlier[1]] for row, earlier in others[:LISTED]]}


class Places:
    """Number of the source, and origin, of rows that are counted over several sources."""

    def __init__(self, sources: Sequence[Keyed]) -> None:
        self.origins = [rows.origins for rows in sources]
        self.starts = np.cumsum([0, *map(len, self.origins)])

    def __call__(self, row: int) -> tuple[int, str]:
        """The number of the source, and the origin, of a row."""
        source = int(np.searchsorted(self.starts, row, side="right")) - 1
        return source, self.origins[source][row - int(self.starts[source])]


def prompts_in_training(held_out: Keyed, training: Sequence[Keyed]) -> dict[str, Any]:
    """Counts the held-out rows whose prompt (of texts without one: whose text) is in training too.

    Returns:
        `rows`, how many of these are `identical` to a training row, and the `first` of them, each with a training row.
    """
    known, places = np.unique(np.concatenate([rows.prompt_keys for rows in training]), return_index=True)
    at = np.minimum(np.searchsorted(known, held_out.prompt_keys), max(0, len(known) - 1))
    shared = np.flatnonzero(known[at] == held_out.prompt_keys) if len(known) else np.empty(0, dtype=np.int64)
    if not len(shared):
        return {"rows": 0, "identical": 0, "first": []}
    records = np.concatenate([rows.record_keys for rows in training])
    identical = int(np.isin(held_out.record_keys[shared], records).sum())
    place = Places(training)
    first = [[held_out.origins[i], place(places[at[i]])[1]] for i in shared[:LISTED].tolist()]
    return {"rows": len(shared), "identical": identical, "first": first}
