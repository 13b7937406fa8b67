"""Stores of tokenized examples on disk: written once, memory-mapped, and found by a hash of all they depend on."""

import contextlib
import hashlib
import itertools
import json
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from oumi_pl.attention.segments import check_segments
from oumi_pl.data.code import code_of
from oumi_pl.data.duplicates import Repeats, RowKeys, line_of, read_lines
from oumi_pl.data.formats import FORMATS, Formats, format_name, resolve_format
from oumi_pl.data.processes import mapped
from oumi_pl.data.records import BadRows, OnBadRows, RecordWithFields, record_reader
from oumi_pl.data.sources import Source, expected_rows, fingerprint, origin_names
from oumi_pl.data.splitting import Side
from oumi_pl.data.tokenize import Dropped
from oumi_pl.errors import UserError, cache_folder
from oumi_pl.runs import checksums
from oumi_pl.runs.files import remove, sync, sync_all
from oumi_pl.runs.folders import half_of, remove_abandoned
from oumi_pl.terminal.screen import track
from oumi_pl.terminal.text import echo
from oumi_pl.types import BadRow, Example, Record, Segment

REPORT = "report.json"
TABLES = "tables.npz"
ORIGINS = "origins.txt"
COLUMNS = "columns.json"
FIELD = "field "
"""Prefix of the names of tables with fields of the examples."""


def cache_root() -> Path:
    """The cache directory, which is created: `$OUMI_PL_CACHE`, else `oumi_pl` in the user's cache directory.

    Raises:
        UserError: it can't be created.
    """
    root = cache_folder()
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
    """Yields a temporary folder that becomes `directory` if nothing fails, so that a kill leaves no partial one.

    It gets a list of checksums, and is on disk before it gets its name.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(directory.parent)
    half = half_of(directory)
    remove(half)
    half.mkdir()
    try:
        yield half
        checksums.write_list(half)
        sync_all(half)
        try:
            half.rename(directory)
        except OSError:  # another process has written the same folder meanwhile: names are hashes of the content
            if not directory.exists():
                raise
        sync(directory.parent)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def is_whole(directory: Path) -> bool:
    """Whether a folder of the cache is there and whole. A damaged one is removed, which prints a line.

    Raises:
        UserError: a damaged one can't be removed.
    """
    if not directory.exists():
        return False
    has_list = (directory / checksums.LIST).exists()
    why = checksums.damage(directory) if has_list else f"it has no {checksums.LIST}"  # or is of an older version
    if why is None:
        return True
    echo(f"the cache folder {directory} is damaged: {why}; it is written again", file=sys.stderr)
    try:
        # moved first: another process may be reading it, or removing it as well
        gone = half_of(directory)
        directory.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    except OSError as error:
        if directory.exists():
            raise UserError(f"can't remove the damaged cache folder {directory}: {error.strerror}") from error
    return False


class ExampleStore:
    """Examples of one source as flat arrays: ids and loss mask `[tokens]`, offsets `[examples + 1]`, the segments.

    targets: number of tokens that carry loss, `[examples]` int64. target_weights: sum of their weights, `[examples]`
    float64; None if all are 1. fields: the numeric fields by name, `[examples]` float64 each. record_keys, prompt_keys:
    hashes of what the row of each example says and of its prompt, `[examples]` uint64.

    Raises:
        DamagedError: a file is not as it was written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        checksums.refuse_damaged(directory)
        self.report: dict[str, Any] = json.loads((directory / REPORT).read_text())
        self._names: list[str] = self.report.pop("names", [])
        self._renamed: dict[str, str] = {}
        self.input_ids = _mapped(directory / "input_ids.bin", np.int32)
        self.loss_mask = _mapped(directory / "loss_mask.bin", np.bool_)
        weights = directory / "weights.bin"
        self.weights = _mapped(weights, np.float32) if weights.exists() else None
        with np.load(directory / TABLES) as tables:
            self.offsets = tables["offsets"]
            self.targets = tables["targets"]
            self.target_weights = None if self.weights is None else tables["target_weights"]
            self._segments = tables["segments"]  # [segments, 3], as in `Segment`
            self._first_segment = tables["first_segment"]  # [examples + 1]
            self.fields = {name[len(FIELD) :]: tables[name] for name in tables.files if name.startswith(FIELD)}
            self.record_keys: np.ndarray = tables["record_keys"]
            self.prompt_keys: np.ndarray = tables["prompt_keys"]

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
            weights=None if self.weights is None else np.asarray(self.weights[start:stop]),
        )

    @cached_property
    def origins(self) -> list[str]:
        """File and line of each example's row."""
        origins = read_lines(self.directory / ORIGINS)
        return [self._origin(origin) for origin in origins] if self._renamed else origins

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """Values that rows are drawn or ordered by, of each example."""
        file = self.directory / COLUMNS
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def rename(self, source: str, names: list[str]) -> None:
        """Sets the name of the source, and of the files that origins name: they may have been moved since."""
        self.report["source"] = source
        if len(names) == len(self._names) and names != self._names:
            self._renamed = dict(zip(self._names, names, strict=True))
            for kind in self.report.get("bad_rows", {}).values():
                kind["first"] = [self._origin(origin) for origin in kind["first"]]

    def _origin(self, origin: str) -> str:
        """An origin with the file's present name."""
        for before in sorted(self._renamed, key=len, reverse=True):
            if origin.startswith(before) and origin[len(before) : len(before) + 1] in ("", ":", " "):
                return self._renamed[before] + origin[len(before) :]
        return origin

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
    def branched(self) -> int:
        """Number of examples with several segments."""
        return int((np.diff(self._first_segment) > 1).sum())

    @property
    def beyond_longest(self) -> int:
        """Tokens that examples have besides those of their longest path."""
        if not len(self):
            return 0
        paths = np.maximum.reduceat(self._segments[:, 0] + self._segments[:, 2], self._first_segment[:-1])
        return int(self.offsets[-1] - paths.sum())

    @property
    def mean_length(self) -> float:
        """Tokens per example; 1 if there are none."""
        return float(self.lengths.mean()) if len(self) else 1.0

    @property
    def mean_target_weight(self) -> float:
        """The weight of the tokens that carry loss, per example; 1 if there are none."""
        weights = self.targets if self.target_weights is None else self.target_weights
        return float(weights.mean()) if len(self) else 1.0

    @property
    def target_tokens(self) -> int:
        """Tokens that carry loss, over all examples."""
        return int(self.targets.sum())


