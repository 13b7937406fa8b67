"""Examples as their batch shows them: marked are the targets of that very batch."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from oumi_pl.data.examples import ExampleData
from oumi_pl.errors import UserError
from oumi_pl.preview.marks import Tokens, segments_of
from oumi_pl.preview.pieces import Decoder, Piece
from oumi_pl.preview.rows import SourceRow, row_count, walk
from oumi_pl.preview.shown import Mark, Section, Shown
from oumi_pl.types import Example, Segment

# ---- which


def first(data: ExampleData, split: str, count: int) -> list[SourceRow]:
    """The first examples of a split."""
    return list(itertools.islice(walk(data, split, lambda row, index: index is not None), count))


def numbered(data: ExampleData, split: str, rows: Sequence[int]) -> list[SourceRow]:
    """The rows of these numbers, counted from 1 as they are read.

    Raises:
        UserError: there are fewer rows.
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
    """The first examples that tokens were cut off from."""
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


# ---- what they are


def shown(data: ExampleData, split: str, row: SourceRow, decoder: Decoder) -> Shown:
    """One row as the model sees it."""
    title = f"{split} row {row.number:,}"
    if row.example is None:
        return Shown(title, [row.origin, f"dropped: {row.reason}"], _text_of_dropped(data, row, decoder))
    example: Example = data.examples(split)[row.example]
    segments = segments_of(data.batch(split, [row.example]))
    uncut = data.uncut(row.record) if row.cut else None
    whole, kept = uncut or (example, [np.arange(len(tokens)) for tokens in segments])
    parts = _parts(data.segment_names, example, segments, whole, kept)
    targets = sum(int(tokens.targets.sum()) for tokens in segments)
    lengths = ", ".join(f"{part.name} {len(part.tokens):,}" for part in parts) if len(parts) > 1 else ""
    facts = [row.origin, f"{len(example.input_ids):,} tokens{f' ({lengths})' if lengths else ''}"]
    facts.append(f"{targets:,} carry loss")
    facts += [f"{name} {value:g}" for name, value in example.fields.items() if not math.isnan(value)]
    if row.cut:
        removed = len(whole.input_ids) - len(example.input_ids)
        facts.append(f"cut: {removed:,} tokens removed" if removed else "cut")
    if row.straddled:
        facts.append("a token holds characters of both prompt and answer")
    return Shown(title, facts, [Section(part.title, _with_cuts(part, decoder)) for part in parts])


class _Part:
    """Tokens that are shown together, which are those at `kept` `[n]` of `length`; the others were cut off."""

    def __init__(self, name: str, title: str, tokens: Tokens, kept: np.ndarray, length: int) -> None:
        self.name = name
        self.title = title
        self.tokens = tokens
        self.kept = kept
        self.length = length


def _parts(
    names: Sequence[str], example: Example, segments: list[Tokens], whole: Example, kept: list[np.ndarray]
) -> list[_Part]:
    """What all segments share, once, and then the rest of each segment; a single part where there is one segment.

    Args:
        names: Of the segments, as far as they have one.
        example: As it is trained on.
        segments: Its segments' own tokens.
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
        skip, whole_skip = (0, 0) if i else (shared, whole_shared)  # of the first, what all share is above
        rest, length = tokens.part(skip, len(tokens)), whole.segments[i].length - whole_skip
        elsewhere = i and segment.shared != shared
        after = f", after {segment.shared:,} tokens of segment {segment.parent + 1}" if elsewhere else ""
        parts.append(_Part(name, f"{name} ({len(rest):,} tokens{after})", rest, kept[i][skip:] - whole_skip, length))
    return parts


def _shared_by_all(segments: Sequence[Segment]) -> int:
    return min(segment.shared for segment in segments[1:])


def _text_of_dropped(data: ExampleData, row: SourceRow, decoder: Decoder) -> list[Section]:
    """What a dropped row would be if it were not too long; nothing of it is trained on, so nothing is marked."""
    if (uncut := data.uncut(row.record)) is None:
        return []
    ids = uncut[0].input_ids.tolist()
    pieces = decoder.pieces(ids, [False] * len(ids), range(len(ids)))
    return [Section(f"not trained on: {len(ids):,} tokens", [*pieces])]


def _with_cuts(part: _Part, decoder: Decoder) -> list[Piece | Mark]:
    """The pieces of a part, and a mark wherever tokens are missing."""
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
