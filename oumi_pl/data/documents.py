"""Documents for pretraining: from the rows of a source to texts, and from texts to token ids.

Prepared shards and tokenizing on the fly both use this module, so they see the same documents in the same order.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from oumi_pl.data.duplicates import REPEATED, Keyed, Repeats
from oumi_pl.data.formats import (
    FORMATS,
    Format,
    Formats,
    find_format,
    format_name,
    raised,
    rename_columns,
    resolve_format,
    text,
)
from oumi_pl.data.records import OnBadRows, RecordReader, RowCounts
from oumi_pl.data.sources import Source, left_out, rows
from oumi_pl.data.splitting import Side
from oumi_pl.data.template import adds_bos
from oumi_pl.data.tokenize import Dropped
from oumi_pl.errors import UserError
from oumi_pl.types import BadRow, Conversation, Record, Row, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS: Formats = ((text, ("text",)),)
"""The formats that are detected for rows of documents; a recipe may name any other that returns a `Text`."""
CONVERSATIONS = ("messages", "conversations")
"""Columns that identify a conversation."""

PIECE = 1 << 17
"""Longer documents, in characters, are tokenized in pieces, since an encoding takes about 100 bytes per token."""
LONGEST_PIECE = 50_000_000
"""Most characters that are tokenized as one, which takes 3 GB if each is a token."""
CHUNK_DOCUMENTS = 256
CHUNK_CHARACTERS = 1 << 20
"""Limits of a batch for the tokenizer, which divides it among its threads."""

_LINE_END = re.compile(r"(?<=[^\s])\n(?=[^\s])")


class Document(NamedTuple):
    """A tokenized document.

    ids: `[tokens]`, of the tokenizer's `token_dtype`, EOS at the end. text_bytes: bytes of its UTF-8 text.
    target_bytes: the same without those of the first token, if it is text and so never a target.
    """

    ids: np.ndarray
    text_bytes: int
    target_bytes: int


class Documents(Protocol):
    """The tokenized documents of a source, in its order."""

    name: str
    """Name of the source in messages and metrics."""

    def read(self, start: int) -> Iterator[np.ndarray]:
        """Yields the ids of each document, `[tokens]`, from number `start` on, counted from 0."""
        ...


# --- from rows to texts ----------------------------------------------------------------------------------------------


def texts(
    source: Source,
    keep: Side | None = None,
    counts: RowCounts | None = None,
    streaming: bool = False,
    render: Callable[[Conversation], str] | None = None,
    *,
    bad_rows: OnBadRows | None = None,
    before: Sequence[Keyed] | None = None,
) -> Iterator[str]:
    """Yields the text of each document of a source, in order, without empty ones; arguments as of `texts_with_rows`."""
    pairs = texts_with_rows(source, keep, counts, streaming, render, bad_rows=bad_rows, before=before)
    return (text for text, _ in pairs)


def texts_with_rows(
    source: Source,
    keep: Side | None = None,
    counts: RowCounts | None = None,
    streaming: bool = False,
    render: Callable[[Conversation], str] | None = None,
    *,
    bad_rows: OnBadRows | None = None,
    before: Sequence[Keyed] | None = None,
) -> Iterator[tuple[str, Row]]:
    """Yields the text of each document of a source, in order, and its row; without empty ones.

    Args:
        source: The source.
        keep: Which rows to use; all when left out.
        counts: Counts that are updated: `rows`, `kept`, `empty`, `replaced`, and why rows were dropped.
        streaming: Read data from the hub without downloading them first.
        render: Renders conversations as texts; without it, they are refused.
        bad_rows: Whether rows that can't be used are left out, or are an `error` that lists all of them, after which no
            further text is yielded. None stops at the first, as `error` does when streaming.
        before: Documents that are left out here, and so are those that repeat another one of the source; None: all are
            used.

    Raises:
        UserError: a row is no document (names file and line); and as for `rows`.
    """
    counts = RowCounts() if counts is None else counts
    bad, repeats, convert = counts.bad, Repeats(before), _converter(source, render)
    at_once = bad_rows is None or (bad_rows == "error" and streaming)
    for origin, row in rows(source, streaming=streaming, counts=counts, strict=at_once):
        if isinstance(row, BadRow):
            counts.add_bad(origin, row.reason)
            continue
        try:
            document = convert(row)
            if keep is not None and not keep(row, None if isinstance(document, Dropped) else Text(document)):
                continue
        except UserError as error:
            if at_once:
                raise UserError(f"{origin}: {error}") from None
            if keep is None or keep.counts_bad(row):
                counts.add_bad(origin, str(error))
            continue
        except Exception as error:
            if source.format is None:
                raise
            raise UserError(f"{origin}: {raised(format_name(source.format), error)}") from error
        counts["rows"] += 1
        if isinstance(document, Dropped):
            counts.add_dropped({document.reason: 1})
            continue
        if bad.count and bad_rows == "error":
            continue  # what is wrong with the others is all that is left to find
        if _is_used(document, origin, counts, repeats):
            counts.held_out += [origin] if keep is not None and keep.is_held_out else []
            yield document, row
    if bad.count and bad_rows == "error":
        raise bad.error(source.title, counts["rows"])
    counts["rows"] += counts.add_dropped(left_out(source, counts, keep))
    repeats.add_to(counts.duplicates)


def _is_used(document: str, origin: str, counts: RowCounts, repeats: Repeats) -> bool:
    """Whether a document is neither empty nor repeated; counts it."""
    if not document.strip():
        counts["empty"] += 1
        return False
    record = Text(document)
    if repeats.is_repeated(origin, record):
        counts.add_dropped({REPEATED: 1})
        return False
    counts["kept"] += 1
    if counts.row_keys is not None:
        counts.row_keys.add(origin, record)
    return True


def _converter(source: Source, render: Callable[[Conversation], str] | None) -> Callable[[Row], str | Dropped]:
    """What makes a row's text, or the reason why it has none."""
    if render is None:
        own = resolve_format(source.format, FORMATS) if source.format else None
        return lambda row: _document(rename_columns(row, source.columns or {}), own)
    reader = RecordReader(source, mixed=True)

    def rendered(row: Row) -> str | Dropped:
        record = reader.record(row)
        return record if isinstance(record, Dropped) else _rendered(record, render)

    return rendered


