"""Windows: cut documents into rows of at most `max_length` input tokens, each with as many labels.

Both kinds take one document at a time and yield rows as they fill up. They carry tokens over in a list of arrays that
are never changed in place, so that a snapshot of the state costs nothing.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from oumi_pl.data.plan import pack
from oumi_pl.types import IGNORE_INDEX

BUFFERED_ROWS = 128
"""Size of the buffer that best fit packs from, in rows."""


class Row(NamedTuple):
    """A row of tokens, whose arrays are never changed.

    input_ids: `[seq]` int32. labels: `[seq]` int32, the token that each position predicts; IGNORE_INDEX for none.
    lengths: `[docs]` int32, tokens of the documents that are kept apart; sums to `seq`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


class Windows(ABC):
    """Cuts documents into rows.

    Args:
        max_length: Input tokens of a row.
        isolate: Keep the documents of a row apart; the first token of each is then no target.
    """

    def __init__(self, max_length: int, isolate: bool) -> None:
        self.max_length = max_length
        self.isolate = isolate

    @abstractmethod
    def rows(self, ids: np.ndarray) -> Iterator[Row]:
        """Adds a document's ids `[tokens]` and yields the rows that are full. Has to be exhausted."""

    @abstractmethod
    def finish(self) -> Iterator[Row]:
        """Yields the remaining rows after the last document; the last one may be short."""

    @abstractmethod
    def state(self) -> tuple[list[np.ndarray], int]:
        """The tokens carried over between two documents: arrays of ids, and how many of them (the list may grow)."""

    @abstractmethod
    def restore(self, carried: list[np.ndarray]) -> None:
        """Continues with tokens that were carried over."""

    @abstractmethod
    def count(self, lengths: Iterable[int]) -> int:
        """Number of rows for documents of these lengths, in this order."""


