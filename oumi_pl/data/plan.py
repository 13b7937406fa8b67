"""The plan of an epoch: the examples of each optimizer update, and their division among ranks and micro-batches.

A plan is a deterministic list of *global* batches per (seed, epoch), computed first and divided afterwards. Because the
examples of an update do not depend on the number of ranks or micro-batches, a run can resume exactly, also with another
layout of the same `rows_per_update`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oumi_pl.errors import UserError


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Packs examples into rows of `capacity` tokens by best-fit decreasing.

    Args:
        lengths: tokens of every example, `[n]`, each from 1 to `capacity`.
        capacity: tokens that a pack holds.
        order: a permutation of `0..n-1`, by index when left out. Examples of equal length are placed in this order, so
            another permutation gives other packs that are equally full.

    Returns:
        `members` `[n]` and `starts` `[packs + 1]`, both int64: pack `p` holds the examples
        `members[starts[p] : starts[p + 1]]`, longest first. Every example occurs once, and no pack is empty.

    Raises:
        ValueError: a length is below 1 or above `capacity`, or `order` is no permutation.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    count = len(lengths)
    if count and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}, but a pack holds 1 to {capacity} tokens")
    order = np.arange(count) if order is None else np.asarray(order, dtype=np.int64)
    if len(order) != count or not np.array_equal(np.sort(order), np.arange(count)):
        raise ValueError(f"order is no permutation of {count} indices")
    examples = order[np.argsort(-lengths[order], kind="stable")]
    pack_of = _best_fit(lengths[examples], capacity)
    members = examples[np.argsort(pack_of, kind="stable")]
    return members, np.concatenate([[0], np.cumsum(np.bincount(pack_of))]).astype(np.int64)


def pack_in_order(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs examples into rows of `capacity` tokens in their order; lengths and result as of `pack`.

    A row is closed at the first example that does not fit, so rows are less full.
    """
    starts, used = [0], 0
    for i, length in enumerate(lengths.tolist()):
        if used + length > capacity:
            starts.append(i)
            used = 0
        used += length
    return np.arange(len(lengths)), np.array([*starts, len(lengths)] if len(lengths) else [0], dtype=np.int64)


def _best_fit(descending: np.ndarray, capacity: int) -> np.ndarray:
    """Assigns each length to a pack; returns the packs' numbers, `[n]`. `descending` is sorted, longest first."""
    # Handles all examples of a length at once, so that millions of them take seconds. `rooms` finds the tightest fit in
    # constant time.
    pack_of = np.empty(len(descending), dtype=np.int64)
    by_room: defaultdict[int, list[int]] = defaultdict(list)  # tokens of room -> packs; the last one in is used first
    rooms = 0  # bit r is set while by_room[r] has packs: the tightest fit is the lowest set bit from `size` up
    opened = placed = 0
    negative, counts = np.unique(-descending, return_counts=True)
    for size, count in zip((-negative).tolist(), counts.tolist(), strict=True):
        left = count
        while left:
            fitting = rooms >> size
            room = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // size  # a pack that took one remains the tightest fit for the next, as long as it fits
            needed = -(-left // each)
            if not fitting:
                by_room[room].extend(range(opened + needed - 1, opened - 1, -1))
                opened += needed
            packs = by_room[room][: -needed - 1 : -1]
            del by_room[room][-needed:]
            now = min(left, each * len(packs))
            pack_of[placed : placed + now] = np.repeat(packs, each)[:now]
            missing = each * len(packs) - now  # how many fewer the last pack has if lengths run out
            by_room[room - each * size].extend(packs[:-1] if missing else packs)
            if missing:
                by_room[room - (each - missing) * size].append(packs[-1])
            for changed in (room, room - each * size, room - (each - missing) * size):
                rooms = rooms | (1 << changed) if by_room[changed] else rooms & ~(1 << changed)
            placed, left = placed + now, left - now
    return pack_of


# Distinguishes these random numbers from those of `plan_epoch`, which also seeds with (seed, epoch): the same
# permutation applied twice isn't a fair shuffle.
_STREAM = 0x6D69


def mixture_counts(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Rows that an epoch takes from each source; they sum to `sum(sizes)`.

    Args:
        sizes: rows that each source has.
        weights: relative share of each source; all None for every row of each source once.

    Returns:
        `sizes` without weights; with them, the total divided in proportion to the weights, by largest remainder; the
        earlier source wins ties.

    Raises:
        UserError: some sources have a weight and others none, a weight isn't above 0, or a weighted source is empty.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return list(sizes)
    if len(given) < len(weights):
        missing = ", ".join(str(k) for k, weight in enumerate(weights, 1) if weight is None)
        raise UserError(
            f"data.train: {len(given)} of {len(weights)} sources have a weight, but not number {missing}; give "
            "all or none"
        )
    for k, (size, weight) in enumerate(zip(sizes, given, strict=True), 1):
        if not 0 < weight < float("inf"):
            raise UserError(
                f"data.train: source number {k} has the weight {weight}, but a weight lies above 0; leave the source "
                "out"
            )
        if not size:
            raise UserError(f"data.train: source number {k} has the weight {weight}, but no rows")
    total = sum(sizes)
    exact = np.array(given, dtype=np.float64) / max(given)
    exact *= total / exact.sum()
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: total - int(counts.sum())]] += 1
    return counts.tolist()


