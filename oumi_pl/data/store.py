"""Stores of tokenized examples on disk: written once, memory-mapped, and found by a hash of all they depend on."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from oumi_pl.attention.segments import check_segments
from oumi_pl.data.code import code_of
from oumi_pl.data.formats import (
    FORMATS,
    Format,
    Formats,
    find_format,
    format_name,
    raised,
    rename_columns,
    resolve_format,
)
from oumi_pl.data.sources import Source, fingerprint, rows
from oumi_pl.data.tokenize import Dropped
from oumi_pl.errors import UserError, nearest
from oumi_pl.terminal.screen import track
from oumi_pl.types import Example, Record, Row, Segment

REPORT = "report.json"
TABLES = "tables.npz"
FIELD = "field "
"""Prefix of the names of tables with fields of the examples."""


def cache_root() -> Path:
    """The cache directory, which is created: `$OUMI_PL_CACHE`, else `oumi_pl` in the user's cache directory.

    Raises:
        UserError: it can't be created.
    """
    explicit = os.environ.get("OUMI_PL_CACHE")
    root = Path(explicit or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "oumi_pl").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"can't create the cache directory {root}: {error.strerror}; name another one with the environment "
            "variable OUMI_PL_CACHE"
        ) from error
    return root


def cache_key(*parts: Any) -> str:
    """Hash of some JSON values; the same in every process."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `directory` if nothing fails, so that a kill leaves no partial one."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield half
        half.chmod(0o755)  # mkdtemp lets only the owner read it
        try:
            half.rename(directory)
        except OSError:  # another process has written the same folder meanwhile: names are hashes of the content
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


class ExampleStore:
    """Examples of one source as flat arrays: ids and loss mask `[tokens]`, offsets `[examples + 1]`, the segments.

    targets: number of tokens that carry loss, `[examples]` int64. fields: the numeric fields by name, `[examples]`
    float64 each.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.report: dict[str, Any] = json.loads((directory / REPORT).read_text())
        self.input_ids = _mapped(directory / "input_ids.bin", np.int32)
        self.loss_mask = _mapped(directory / "loss_mask.bin", np.bool_)
        with np.load(directory / TABLES) as tables:
            self.offsets = tables["offsets"]
            self.targets = tables["targets"]
            self._segments = tables["segments"]  # [segments, 3], as in `Segment`
            self._first_segment = tables["first_segment"]  # [examples + 1]
            self.fields = {name[len(FIELD) :]: tables[name] for name in tables.files if name.startswith(FIELD)}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        start, stop = self.offsets[index], self.offsets[index + 1]
        first, end = self._first_segment[index], self._first_segment[index + 1]
        return Example(
            np.asarray(self.input_ids[start:stop]),
            np.asarray(self.loss_mask[start:stop]),
            tuple(Segment(*values) for values in self._segments[first:end].tolist()),
            {name: values[index].item() for name, values in self.fields.items()},
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, `[examples]`."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Tokens of the longest path; for pairs, of prompt and longer response."""
        return int((self._segments[:, 0] + self._segments[:, 2]).max(initial=0))

    @property
    def shared(self) -> int:
        """Tokens saved by storing what several paths share once."""
        return int(self._segments[:, 2].sum())

    @property
    def target_tokens(self) -> int:
        """Tokens that carry loss, over all examples."""
        return int(self.targets.sum())


