"""Windows: documents become rows of at most `max_length` input tokens, each with as many labels.

Both kinds are fed document by document and hand out rows as they fill up. What they carry over is a list of arrays that
are never changed, so that noting the state costs nothing.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from oumi_pl.data.plan import pack
from oumi_pl.types import IGNORE_INDEX

BUFFERED_ROWS = 128
"""Rows' worth of documents that best fit chooses from at once."""


class Row(NamedTuple):
    """A row of tokens. Arrays are never changed once they are in a row.

    input_ids: `[seq]` int32. labels: `[seq]` int32, what each position has to predict, IGNORE_INDEX where nothing.
    lengths: `[docs]` int32, tokens of the documents that are kept apart; sums to `seq`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


class Windows(ABC):
    """Makes rows of documents.

    Args:
        max_length: Input tokens of a row.
        isolate: Keep the documents of a row apart: the first token of each is no target.
    """

    def __init__(self, max_length: int, isolate: bool) -> None:
        self.max_length = max_length
        self.isolate = isolate

    @abstractmethod
    def rows(self, ids: np.ndarray) -> Iterator[Row]:
        """The rows that are full once a document's ids `[tokens]` are added. To be gone through to the end."""

    @abstractmethod
    def finish(self) -> Iterator[Row]:
        """What is left when there are no more documents; the last row may be short."""

    @abstractmethod
    def state(self) -> tuple[list[np.ndarray], int]:
        """What is carried over between two documents: arrays of ids, and how many of them."""

    @abstractmethod
    def restore(self, carried: list[np.ndarray]) -> None:
        """Goes on with what was carried over."""

    @abstractmethod
    def count(self, lengths: Iterable[int]) -> int:
        """Rows that documents of so many tokens make, in this order."""


