"""The loader of a stream of rows: divides it by update, micro-batch and rank, and keeps a position per update."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from oumi_pl.data.loader import refuse_other_rows
from oumi_pl.data.plan import Layout
from oumi_pl.data.windows import Row
from oumi_pl.errors import UserError
from oumi_pl.types import IGNORE_INDEX, Batch, Update

KEPT_POSITIONS = 4
"""Updates whose positions are kept. Few suffice: Lightning fetches at most one micro-batch ahead of training."""


class Stream(Protocol):
    """The rows of one pass, with a position that can be saved between any two of them."""

    def __iter__(self) -> Iterator[Any]:
        """Yields the rows from the current position to the end."""

    def snapshot(self) -> Any:
        """The position between two rows; not to be changed."""

    def as_state(self, snapshot: Any) -> Any:
        """Converts a snapshot to plain numbers and tensors for a checkpoint."""

    def restore(self, state: Any) -> None:
        """Continues from a state."""


class StreamLoader:
    """Yields the micro-batches of one rank. Each rank reads the whole stream and takes its share of every update.

    Update `u` has the rows `[u * rows_per_update, (u + 1) * rows_per_update)` of the pass, divided as in a plan. If a
    short last update runs out of rows, its last micro-batches have no targets.

    Its state is the position after the updates that were trained, however far the stream was read ahead. It is the same
    on every rank, because Lightning saves only rank 0's.

    Args:
        stream: Creates the stream of an epoch, at its start.
        layout: How the rows of an update are divided.
        collate: Turns rows and their numbers into a batch.
        rows: Rows of a pass, if known; the loader then has a length.
        trained: Returns the number of updates trained in the whole run; when left out, counts yielded batches.
        limit: Micro-batches of an epoch that are trained on, or the share of them (`limit_train_batches`).
        pin_memory: Pin batches in memory, for asynchronous copies to a GPU.
    """

    no_rows: str = "data.train: the documents don't fill a single row: there is nothing to predict in them"
    """The message for a pass without rows."""

    def __init__(
        self,
        stream: Callable[[int], Stream],
        layout: Layout,
        collate: Callable[[Sequence[Row], Sequence[int]], Batch],
        *,
        rows: int | None = None,
        trained: Callable[[], int] | None = None,
        limit: int | float = 1.0,
        pin_memory: bool = False,
    ) -> None:
        self.stream = stream
        self.layout = layout
        self.collate = collate
        self.rows = rows
        self.limit = limit
        self.pin_memory = pin_memory
        self.epoch = 0
        self.on_epoch: Callable[[int], None] = lambda epoch: None
        """Called with the number of each epoch before it is trained on, also if a resumed run begins within it."""
        self._yielded = 0
        self._trained = trained or (lambda: self._yielded // self.layout_now.micro_batches)
        self._update = 0
        self._saved: dict[str, Any] | None = None
        self._loaded: dict[str, Any] = {}
        self._begun_at = 0
        self._positions: dict[int, dict[str, Any]] = {}
        self._stream: Stream
        self._last: tuple[dict[str, Any], dict[str, Any]] | None = None

    @property
    def sampler(self) -> "StreamLoader":
        """Itself: Lightning looks here for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch; keeps the position if it is within the same epoch, as after a resume."""
        self._begin(epoch)
        self.on_epoch(epoch)

    def _begin(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._update, self._saved = epoch, 0, None

    @property
    def layout_now(self) -> Layout:
        """The layout in the current epoch."""
        return self.layout.at(self.epoch)

    @property
    def updates(self) -> int | None:
        """Updates of the current pass; None if unknown."""
        return None if self.rows is None else self.layout_now.updates(self.rows)

    def __len__(self) -> int:
        """Micro-batches of a whole pass on one rank, whatever the position.

        Raises:
            TypeError: it is unknown.
        """
        if self.updates is None:
            raise TypeError("the length of a pass is unknown")
        return self.updates * self.layout_now.micro_batches

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that nothing is read before the first `next`: Lightning calls `iter` before `set_epoch` and
        # `load_state_dict`.
        while True:
            resumed, batches = self._saved is not None, 0
            for batch in self._pass():
                batches += 1
                yield batch
            if batches or not resumed:
                break
            # The checkpoint is from the end of an epoch. If the length of a pass is unknown, Lightning fetches the
            # first batch of the next epoch before it calls `set_epoch`.
            self._begin(self.epoch + 1)
        if not batches:
            raise UserError(self.no_rows)

    def _pass(self) -> Iterator[Batch]:
        """The rest of one pass."""
        layout, update = self.layout_now, self._update
        stream = self._stream = self.stream(self.epoch)
        if self._saved is not None:
            stream.restore(self._saved)
        self._yielded, epoch = 0, self.epoch
        self._begun_at = self._trained()
        self._positions = {0: {"epoch": epoch, "update": update, "stream": stream.snapshot()}}
        rows = iter(stream)
        for done in itertools.count(1):
            taken = list(itertools.islice(rows, layout.rows_per_update))
            if not taken:
                return
            self._positions[done] = {"epoch": epoch, "update": update + done, "stream": stream.snapshot()}
            self._positions.pop(done - KEPT_POSITIONS, None)
            for batch in self.batches_of(taken, update + done - 1):
                self._yielded += 1
                yield batch

    def batches_of(self, rows: Sequence[Any], update: int) -> Iterator[Any]:
        """Yields the micro-batches of this rank in an update, each with the totals of the update."""
        layout = self.layout_now
        first, totals = update * layout.rows_per_update, self._totals(rows, update)
        for share in layout.shares(len(rows)):
            yield self._batch([rows[i] for i in share], [first + i for i in share], totals)

    def _totals(self, rows: Sequence[Row], update: int) -> Update:
        """The totals of an update; only those within `limit` if the limit falls within the update."""
        layout = self.layout_now
        rows = rows[: layout.within(self.limit, update, self.updates) * layout.batch_size * layout.ranks]
        return Update(sum(int(np.count_nonzero(row.labels != IGNORE_INDEX)) for row in rows), len(rows), layout.parts)

    def _batch(self, rows: Sequence[Row], numbers: Sequence[int], update: Update) -> Batch:
        batch = self.collate(rows, numbers)
        batch["update"] = update
        if self.pin_memory:
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    batch[name] = value.pin_memory()  # type: ignore[literal-required]
        return batch

    def position(self) -> dict[str, Any]:
        """The position after the updates that were trained: epoch, update, stream; not to be changed."""
        if not self._positions:
            return {}
        return self._positions[self._trained() - self._begun_at]

    def state_dict(self) -> dict[str, Any]:
        """The position between two updates, as plain numbers and tensors, and the layout of updates."""
        position = self.position()
        if not position:  # nothing was read yet, as when a trained run is resumed for what is left
            return self._loaded
        # Lightning saves the state of both the loader and the data module: with the same tensors, they are written once
        if self._last is None or self._last[0] is not position:
            self._last = position, self._stream.as_state(position["stream"])
        return position | {
            "stream": self._last[1],
            "micro_batches": self.layout_now.micro_batches,
            "rows_per_update": self.layout_now.rows_per_update,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a position.

        Raises:
            UserError: an update has another number of rows than when the state was saved.
        """
        refuse_other_rows(state, self.layout.at(state["epoch"]))
        self.epoch, self._update, self._saved = state["epoch"], state["update"], state["stream"]
        self._loaded = dict(state)