def write_store(directory: Path, examples: Iterable[Example], report: dict[str, Any]) -> ExampleStore:
    """Writes a store in one step.

    `report` is written last, so that it includes what consuming `examples` adds to it. `cut`, `straddled` and
    `empty_answer` are counted there, and not stored per example.

    Raises:
        ValueError: an example is not a tree of segments, or has other fields than those before it.
    """
    with new_folder(directory) as half:
        lengths: list[int] = []
        targets: list[int] = []
        segments: list[Segment] = []
        counts: list[int] = []
        fields: dict[str, list[float]] = {}
        with (half / "input_ids.bin").open("wb") as ids, (half / "loss_mask.bin").open("wb") as masks:
            for example in examples:
                _check(example)
                if not lengths:
                    fields = {name: [] for name in example.fields}
                elif example.fields.keys() != fields.keys():
                    raise ValueError(f"an example with the fields {[*example.fields]} among others with {[*fields]}")
                for name, values in fields.items():
                    values.append(example.fields[name])
                ids.write(example.input_ids.astype(np.int32, copy=False).tobytes())
                masks.write(example.loss_mask.astype(np.bool_, copy=False).tobytes())
                lengths.append(len(example.input_ids))
                targets.append(example.target_tokens)
                segments += example.segments
                counts.append(len(example.segments))
        tables: dict[str, Any] = {
            "offsets": np.cumsum([0, *lengths], dtype=np.int64),
            "targets": np.array(targets, dtype=np.int64),
            "segments": np.array(segments, dtype=np.int64).reshape(-1, 3),
            "first_segment": np.cumsum([0, *counts], dtype=np.int64),
        }
        tables |= {FIELD + name: np.array(values, dtype=np.float64) for name, values in fields.items()}
        np.savez(half / TABLES, **tables)
        (half / REPORT).write_text(json.dumps(report, indent=1))
    return ExampleStore(directory)


def _check(example: Example) -> None:
    """Checks an example for errors that would otherwise silently train on other tokens."""
    tokens, segments = len(example.input_ids), example.segments
    check_segments(segments)
    if not sum(segment.length for segment in segments) == tokens == len(example.loss_mask):
        lengths = [segment.length for segment in segments]
        raise ValueError(f"{tokens} tokens, {len(example.loss_mask)} entries in the loss mask, segments of {lengths}")
    if [i for i, segment in enumerate(segments) if not segment.shared] != [0]:
        raise ValueError(f"the first segment of an example has to be its only root: {segments}")
    if example.loss_mask[0]:
        raise ValueError("the first token carries loss, and nothing predicts it")


def _mapped(file: Path, dtype: type) -> np.ndarray:
    if file.stat().st_size == 0:  # an empty file can't be mapped
        return np.empty(0, dtype=dtype)
    return cast("np.ndarray", np.memmap(file, dtype=dtype, mode="r"))


ENCODE_BATCH = 1000
"""Rows per call of `encode`."""

Encode = Callable[[Sequence[Record]], list[Example | Dropped]]


def example_store(
    source: Source,
    key: list[Any],
    encode: Encode,
    keep: Callable[[Row], bool] | None = None,
    formats: Formats = FORMATS,
    *,
    columns: Sequence[str] = (),
) -> ExampleStore:
    """The tokenized rows of a source, from the cache or written now.

    Args:
        source: The source.
        key: Everything that the examples depend on besides the source's content, its format and this package's code.
        encode: Turns records into examples, or into the reason why not.
        keep: Which rows to use; all when left out.
        formats: The formats that rows may have.
        columns: Columns with numbers, which become fields of the examples.

    Raises:
        UserError: a row is invalid; names its file and line.
    """
    code = source.format and code_of(resolve_format(source.format, formats))
    table = [(function.__module__, function.__qualname__, columns) for function, columns in formats]
    name = source.format and format_name(source.format)
    parts = [fingerprint(source), source.columns, name, code, table, key, columns, _own_code()]
    directory = cache_root() / "examples" / cache_key(*parts)
    if (directory / REPORT).exists():
        store = ExampleStore(directory)
        store.report["source"] = source.title  # the rows may have been written under another name
        return store
    report = _empty_report(source.title)
    if columns:
        keep, encode = _with_columns(columns, keep, encode)
    records = track(source_records(source, keep, report, formats), f"tokenizing {source.title}")
    return write_store(directory, _encoded(records, report, encode), report)


