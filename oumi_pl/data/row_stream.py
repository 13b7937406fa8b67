"""The stream of rows: documents in proportion, cut into windows, shuffled; and where it stands."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from oumi_pl.data.mixture_stream import TokenMixture
from oumi_pl.data.rows import Row, arrays_from_state, arrays_to_state, rows_from_state, rows_to_state
from oumi_pl.data.windows import Windows

_STREAM = 0x7368  # keeps these random numbers apart from others that are seeded with (seed, epoch)
_BLOCK = 4096  # random numbers that are made at once


class RowStream:
    """Rows of one pass, in an order that is a function of sources, seed and epoch alone.

    The state between two rows is small, however long the documents are: where the sources stood and what the windows
    carried over before the last document, how many rows of that document are out, and the content of the shuffle
    buffer. The document itself is read again.

    Args:
        mixture: Documents.
        windows: Makes rows of them.
        shuffle_buffer: Rows of which each next one is drawn; 0 leaves them in order.
        seed: Of the draws.
        epoch: Counted from 0; each has its own draws.
    """

    def __init__(self, mixture: TokenMixture, windows: Windows, shuffle_buffer: int, seed: int, epoch: int) -> None:
        self.mixture = mixture
        self.windows = windows
        self.shuffle_buffer = shuffle_buffer
        self._seed = seed, epoch
        self._draws: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._before = mixture.state(), windows.state()
        self._out = 0  # rows that the running document has made
        self._drawn = 0
        self._buffer: list[Row] = []

    def __iter__(self) -> Iterator[Row]:
        """The rows from where the stream stands to its end."""
        for row in self._in_order():
            if len(self._buffer) < self.shuffle_buffer:
                self._buffer.append(row)
            elif not self._buffer:
                yield row
            else:
                drawn = self._draw()
                out, self._buffer[drawn] = self._buffer[drawn], row
                yield out
        while self._buffer:
            drawn = self._draw()
            self._buffer[drawn], self._buffer[-1] = self._buffer[-1], self._buffer[drawn]
            yield self._buffer.pop()

    def _in_order(self) -> Iterator[Row]:
        skipped = self._out
        while True:
            self._before = self.mixture.state(), self.windows.state()
            ids = next(self.mixture, None)
            rows = self.windows.finish() if ids is None else self.windows.rows(ids)
            self._out = skipped
            for row in itertools.islice(rows, skipped, None):
                self._out += 1
                yield row
            if ids is None:
                return
            skipped = 0

    def _draw(self) -> int:
        """A place in the buffer: a function of seed, epoch and the number of rows drawn so far."""
        block, place = divmod(self._drawn, _BLOCK)
        if self._draws[0] != block:
            self._draws = block, np.random.default_rng([*self._seed, block, _STREAM]).random(_BLOCK)
        self._drawn += 1
        return int(self._draws[1][place] * len(self._buffer))

    def snapshot(self) -> dict[str, Any]:
        """Where the stream stands, between two rows. Copies references only; `as_state` makes tensors of it."""
        mixture, (carried, length) = self._before
        return {
            "mixture": mixture,
            "carried": (carried, length),
            "out": self._out,
            "drawn": self._drawn,
            "buffer": list(self._buffer),
        }

    def as_state(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        """A snapshot as plain numbers and tensors, which a checkpoint can hold."""
        carried, length = snapshot["carried"]
        return snapshot | {
            "carried": arrays_to_state(carried[:length]),
            "buffer": rows_to_state(snapshot["buffer"]),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            UserError: it is of another number of sources.
        """
        self.mixture.restore(state["mixture"])
        self.windows.restore(arrays_from_state(state["carried"]))
        self._out, self._drawn = state["out"], state["drawn"]
        self._buffer = rows_from_state(state["buffer"])
