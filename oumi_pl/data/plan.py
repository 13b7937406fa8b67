"""The plan of an epoch: which examples each optimizer update sees, and how ranks and micro-batches share them.

One deterministic list of *global* batches per (seed, epoch), computed once and cut afterwards. Because an update's
examples do not depend on the number of ranks or micro-batches, a run resumes exactly, and may resume with another
layout of the same `rows_per_update`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from oumi_pl.data.packing import pack

# Length grouping sorts within this many updates: enough to make the lengths of a micro-batch alike, few enough that
# updates of one epoch still differ from those of the next.
GROUPED_UPDATES = 50


@dataclass(frozen=True)
class Layout:
    """How one update is cut: `ranks` x `micro_batches` x `batch_size` rows.

    batch_size: rows of one micro-batch on one rank. micro_batches: micro-batches per update (gradient accumulation).
    """

    batch_size: int
    micro_batches: int = 1
    ranks: int = 1
    rank: int = 0

    @property
    def parts(self) -> int:
        """Micro-batches of an update, over all ranks."""
        return self.micro_batches * self.ranks

    @property
    def rows_per_update(self) -> int:
        """Rows that one optimizer update sees, over all ranks and micro-batches."""
        return self.batch_size * self.parts

    def shares(self, rows: int) -> Iterator[range]:
        """Which rows of an update of `rows` each micro-batch of this rank has; none where a short update runs out."""
        for micro in range(self.micro_batches):
            first = (micro * self.ranks + self.rank) * self.batch_size
            yield range(min(first, rows), min(first + self.batch_size, rows))

    def filled(self, rows: int) -> int:
        """Micro-batches on each rank of an update of `rows` that some rank has rows for."""
        return math.ceil(rows / (self.batch_size * self.ranks))

    def within(self, limit: int | float, update: int, updates: int | None) -> int:
        """Micro-batches of an update, on one rank, that lie within `limit_train_batches`.

        Args:
            limit: Micro-batches of an epoch, or below 1.0 the share of them.
            update: Counted from 0.
            updates: Of the epoch; None if that isn't known.
        """
        if isinstance(limit, float):
            limit = self.micro_batches * (update + 1) if updates is None else int(limit * updates * self.micro_batches)
        return min(self.micro_batches, max(0, limit - update * self.micro_batches))


class Plan:
    """An epoch as a list of updates, each a list of rows, each an array of example ids.

    Rows and examples are held in three flat arrays, so that millions of examples stay cheap. A row is one example, or
    several packed together.
    """

    def __init__(self, example_ids: np.ndarray, row_starts: np.ndarray, rows_per_update: int) -> None:
        self.example_ids = example_ids  # [examples]
        self.row_starts = row_starts  # [rows + 1], offsets into example_ids
        self.rows_per_update = rows_per_update

    @property
    def rows(self) -> int:
        """Number of rows in the epoch."""
        return len(self.row_starts) - 1

    def __len__(self) -> int:
        """Number of updates; the last may be short."""
        return math.ceil(self.rows / self.rows_per_update)

    def row(self, index: int) -> np.ndarray:
        """Example ids of one row."""
        return self.example_ids[self.row_starts[index] : self.row_starts[index + 1]]

    def examples_of(self, update: int, layout: Layout, micro_batches: int) -> np.ndarray:
        """Ids of the examples of one update, over all ranks, in its first micro-batches. `[n]`."""
        start = update * self.rows_per_update
        stop = min(start + micro_batches * layout.batch_size * layout.ranks, self.rows)
        return self.example_ids[self.row_starts[start] : self.row_starts[stop]]

    def micro_batches(self, update: int, layout: Layout) -> Iterator[list[np.ndarray]]:
        """Cuts one update for one rank: `layout.micro_batches` lists of rows.

        Where a short update runs out of rows the list is empty: such a micro-batch has zero targets, and nothing is
        seen twice.
        """
        start = update * self.rows_per_update
        stop = min(start + self.rows_per_update, self.rows)
        for share in layout.shares(stop - start):
            yield [self.row(start + i) for i in share]


def plan_epoch(
    lengths: np.ndarray,
    example_ids: np.ndarray,
    rows_per_update: int,
    *,
    seed: int,
    epoch: int,
    capacity: int | None = None,
    group_by_length: bool = True,
) -> Plan:
    """Shuffles and arranges one epoch of training.

    Args:
        lengths: tokens of every example, `[examples in store]`.
        example_ids: the examples of this epoch, `[n]`; an id may occur more than once (mixtures).
        rows_per_update: rows of one global batch.
        seed: of the run.
        epoch: counted from 0; each epoch has its own order.
        capacity: tokens per packed row; None leaves one example per row.
        group_by_length: without packing, put examples of similar length into the same update.
    """
    rng = np.random.default_rng([seed, epoch])
    ids = rng.permutation(example_ids)
    if capacity is not None:
        members, starts = pack(lengths[ids], capacity, order=np.arange(len(ids)))
        ids, starts = _reorder_rows(ids[members], starts, rng.permutation(len(starts) - 1))
        return Plan(ids, starts, rows_per_update)
    if group_by_length:
        ids = _group_by_length(ids, lengths, rows_per_update, rng)
    return Plan(ids, np.arange(len(ids) + 1), rows_per_update)


def plan_in_order(lengths: np.ndarray, rows_per_update: int, *, capacity: int | None = None) -> Plan:
    """Arranges every example once, longest first: for validation, where order means nothing and padding costs time."""
    if capacity is not None:
        members, starts = pack(lengths, capacity)
        return Plan(members, starts, rows_per_update)
    ids = np.argsort(-lengths, kind="stable")
    return Plan(ids, np.arange(len(ids) + 1), rows_per_update)


def _reorder_rows(ids: np.ndarray, starts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.diff(starts)[order]
    new_starts = np.concatenate([[0], np.cumsum(sizes)])
    # position of each id in the old array: its row's old start plus its place within the row
    within = np.arange(len(ids)) - np.repeat(new_starts[:-1], sizes)
    return ids[np.repeat(starts[:-1][order], sizes) + within], new_starts


def _group_by_length(ids: np.ndarray, lengths: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    window = GROUPED_UPDATES * rows
    chunks = [ids[i : i + window] for i in range(0, len(ids), window)]
    grouped = np.concatenate([chunk[np.argsort(-lengths[chunk], kind="stable")] for chunk in chunks])
    full = len(grouped) // rows
    # only whole updates are shuffled, so that the short one stays last
    updates = grouped[: full * rows].reshape(full, rows)[rng.permutation(full)]
    return np.concatenate([updates.reshape(-1), grouped[full * rows :]])
