"""Finds examples by their rows, and shows each as its batch feeds it to the model, with the targets of that batch."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from oumi_pl.data.duplicates import Repeats
from oumi_pl.data.examples import ChatData, ExampleData
from oumi_pl.data.records import RecordWithFields, record_reader
from oumi_pl.data.sources import Source
from oumi_pl.data.splitting import Side
from oumi_pl.data.store import ExampleStore
from oumi_pl.data.tokenize import Dropped
from oumi_pl.data.where import WHERE
from oumi_pl.errors import UserError
from oumi_pl.preview.pieces import Decoder, Piece, Tokens, segments_of
from oumi_pl.preview.shown import Mark, Section, Shown
from oumi_pl.terminal.screen import track
from oumi_pl.types import BadRow, Conversation, Example, Record, Segment

AT_ONCE = 256
"""Rows tokenized at once."""
LISTED = 8
"""Most weights of a row that are listed."""


class SourceRow(NamedTuple):
    """A row of a source, and its example.

    number: of the row, from 1 over all sources of the split. origin: file and line. record: None for a row that can't
    be used. example: index of its example in the split, from 0; None if the row was dropped. reason: why it was
    dropped.
    """

    number: int
    origin: str
    record: Record | None
    example: int | None
    reason: str = ""
    cut: bool = False
    straddled: bool = False


Wanted = Callable[[int, int | None], bool]
"""(Row number, index of its example or None) -> whether the row is wanted."""


def row_count(data: ExampleData, split: str) -> int:
    """Number of rows of a split, including dropped ones, but not those that `where` leaves out."""
    return sum(map(_rows_of, data.stores(split)))


def _rows_of(store: ExampleStore) -> int:
    """Number of rows that the store's source yields."""
    filtered = sum(n for reason, n in store.report["dropped"].items() if reason.startswith(WHERE))
    return int(store.report["rows"]) - filtered


def has_no_dropped_rows(data: ExampleData, split: str) -> bool:
    """Whether no row was dropped, so that example `i` comes from row `i + 1`."""
    return row_count(data, split) == sum(map(len, data.stores(split)))


def walk(data: ExampleData, split: str, wanted: Wanted) -> Iterator[SourceRow]:
    """Yields the wanted rows of a split, in order.

    Rows are read from the sources again. If some were dropped, all are tokenized again as well, to find out which.
    """
    sources, keep = data.taken(split)
    number = index = 0
    for i, (source, store) in enumerate(zip(sources, data.stores(split), strict=True)):
        drops = _rows_of(store) != len(store)
        records = track(_records(data, split, source, keep, i), f"looking for rows in {source.title}")
        while batch := list(itertools.islice(records, AT_ONCE)):
            rows = [(number + i, origin, record) for i, (origin, record) in enumerate(batch, 1)]
            if not drops:  # every row has an example, so only wanted rows have to be tokenized
                places: list[int | None] = list(range(index, index + len(rows)))
                chosen = [(row, place) for row, place in zip(rows, places, strict=True) if wanted(row[0], place)]
                encoded = _encoded(data, [record for (_, _, record), _ in chosen])
            else:
                encoded = _encoded(data, [record for _, _, record in rows])
                kept = itertools.count(index)
                places = [next(kept) if isinstance(example, Example) else None for example in encoded]
                chosen = list(zip(rows, places, strict=True))
            for ((row, origin, record), place), example in zip(chosen, encoded, strict=True):
                if not wanted(row, place):
                    continue
                if isinstance(example, Example):
                    yield SourceRow(row, origin, record, place, "", example.cut, example.straddled)
                else:
                    yield SourceRow(row, origin, record if isinstance(record, Record) else None, None, example.reason)
            number += len(rows)
            index += sum(place is not None for place in places)


def _records(
    data: ExampleData, split: str, source: Source, keep: Side | None, number: int
) -> Iterator[tuple[str, Record | Dropped | BadRow]]:
    """The records of a split's source, its number counted from 0, as its store was made from them."""
    records = record_reader(source, data.formats, data.fields, data.kept_columns(split)).records(keep, strict=False)
    if data.drops_repeated(split):
        records = Repeats(data.stores(split)[:number]).leave_out(records)
    return ((origin, one.record if isinstance(one, RecordWithFields) else one) for origin, one in records)