class Concat(Windows):
    """Joins documents and cuts every `max_length` tokens: a row's last label is the next row's first token.

    Every token is a label exactly once, except the very first; with `isolate`, except the first of each document.
    """

    def __init__(self, max_length: int, isolate: bool) -> None:
        super().__init__(max_length, isolate)
        self._carried: list[np.ndarray] = []

    def rows(self, ids: np.ndarray) -> Iterator[Row]:
        """Adds a document's ids `[tokens]` and yields the rows that are full. Has to be exhausted."""
        carried, have, start = self._carried, sum(map(len, self._carried)), 0
        while have + len(ids) - start > self.max_length:
            stop = start + self.max_length + 1 - have
            yield self._row([*carried, ids[start:stop]])
            carried, have, start = [], 0, stop - 1
        self._carried = [*carried, ids[start:].copy()]

    def finish(self) -> Iterator[Row]:
        """Yields the remaining tokens as a short row, if any."""
        if sum(map(len, self._carried)) > 1:
            yield self._row(self._carried)
        self._carried = []

    def state(self) -> tuple[list[np.ndarray], int]:
        """The tokens that were inputs of no row yet, one array per document."""
        return self._carried, len(self._carried)

    def restore(self, carried: list[np.ndarray]) -> None:
        """Continues with tokens that were carried over."""
        self._carried = carried

    def count(self, lengths: Iterable[int]) -> int:
        """Number of rows for documents of these lengths, in this order."""
        return -(-max(0, sum(lengths) - 1) // self.max_length)

    def _row(self, segments: Sequence[np.ndarray]) -> Row:
        """A row from one token more than its inputs; each of `segments` is from another document."""
        tokens = np.concatenate(segments, dtype=np.int32, casting="same_kind")
        inputs, labels = tokens[:-1], tokens[1:].copy()
        if not self.isolate:
            return Row(inputs, labels, np.array([len(inputs)], dtype=np.int32))
        ends = np.cumsum([len(segment) for segment in segments])
        labels[ends[:-1] - 1] = IGNORE_INDEX  # the next token begins another document
        lengths = np.diff(np.minimum(ends, len(inputs)), prepend=0)
        return Row(inputs, labels, lengths[lengths > 0].astype(np.int32))


class BestFit(Windows):
    """Packs whole documents by best fit, within a buffer of `BUFFERED_ROWS` rows' worth of them (Ding et al. 2024,
    arXiv:2404.10830); only documents longer than a row are cut.

    Every token is a label exactly once, except the first of each document. Rows are filled as far as documents fit, and
    come in the order of their first documents.
    """

    def __init__(self, max_length: int, isolate: bool) -> None:
        super().__init__(max_length, isolate)
        self._buffer = Buffer(max_length)

    def rows(self, ids: np.ndarray) -> Iterator[Row]:
        """Adds a document's ids `[tokens]` and yields the rows that are full. Has to be exhausted."""
        start = 0
        while len(ids) - start > self.max_length + 1:
            yield self._row([ids[start : start + self.max_length + 1]])
            start += self.max_length
        rest = ids[start:]
        if len(rest) > self.max_length:
            yield self._row([rest])
        elif size := self._size(len(rest)):
            yield from map(self._row, self._buffer.add(rest.copy(), size))

    def finish(self) -> Iterator[Row]:
        """Yields the remaining rows."""
        yield from map(self._row, self._buffer.flush(everything=True))

    def state(self) -> tuple[list[np.ndarray], int]:
        """The documents, or last pieces of them, that are in no row yet."""
        return self._buffer.items, len(self._buffer.items)

    def restore(self, carried: list[np.ndarray]) -> None:
        """Continues with tokens that were carried over."""
        self._buffer.restore(carried, [self._size(len(ids)) for ids in carried])

    def count(self, lengths: Iterable[int]) -> int:
        """Number of rows for documents of these lengths, in this order."""
        rows, buffer = 0, Buffer(self.max_length)
        for length in lengths:
            cut = max(0, -(-(length - 1) // self.max_length) - 1)
            rest = length - cut * self.max_length
            full = rest > self.max_length
            rows += cut + full
            if not full and (size := self._size(rest)):
                rows += len(buffer.add(None, size))
        return rows + len(buffer.flush(everything=True))

    def _size(self, tokens: int) -> int:
        """Number of inputs for `tokens`: with `isolate`, the last one (EOS) is only a label."""
        return tokens - 1 if self.isolate else tokens

    def _row(self, pieces: Sequence[np.ndarray]) -> Row:
        """A row of pieces. A piece of more than `max_length` tokens is alone, and its last token only a label."""
        sizes = [min(self.max_length, self._size(len(piece))) for piece in pieces]
        inputs = np.empty(sum(sizes), dtype=np.int32)
        labels = np.full(len(inputs), IGNORE_INDEX, dtype=np.int32)
        start = 0
        for piece, size in zip(pieces, sizes, strict=True):
            inputs[start : start + size] = piece[:size]
            labels[start : start + len(piece) - 1] = piece[1:]
            start += size
        return Row(inputs, labels, np.array(sizes if self.isolate else [len(inputs)], dtype=np.int32))


class Buffer:
    """Items of known sizes, packed by best fit once there are enough of them.

    The emptiest pack stays in the buffer. Lists are only appended to or replaced: a snapshot is a list and a length.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: list[Any] = []
        self.sizes: list[int] = []
        self._total = 0

    def restore(self, items: list[Any], sizes: list[int]) -> None:
        """Continues with items of these sizes."""
        self.items, self.sizes, self._total = items, sizes, sum(sizes)

    def add(self, item: Any, size: int) -> list[list[Any]]:
        """Adds an item; returns the packs that are due."""
        self.items.append(item)
        self.sizes.append(size)
        self._total += size
        return self.flush() if self._total >= BUFFERED_ROWS * self.capacity else []

    def flush(self, everything: bool = False) -> list[list[Any]]:
        """Packs the items; returns the packs, without the emptiest one unless `everything`."""
        sizes = np.array(self.sizes, dtype=np.int64)
        members, starts = pack(sizes, self.capacity)
        packs = [sorted(members[start:stop].tolist()) for start, stop in itertools.pairwise(starts.tolist())]
        emptiest: list[int] = []
        if packs and not everything:
            emptiest = packs.pop(int(np.argmin([sizes[members].sum() for members in packs])))
        out = [[self.items[i] for i in members] for members in sorted(packs)]
        self.restore([self.items[i] for i in emptiest], sizes[emptiest].tolist())
        return out
