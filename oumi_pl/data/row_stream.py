"""The stream of rows of pretraining: a mixture of documents, cut into windows and shuffled, with a position."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from oumi_pl.data.collate import stand_in
from oumi_pl.data.documents import Documents
from oumi_pl.data.plan import mixture_counts
from oumi_pl.data.windows import Row, Windows
from oumi_pl.errors import UserError
from oumi_pl.types import IGNORE_INDEX, Batch, Segment


def batch_of(rows: Sequence[Row], numbers: Sequence[int], pad_id: int) -> Batch:
    """Joins rows into a micro-batch. Without rows, returns a stand-in without targets.

    Args:
        rows: Its rows.
        numbers: Numbers of the rows, for `sample_ids`.
        pad_id: Token id of the stand-in.
    """
    if not rows:
        return stand_in(pad_id)
    labels = np.concatenate([row.labels for row in rows])
    lengths = np.concatenate([row.lengths for row in rows])
    predictors = np.flatnonzero(labels != IGNORE_INDEX)
    return {
        "input_ids": _tensor(np.concatenate([row.input_ids for row in rows])).unsqueeze(0),
        "position_ids": _tensor(np.concatenate([np.arange(n) for n in lengths])).unsqueeze(0),
        "segments": [Segment(length) for length in lengths.tolist()],
        "targets": _tensor(labels[predictors]),
        "predictors": _tensor(predictors),
        "target_segments": _tensor(np.searchsorted(np.cumsum(lengths), predictors, side="right")),
        "fields": {},
        "sample_ids": list(numbers),
    }


def arrays_to_state(arrays: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Integer arrays of any lengths as two tensors: all values, concatenated, int32, and the length of each array."""
    flat = np.concatenate([np.empty(0, dtype=np.int32), *arrays]).astype(np.int32)
    return {"values": torch.from_numpy(flat), "counts": torch.tensor([len(a) for a in arrays], dtype=torch.int64)}


def arrays_from_state(state: dict[str, Any]) -> list[np.ndarray]:
    """The arrays of an `arrays_to_state`, int32."""
    borders = np.cumsum(state["counts"].numpy())[:-1] if len(state["counts"]) else None
    return [] if borders is None else np.split(state["values"].numpy(), borders)


