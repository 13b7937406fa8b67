"""Several sources as one: how many rows of each an epoch has, and which."""

from collections.abc import Sequence

import numpy as np

from oumi_pl.errors import UserError

# Keeps this stream of random numbers apart from that of others who seed with (seed, epoch): a permutation that is
# permuted by itself isn't a fair shuffle.
_STREAM = 0x6D69


def mixture_counts(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Rows that an epoch takes from each source; they sum to `sum(sizes)`.

    Args:
        sizes: rows that each source has.
        weights: share of each source, in any unit; all None for the sources as they are, one after the other.

    Returns:
        `sizes` without weights; with them, the total split in proportion to the weights. What rounding down leaves
        goes to the largest remainders, the earlier source first.

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
            raise UserError(f"data.train: source number {k} has the weight {weight}, but no rows are left of it")
    total = sum(sizes)
    exact = np.array(given, dtype=np.float64) / max(given)
    exact *= total / exact.sum()
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: total - int(counts.sum())]] += 1
    return counts.tolist()


def mixture_epoch(sizes: Sequence[int], weights: Sequence[float | None], seed: int, epoch: int) -> np.ndarray:
    """Draws the rows of one epoch, shuffled: a pure function of its arguments.

    Args:
        sizes: rows that each source has; source `k`'s rows are numbered from `sum(sizes[:k])`.
        weights: as for `mixture_counts`.
        seed: of the run, at least 0.
        epoch: counted from 0. Each epoch draws anew.

    Returns:
        Row numbers `[sum(sizes)]`, int64. A source is passed over as a whole as often as its count allows; the
        remainder is drawn without repetition, so no row comes more than once more often than another of its source.

    Raises:
        UserError: as for `mixture_counts`.
    """
    rng = np.random.default_rng([seed, epoch, _STREAM])
    drawn, start = [np.empty(0, dtype=np.int64)], 0
    for size, count in zip(sizes, mixture_counts(sizes, weights), strict=True):
        if count:
            passes, remainder = divmod(count, size)
            # in order, since the result is shuffled anyway
            remaining = rng.choice(size, remainder, replace=False, shuffle=False)
            drawn += [np.tile(np.arange(size), passes) + start, remaining + start]
        start += size
    return rng.permutation(np.concatenate(drawn))
