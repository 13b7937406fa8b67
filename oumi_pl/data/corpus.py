"""The sources of a split as token shards: a prepared folder, or one in the cache that is written once."""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from oumi_pl.data.code import code_of, is_own
from oumi_pl.data.documents import TokenizeDocuments, texts, texts_with_rows
from oumi_pl.data.formats import Format, format_name, resolve_format
from oumi_pl.data.records import OnBadRows, RowCounts
from oumi_pl.data.rendering import Rendering
from oumi_pl.data.shards import FORMAT, MADE_FROM, MANIFEST, OtherShardsError, Shards, write_shards
from oumi_pl.data.sources import Source, expected_rows, fingerprint, is_on_hub
from oumi_pl.data.splitting import Side
from oumi_pl.data.store import cache_key, cache_root
from oumi_pl.data.tokenizers import tokenizer_fingerprint
from oumi_pl.errors import UserError
from oumi_pl.runs.checksums import DamagedError
from oumi_pl.runs.files import remove
from oumi_pl.terminal.text import echo
from oumi_pl.types import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Part(NamedTuple):
    """The part of a source that a split uses.

    keep: which rows to use; all if None. render: renders conversations as texts, if rows may be conversations.
    bad_rows, before: see `texts`.
    """

    source: Source
    keep: Side | None = None
    render: Rendering | None = None
    bad_rows: OnBadRows | None = None
    before: tuple[Shards, ...] | None = None

    @property
    def name(self) -> str:
        """The source's name in messages and metrics: the last part of its path, without suffixes."""
        if self.source.name is not None or self.source.rows is not None:
            return self.source.title
        parts = [part for part in re.split(r"[/\\]", self.source.address) if part and not re.search(r"[*?\[]", part)]
        return (parts[-1].split(".")[0] if parts else "") or self.source.address

    @property
    def prepared(self) -> Path | None:
        """The folder of prepared shards at the source's path; None if there is none.

        That is the folder itself, or its subfolder with the split's name.

        Raises:
            UserError: it holds the shards of several sources, or preparing them was not finished.
        """
        if self.source.rows is not None:
            return None
        path = Path(self.source.address).expanduser()
        for folder in (path / self.source.split, path):
            if (folder / MANIFEST).is_file() and any(folder.glob("tokens-*.bin")):
                return folder
            if (folder / MANIFEST).is_file() and (folder / MADE_FROM).is_file():
                raise UserError(
                    f"{folder}: the token files (tokens-*.bin) are missing; copy them too, or prepare it again"
                )
            if (folder / MADE_FROM).is_file() and any(folder.glob("tokens-*.bin")):
                raise UserError(f"{folder}: preparing these shards was not finished; run `prepare` again")
        if (path / f"{self.source.split}-1" / MANIFEST).is_file():
            folders = sorted(folder.as_posix() for folder in path.glob(f"{self.source.split}-*"))
            raise UserError(f"{path}: holds the shards of several sources: name them one by one: {', '.join(folders)}")
        return None

    def texts(self, counts: RowCounts | None = None, streaming: bool = False) -> Iterator[str]:
        """Iterates over the documents' texts from the start."""
        how = {"bad_rows": self.bad_rows, "before": self.before}
        return texts(self.source, self.keep, counts, streaming, self.render, **how)  # type: ignore[arg-type]

    def texts_with_rows(self) -> Iterator[tuple[str, Row]]:
        """As `texts`, each with its row."""
        return texts_with_rows(self.source, self.keep, render=self.render, bad_rows=self.bad_rows)

    def made_from(self, streaming: bool = False) -> list[Any]:
        """Everything that the texts depend on. Of streamed hub data, only the name counts."""
        source = self.source
        if streaming and is_on_hub(source):
            content = str([source.address, source.config, source.split, source.revision])
        else:
            content = fingerprint(source)
        made_from: list[Any] = [content, source.columns, _format_code(source.format), str(self.keep)]
        if source.ignore or source.label or source.template_variables:
            made_from.append([source.ignore, source.label, source.template_variables])
        if self.bad_rows == "drop":
            made_from.append(self.bad_rows)
        if self.before is not None:
            made_from.append(["without repeated", *(shards.manifest["source"] for shards in self.before)])
        return made_from if self.render is None else [*made_from, self.render.template]


def _format_code(source_format: str | Format | None) -> list[str | None]:
    """Name and code of a source's format, with the user code that it imports."""
    if source_format is None:
        return [None, None]
    function, name = resolve_format(source_format), format_name(source_format)
    return [name, "" if is_own(function.__module__) else inspect.getsource(function), code_of(function)]


def shards_of(part: Part, tokenizer: "PreTrainedTokenizerBase") -> Shards:
    """Opens the shards of a source: prepared ones, or those in the cache, which are written now if missing.

    Raises:
        UserError: a row or the shards are invalid.
    """
    ids = tokenizer_fingerprint(tokenizer, chat=False)
    vocabulary = max(tokenizer.get_vocab().values(), default=-1) + 1
    if part.prepared is None:
        directory = cache_root() / "tokens" / cache_key(FORMAT, "keys", part.made_from(), ids)
        try:
            return _cached(part, tokenizer, directory, ids, vocabulary)
        except (DamagedError, OtherShardsError) as error:
            echo(f"the cache folder {directory} is damaged: {error}; it is written again", file=sys.stderr)
            remove(directory)
            return _cached(part, tokenizer, directory, ids, vocabulary)
    if part.keep is not None:
        raise UserError(
            f"data.validation: no fraction of {part.prepared} can be held out, since it holds tokens: name a source, "
            "or hold out a fraction when you prepare it"
        )
    return Shards(part.prepared, ids, vocabulary)


def _cached(part: Part, tokenizer: "PreTrainedTokenizerBase", directory: Path, ids: str, vocabulary: int) -> Shards:
    if not (directory / MANIFEST).exists():
        write_part(part, tokenizer, directory)
    shards = Shards(directory, ids, vocabulary)
    shards.check()
    return shards


def write_part(part: Part, tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Writes the shards of a source to a folder; continues an interrupted run."""
    made_from = {"tokenizer": tokenizer_fingerprint(tokenizer, chat=False), "source": part.made_from()}
    total = expected_rows(part.source, part.keep)
    write_shards(directory, part.texts, TokenizeDocuments(tokenizer), made_from, name=part.name, total=total)