def mixture_epoch(sizes: Sequence[int], weights: Sequence[float | None], seed: int, epoch: int) -> np.ndarray:
    """Draws and shuffles the rows of one epoch; a pure function of its arguments.

    Args:
        sizes: rows that each source has; source `k`'s rows are numbered from `sum(sizes[:k])`.
        weights: as for `mixture_counts`.
        seed: of the run, at least 0.
        epoch: counted from 0. Each epoch draws other rows.

    Returns:
        Row numbers `[sum(sizes)]`, int64: every row of a source as often as its count allows, and a remainder drawn
        without replacement. So the numbers of occurrences of two rows of a source differ by at most 1.

    Raises:
        UserError: as for `mixture_counts`.
    """
    rng = np.random.default_rng([seed, epoch, _STREAM])
    drawn, start = [np.empty(0, dtype=np.int64)], 0
    for size, count in zip(sizes, mixture_counts(sizes, weights), strict=True):
        if count:
            passes, remainder = divmod(count, size)
            # not shuffled, since the result is shuffled anyway
            remaining = rng.choice(size, remainder, replace=False, shuffle=False)
            drawn += [np.tile(np.arange(size), passes) + start, remaining + start]
        start += size
    return rng.permutation(np.concatenate(drawn))


# Length grouping sorts within so many updates: enough for similar lengths in each micro-batch, and few enough for other
# groups in each epoch.
GROUPED_UPDATES = 50


@dataclass(frozen=True)
class Layout:
    """How the rows of an update are divided: `ranks` x `micro_batches` x `batch_size`.

    batch_size: rows of one micro-batch on one rank. micro_batches: micro-batches per update (gradient accumulation).
    schedule: (first epoch, micro-batches per update from then on), in order, if accumulation changes with the epoch.
    """

    batch_size: int
    micro_batches: int = 1
    ranks: int = 1
    rank: int = 0
    schedule: tuple[tuple[int, int], ...] = ()

    def at(self, epoch: int) -> "Layout":
        """The layout in an epoch: with the `micro_batches` that `schedule` says."""
        now = [micro_batches for first, micro_batches in self.schedule if first <= epoch]
        return replace(self, micro_batches=now[-1]) if now else self

    @property
    def parts(self) -> int:
        """Micro-batches of an update, over all ranks."""
        return self.micro_batches * self.ranks

    @property
    def rows_per_update(self) -> int:
        """Rows that one optimizer update sees, over all ranks and micro-batches."""
        return self.batch_size * self.parts

    def shares(self, rows: int) -> Iterator[range]:
        """The rows of each micro-batch of this rank, in an update of `rows`; empty if a short update runs out."""
        for micro in range(self.micro_batches):
            first = (micro * self.ranks + self.rank) * self.batch_size
            yield range(min(first, rows), min(first + self.batch_size, rows))

    def filled(self, rows: int) -> int:
        """Micro-batches per rank, in an update of `rows`, for which at least one rank has rows."""
        return math.ceil(rows / (self.batch_size * self.ranks))

    def updates(self, rows: int, limit: int | float = 1.0) -> int:
        """Updates in an epoch of `rows` rows, within `limit_train_batches`; Lightning also steps at its last batch."""
        batches = limited(math.ceil(rows / self.rows_per_update) * self.micro_batches, limit)
        return math.ceil(batches / self.micro_batches)

    def within(self, limit: int | float, update: int, updates: int | None) -> int:
        """Micro-batches of an update, on one rank, that are within `limit_train_batches`.

        Args:
            limit: Micro-batches of an epoch, or as a float the share of them.
            update: Counted from 0.
            updates: Number of updates of the epoch; None if unknown.
        """
        if isinstance(limit, float):
            limit = self.micro_batches * (update + 1) if updates is None else int(limit * updates * self.micro_batches)
        return min(self.micro_batches, max(0, limit - update * self.micro_batches))


