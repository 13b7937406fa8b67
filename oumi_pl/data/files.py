"""Reads the rows of a local file: JSON (lines, or one document), CSV and text, also as `.gz` or `.zst`; Parquet, Arrow.

Text is read line by line, not by `datasets`: an error names file and line, a row keeps exactly its own keys (Arrow
gives all rows the same keys, so a tool call would get the arguments of all others), and nothing is copied to a cache.
Tables are read by pyarrow, a batch of rows at a time.
"""

import codecs
import contextlib
import csv
import gzip
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from oumi_pl.errors import UserError
from oumi_pl.types import BadRow, Row

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""File suffix -> kind of file."""
TABLES = ("parquet", "arrow")
"""Kinds with built-in compression, which are not read as `.gz` or `.zst`."""

LONGEST_LINE = 1 << 28
"""Maximum bytes of a line of JSON lines: a compressed file, or one without line ends, could fill the memory."""
DEEPEST = 100
"""Maximum nesting depth of a row: other code recurses through it."""

_BATCH = 1000  # rows of a table in memory
_MAX_CELL = 2**31 - 1  # characters of a CSV cell; the module's own limit of 131,072 is too short for documents
_ZSTD_CHUNK = 1 << 12  # compressed bytes read at once; decompressed, they have to fit into memory (up to 128 MB)
_ZSTD_WINDOW = 1 << 31  # published dumps are made with `zstd --long=31`


@dataclass(frozen=True)
class Reading:
    """How text files are read.

    documents: how a `.txt` file is divided into documents: not at all (`file`), at `blank_lines`, into `lines`, or
    at each occurrence of this text. encoding: of text files. replace: replace undecodable bytes with U+FFFD instead
    of raising an error. counts: `replaced` counts those characters. strict: raise an error for something that isn't
    a row; else yield a `BadRow` in its place, if the rows after it can be read.
    """

    documents: str = "file"
    encoding: str = "utf-8"
    replace: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    strict: bool = True


def kind_of(path: Path) -> str | None:
    """Kind of a data file by its suffix (`a.jsonl.gz` -> `jsonl`), or None if it isn't one."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        kind = KINDS.get(suffixes[0]) if len(suffixes) == 2 else None
        return None if kind in TABLES else kind
    return KINDS.get(suffixes[-1]) if suffixes else None