def _rendered(record: Record, render: Callable[[Conversation], str]) -> str:
    if isinstance(record, Conversation):
        if record.weight != 1 or any("weight" in message for message in record.messages):
            raise UserError(
                "this row says how much it counts in the loss, and a stream of conversations trains on all tokens "
                "alike; use SFTData with packing, or leave a column out with `ignore: [weight]`"
            )
        return render(record)
    return _text(record)


def _document(row: Row, convert: Format | None) -> str | Dropped:
    _refuse_conversation(row, convert)
    record = (convert or find_format(row.keys(), DOCUMENTS))(row)
    return Dropped(f"the format {format_name(convert)} returned None") if record is None and convert else _text(record)


def _text(record: Record | list[Record] | None) -> str:
    if not isinstance(record, Text):
        raise UserError(
            f"the format returns a {type(record).__name__} for this row, which SFT or DPO trains on; pretraining reads "
            "documents: name a 'format' that returns a Text"
        )
    return record.prompt + record.text


def _refuse_conversation(row: Row, convert: Format | None) -> None:
    if convert is None and "text" not in row and any(name in row for name in CONVERSATIONS):
        raise UserError(
            "this row is a conversation, which SFT trains on; pretraining reads documents (a column 'text', or a "
            "'format' that returns a Text)"
        )


# --- from texts to tokens --------------------------------------------------------------------------------------------


def in_chunks(items: Iterable[str]) -> Iterator[list[str]]:
    """Groups texts into batches for the tokenizer."""
    chunk: list[str] = []
    characters = 0
    for item in items:
        chunk.append(item)
        characters += len(item)
        if len(chunk) >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def token_dtype(tokenizer: "PreTrainedTokenizerBase") -> type[np.unsignedinteger]:
    """The smallest type that holds every id of a tokenizer, the added ones included: uint16 or uint32."""
    largest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
    return np.uint16 if largest < 1 << 16 else np.uint32