def limited(batches: int, limit: int | float) -> int:
    """How many of the micro-batches of an epoch are trained on, by Lightning's rule for `limit_train_batches`."""
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)


class Plan:
    """An epoch as a list of updates, each a list of rows, each an array of example ids.

    Two flat arrays hold all rows, so that millions of examples stay cheap. A row is one example, or several packed
    together.
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
        """Ids of the examples in the first `micro_batches` of an update, over all ranks, `[n]`."""
        start = update * self.rows_per_update
        stop = min(start + micro_batches * layout.batch_size * layout.ranks, self.rows)
        return self.example_ids[self.row_starts[start] : self.row_starts[stop]]

    def micro_batches(self, update: int, layout: Layout) -> Iterator[list[np.ndarray]]:
        """Yields one rank's micro-batches of an update, each a list of rows.

        If a short update runs out of rows, the last lists are empty: no row is used twice.
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
    shuffle: bool = True,
    keep_order: bool = False,
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
        shuffle: False keeps the order of `example_ids`, in every epoch; packs are ordered by their first example.
        keep_order: Without shuffling, packs hold examples that follow each other as well.
    """
    rng = np.random.default_rng([seed, epoch])
    ids = rng.permutation(example_ids) if shuffle else np.asarray(example_ids)
    if capacity is not None and keep_order:
        return Plan(ids, pack_in_order(lengths[ids], capacity)[1], rows_per_update)
    if capacity is not None:
        members, starts = pack(lengths[ids], capacity, order=np.arange(len(ids)))
        rows = len(starts) - 1
        order = rng.permutation(rows) if shuffle else np.argsort(np.minimum.reduceat(members, starts[:-1]))
        ids, starts = _reorder_rows(ids[members], starts, order)
        return Plan(ids, starts, rows_per_update)
    if group_by_length and shuffle:
        ids = _group_by_length(ids, lengths, rows_per_update, rng)
    return Plan(ids, np.arange(len(ids) + 1), rows_per_update)


def plan_in_order(lengths: np.ndarray, rows_per_update: int, *, capacity: int | None = None) -> Plan:
    """Plans every example once, longest first, which saves padding; for validation, where the order does not matter."""
    if capacity is not None:
        members, starts = pack(lengths, capacity)
        return Plan(members, starts, rows_per_update)
    ids = np.argsort(-lengths, kind="stable")
    return Plan(ids, np.arange(len(ids) + 1), rows_per_update)


def _reorder_rows(ids: np.ndarray, starts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reorders the rows; returns ids and starts as `pack` does."""
    sizes = np.diff(starts)[order]
    new_starts = np.concatenate([[0], np.cumsum(sizes)])
    # position of each id in the old array: its row's old start plus its index within the row
    within = np.arange(len(ids)) - np.repeat(new_starts[:-1], sizes)
    return ids[np.repeat(starts[:-1][order], sizes) + within], new_starts


def _group_by_length(ids: np.ndarray, lengths: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    window = GROUPED_UPDATES * rows
    chunks = [ids[i : i + window] for i in range(0, len(ids), window)]
    grouped = np.concatenate([chunk[np.argsort(-lengths[chunk], kind="stable")] for chunk in chunks])
    full = len(grouped) // rows
    # shuffle whole updates only, so that the short one stays last
    updates = grouped[: full * rows].reshape(full, rows)[rng.permutation(full)]
    return np.concatenate([updates.reshape(-1), grouped[full * rows :]])
