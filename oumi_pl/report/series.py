"""Long series made short enough to draw, without losing what stands out."""

import numpy as np
from numpy.typing import ArrayLike

POINTS = 600
"""How many points a line is drawn with at the most."""


def smooth(values: ArrayLike, window: int) -> np.ndarray:
    """The mean of each value and its neighbours, `window` in all; fewer at the ends; those that aren't finite left out.

    Returns:
        `[n]`; NaN where no neighbour is finite.
    """
    x = np.asarray(values, dtype=float)
    finite = np.isfinite(x)
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, x, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    last = np.minimum(np.arange(len(x)) + half + 1, len(x))
    first = np.maximum(np.arange(len(x)) - half, 0)
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / np.where(counts[last] > counts[first], counts[last] - counts[first], np.nan)


def window_of(n: int) -> int:
    """Over how many updates a line of `n` is smoothed: a fiftieth, an odd number, so that it is centred."""
    return 1 if n < 20 else max(5, n // 50) | 1


def thin(steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` of a line's points, evenly, the first and the last among them."""
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if len(x) <= POINTS:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
    return x[keep], y[keep]


def envelope(steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a line is too long to draw each point: the least and the largest value of each of `POINTS / 2` stretches.

    Returns:
        Middle of the stretch, minimum, maximum, each `[stretches]`; stretches without a finite value are left out.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    starts = np.linspace(0, len(x), min(POINTS // 2, len(x)) + 1).astype(int)[:-1]
    low = np.minimum.reduceat(np.where(np.isfinite(y), y, np.inf), starts)
    high = np.maximum.reduceat(np.where(np.isfinite(y), y, -np.inf), starts)
    ends = np.append(starts[1:], len(x)) - 1
    there = low <= high
    return ((x[starts] + x[ends]) / 2)[there], low[there], high[there]
