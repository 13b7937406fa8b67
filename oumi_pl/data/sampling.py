"""Takes a given number of rows from a source, however many it has."""

import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from oumi_pl.errors import UserError

T = TypeVar("T")


def sampled(start: Callable[[], Iterator[T]], sample: int, seed: int | None = None) -> Iterator[T]:
    """Yields exactly `sample` rows, none if there are none.

    Where there are fewer, each comes as often as they fit as a whole, and some come once more.

    Args:
        start: Reads the rows from the beginning.
        sample: How many to take, at least 1.
        seed: Draws those that are taken, or taken once more, as the first ones of `Dataset.shuffle(seed)` in
            `datasets`; they still come in the order of the source. Without, they are the first.

    Raises:
        UserError: `sample` is less than 1.
    """
    if sample < 1:
        raise UserError(f"sample is {sample}, but has to be at least 1 row")
    return _from_the_start(start, sample) if seed is None else _drawn(start, sample, seed)


def _from_the_start(start: Callable[[], Iterator[T]], left: int) -> Iterator[T]:
    while left:
        before = left
        for item in itertools.islice(start(), left):
            left -= 1
            yield item
        if left == before:
            return


def _drawn(start: Callable[[], Iterator[T]], sample: int, seed: int) -> Iterator[T]:
    size = sum(1 for _ in start())
    copies, rest = divmod(sample, max(1, size))
    drawn = set(np.random.default_rng(seed).permutation(size)[:rest].tolist())
    for number, item in enumerate(start()):
        yield from itertools.repeat(item, copies + (number in drawn))