class RowError(UserError):
    """Something that isn't a row, where the rows after it can be read."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


def read_file(path: Path, name: str, how: Reading | None = None) -> Iterator[tuple[str, Row | BadRow]]:
    """Reads the rows of a file, each with its origin.

    JSON lines, CSV and text are read one row at a time, tables a batch of rows at a time, a JSON document at once. CSV
    cells are text, empty ones too. A text file's rows are its documents, with the column `text`.

    Args:
        path: the file; its kind is one of `KINDS`.
        name: the file's name in messages.
        how: how to read it; by default strictly, with a text file as one document.

    Yields:
        `("name:17", row)`, counted in lines, or `("name row 3", row)`; both start at 1.

    Raises:
        UserError: the file can't be read to its end, or something in it isn't a row (if `how.strict`).
    """
    return _READERS[kind_of(path) or ""](path, name, how or Reading())


def count_rows(path: Path, name: str, how: Reading) -> int:
    """Number of rows of a file; JSON lines and tables are counted without parsing them."""
    look = Reading(how.documents, how.encoding, how.replace)  # with a separate counter, since the rows are read again
    if kind_of(path) in TABLES:
        return sum(batch.num_rows for batch in _batches(path, name))
    if kind_of(path) == "jsonl":
        return sum(1 for _, line in _lines(path, name, look, LONGEST_LINE) if line.strip())
    return sum(1 for _ in read_file(path, name, look))


# --- kinds of file ---------------------------------------------------------------------------------------------------


def _json_lines(path: Path, name: str, how: Reading) -> Iterator[tuple[str, Row | BadRow]]:
    for number, offset, data in _raw_lines(path, name, how, LONGEST_LINE):
        where = f"{name}:{number}"
        try:
            # files that were concatenated have the byte order mark of each
            line = _decoded(data, name, number, offset, how).removeprefix("\ufeff")
            if line.strip():
                yield where, _row(_parse(line.rstrip(), name, number), where)
        except RowError as error:
            if how.strict:
                raise
            yield where, BadRow(error.reason)


def _json(path: Path, name: str, how: Reading) -> Iterator[tuple[str, Row | BadRow]]:
    if _holds_lines(path, name, how):
        yield from _json_lines(path, name, how)
        return
    text = "".join(line for _, line in _lines(path, name, how))
    if not text.strip():
        return
    value = _parse(text, name)
    if isinstance(value, dict):
        value = _unwrapped(value, name)
    if not isinstance(value, list):
        raise UserError(f"{name}: expected a list of objects (the rows), found {_word(value)}")
    for number, item in enumerate(value, 1):
        where = f"{name} row {number}"
        try:
            yield where, _row(item, where)
        except RowError as error:
            if how.strict:
                raise
            yield where, BadRow(error.reason)


def _holds_lines(path: Path, name: str, how: Reading) -> bool:
    """Whether a `.json` file holds JSON lines: its first line is a whole object, and more lines follow."""
    # with a separate counter, since the lines are read again
    look = Reading(encoding=how.encoding, replace=how.replace)
    filled = (line for _, line in _lines(path, name, look) if line.strip())
    first, second = next(filled, ""), next(filled, None)
    if second is None or not first.lstrip().startswith("{"):
        return False
    try:
        json.loads(first)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):  # JSON, but not a row that can be used
        return True
    return True


def _unwrapped(value: dict[str, Any], name: str) -> list[Any]:
    """The rows of a document such as `{"data": [...]}`. An object with turns, or without a list, is a single row."""
    lists = {key: items for key, items in value.items() if isinstance(items, list) and items}
    lists = {key: items for key, items in lists.items() if all(isinstance(item, dict) for item in items)}
    if any(_are_turns(items) for items in lists.values()):
        return [value]
    if len(lists) > 1:
        raise UserError(f"{name}: expected one list of rows, found several lists of objects ({', '.join(lists)})")
    return next(iter(lists.values()), [value])


def _are_turns(items: list[dict[str, Any]]) -> bool:
    return all("role" in item or {"from", "value"} <= item.keys() for item in items)


def _csv(path: Path, name: str, how: Reading) -> Iterator[tuple[str, Row | BadRow]]:
    if csv.field_size_limit() < _MAX_CELL:
        csv.field_size_limit(_MAX_CELL)
    of_row: list[tuple[int, str]] = []  # the lines since the last whole row

    def lines() -> Iterator[str]:
        for line in _lines(path, name, how):
            of_row.append(line)
            yield line[1]

    reader = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for cells in reader:
            of_row.clear()
            if not cells:
                continue
            if header is None:
                header = cells
                if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)):
                    raise UserError(f"{name}:1: no commas between columns, but {other!r}; save it with commas")
                repeated = {column for column in header if header.count(column) > 1}
                if repeated:
                    raise UserError(f"{name}:{reader.line_num}: two columns are named {min(repeated)!r}")
                continue
            number += 1
            if len(cells) != len(header):
                wrong = f"{len(cells)} cells under {len(header)} column names ({', '.join(header)})"
                wrong += "; commas within a text need quotes around it"
                if how.strict:
                    raise RowError(f"{name} row {number}", wrong)
                yield f"{name} row {number}", BadRow(wrong)
                continue
            yield f"{name} row {number}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        opened = _open_quote(of_row)
        if opened is None or (opened == reader.line_num and "end of data" not in str(error)):
            raise UserError(f"{name}:{reader.line_num}: not valid CSV: {error}") from error
        raise UserError(
            f'{name}:{opened}: not valid CSV: the quote (") that opens a cell in this line is not closed, so the lines '
            'after it were read as part of the cell; a quote within a cell is written twice ("")'
        ) from error


def _open_quote(lines: list[tuple[int, str]]) -> int | None:
    """The line with the quote that opens the last quoted cell of a row; None if there is none.

    Args:
        lines: Numbers and texts of the lines from the start of the row to where it can't be read.
    """
    opened: int | None = None
    is_quoted, was_closed, before = False, False, ","
    for number, line in lines:
        for character in line:
            is_closed = False
            if character == '"' and is_quoted:
                is_quoted, is_closed = False, True
            elif character == '"' and was_closed:  # two quotes in a row are one within the cell
                is_quoted = True
            elif character == '"' and before in ",\n":
                is_quoted, opened = True, number
            was_closed, before = is_closed, character
    return opened


def _text(path: Path, name: str, how: Reading) -> Iterator[tuple[str, Row]]:
    if how.documents == "lines":
        for number, line in _lines(path, name, how):
            if line.strip():
                yield f"{name}:{number}", {"text": line.rstrip("\r\n")}
        return
    if how.documents != "file":
        yield from (_paragraphs if how.documents == "blank_lines" else _separated)(path, name, how)
        return
    text = "".join(line for _, line in _lines(path, name, how))
    if text.strip():
        yield name, {"text": text}


def _paragraphs(path: Path, name: str, how: Reading) -> Iterator[tuple[str, Row]]:
    """Yields the documents between blank lines (empty, or only white space)."""
    lines: list[str] = []
    number = 0
    for number, line in _lines(path, name, how):
        if line.strip():
            lines.append(line)
        elif lines:
            yield f"{name}:{number - len(lines)}", {"text": "".join(lines).rstrip("\r\n")}
            lines = []
    if lines:
        yield f"{name}:{number - len(lines) + 1}", {"text": "".join(lines).rstrip("\r\n")}


def _separated(path: Path, name: str, how: Reading) -> Iterator[tuple[str, Row]]:
    """Yields the documents between separators, without the line ends around them."""
    parts: list[str] = []
    start, begun = 1, False
    overlap = ""  # end of the text so far: a separator may span lines
    for number, line in _lines(path, name, how):
        start, begun = start if begun else number, begun or not line.isspace()
        parts.append(line)
        overlap += line
        if how.documents in overlap:
            *whole, rest = "".join(parts).split(how.documents)
            for text in whole:
                if text.strip():
                    yield f"{name}:{start}", {"text": text.strip("\r\n")}
                start = number
            parts, begun, overlap = [rest], bool(rest.strip()), rest
        overlap = overlap[max(0, len(overlap) - len(how.documents) + 1) :]
    if begun:
        yield f"{name}:{start}", {"text": "".join(parts).strip("\r\n")}


def _table(path: Path, name: str, how: Reading) -> Iterator[tuple[str, Row]]:
    import datasets

    number = 0
    for batch in _batches(path, name):
        decode = datasets.Features.from_arrow_schema(batch.schema).decode_example  # else JSON columns would stay text
        for row in batch.to_pylist():
            number += 1
            yield f"{name} row {number}", decode(row)


def _batches(path: Path, name: str) -> Iterator[Any]:
    """Yields the record batches of a Parquet or Arrow file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind_of(path) == "parquet":
            yield from pq.ParquetFile(path).iter_batches(_BATCH)
            return
        mapped = pa.memory_map(str(path))
        try:
            batches = iter(pa.ipc.open_stream(mapped))
        except pa.ArrowInvalid:  # `.arrow` files have the stream or the file layout
            file = pa.ipc.open_file(mapped)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        yield from batches
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{name}: damaged, or not a file of this kind: {error}") from error


