"""Sources of rows: files, directories, bundled data, the hub, and rows in memory."""

import codecs
import encodings.aliases
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import numpy as np

from oumi_pl.data.files import KINDS, TABLES, Reading, count_rows, kind_of, read_file
from oumi_pl.data.formats import Format
from oumi_pl.data.memory import Rows, Table
from oumi_pl.data.splitting import Side
from oumi_pl.data.where import WHERE, Filter, Where
from oumi_pl.errors import UserError, nearby, nearest
from oumi_pl.models.hub import asked_once
from oumi_pl.types import BadRow, Row

BUNDLED = Path(__file__).parent / "bundled"
"""Folder of the bundled data: `bundled/NAME` is `NAME/train.jsonl` or `.txt`, `bundled/NAME/SPLIT` another split."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|validation|test)(?![a-z])", re.IGNORECASE)
_NOT_DATA = ("dataset_info.json", "dataset_infos.json")  # metadata files next to data


def find_files(name: str) -> dict[str, list[Path]] | None:
    """The data files of a recipe's `path`, by split; None if it looks like a hub id.

    A path is local if it exists, contains a wildcard, starts with `.`, `/` or `~`, or has the suffix of a data file. It
    is then not looked up on the hub, so that a typo in a path gives a message about paths. Only a directory has other
    splits than `train`: those that its files, or subdirectories, are named after.

    Raises:
        UserError: the path does not exist, or has no data files.
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
        if not path.is_file():  # rows are read several times
            raise UserError(f"{name}: a pipe or device, not a file; copy its content to a file")
        return {"train": [path]}
    if glob.has_magic(name):
        # not Path.glob, which includes hidden files and refuses `**.jsonl`
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
    """Groups a directory's files by the split that they, or its subdirectories, are named after."""
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
        raise UserError(f"no bundled data {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def could_be_meant(path: Path) -> bool:
    """Whether an existing path may be a source: a directory, or a file of a known kind."""
    return path.is_dir() or kind_of(path) is not None


T = TypeVar("T")


def sampled(start: Callable[[], Iterator[T]], sample: int, seed: int | None = None) -> Iterator[T]:
    """Yields exactly `sample` rows; none if there are none.

    If there are fewer, all are repeated as often as they fit, and some once more.

    Args:
        start: Reads the rows from the beginning.
        sample: Number of rows, at least 1.
        seed: Draws the rows that are taken, or repeated once more: the first ones of `Dataset.shuffle(seed)` in
            `datasets`, but in the order of the source. None: the first rows.

    Raises:
        UserError: `sample` is less than 1.
    """
    if sample < 1:
        raise UserError(f"sample is {sample}, but has to be at least 1 row")
    return _from_the_start(start, sample) if seed is None else _drawn(start, sample, seed)


def _from_the_start(start: Callable[[], Iterator[T]], left: int) -> Iterator[T]:
    while left:
        before = left
        for item in itertools.islice(start(), left):
            left -= 1
            yield item
        if left == before:
            return


def _drawn(start: Callable[[], Iterator[T]], sample: int, seed: int) -> Iterator[T]:
    size = sum(1 for _ in start())
    copies, rest = divmod(sample, max(1, size))
    drawn = set(np.random.default_rng(seed).permutation(size)[:rest].tolist())
    for number, item in enumerate(start()):
        yield from itertools.repeat(item, copies + (number in drawn))


_INFO = "dataset_info.json"
_DOCUMENTS = ("file", "blank_lines", "lines")
Errors = Literal["strict", "replace"]

if TYPE_CHECKING:
    Place = str | os.PathLike[str] | Table | Rows
    FormatName = str | Format
    Condition = str | Filter
else:  # the types of a recipe; Python may pass the objects themselves
    Place = FormatName = Condition = str


@dataclass(frozen=True)
class Source:
    """Where rows come from, and how they are read.

    Args:
        path: A local file, directory or glob (JSON, JSON lines, CSV, text, Parquet, Arrow), a folder that
            `save_to_disk` made, `bundled/NAME` or `bundled/NAME/SPLIT`, or the id of a data set on the hub. From
            Python also rows: a list of dicts, a `datasets.Dataset` or a pandas DataFrame.
        config: Configuration of a hub data set.
        split: Split, or a slice of it as in `datasets`: `train[:100]`, `train[10:20]`, `train[:5%]`.
        revision: Branch, tag or commit of a hub data set.
        weight: Share of this source in a mixture, relative to the others' weights.
        where: Which rows are used: an expression over their columns, such as `lang == 'en' and quality >= 3`, or the
            dotted path of a function from a row to true or false. The columns are those of the file, before `columns`
            renames them; in backticks if their name has blanks. A missing value is never greater or less than
            another. See `oumi_pl.data.where`.
        format: The name of a format, or the dotted path of your own function (from Python, the function itself);
            detected when left out.
        columns: The format's fields by the names of your columns, as `{question: my_column}`.
        ignore: Columns that are left out. A column that usually carries meaning (`system`, `weight`, `tools`, `images`,
            `label`, `history`, `context`, ...) stops the run if the format doesn't read it and it isn't listed here.
        label: How rows with a column `label` (or `kto_tag`) are used, which says whether an answer is good: `keep_good`
            leaves out the bad ones.
        template_variables: Values for variables that the chat template reads, for the rows of this source. They
            override those of the recipe, and a row's own (`chat_template_kwargs`) override them.
        documents: How a `.txt` file is divided into documents: not at all (`file`, the default; `lines` for prompts of
            `predict`), at `blank_lines`, into `lines`, or at a separator of your own, for example `<|endoftext|>`.
        encoding: Encoding of text files, such as `cp1252` or `utf-16`; UTF-8 when left out.
        errors: How bytes that the encoding doesn't have are handled: the run stops (`strict`), or they become U+FFFD
            (`replace`).
        sample: Use exactly so many of the rows that fit `where`: the first ones, or randomly drawn ones with
            `sample_seed`. If there are too few, rows are repeated.
        sample_seed: Seed of the draw.
        name: Name of the source in messages, reports and metrics; its path when left out.
    """

    path: Place
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    weight: float | None = None
    where: Condition | None = None
    format: FormatName | None = None
    columns: dict[str, str] | None = None
    ignore: list[str] | None = None
    label: Literal["keep_good"] | None = None
    template_variables: dict[str, Any] | None = None
    documents: str | None = None
    encoding: str | None = None
    errors: Errors = "strict"
    sample: int | None = None
    sample_seed: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        path: Any = self.path
        if isinstance(path, os.PathLike):
            object.__setattr__(self, "path", os.fspath(path))
        elif not isinstance(path, str | Rows):
            object.__setattr__(self, "path", Rows(path, self.name or "a source"))
        if not (self.format is None or isinstance(self.format, str) or callable(self.format)):
            kind = type(self.format).__name__
            raise UserError(f"{self.title}: format is a {kind}; it is the name of a format, or a function of a row")
        if not (self.where is None or isinstance(self.where, str) or callable(self.where)):
            kind = type(self.where).__name__
            raise UserError(
                f"{self.title}: where is a {kind}; it is an expression over columns, or a function of a row"
            )

    @property
    def title(self) -> str:
        """The source's name in messages and reports."""
        return self.name or str(self.path)

    @property
    def rows(self) -> Rows | None:
        """The rows, if they are in memory."""
        return self.path if isinstance(self.path, Rows) else None

    @property
    def condition(self) -> Where | None:
        """The filter of its rows; None if all are used.

        Raises:
            UserError: the expression can't be read.
        """
        return None if self.where is None else Where(self.where)

    @property
    def address(self) -> str:
        """The path or hub id of rows that are not in memory."""
        return cast("str", self.path)


@dataclass(frozen=True)
class _Split:
    """A local split: its `files`, and functions that `read` and `count` its rows from the start."""

    files: list[Path]
    read: Callable[[], Iterator[tuple[str, Row | BadRow]]]
    count: Callable[[], int]
    names: list[str]
    """What origins of rows begin with: the names of files, or that of the data set."""
    rows: Rows | None = None
    """The rows, if they are in memory and so in no file."""


def as_sources(value: Any, where: str = "data") -> list[Source]:
    """The sources of a data module's argument.

    Args:
        value: A path, a `Source`, rows in memory, a list of these, or a dict of these by name. A list of dicts is rows.
        where: Name of the argument, for messages.

    Raises:
        UserError: it is something else, or empty.
    """
    if isinstance(value, Mapping):
        sources = _named_sources(value, where)
    elif not isinstance(value, list | tuple) or (value and _is_row(value[0])):
        sources = [_source(value, where)]
    elif not value:
        raise UserError(f"{where}: a list of sources is empty; name at least one file, directory or hub id")
    else:
        sources = [_source(item, where) for item in value]
    for source in sources:
        try:
            _ = source.condition
        except UserError as error:
            raise UserError(f"{where}: {source.title}: {error}") from error
    return sources


def by_line(source: Source, column: str = "text") -> Source:
    """The source with each line of its text files as a row, unless it says how they are divided, or has none.

    Args:
        source: The source.
        column: The column of the text.

    Raises:
        UserError: the source does not exist.
    """
    if source.rows is not None or source.documents is not None or _is_saved(Path(source.address).expanduser()):
        return source
    files = [path for paths in (find_files(source.address) or {}).values() for path in paths]
    if not any(kind_of(path) == "txt" for path in files):
        return source
    columns = source.columns if column == "text" or source.columns else {column: "text"}
    return replace(source, documents="lines", columns=columns)


def titles(value: Any) -> list[str]:
    """The names of the sources of an argument, for messages and caches; none for None."""
    return [] if value is None else [source.title for source in as_sources(value)]


def _named_sources(value: Mapping[str, Any], where: str) -> list[Source]:
    import datasets

    if isinstance(value, datasets.DatasetDict | datasets.IterableDatasetDict):
        example = next(iter(value), "train")
        raise UserError(f"{where}: a DatasetDict holds several splits; pass one of them, for example data[{example!r}]")
    if "path" in value:
        return [_source(value, where)]
    if not value:
        raise UserError(f"{where}: a dict of sources is empty; name at least one file, directory or hub id")
    return [replace(_source(item, f"{where}[{name!r}]"), name=str(name)) for name, item in value.items()]


def _source(value: Any, where: str) -> Source:
    if isinstance(value, Source):
        return value
    if isinstance(value, Mapping):
        known = [field.name for field in fields(Source)]
        for key in value:
            if key not in known:
                raise UserError(f"{where}: a source has no {key!r}{nearest(key, known)}")
        if "path" not in value:
            raise UserError(f"{where}: this source has no path")
        return Source(**value)
    if isinstance(value, list | tuple) and value and not _is_row(value[0]):
        kind = type(value[0]).__name__
        raise UserError(
            f"{where}: a list of {kind} is neither rows nor sources; rows are dicts from column to value, and columns "
            "can be passed as a pandas DataFrame"
        )
    return Source(value if isinstance(value, str | os.PathLike | Rows) else Rows(value, where))


def _is_row(value: Any) -> bool:
    """Whether an item of a list is a row: a dict that does not describe a source."""
    return isinstance(value, Mapping) and not ("path" in value and value.keys() <= {f.name for f in fields(Source)})


def rows(
    source: Source, *, streaming: bool = False, counts: Counter[str] | None = None, strict: bool = True
) -> Iterator[tuple[str, Any]]:
    """Finds a source immediately and reads its rows lazily, each with its origin for messages.

    Args:
        source: The source.
        streaming: Read data from the hub without downloading them first.
        counts: Counter whose `replaced` counts the characters inserted by `errors: replace`, and `where` the rows that
            are left out.
        strict: Raise an error for something that isn't a row, instead of yielding a `BadRow` in its place.

    Yields:
        `("data/train.jsonl:17", row)` for JSON lines, `("data/train.csv row 12", row)` for other files,
        `("org/name[train] row 5", row)` for the hub. Lines and rows count from 1.

    Raises:
        UserError: when called: the source does not exist, the split is unknown, or the hub can't be reached; while
            reading: a file is damaged, something in it isn't a row, or there are no rows.
    """
    splits, condition = _local_splits(source, counts, strict), source.condition
    counter = Counter[str]() if counts is None else counts

    def start() -> Iterator[tuple[str, Row | BadRow]]:
        read = _hub_rows(source, streaming) if splits is None else _cut(source, splits)
        return read if condition is None else condition.used(read, source.title, counter, strict)

    found = start() if source.sample is None else sampled(start, source.sample, source.sample_seed)
    return _not_empty(found, source, counter)


def left_out(source: Source, counts: Counter[str], keep: Side | None) -> dict[str, int]:
    """The rows that `where` left out, by reason; they count on one side only if a fraction is held out.

    Args:
        source: The source, after its rows were read.
        counts: The counter that they were counted in.
        keep: Which rows were used.
    """
    number = counts["where"]
    if not number or (keep is not None and keep.is_held_out) or (condition := source.condition) is None:
        return {}
    return {f"{WHERE}{condition.text}": number}


def is_on_hub(source: Source) -> bool:
    """Whether a source is the id of a data set on the hub.

    Raises:
        UserError: it is a local path that does not exist.
    """
    return _local_splits(source) is None


def fingerprint(source: Source) -> str:
    """Hash of all that determines the rows and their order: 32 hex digits.

    Local data are identified by their contents, not their names; hub data by their fingerprint in `datasets`. `split`,
    `config`, `revision`, `where`, `documents`, `encoding`, `errors` and `sample` count; `weight` and what turns rows
    into records (`format`, `columns`, `ignore`, `label`) do not.

    Raises:
        UserError: the source can't be found, as for `rows`.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([source.config, source.split, source.revision]).encode())
    if source.documents is not None or source.errors != "strict":
        digest.update(json.dumps([source.documents, source.errors]).encode())
    if source.encoding is not None:
        digest.update(json.dumps(["encoding", source.encoding]).encode())
    if source.sample is not None:
        digest.update(json.dumps(["sample", source.sample, source.sample_seed]).encode())
    if (condition := source.condition) is not None:
        digest.update(json.dumps(["where", condition.key()]).encode())
    splits = _local_splits(source)
    if splits is None:
        digest.update(_load_hub(source)._fingerprint.encode())
        return digest.hexdigest()
    for name in _names(source, splits):
        if (in_memory := splits[name].rows) is not None:
            digest.update(in_memory.fingerprint().encode())
        for path in splits[name].files:
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "blake2b").hexdigest()
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from error
            digest.update(f"{name} {kind_of(path)} {content}\n".encode())
    return digest.hexdigest()


def expected_rows(source: Source, keep: Side | None = None) -> int | None:
    """About how many rows of a source are read, for progress.

    Returns:
        None if it is unknown: with `where`, with slices, or if a file is damaged.
    """
    if source.where is not None:
        return None
    share = 1.0 if keep is None else keep.fraction if keep.is_held_out else 1 - keep.fraction
    if source.sample is not None:
        return round(share * source.sample)
    try:
        splits = _local_splits(source)
        if splits is None:
            return round(share * len(_load_hub(source)))
        names = _names(source, splits)
        if names != source.split.split("+"):
            return None
        return round(share * sum(splits[name].count() for name in names))
    except UserError:  # reading the rows says so
        return None


def origin_names(source: Source) -> list[str]:
    """What the origins of a source's rows begin with, in order: names of files, or that of the data set.

    Raises:
        UserError: the source can't be found, as for `rows`.
    """
    splits = _local_splits(source)
    if splits is None:
        return [f"{source.title}[{source.split}]"]
    return [name for split in _names(source, splits) for name in splits[split].names]


# --- local data ------------------------------------------------------------------------------------------------------


def _local_splits(source: Source, counts: Counter[str] | None = None, strict: bool = True) -> dict[str, _Split] | None:
    """The splits of a local source by name; None if the path is a hub id."""
    splits: dict[str, _Split]
    how = _reading(source, counts, strict)
    if source.rows is not None:
        if source.documents is not None:
            raise UserError(f"{source.title}: 'documents' divides .txt files; rows in memory are documents already")
        read = partial(_numbered, source.rows, source.title)
        splits = {"train": _Split([], read, partial(len, source.rows), [source.title], source.rows)}
    elif _is_saved(path := Path(source.address).expanduser()):
        splits = _saved_splits(path)
    elif (files := find_files(source.address)) is not None:
        splits = {name: _file_split(members, source, how) for name, members in files.items()}
    else:
        return None
    if source.encoding is not None and (source.rows is not None or _is_saved(Path(source.address).expanduser())):
        raise UserError(f"{source.title}: 'encoding' is that of text files, and these rows are in none; leave it out")
    for key in ("config", "revision"):
        if getattr(source, key) is not None:
            raise UserError(f"{source.title}: {key!r} is for data from the hub, and this is local; leave it out")
    return splits


def _is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").exists() or ((path / "state.json").exists() and (path / _INFO).exists())


def _reading(source: Source, counts: Counter[str] | None, strict: bool) -> Reading:
    if source.errors not in get_args(Errors):
        raise UserError(f"{source.title}: unknown errors {source.errors!r}{nearest(source.errors, get_args(Errors))}")
    documents = source.documents or "file"
    if documents not in _DOCUMENTS and re.fullmatch(r"\w*", documents):  # a separator of letters would split words
        hint = nearest(documents, _DOCUMENTS)
        raise UserError(f"{source.title}: unknown documents {documents!r}{hint} (a separator holds more than letters)")
    counts = Counter() if counts is None else counts
    return Reading(documents, _encoding(source), source.errors == "replace", counts, strict)


def _encoding(source: Source) -> str:
    """The encoding of a source's text files.

    Raises:
        UserError: it is unknown, or the source has no text files.
    """
    if source.encoding is None:
        return "utf-8"
    try:
        known = codecs.lookup(source.encoding)
        "\n".encode(source.encoding)  # refuses codecs that encode no text, such as base64
    except LookupError as error:
        names = {name.replace("_", "-") for name in encodings.aliases.aliases.values()}
        hint = nearest(source.encoding, names)
        raise UserError(f"{source.title}: unknown encoding {source.encoding!r}{hint}") from error
    return known.name


def _file_split(files: list[Path], source: Source, how: Reading) -> _Split:
    name, kinds = source.title, {kind_of(path): path.name for path in files}
    if len(kinds) > 1:
        first, second, *_ = kinds.values()
        raise UserError(f"{name}: different kinds of files ({first}, {second}); choose one with a glob such as *.jsonl")
    if source.encoding is not None and set(kinds) & set(TABLES):
        raise UserError(f"{name}: 'encoding' is that of text files, and these are none; leave it out")
    if source.documents is not None and "txt" not in kinds:
        raise UserError(f"{name}: 'documents' divides .txt files; the rows of other files are documents already")

    def read() -> Iterator[tuple[str, Row | BadRow]]:
        return itertools.chain.from_iterable(read_file(path, _name(path), how) for path in files)

    names = [_name(path) for path in files]
    return _Split(files, read, lambda: sum(count_rows(path, _name(path), how) for path in files), names)


def _name(path: Path) -> str:
    """A file's name in messages; for bundled files the name that recipes use."""
    return str(path.relative_to(BUNDLED.parent) if path.is_relative_to(BUNDLED) else path)


def _cut(source: Source, splits: dict[str, _Split]) -> Iterator[tuple[str, Row | BadRow]]:
    """Reads what `source.split` names: whole splits or slices, added up with `+`."""
    names = _names(source, splits)
    if names == source.split.split("+"):
        return itertools.chain.from_iterable(splits[name].read() for name in names)
    import datasets

    # only percentages and negative indices need the number of rows
    counted = "%" in source.split or "-" in source.split
    try:
        instruction = datasets.ReadInstruction.from_spec(source.split)
        pieces = instruction.to_absolute({n: splits[n].count() if counted else sys.maxsize for n in names})
    except ValueError as error:
        examples = "train, train[:100], train[10:20] or train[:5%]"
        raise UserError(f"{source.title}: no split {source.split!r} ({error}); write for example {examples}") from error
    return itertools.chain.from_iterable(
        itertools.islice(splits[piece.splitname].read(), piece.from_, piece.to) for piece in pieces
    )


def _names(source: Source, splits: dict[str, _Split]) -> list[str]:
    names = [re.split(r"[\[(]", piece)[0].strip() for piece in source.split.split("+")]
    for name in names:
        if name not in splits:
            raise UserError(f"{source.title}: no split {name!r}{nearest(name, splits)}")
    return names


def _not_empty(found: Iterator[tuple[str, Any]], source: Source, counts: Counter[str]) -> Iterator[tuple[str, Any]]:
    empty = True
    for item in found:
        empty = False
        yield item
    if empty and counts["where"]:
        raise UserError(f"{source.title}: where: none of {counts['where']:,} rows fits {source.where!r}")
    if empty:
        path = Path(source.address).expanduser() if source.rows is None else None
        empty = path is not None and path.is_file() and not path.stat().st_size
        raise UserError(f"{source.title}: {'the file is empty' if empty else f'split {source.split!r} has no rows'}")


def _saved_splits(path: Path) -> dict[str, _Split]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a complete `save_to_disk` folder: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": _saved_split(loaded, path, str(path))}
    return {str(name): _saved_split(part, path / str(name), f"{path}[{name}]") for name, part in loaded.items()}


def _saved_split(dataset: Any, folder: Path, name: str) -> _Split:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    dataset = dataset.with_format(None)  # the folder remembers a format, which would make arrays or tensors of lists
    return _Split(files, partial(_numbered, dataset, name), partial(len, dataset), [name])


def _numbered(dataset: Any, name: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(dataset, 1):
        yield f"{name} row {number}", row


# --- the hub ---------------------------------------------------------------------------------------------------------


def _hub_rows(source: Source, streaming: bool = False) -> Iterator[tuple[str, Row]]:
    if source.documents is not None:
        raise UserError(f"{source.title}: 'documents' divides .txt files; rows of the hub are documents already")
    if source.encoding is not None:
        raise UserError(f"{source.title}: 'encoding' is that of local text files; leave it out")
    return _numbered(_load_hub(source, streaming), f"{source.title}[{source.split}]")


def _load_hub(source: Source, streaming: bool = False) -> Any:
    import datasets

    how = {"streaming": True} if streaming else {}
    try:
        with asked_once(datasets.config):
            split, revision = source.split, source.revision
            return datasets.load_dataset(source.path, source.config, split=split, revision=revision, **how)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source.title}: {_hub_reason(source, error)}") from error


def _hub_reason(source: Source, error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    beside = nearby(Path(source.address), could_be_meant, tell_where=False)
    nothing_here = f"no such file or directory here{beside}"
    if isinstance(error, ConnectionError):
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
        import datasets

        remedy = "without a network, name a file, or fill the cache and set HF_HUB_OFFLINE=1"
        if offline:
            remedy = "unset HF_HUB_OFFLINE to download it, or name a file"
        cache = f"no copy of data set {source.path!r} is in the cache ({datasets.config.HF_DATASETS_CACHE})"
        return f"{nothing_here}; {cache}, and the hub can't be reached; {remedy}"
    if isinstance(error, DatasetNotFoundError):
        return f"{nothing_here}; {error} Private and gated data need `hf auth login`"
    reason = " ".join(str(error).partition("Example of usage")[0].split())
    if error.__cause__ is not None:
        reason += f": {error.__cause__}"
    asked = "".join(f", {key} {value!r}" for key in ("config", "revision") if (value := getattr(source, key)))
    return textwrap.shorten(f"split {source.split!r}{asked} can't be loaded from the hub: {reason}", 400)