def _with_columns(
    columns: Sequence[str], keep: Callable[[Row], bool] | None, encode: Encode
) -> tuple[Callable[[Row], bool], Encode]:
    """Adds columns of the rows to the fields of their examples: rows are seen by `keep`, and records by `encode`."""
    waiting: deque[dict[str, float]] = deque()

    def kept(row: Row) -> bool:
        if keep is not None and not keep(row):
            return False
        waiting.append({column: _number(row, column) for column in columns})
        return True

    def encoded(records: Sequence[Record]) -> list[Example | Dropped]:
        values = [waiting.popleft() for _ in records]
        pairs = zip(encode(records), values, strict=True)
        return [replace(e, fields={**e.fields, **own}) if isinstance(e, Example) else e for e, own in pairs]

    return kept, encoded


def _number(row: Row, column: str) -> float:
    """The number in a column; NaN if it is null.

    Raises:
        UserError: the row has no such column, or something else in it.
    """
    if column not in row:
        raise UserError(f"data.fields: a row has no column {column!r}{nearest(column, row)}")
    value = row[column]
    if value is not None and not isinstance(value, bool | int | float):
        raise UserError(f"data.fields: {column!r} is {value!r} in a row, and a field is a number")
    return float("nan") if value is None else float(value)


def source_records(
    source: Source,
    keep: Callable[[Row], bool] | None = None,
    report: dict[str, Any] | None = None,
    formats: Formats = FORMATS,
) -> Iterator[tuple[str, Record]]:
    """Yields the records of a source with their origin (file and line); counts rows in `report`.

    Raises:
        UserError: a row does not have the format.
    """
    convert = resolve_format(source.format, formats) if source.format else None
    for origin, row in rows(source):
        if keep is not None and not keep(row):
            continue
        if report is not None:
            report["rows"] += 1
        try:
            renamed = rename_columns(row, source.columns or {})
            convert = convert or find_format(renamed.keys(), formats)
            record = convert(renamed)
        except UserError as error:
            other = source.format is None and convert is not None and _other_format(renamed, convert, formats)
            raise UserError(f"{origin}: {other or error}") from None
        except Exception as error:
            if source.format is None:
                raise
            raise UserError(f"{origin}: {raised(format_name(source.format), error)}") from error
        if not isinstance(record, Record):
            raise UserError(
                f"{origin}: {format_name(source.format or 'the format')} returned a {type(record).__name__} for this "
                "row; a format returns a "
                "Conversation, a Text or a Preference"
            )
        yield origin, record


def _other_format(row: Row, before: Format, formats: Formats) -> str | None:
    """The message for a row of another format than those before it; None if it has no known format."""
    try:
        own = find_format(row.keys(), formats)
    except UserError:
        return None
    if own is before:
        return None
    return (
        f"a row of the format {own.__name__}, and those before it are {before.__name__}; put the rows of each format "
        "in a separate file, and name both as sources"
    )


def _encoded(records: Iterable[tuple[str, Record]], report: dict[str, Any], encode: Encode) -> Iterator[Example]:
    iterator = iter(records)
    while batch := list(itertools.islice(iterator, ENCODE_BATCH)):
        try:
            encoded = encode([record for _, record in batch])
        except UserError:
            _name_the_row(batch, encode)
            raise
        for example in encoded:
            _count(report, example)
            if isinstance(example, Example):
                yield example


def _name_the_row(batch: list[tuple[str, Record]], encode: Encode) -> None:
    """Encodes row by row, after a batch has failed, and adds the row's origin to the error."""
    for origin, record in batch:
        try:
            encode([record])
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None


def _own_code() -> str:
    """Hash of this package's code that makes examples, so that no version reads another's cache."""
    here = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for file in (here.parent / "types.py", *sorted(here.glob("*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _empty_report(source: str) -> dict[str, Any]:
    """A report with nothing counted yet."""
    return {"source": source, "rows": 0, "kept": 0, "dropped": {}, "cut": 0, "straddled": 0, "empty_answers": 0}


def _count(report: dict[str, Any], example: Example | Dropped) -> None:
    """Adds one encoded row to a report, in place."""
    if isinstance(example, Dropped):
        report["dropped"][example.reason] = report["dropped"].get(example.reason, 0) + 1
        return
    report["kept"] += 1
    report["cut"] += example.cut
    report["straddled"] += example.straddled
    report["empty_answers"] += example.empty_answer
