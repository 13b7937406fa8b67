"""From a source to its examples on disk: made once, found again as long as nothing they depend on has changed."""

import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from oumi_pl.data import report as reports
from oumi_pl.data.formats import FORMATS, Format, Formats, find_format, raised, rename_columns, resolve_format
from oumi_pl.data.sources import Source, fingerprint, rows
from oumi_pl.data.store import REPORT, ExampleStore, cache_key, cache_root, write_store
from oumi_pl.data.tokenize import Dropped
from oumi_pl.errors import UserError
from oumi_pl.terminal.progress import track
from oumi_pl.types import Example, Record, Row

ENCODE_BATCH = 1000
"""Rows that the tokenizer sees at once."""

Encode = Callable[[Sequence[Record]], list[Example | Dropped]]


def example_store(
    source: Source,
    key: list[Any],
    encode: Encode,
    keep: Callable[[Row], bool] | None = None,
    formats: Formats = FORMATS,
) -> ExampleStore:
    """The tokenized rows of a source, from the cache or made now.

    Args:
        source: Where the rows come from.
        key: What the examples depend on besides the source's content, its format and this package's code.
        encode: Turns records into examples, or into the reason why not.
        keep: Which rows to take; all when left out.
        formats: The formats that rows may have.

    Raises:
        UserError: for whatever is wrong with a row, with its file and line.
    """
    names = [function.__name__ for function, _ in formats]
    parts = [fingerprint(source), source.columns, _code_of(source.format, formats), names, key, _own_code()]
    directory = cache_root() / "examples" / cache_key(*parts)
    if (directory / REPORT).exists():
        return ExampleStore(directory)
    report = reports.empty(source.path)
    records = track(source_records(source, keep, report, formats), f"tokenizing {source.path}")
    return write_store(directory, _encoded(records, report, encode), report)


def source_records(
    source: Source,
    keep: Callable[[Row], bool] | None = None,
    report: dict[str, Any] | None = None,
    formats: Formats = FORMATS,
) -> Iterator[tuple[str, Record]]:
    """The records of a source with their origin (file and line); rows are counted in `report`.

    Raises:
        UserError: for a row that the format can't make a record of.
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
            raise UserError(f"{origin}: {raised(source.format, error)}") from error
        if not isinstance(record, get_args(Record)):
            made = f"{source.format} made a {type(record).__name__} of this row"
            raise UserError(f"{origin}: {made}; a format makes a Conversation, a Text or a Preference")
        yield origin, record


def _other_format(row: Row, before: Format, formats: Formats) -> str | None:
    """What to say of a row that has another format than those before it; None if it has none at all."""
    try:
        own = find_format(row.keys(), formats)
    except UserError:
        return None
    if own is before:
        return None
    return (
        f"a row of the format {own.__name__}, and those before it are {before.__name__}; put the rows of each format "
        "in a file of its own, and name both as sources"
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
            reports.count(report, example)
            if isinstance(example, Example):
                yield example


def _name_the_row(batch: list[tuple[str, Record]], encode: Encode) -> None:
    """Encodes row by row to tell which one is wrong: only ever called on the way out."""
    for origin, record in batch:
        try:
            encode([record])
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None


def _code_of(format_name: str | None, formats: Formats) -> list[str | None]:
    """Name and source text of a format function: changing a function of one's own must not hit the old cache."""
    if format_name is None:
        return [None, None]
    return [format_name, inspect.getsource(resolve_format(format_name, formats))]


def _own_code() -> str:
    """Hash of the code that makes examples, so that no version of the package reads another's cache."""
    here = Path(__file__).parent
    data = ("columns", "formats", "preferences", "template", "tokenize", "pairs", "store")
    digest = hashlib.blake2b(digest_size=16)
    for file in (here.parent / "types.py", *(here / f"{name}.py" for name in data)):
        digest.update(file.read_bytes())
    return digest.hexdigest()