_READERS: dict[str, Callable[[Path, str, Reading], Iterator[tuple[str, Row | BadRow]]]] = {
    "jsonl": _json_lines,
    "json": _json,
    "csv": _csv,
    "txt": _text,
    "parquet": _table,
    "arrow": _table,
}

# --- bytes to lines to values ----------------------------------------------------------------------------------------


def _lines(path: Path, name: str, how: Reading, longest: int | None = None) -> Iterator[tuple[int, str]]:
    """Yields decoded lines with their numbers, from 1, including line ends."""
    for number, offset, line in _raw_lines(path, name, how, longest):
        yield number, _decoded(line, name, number, offset, how)


def _raw_lines(path: Path, name: str, how: Reading, longest: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Yields lines with their numbers, from 1, and their offsets in the file; including line ends.

    Lines of an encoding in which a line end is not the byte of ASCII, such as UTF-16, are turned into UTF-8.
    """
    number = offset = 0
    try:
        with _open(path, longest) as parts:
            lines = parts if _ends_lines_as_ascii(how.encoding) else _as_utf8(parts, name, how, longest)
            for number, line in enumerate(lines, 1):
                if longest is not None and len(line) > longest:
                    raise UserError(f"{name}:{number}: the line has more than {longest:,} bytes; a row is one line")
                yield number, offset, line
                offset += len(line)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: cannot be read{f' beyond line {number}' if number else ''}: {reason}") from error


def _ends_lines_as_ascii(encoding: str) -> bool:
    return "\n".encode(encoding) == b"\n"


def _as_utf8(chunks: Iterable[bytes], name: str, how: Reading, longest: int | None) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(how.encoding)("replace" if how.replace else "strict")
    rest, number = "", 1
    for chunk in itertools.chain(chunks, (None,)):
        try:
            text = decoder.decode(b"", True) if chunk is None else decoder.decode(chunk)
        except UnicodeError as error:
            raise UserError(f"{name}:{number}: not {how.encoding} text: {error}; name its encoding") from error
        how.counts["replaced"] += text.count("\ufffd") if how.replace else 0
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield f"{line}\n".encode(errors="surrogatepass")
        number += len(lines)
        if longest is not None and len(rest) > longest:
            break  # too long, as the caller finds
    if rest:
        yield rest.encode(errors="surrogatepass")


def _open(path: Path, longest: int | None = None) -> AbstractContextManager[Iterable[bytes]]:
    """Opens a file, decompressed; iterating over it yields lines, and of lines of more than `longest` bytes parts."""
    return contextlib.closing((_zstd_lines if path.suffix.lower() == ".zst" else _file_lines)(path, longest))


def _file_lines(path: Path, longest: int | None) -> Generator[bytes]:
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
        yield from file if longest is None else iter(partial(file.readline, longest + 1), b"")


def _zstd_lines(path: Path, longest: int | None) -> Generator[bytes]:
    parts: list[bytes] = []  # of a line that continues in the next chunk
    size = 0
    for chunk in _zstd_chunks(path):
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*parts, line, b"\n"])
            parts, size = [], 0
        parts.append(rest)
        size += len(rest)
        if longest is not None and size > longest:
            break
    if any(parts):
        yield b"".join(parts)


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Yields the decompressed bytes of all frames. The library's own reader would not notice a truncated file."""
    import zstandard

    frame: Any = None
    try:
        with path.open("rb") as file:
            while data := file.read(_ZSTD_CHUNK):
                while data:
                    frame = frame or zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
                    yield frame.decompress(data)
                    data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None:
        raise EOFError("the compressed file ends too early")


def _decoded(line: bytes, name: str, number: int, offset: int, how: Reading) -> str:
    if number == 1 and line.startswith(b"\xef\xbb\xbf"):  # the byte order mark of some editors
        line, offset = line[3:], 3
    encoding = how.encoding if _ends_lines_as_ascii(how.encoding) else "utf-8"
    if encoding == "utf-8" and number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        kind = "UTF-32" if line.startswith(b"\xff\xfe\0\0") else "UTF-16"
        raise UserError(
            f"{name}:1: expected UTF-8 text, found {kind}; save it as UTF-8, or name its encoding: "
            f"{{path: {name}, encoding: {kind.lower()}}}"
        )
    if b"\0" in line:
        wrong = "expected text, found binary data (a zero byte); tables are read from .parquet and .arrow files"
        raise UserError(f"{name}:{number}: {wrong}")
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        if how.replace:
            text = line.decode(encoding, errors="replace")
            how.counts["replaced"] += text.count("\ufffd") - line.count("\ufffd".encode(encoding, "ignore") or b"\0")
            return text
        byte = (
            f"0x{line[error.start]:02x} at byte {error.start + 1} of the line, {offset + error.start + 1} of the file"
        )
        right = (
            f"save it as UTF-8, name its encoding ({{path: {name}, encoding: cp1252}}), or have such bytes replaced: "
            f"{{path: {name}, errors: replace}}"
        )
        raise RowError(f"{name}:{number}", f"not {encoding.upper()} text ({byte}); {right}") from error


def _parse(text: str, name: str, number: int = 1) -> Any:
    """Parses JSON that starts at line `number` of a file."""
    try:
        value = parse_json(text)
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair is valid JSON, but tokenizers fail on it
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"{name}:{number + error.lineno - 1}"
        ends = "; the line ends are CR alone: save it with LF" if "\r" in text and "\n" not in text else ""
        raise RowError(where, f"not valid JSON: {error.msg} (column {error.colno}){ends}") from error
    except UnicodeEncodeError as error:
        raise RowError(f"{name}:{number}", "not valid text: half of a surrogate pair") from error
    except ValueError as error:
        raise RowError(f"{name}:{number}", f"not readable as JSON: {error}") from error
    return value


def parse_json(text: str) -> Any:
    """Parses JSON that has one value for each key, and whose lists and objects are at most `DEEPEST` levels deep.

    Raises:
        ValueError: a key occurs twice, or it is nested too deeply; `json.JSONDecodeError` if it is not JSON.
    """
    too_deep = f"lists and objects are more than {DEEPEST} levels deep"
    try:
        value = _JSON.decode(text)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise ValueError(too_deep)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some keys and values. Python's parser would take the last of two values for a key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in an object")
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        items = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for item in itertools.chain.from_iterable(items) if isinstance(item, dict | list)]
    return bool(level)


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise RowError(where, f"expected an object (one row), found {_word(value)}")
    return value


def _word(value: Any) -> str:
    words = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return words.get(type(value), "null")