def write_store(
    directory: Path, examples: Iterable[Example], report: dict[str, Any], keys: RowKeys | None = None
) -> ExampleStore:
    """Writes a store in one step.

    `report` and `keys` are written last, so that they include what consuming `examples` adds to them. `cut`,
    `straddled` and `empty_answer` are counted in the report, and not stored per example. Without `keys`, all rows
    differ.

    Raises:
        ValueError: an example is not a tree of segments, or has other fields than those before it.
    """
    with new_folder(directory) as half:
        lengths: list[int] = []
        targets: list[int] = []
        target_weights: list[float] = []
        segments: list[Segment] = []
        counts: list[int] = []
        fields: dict[str, list[float]] = {}
        weights: BinaryIO | None = None  # opened at the first example whose weights are not all 1
        with contextlib.ExitStack() as files:
            ids, masks = (files.enter_context((half / f"{name}.bin").open("wb")) for name in ("input_ids", "loss_mask"))
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
                if weights is None and example.weights is not None:
                    weights = files.enter_context((half / "weights.bin").open("wb"))
                    for length in lengths:
                        weights.write(np.ones(length, dtype=np.float32).tobytes())
                if weights is not None:
                    own = np.ones(len(example.input_ids)) if example.weights is None else example.weights
                    weights.write(own.astype(np.float32, copy=False).tobytes())
                lengths.append(len(example.input_ids))
                targets.append(example.target_tokens)
                target_weights.append(example.target_weight)
                segments += example.segments
                counts.append(len(example.segments))
        tables: dict[str, Any] = {
            "offsets": np.cumsum([0, *lengths], dtype=np.int64),
            "targets": np.array(targets, dtype=np.int64),
            "segments": np.array(segments, dtype=np.int64).reshape(-1, 3),
            "first_segment": np.cumsum([0, *counts], dtype=np.int64),
        }
        tables |= {FIELD + name: np.array(values, dtype=np.float64) for name, values in fields.items()}
        if weights is not None:
            tables["target_weights"] = np.array(target_weights, dtype=np.float64)
        tables |= _write_keys(half, keys, len(lengths))
        np.savez(half / TABLES, **tables)
        (half / REPORT).write_text(json.dumps(report, indent=1))
    return ExampleStore(directory)


