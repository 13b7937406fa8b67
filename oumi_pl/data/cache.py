"""From a source to its examples on disk: made once, found again as long as nothing they depend on has changed."""

import hashlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

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
    code = source.format and code_of(resolve_format(source.format, formats))
    parts = [fingerprint(source), source.columns, source.format, code, key, _own_code()]
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
        if not isinstance(record, Record):
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


def code_of(*parts: type | Callable[..., Any]) -> str:
    """Hash of the source of classes and functions and of all that they use, but for libraries and this package.

    A change in any of it has to miss the cache. Followed are the bases of classes, and what the modules of all these
    name: functions, classes, and other modules.
    """
    modules: dict[str, ModuleType] = {}
    waiting: list[Any] = [base for part in parts for base in (part.__mro__ if isinstance(part, type) else (part,))]
    while waiting:
        part = waiting.pop()
        module = part if isinstance(part, ModuleType) else sys.modules.get(getattr(part, "__module__", None) or "")
        if module is None or module.__name__ in modules or _is_library(module):
            continue
        modules[module.__name__] = module
        waiting += [value for value in vars(module).values() if isinstance(value, type | ModuleType) or callable(value)]
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(modules):
        file = getattr(modules[name], "__file__", None)
        text = Path(file).read_bytes() if file else _typed_source(parts, name)
        digest.update(name.encode() + b"\0" + text)
    return digest.hexdigest()


def _is_library(module: ModuleType) -> bool:
    """Whether a module is this package's, the standard library's or an installed one."""
    name, file = module.__name__.partition(".")[0], getattr(module, "__file__", None)
    if name == "oumi_pl" or name in sys.stdlib_module_names - {"__main__"} or (file is None and name != "__main__"):
        return True
    return file is not None and any(part in ("site-packages", "dist-packages") for part in Path(file).parts)


def _typed_source(parts: Sequence[Any], module: str) -> bytes:
    """The source of what was typed into a notebook or an interpreter: there is no file to read."""
    own = [part for part in parts if part.__module__ == module]
    return "".join(inspect.getsource(part) for part in own).encode()


def _own_code() -> str:
    """Hash of the code that makes examples, so that no version of the package reads another's cache."""
    here = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for file in (here.parent / "types.py", *sorted(here.glob("*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()