def _encoded(data: ExampleData, records: Sequence[Record | Dropped | BadRow]) -> list[Example | Dropped | BadRow]:
    """The example of each record, or the reason why there is none."""
    known = [record for record in records if isinstance(record, Record)]
    try:
        examples = iter(data.encode(known) if known else [])
    except UserError as error:
        if len(records) == 1:
            return [BadRow(str(error))]
        return [example for record in records for example in _encoded(data, [record])]
    return [next(examples) if isinstance(record, Record) else record for record in records]


# ---- which examples


def first(data: ExampleData, split: str, count: int) -> list[SourceRow]:
    """The first examples of a split."""
    return list(itertools.islice(walk(data, split, lambda row, index: index is not None), count))


def numbered(data: ExampleData, split: str, rows: Sequence[int]) -> list[SourceRow]:
    """The rows with these numbers, counted from 1 in reading order.

    Raises:
        UserError: a number is out of range.
    """
    last = row_count(data, split)
    for row in rows:
        if not 1 <= row <= last:
            raise UserError(f"--row {row}: the {split} split has rows 1 to {last:,}")
    wanted = set(rows)
    matches = itertools.islice(walk(data, split, lambda row, index: row in wanted), len(wanted))
    by_number = {row.number: row for row in matches}
    return [by_number[row] for row in dict.fromkeys(rows)]


def longest(data: ExampleData, split: str, count: int) -> list[SourceRow]:
    """The examples with the most tokens, the longest first."""
    order = np.argsort(-data.lengths(split), kind="stable")[:count].tolist()
    wanted = set(order)
    matches = itertools.islice(walk(data, split, lambda row, index: index in wanted), len(wanted))
    return sorted(matches, key=lambda row: order.index(row.example))


def cut(data: ExampleData, split: str, count: int) -> list[SourceRow]:
    """The first examples that were cut to `max_length`."""
    if not any(store.report["cut"] for store in data.stores(split)):
        return []
    full = data.lengths(split) >= data.max_length  # a shorter one can't have been cut
    candidates = walk(data, split, lambda row, index: index is not None and bool(full[index]))
    return list(itertools.islice((row for row in candidates if row.cut), count))


def dropped(data: ExampleData, split: str, count: int) -> list[SourceRow]:
    """The first rows that were dropped."""
    missing = row_count(data, split) - sum(map(len, data.stores(split)))
    rows = (row for row in walk(data, split, lambda row, index: index is None) if row.example is None)
    return list(itertools.islice(rows, min(count, missing)))


# ---- what they look like


def shown(data: ExampleData, split: str, row: SourceRow, decoder: Decoder) -> Shown:
    """One row as the model sees it."""
    title = f"{split} row {row.number:,}"
    if row.example is None:
        return Shown(title, [row.origin, f"dropped: {row.reason}"], _text_of_dropped(data, row, decoder))
    example: Example = data.examples(split)[row.example]
    segments = segments_of(data.batch(split, [row.example]))
    uncut = data.uncut(row.record) if row.cut and row.record is not None else None
    whole, kept = uncut or (example, [np.arange(len(tokens)) for tokens in segments])
    parts = _parts(data.segment_names, example, segments, whole, kept)
    targets = sum(int(tokens.targets.sum()) for tokens in segments)
    lengths = ", ".join(f"{part.name} {len(part.tokens):,}" for part in parts) if len(parts) > 1 else ""
    facts = [row.origin, f"{len(example.input_ids):,} tokens{f' ({lengths})' if lengths else ''}"]
    facts.append(f"{targets:,} carry loss{'' if row.cut else _by_kind(data, row.record, targets)}")
    weights = [] if example.weights is None else np.unique(example.weights[example.loss_mask]).tolist()
    if weights not in ([], [1.0]):
        counted = [f"{weight:g}" for weight in weights]
        facts.append(f"with weights {', '.join(counted[:LISTED])}{', ...' if len(counted) > LISTED else ''}")
    facts += [f"{name} {value:g}" for name, value in example.fields.items() if not math.isnan(value)]
    if row.cut:
        removed = len(whole.input_ids) - len(example.input_ids)
        facts.append(f"cut: {removed:,} tokens removed" if removed else "cut")
    if row.straddled:
        facts.append("a token holds characters of both prompt and answer")
    return Shown(title, facts, [Section(part.title, _with_cuts(part, decoder)) for part in parts])