def _write_keys(directory: Path, keys: RowKeys | None, count: int) -> dict[str, np.ndarray]:
    """Writes the origins of the rows to a folder, and returns tables of their keys; without keys, all rows differ."""
    numbers = np.arange(count, dtype=np.uint64)
    origins = [f"row {i + 1}" for i in numbers.tolist()] if keys is None else keys.origins
    (directory / ORIGINS).write_bytes(b"".join(map(line_of, origins)))
    if keys is not None and keys.columns:
        (directory / COLUMNS).write_text(json.dumps(keys.columns), encoding="utf-8")
    if keys is None:
        return {"record_keys": numbers, "prompt_keys": numbers}
    return {"record_keys": keys.record_keys, "prompt_keys": keys.prompt_keys}


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
    if example.weights is not None:
        if len(example.weights) != tokens:
            raise ValueError(f"{tokens} tokens, and {len(example.weights)} weights")
        if not (example.weights[example.loss_mask] > 0).all():
            raise ValueError("a token that carries loss has a weight that isn't above 0")


def _mapped(file: Path, dtype: type) -> np.ndarray:
    if file.stat().st_size == 0:  # an empty file can't be mapped
        return np.empty(0, dtype=dtype)
    return cast("np.ndarray", np.memmap(file, dtype=dtype, mode="r"))


ENCODE_BATCH = 200
"""Rows per call of `encode`. With larger batches, Python's garbage collector goes through all objects more often."""
HOPELESS = 1000
"""Bad rows after which the others are not looked at, if no row was usable until then."""

Encode = Callable[[Sequence[Record]], list[Example | Dropped]]


def example_store(
    source: Source,
    key: list[Any],
    encode: Encode,
    keep: Side | None = None,
    formats: Formats = FORMATS,
    *,
    bad_rows: OnBadRows = "error",
    columns: Sequence[str] = (),
    kept: Sequence[str] = (),
    processes: int = 1,
    before: Sequence[ExampleStore] | None = None,
) -> ExampleStore:
    """The tokenized rows of a source, from the cache or written now.

    Args:
        source: The source.
        key: Everything that the examples depend on besides the source's content, its format and this package's code.
        encode: Turns records into examples, or into the reason why not.
        keep: Which rows to use; all when left out.
        formats: The formats that rows may have.
        bad_rows: Whether rows that can't be used stop the run, after all rows were looked at, or are left out.
        columns: Columns with numbers, which become fields of the examples.
        kept: Columns that are stored beside the examples.
        processes: How many processes call `encode`. The store is the same for any number.
        before: Stores whose rows are left out here, and so are rows that repeat another one of the source; None: all
            rows are used.

    Raises:
        UserError: rows can't be used; lists the reasons with the files and lines of the first rows.
    """
    reading = [source.columns, source.ignore, source.label, source.template_variables, bad_rows, columns, kept]
    parts = [fingerprint(source), reading, *_format_key(source, formats), key, own_code()]
    parts += [] if before is None else [[store.directory.name for store in before]]
    directory = cache_root() / "examples" / cache_key(*parts)
    if is_whole(directory):
        store = ExampleStore(directory)
        store.rename(source.title, origin_names(source))  # the rows may have been written under another name
        return store
    report = _empty_report(source.title) | {"names": origin_names(source)}
    keys = RowKeys()
    reader = record_reader(source, formats, columns, kept)
    repeats, total = Repeats(before), expected_rows(source, keep)
    records = repeats.leave_out(track(reader.records(keep, strict=False), f"tokenizing {source.title}", total=total))

    def examples() -> Iterator[Example]:
        bad = BadRows()
        encode_records = partial(with_fields, encode) if columns or kept else encode
        yield from _encoded(records, report, encode_records, bad, processes=processes, keys=keys)
        if bad.count and bad_rows == "error":
            raise bad.error(source.title, report["rows"])
        reader.add_left_out(report, keep)
        repeats.add_to(report)
        bad.add_to(report)
        if replaced := reader.counts["replaced"]:
            report["notes"]["U+FFFD in place of bytes that aren't UTF-8 (characters, not rows)"] = replaced
        if reader.unread:
            report["unread_columns"] = sorted(reader.unread)

    return write_store(directory, examples(), report, keys)


