"""The content of a preview, for terminal and page alike: pieces of text in sections, with marks between them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from oumi_pl.preview.pieces import Piece

SHOWN_TOKENS = 480
"""Longer sections, in pieces, are shortened in the middle."""
SHOWN_RUNS = 24
"""Of more runs (turns, documents) in a section, those in the middle are left out."""
KEPT_OF_A_RUN = 24
"""Fewest pieces of a run that are shown."""


@dataclass(frozen=True)
class Mark:
    """A mark between two pieces: tokens that were `cut` off, a `border` of documents, or `hidden` pieces."""

    kind: Literal["cut", "border", "hidden"]
    text: str
    hidden: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of an example: a shared prompt, a response, or all of it."""

    title: str
    items: list[Piece | Mark]

    @property
    def pieces(self) -> list[Piece]:
        """The pieces without the marks."""
        return [item for item in self.items if isinstance(item, Piece)]


@dataclass(frozen=True)
class Shown:
    """An example: title, facts, and parts."""

    title: str
    facts: list[str]
    sections: list[Section] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Pack:
    """A pack: the length of each of its examples, and the row that each comes from, 0 if unknown."""

    lengths: list[int]
    rows: list[int]


@dataclass(frozen=True)
class Packs:
    """The packs of the first micro-batch."""

    title: str
    capacity: int
    packs: list[Pack]


@dataclass(frozen=True)
class Histogram:
    """The lengths of a split's examples: `counts` in ranges of equal width from `low` to `high` tokens."""

    title: str
    low: int
    high: int
    counts: list[int]


@dataclass(frozen=True)
class Preview:
    """The whole content of a preview."""

    title: str
    notes: list[str]
    examples: list[Shown]
    packs: Packs | None
    tables: list[Table]
    histograms: list[Histogram]


def shortened(section: Section) -> Section:
    """Leaves out the middle of long runs of a section; the borders of runs, where loss begins and ends, stay."""
    if len(section.pieces) <= SHOWN_TOKENS:
        return section
    runs = _runs(section.items)
    if len(runs) > SHOWN_RUNS:
        half = SHOWN_RUNS // 2
        middle = [item for run in runs[half:-half] for item in run]
        runs = [*runs[:half], [_hidden(middle)], *runs[-half:]]
    each = max(KEPT_OF_A_RUN, SHOWN_TOKENS // len(runs)) // 2
    items: list[Piece | Mark] = []
    for run in runs:
        items += run if len(run) <= 2 * each + KEPT_OF_A_RUN else [*run[:each], _hidden(run[each:-each]), *run[-each:]]
    return Section(section.title, items)


def stretches(items: Iterable[Piece | Mark]) -> Iterator[list[Piece] | Mark]:
    """Groups consecutive pieces into lists; yields these lists and the marks between them."""
    pieces: list[Piece] = []
    for item in items:
        if isinstance(item, Piece):
            pieces.append(item)
            continue
        if pieces:
            yield pieces
        pieces = []
        yield item
    if pieces:
        yield pieces


def _runs(items: Sequence[Piece | Mark]) -> list[list[Piece | Mark]]:
    """Splits items into runs of pieces that all carry loss or all don't; each mark is a run of its own."""
    keyed = groupby(enumerate(items), lambda x: x[1].target if isinstance(x[1], Piece) else ("mark", x[0]))
    return [[item for _, item in run] for _, run in keyed]


def _hidden(items: Sequence[Piece | Mark]) -> Mark:
    pieces = tuple(item for item in items if isinstance(item, Piece))
    tokens = sum(len(piece.ids) for piece in pieces)
    targets = sum(len(piece.ids) for piece in pieces if piece.target)
    loss = "" if targets in (0, tokens) else f", {targets:,} of them with loss"
    return Mark("hidden", f"… {tokens:,} tokens not shown here{loss}", pieces)