def rows_to_state(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as tensors, for a checkpoint."""
    return {name: arrays_to_state([getattr(row, name) for row in rows]) for name in Row._fields}


def rows_from_state(state: dict[str, Any]) -> list[Row]:
    """The rows of a `rows_to_state`."""
    columns = [arrays_from_state(state[name]) for name in Row._fields]
    return [Row(*fields) for fields in zip(*columns, strict=True)]


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))


Exhausted = Literal["stop", "restart"]


class TokenMixture:
    """Takes each document from the source that is furthest below its share of the tokens; nothing is random.

    After any document, the tokens of a source differ from its share by at most the length of the longest document times
    the number of other sources. Without weights the sources follow each other.

    Args:
        sources: The documents of each source.
        weights: Relative share of each source in the tokens; all None to read one source after the other.
        exhausted: At the end of a source (without weights, of the last one), the stream `stop`s, or the source (without
            weights, the first one) `restart`s.
        measure: Maps a document to what shares are of; its number of tokens by default.

    Raises:
        UserError: some sources have a weight and others none, or a weight isn't above 0; while reading: a source has no
            documents.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        weights: Sequence[float | None],
        exhausted: Exhausted,
        measure: Callable[[Any], float] = len,
    ) -> None:
        mixture_counts([1] * len(sources), weights)  # refuses invalid weights
        self.sources = sources
        self.exhausted = exhausted
        self.measure = measure
        given = np.array([weight for weight in weights if weight is not None], dtype=np.float64)
        self.shares = given / given.sum() if len(given) else None
        self._current = 0
        self.source = 0
        """The source of the last document."""
        self.restore({"current": 0, **{name: [0] * len(sources) for name in ("documents", "passes", "tokens")}})

    def __iter__(self) -> "TokenMixture":
        return self

    def __next__(self) -> np.ndarray:
        """The ids of the next document, `[tokens]`."""
        while True:
            source = self._due()
            iterator = self._iterators[source]
            if iterator is None:
                iterator = self._iterators[source] = self.sources[source].read(self._documents[source])
            ids = next(iterator, None)
            if ids is not None:
                self.source = source
                self._documents[source] += 1
                self._tokens[source] += self.measure(ids)
                return ids
            if not self._documents[source]:
                raise UserError(f"{self.sources[source].name}: there are no documents in it")
            if not self._tokens[source] and self.exhausted == "restart":  # it would be read again and again
                raise UserError(f"{self.sources[source].name}: none of its rows can be used")
            if not self._restart(source):
                raise StopIteration

    def close(self) -> None:
        """Ends the processes that read. The next document is read from the current position."""
        self._iterators = self._no_iterators()

    def _due(self) -> int:
        """The source that is furthest below its share; the first of equals."""
        if self.shares is None:
            return self._current
        return int(np.argmax(self.shares * sum(self._tokens) - self._tokens))

    def _restart(self, source: int) -> bool:
        """Handles the end of a source; returns False if the stream ends."""
        last = self.shares is not None or source == len(self.sources) - 1
        if last and self.exhausted == "stop":
            return False
        self._iterators[source] = None
        self._documents[source] = 0
        self._passes[source] += 1
        self._current = (source + 1) % len(self.sources)
        return True

    def state(self) -> dict[str, Any]:
        """Documents taken in the current pass, whole passes, and tokens so far, per source, as plain numbers."""
        return {
            "current": self._current,
            "documents": list(self._documents),
            "passes": list(self._passes),
            "tokens": list(self._tokens),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            UserError: the state has another number of sources.
        """
        if len(state["documents"]) != len(self.sources):
            raise UserError(
                f"the checkpoint was made with {len(state['documents'])} sources, this run has {len(self.sources)}; "
                "a run can only resume with the same sources"
            )
        self._current = state["current"]
        self._documents: list[int] = list(state["documents"])
        self._passes: list[int] = list(state["passes"])
        self._tokens: list[float] = list(state["tokens"])
        self._iterators = self._no_iterators()

    def _no_iterators(self) -> list[Iterator[np.ndarray] | None]:
        return [None] * len(self.sources)


_STREAM = 0x7368  # distinguishes these random numbers from others that are seeded with (seed, epoch)
_BLOCK = 4096  # random numbers drawn at once: one generator per row would be slow


class RowStream:
    """Rows of one pass, in an order that depends only on sources, seed and epoch.

    The state between two rows is small, however long the documents are: the positions in the sources and the tokens
    carried over before the last document, the number of rows of that document already yielded, and the shuffle buffer.
    To resume, the document itself is read again.

    Args:
        mixture: The documents.
        windows: Cuts them into rows.
        shuffle_buffer: Size, in rows, of the buffer that rows are drawn from; 0 keeps their order.
        seed: Seed of the draws.
        epoch: Counted from 0; each has other draws.
    """

    def __init__(self, mixture: TokenMixture, windows: Windows, shuffle_buffer: int, seed: int, epoch: int) -> None:
        self.mixture = mixture
        self.windows = windows
        self.shuffle_buffer = shuffle_buffer
        self._seed = seed, epoch
        self._draws: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._before = mixture.state(), windows.state()
        self._out = 0  # rows of the current document that were taken from `windows`
        self._running: list[int] | None = None  # source and length of the current document
        self._drawn = 0
        self._buffer: list[Row] = []

    def __iter__(self) -> Iterator[Row]:
        """Yields the rows from the current position to the end."""
        try:
            for row in self._in_order():
                if len(self._buffer) < self.shuffle_buffer:
                    self._buffer.append(row)
                elif not self._buffer:
                    yield row
                else:
                    drawn = self._draw()
                    out, self._buffer[drawn] = self._buffer[drawn], row
                    yield out
        finally:
            # Close now. The garbage collector would end the threads of the request queues before PyTorch asks the
            # workers to stop, and PyTorch would then wait five seconds for each worker.
            self.mixture.close()
        while self._buffer:
            drawn = self._draw()
            self._buffer[drawn], self._buffer[-1] = self._buffer[-1], self._buffer[drawn]
            yield self._buffer.pop()

    def _in_order(self) -> Iterator[Row]:
        skipped = self._out
        while True:
            self._before = self.mixture.state(), self.windows.state()
            ids = next(self.mixture, None)
            self._running = None if ids is None else [self.mixture.source, len(ids)]
            rows = self.windows.finish() if ids is None else self._rows(ids)
            self._out = skipped
            for row in itertools.islice(rows, skipped, None):
                self._out += 1
                yield row
            if ids is None:
                return
            skipped = 0

    def _rows(self, item: Any) -> Iterator[Any]:
        """The rows that are full once an item of the mixture is added."""
        return self.windows.rows(item)

    def _draw(self) -> int:
        """An index in the buffer: a function of seed, epoch and the number of rows drawn so far."""
        block, place = divmod(self._drawn, _BLOCK)
        if self._draws[0] != block:
            self._draws = block, np.random.default_rng([*self._seed, block, _STREAM]).random(_BLOCK)
        self._drawn += 1
        return int(self._draws[1][place] * len(self._buffer))

    def snapshot(self) -> dict[str, Any]:
        """The position between two rows. Cheap: copies only references, which `as_state` turns into tensors."""
        mixture, (carried, length) = self._before
        running = self._running
        if running is not None:  # approximate to one row, since the first may begin with tokens of earlier documents
            running = [running[0], min(running[1], self._out * self.windows.max_length)]
        return {
            "mixture": mixture,
            "running": running,
            "carried": (carried, length),
            "out": self._out,
            "drawn": self._drawn,
            "buffer": list(self._buffer),
        }

    def as_state(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        """Converts a snapshot to plain numbers and tensors for a checkpoint."""
        carried, length = snapshot["carried"]
        return snapshot | {
            "carried": arrays_to_state(carried[:length]),
            "buffer": rows_to_state(snapshot["buffer"]),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            UserError: it has another number of sources.
        """
        self.mixture.restore(state["mixture"])
        self.windows.restore(arrays_from_state(state["carried"]))
        self._out, self._drawn = state["out"], state["drawn"]
        self._running = state.get("running")  # of these, the tokens that were read
        self._buffer = rows_from_state(state["buffer"])
        self._before = self.mixture.state(), self.windows.state()
