"""The loader over a stream of rows: cut by update, micro-batch and rank, with a position for each update."""

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

KEPT = 4
"""Updates whose positions are kept: Lightning fetches at most one micro-batch ahead of the one that it trains on."""


class Stream(Protocol):
    """The rows of one pass, which can be continued from between any two of them."""

    def __iter__(self) -> Iterator[Any]:
        """The rows from where the stream stands to its end."""

    def snapshot(self) -> Any:
        """Where the stream stands, between two rows; not to be changed."""

    def as_state(self, snapshot: Any) -> Any:
        """A snapshot as plain numbers and tensors, which a checkpoint can hold."""

    def restore(self, state: Any) -> None:
        """Continues from a state."""


class StreamLoader:
    """Yields the micro-batches of one rank: each goes through the whole stream, and takes its share of every update.

    Update `u` has the rows `[u * rows_per_update, (u + 1) * rows_per_update)` of the pass, cut as a plan is. Where a
    short last update runs out of rows, micro-batches without targets are left over.

    Its state is that after the updates that were trained, however far the stream was read ahead. It is the same on
    every rank: Lightning keeps only rank 0's.

    Args:
        stream: Makes the stream of an epoch, at its beginning.
        layout: How an update is cut.
        collate: Makes a batch of rows and their numbers.
        updates: Updates of a pass, where that is known; the loader has a length then.
        trained: How many updates were trained in the whole run; when left out, those whose batches were handed out.
        limit: Micro-batches of an epoch that will be trained on, or the share of them (`limit_train_batches`).
        pin_memory: Put batches where a GPU copies them from without waiting.
    """

    nothing: str = "data.train: the documents don't make a single row: there is nothing to predict in them"
    """What is said of a pass without rows."""

    def __init__(
        self,
        stream: Callable[[int], Stream],
        layout: Layout,
        collate: Callable[[Sequence[Row], Sequence[int]], Batch],
        *,
        updates: int | None = None,
        trained: Callable[[], int] | None = None,
        limit: int | float = 1.0,
        pin_memory: bool = False,
    ) -> None:
        self.stream = stream
        self.layout = layout
        self.collate = collate
        self.updates = updates
        self.limit = limit
        self.pin_memory = pin_memory
        self.epoch = 0
        self._trained = trained or self._handed_out
        self._update = 0
        self._saved: dict[str, Any] | None = None
        self._handed = 0
        self._begun_at = 0
        self._positions: dict[int, dict[str, Any]] = {}
        self._stream: Stream
        self._last: tuple[dict[str, Any], dict[str, Any]] | None = None

    @property
    def sampler(self) -> "StreamLoader":
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch; a position within the same epoch is kept, which is what a resume needs."""
        if epoch != self.epoch:
            self.epoch, self._update, self._saved = epoch, 0, None

    def __len__(self) -> int:
        """Micro-batches of a whole pass on one rank, whatever the position.

        Raises:
            TypeError: that isn't known.
        """
        if self.updates is None:
            raise TypeError("how long a pass is isn't known")
        return self.updates * self.layout.micro_batches

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that nothing is read before `set_epoch` and `load_state_dict` have had their say
        while True:
            resumed, handed = self._saved is not None, 0
            for batch in self._pass():
                handed += 1
                yield batch
            if handed or not resumed:
                break
            # The checkpoint stood at the end of an epoch: where Lightning doesn't know the length of a pass, it asks
            # for the first batch of the next one before it says that it has begun.
            self.set_epoch(self.epoch + 1)
        if not handed:
            raise UserError(self.nothing)

    def _pass(self) -> Iterator[Batch]:
        """The rest of one pass."""
        layout, update = self.layout, self._update
        stream = self._stream = self.stream(self.epoch)
        if self._saved is not None:
            stream.restore(self._saved)
        self._handed, epoch = 0, self.epoch
        self._begun_at = self._trained()
        self._positions = {0: {"epoch": epoch, "update": update, "stream": stream.snapshot()}}
        rows = iter(stream)
        for done in itertools.count(1):
            taken = list(itertools.islice(rows, layout.rows_per_update))
            if not taken:
                return
            self._positions[done] = {"epoch": epoch, "update": update + done, "stream": stream.snapshot()}
            self._positions.pop(done - KEPT, None)
            for batch in self.batches_of(taken, update + done - 1):
                self._handed += 1
                yield batch

    def batches_of(self, rows: Sequence[Any], update: int) -> Iterator[Any]:
        """The micro-batches of this rank in an update, each with what the update comes to."""
        first, comes_to = update * self.layout.rows_per_update, self._comes_to(rows, update)
        for share in self.layout.shares(len(rows)):
            yield self._batch([rows[i] for i in share], [first + i for i in share], comes_to)

    def _comes_to(self, rows: Sequence[Row], update: int) -> Update:
        """Targets, rows and micro-batches of an update; of one that the limit cuts short, those within it."""
        layout = self.layout
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

    def _handed_out(self) -> int:
        return self._handed // self.layout.micro_batches

    def position(self) -> dict[str, Any]:
        """Where the updates that were trained end: epoch, update, and what the stream was like; not to be changed."""
        if not self._positions:
            return {}
        return self._positions[self._trained() - self._begun_at]

    def state_dict(self) -> dict[str, Any]:
        """The position between two updates, as plain numbers and tensors, and the layout it was reached with."""
        position = self.position()
        if not position:
            return {}
        # Lightning keeps the state of loaders as well as that of the data: the same tensors are saved once
        if self._last is None or self._last[0] is not position:
            self._last = position, self._stream.as_state(position["stream"])
        return position | {
            "stream": self._last[1],
            "micro_batches": self.layout.micro_batches,
            "rows_per_update": self.layout.rows_per_update,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position.

        Raises:
            UserError: if an update has another number of rows than when the state was saved.
        """
        refuse_other_rows(state, self.layout)
        self.epoch, self._update, self._saved = state["epoch"], state["update"], state["stream"]