class Concat(Windows):
    """Joins documents and cuts every `max_length` tokens: a row's last label is the next row's first token.

    Every token is a label exactly once, but for the very first; isolated, but for the first of each document.
    """

    def __init__(self, max_length: int, isolate: bool) -> None:
        super().__init__(max_length, isolate)
        self._carried: list[np.ndarray] = []

    def rows(self, ids: np.ndarray) -> Iterator[Row]:
        """The rows that are full once a document's ids `[tokens]` are added. To be gone through to the end."""
        carried, have, start = self._carried, sum(map(len, self._carried)), 0
        while have + len(ids) - start > self.max_length:
            stop = start + self.max_length + 1 - have
            yield self._row([*carried, ids[start:stop]])
            carried, have, start = [], 0, stop - 1
        self._carried = [*carried, ids[start:].copy()]

    def finish(self) -> Iterator[Row]:
        """What is left when there are no more documents: one short row, or nothing."""
        if sum(map(len, self._carried)) > 1:
            yield self._row(self._carried)
        self._carried = []

    def state(self) -> tuple[list[np.ndarray], int]:
        """The tokens that no row has had as inputs, cut where documents begin."""
        return self._carried, len(self._carried)

    def restore(self, carried: list[np.ndarray]) -> None:
        """Goes on with what was carried over."""
        self._carried = carried

    def count(self, lengths: Iterable[int]) -> int:
        """Rows that documents of so many tokens make, in this order."""
        return -(-max(0, sum(lengths) - 1) // self.max_length)

    def _row(self, segments: Sequence[np.ndarray]) -> Row:
        """A row of one token more than it has inputs; `segments` are of a document each."""
        tokens = np.concatenate(segments, dtype=np.int32, casting="same_kind")
        inputs, labels = tokens[:-1], tokens[1:].copy()
        if not self.isolate:
            return Row(inputs, labels, np.array([len(inputs)], dtype=np.int32))
        ends = np.cumsum([len(segment) for segment in segments])
        labels[ends[:-1] - 1] = IGNORE_INDEX  # another document begins there
        lengths = np.diff(np.minimum(ends, len(inputs)), prepend=0)
        return Row(inputs, labels, lengths[lengths > 0].astype(np.int32))


class BestFit(Windows):
    """Packs whole documents by best fit, within a buffer of `BUFFERED_ROWS` rows' worth of them (Ding et al. 2024,
    arXiv:2404.10830); only documents longer than a row are cut.

    Every token is a label exactly once, but for the first of each document. A row is filled up with whatever fits; what
    is left of it stays empty. Rows come in the order of their first documents.
    """

    def __init__(self, max_length: int, isolate: bool) -> None:
        super().__init__(max_length, isolate)
        self._buffer = _Buffer(max_length)

    def rows(self, ids: np.ndarray) -> Iterator[Row]:
        """The rows that are full once a document's ids `[tokens]` are added. To be gone through to the end."""
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
        """What is left when there are no more documents."""
        yield from map(self._row, self._buffer.flush(everything=True))

    def state(self) -> tuple[list[np.ndarray], int]:
        """The documents, or last pieces of documents, that are in no row yet."""
        return self._buffer.items, len(self._buffer.items)

    def restore(self, carried: list[np.ndarray]) -> None:
        """Goes on with what was carried over."""
        self._buffer.restore(carried, [self._size(len(ids)) for ids in carried])

    def count(self, lengths: Iterable[int]) -> int:
        """Rows that documents of so many tokens make, in this order."""
        rows, buffer = 0, _Buffer(self.max_length)
        for length in lengths:
            cut = max(0, -(-(length - 1) // self.max_length) - 1)
            rest = length - cut * self.max_length
            full = rest > self.max_length
            rows += cut + full
            if not full and (size := self._size(rest)):
                rows += len(buffer.add(None, size))
        return rows + len(buffer.flush(everything=True))

    def _size(self, tokens: int) -> int:
        """Inputs that a document's end takes: its EOS is a label only, unless the next document has to see it."""
        return tokens - 1 if self.isolate else tokens

    def _row(self, pieces: Sequence[np.ndarray]) -> Row:
        """A row of pieces; one of more than `max_length` tokens is alone in it, and its last token a label only."""
        sizes = [min(self.max_length, self._size(len(piece))) for piece in pieces]
        inputs = np.empty(sum(sizes), dtype=np.int32)
        labels = np.full(len(inputs), IGNORE_INDEX, dtype=np.int32)
        start = 0
        for piece, size in zip(pieces, sizes, strict=True):
            inputs[start : start + size] = piece[:size]
            labels[start : start + len(piece) - 1] = piece[1:]
            start += size
        return Row(inputs, labels, np.array(sizes if self.isolate else [len(inputs)], dtype=np.int32))


class _Buffer:
    """Items of known sizes, packed by best fit once there are enough of them. Lists only grow, until they are replaced.

    The fullest packs are handed out, and the emptiest one stays for the next time.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items: list[Any] = []
        self.sizes: list[int] = []
        self._total = 0

    def restore(self, items: list[Any], sizes: list[int]) -> None:
        self.items, self.sizes, self._total = items, sizes, sum(sizes)

    def add(self, item: Any, size: int) -> list[list[Any]]:
        self.items.append(item)
        self.sizes.append(size)
        self._total += size
        return self.flush() if self._total >= BUFFERED_ROWS * self.capacity else []

    def flush(self, everything: bool = False) -> list[list[Any]]:
        sizes = np.array(self.sizes, dtype=np.int64)
        members, starts = pack(sizes, self.capacity)
        packs = [sorted(members[start:stop].tolist()) for start, stop in itertools.pairwise(starts.tolist())]
        emptiest: list[int] = []
        if packs and not everything:
            emptiest = packs.pop(int(np.argmin([sizes[members].sum() for members in packs])))
        out = [[self.items[i] for i in members] for members in sorted(packs)]
        self.restore([self.items[i] for i in emptiest], sizes[emptiest].tolist())
        return out