class TokenizeDocuments:
    """Turns texts into token ids that end with EOS, and begin with BOS where the tokenizer by itself adds one.

    A long document is tokenized in pieces, to limit memory. It is cut at line ends between two characters that are not
    white space, and only if the tokenizer never joins characters across such a line end, so that the ids are those of
    the whole text. For other tokenizers (that mark the beginning of a text, for example), and without such line ends,
    the document is encoded whole.

    Args:
        tokenizer: A fast tokenizer with an EOS token.

    Raises:
        UserError: the tokenizer is not a fast one, or has no EOS token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        from tokenizers import Tokenizer

        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer; pretraining needs a fast one (with a tokenizer.json)"
            )
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token (eos_token), so documents would have no end")
        self.dtype = token_dtype(tokenizer)
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = None  # would add BOS and EOS, which `_document` does
        self._backend.no_truncation()
        self._backend.no_padding()
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._adds_bos = adds_bos(tokenizer)
        self._cuts = self._cuts_at_line_ends()
        self._first_tokens: dict[int, str] = {}

    def __call__(self, documents: list[str]) -> list[Document]:
        """Tokenizes a batch of documents."""
        pieces = [self._pieces(document) for document in documents]
        encoded = self._encoded(piece for split in pieces for piece in split)
        return [
            self._document(document, [next(encoded) for _ in split])
            for document, split in zip(documents, pieces, strict=True)
        ]

    def prompt(self, document: str) -> list[int]:
        """The ids of a text to be continued: without EOS at the end."""
        ids = self([document])[0].ids.tolist()
        return ids[:-1] if ids[-1] == self._eos and len(ids) > 1 else ids

    def _document(self, document: str, parts: list[np.ndarray]) -> Document:
        text_bytes = len(document.encode())
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        target_bytes = text_bytes
        if self._adds_bos:
            if not len(ids) or ids[0] != self._bos:
                ids = np.insert(ids, 0, self._bos)
        elif len(ids):
            target_bytes -= self._bytes_of_first(int(ids[0]), document)
        if not len(ids) or ids[-1] != self._eos:
            ids = np.append(ids, self.dtype(self._eos))
        return Document(ids, text_bytes, max(0, target_bytes))

    def _bytes_of_first(self, token: int, document: str) -> int:
        """Bytes of text of the first token; an incomplete character at its end counts for the next token."""
        if token not in self._first_tokens:
            self._first_tokens[token] = self._backend.decode([token], skip_special_tokens=False)
        decoded = self._first_tokens[token]
        if not document.startswith(decoded):
            decoded = decoded.rstrip("\ufffd")
        return len(decoded.encode())

    def _pieces(self, document: str) -> list[str]:
        if len(document) <= PIECE or not self._cuts:
            pieces = [document]
        else:
            pieces, start = [], 0
            while len(document) - start > PIECE and (found := _LINE_END.search(document, start + PIECE)):
                pieces.append(document[start : found.end()])
                start = found.end()
            pieces.append(document[start:])
        if (longest := max(map(len, pieces))) > LONGEST_PIECE:
            raise UserError(
                f"the document that begins with {document[:40]!r} has a text of {longest:,} characters, and at most "
                f"{LONGEST_PIECE:,} are tokenized as one; divide it (the source's `documents`, if it is a .txt file)"
            )
        return pieces

    def _encoded(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        for chunk in in_chunks(pieces):
            # without offsets, which takes a third of the time
            for encoding in self._backend.encode_batch_fast(chunk, add_special_tokens=False):
                yield np.array(encoding.ids, dtype=self.dtype)

    def _cuts_at_line_ends(self) -> bool:
        """Whether the tokenizer never joins characters on both sides of a line end."""
        before, after = "one two.\n", "three"
        splitter = self._backend.pre_tokenizer
        if splitter is None or len(before) not in [
            start for _, (start, _) in splitter.pre_tokenize_str(before + after)
        ]:
            return False
        apart, whole = (list(self._encoded(pieces)) for pieces in ([before, after], [before + after]))
        return np.array_equal(np.concatenate(apart), whole[0])