def _format_key(source: Source, formats: Formats) -> list[Any]:
    """Identifies how rows become records: the source's own format and its code, and the formats to choose from."""
    code = source.format and code_of(resolve_format(source.format, formats))
    table = [(function.__module__, function.__qualname__, columns) for function, columns in formats]
    return [source.format and format_name(source.format), code, table]


def with_fields(encode: Encode, records: Sequence[Record]) -> list[Example | Dropped]:
    """Encodes the records of a `FieldReader`, and adds their numbers to the fields of the examples."""
    own = cast("Sequence[RecordWithFields]", records)
    pairs = zip(encode([one.record for one in own]), own, strict=True)
    return [replace(e, fields={**e.fields, **one.fields}) if isinstance(e, Example) else e for e, one in pairs]


@dataclass
class _Rows:
    """A batch of rows as they were read."""

    rows: int
    bad: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def _encoded(
    records: Iterable[tuple[str, Record | Dropped | BadRow]],
    report: dict[str, Any],
    encode: Encode,
    bad: BadRows,
    *,
    processes: int,
    keys: RowKeys,
) -> Iterator[Example]:
    """Yields the examples, whose rows it adds to `keys`; counts all rows in `report`, and adds bad ones to `bad`."""
    sent: deque[_Rows] = deque()

    def batches() -> Iterator[list[Record]]:
        for batch in _batches(records):
            sent.append(batch)
            yield batch.records

    of_batch = partial(encode_all, encode)
    alone = (of_batch(batch) for batch in batches()) if processes == 1 else None
    with contextlib.closing(alone or mapped(of_batch, batches(), processes, "data.processes")) as results:
        for result in results:
            batch = sent.popleft()
            report["rows"] += batch.rows
            for origin, reason in batch.bad:
                bad.add(origin, reason)
            for dropped in batch.dropped:
                _count(report, dropped)
            for origin, record, example in zip(batch.origins, batch.records, result, strict=True):
                if isinstance(example, BadRow):
                    bad.add(origin, example.reason)
                    continue
                _count(report, example)
                if isinstance(example, Example):
                    keys.add(origin, record, record.columns if isinstance(record, RecordWithFields) else None)
                    yield example
            if not report["kept"] and bad.count >= HOPELESS:  # no row fits the template, say
                return


def _batches(records: Iterable[tuple[str, Record | Dropped | BadRow]]) -> Iterator[_Rows]:
    iterator = iter(records)
    while rows := list(itertools.islice(iterator, ENCODE_BATCH)):
        batch = _Rows(len(rows))
        for origin, record in rows:
            if isinstance(record, BadRow):
                batch.bad.append((origin, record.reason))
            elif isinstance(record, Dropped):
                batch.dropped.append(record)
            else:
                batch.origins.append(origin)
                batch.records.append(record)
        yield batch


def encode_all(encode: Encode, records: list[Record]) -> list[Example | Dropped | BadRow]:
    """Encodes a batch; if that fails, row by row, to find the bad ones."""
    try:
        return list(encode(records))
    except UserError as error:
        failed = error
    encoded: list[Example | Dropped | BadRow] = []
    for record in records:
        try:
            encoded += encode([record])
        except UserError as error:
            encoded.append(BadRow(str(error)))
    if not any(isinstance(row, BadRow) for row in encoded):
        raise failed
    return encoded


def own_code() -> str:
    """Hash of this package's code that makes examples, so that no version reads another's cache."""
    here = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for file in (here.parent / "types.py", *sorted(here.glob("*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _empty_report(source: str) -> dict[str, Any]:
    """A report with nothing counted yet."""
    return {
        "source": source,
        "rows": 0,
        "kept": 0,
        "dropped": {},
        "cut": 0,
        "straddled": 0,
        "empty_answers": 0,
        "notes": {},
    }


def _count(report: dict[str, Any], example: Example | Dropped) -> None:
    """Adds one encoded row to a report, in place."""
    if isinstance(example, Dropped):
        report["dropped"][example.reason] = report["dropped"].get(example.reason, 0) + 1
        return
    report["kept"] += 1
    report["cut"] += example.cut
    report["straddled"] += example.straddled
    report["empty_answers"] += example.empty_answer
    for note in example.notes:
        report["notes"][note] = report["notes"].get(note, 0) + 1