def _by_kind(data: ExampleData, record: Record | None, targets: int) -> str:
    """What the tokens that carry loss are, if a conversation has more than texts."""
    if not isinstance(data, ChatData) or not isinstance(record, Conversation):
        return ""
    kinds = data.tokenize.loss_by_kind(record)
    if not kinds.keys() - {"text"}:
        return ""
    kinds["tags and ends of turns"] = targets - sum(kinds.values())
    return f" ({', '.join(f'{kind} {n:,}' for kind, n in kinds.items() if n > 0)})"


class _Part:
    """Tokens that are shown together. Of the `length` original tokens those at `kept` `[n]` remain; others were cut."""

    def __init__(self, name: str, title: str, tokens: Tokens, kept: np.ndarray, length: int) -> None:
        self.name = name
        self.title = title
        self.tokens = tokens
        self.kept = kept
        self.length = length


def _parts(
    names: Sequence[str], example: Example, segments: list[Tokens], whole: Example, kept: list[np.ndarray]
) -> list[_Part]:
    """The tokens that all segments share, once, then the rest of each segment; one part if there is one segment.

    Args:
        names: Names of the first segments.
        example: The example as it is trained on.
        segments: The own tokens of each of its segments.
        whole: The example before it was cut.
        kept: Per segment of `whole`, which of its own tokens are in `segments`.
    """
    count = len(segments)
    if count == 1:
        return [_Part("", "", segments[0], kept[0], len(whole.input_ids))]
    shared, whole_shared = _shared_by_all(example.segments), _shared_by_all(whole.segments)
    parts = []
    if shared:
        title = f"prompt, the same for {'both' if count == 2 else f'all {count}'}"
        parts.append(_Part("prompt", title, segments[0].part(0, shared), kept[0][:shared], whole_shared))
    for i, (segment, tokens) in enumerate(zip(example.segments, segments, strict=True)):
        name = names[i] if i < len(names) else f"segment {i + 1}"
        skip, whole_skip = (0, 0) if i else (shared, whole_shared)  # the first segment's are shown above
        rest, length = tokens.part(skip, len(tokens)), whole.segments[i].length - whole_skip
        elsewhere = i and segment.shared != shared
        after = f", after {segment.shared:,} tokens of segment {segment.parent + 1}" if elsewhere else ""
        parts.append(_Part(name, f"{name} ({len(rest):,} tokens{after})", rest, kept[i][skip:] - whole_skip, length))
    return parts


def _shared_by_all(segments: Sequence[Segment]) -> int:
    return min(segment.shared for segment in segments[1:])


def _text_of_dropped(data: ExampleData, row: SourceRow, decoder: Decoder) -> list[Section]:
    """The text of a row that was dropped for its length, without targets, because nothing in it is trained on."""
    try:
        uncut = data.uncut(row.record) if row.record is not None else None
    except UserError:  # the reason why the row was dropped
        uncut = None
    if uncut is None:
        return []
    ids = uncut[0].input_ids.tolist()
    pieces = decoder.pieces(ids, [False] * len(ids), range(len(ids)))
    return [Section(f"not trained on: {len(ids):,} tokens", [*pieces])]


def _with_cuts(part: _Part, decoder: Decoder) -> list[Piece | Mark]:
    """The pieces of a part, with a mark wherever tokens were cut."""
    tokens, kept = part.tokens, part.kept
    items: list[Piece | Mark] = []
    borders = [0, *(np.flatnonzero(np.diff(kept) > 1) + 1).tolist(), len(kept)]
    end = 0
    for start, stop in itertools.pairwise(borders):
        if start == stop:
            continue
        if missing := int(kept[start]) - end:
            items.append(_cut_mark(missing))
        run = tokens.part(start, stop)
        items += decoder.pieces(run.ids.tolist(), run.targets, run.positions.tolist())
        end = int(kept[stop - 1]) + 1
    if missing := part.length - end:
        items.append(_cut_mark(missing))
    return items


def _cut_mark(tokens: int) -> Mark:
    return Mark("cut", f"✂ {tokens:,} token{'s' if tokens > 1 else ''} cut off here")
