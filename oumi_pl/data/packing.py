"""Lengths into packs: best-fit decreasing bin packing. Knows nothing of tokens, and needs no tokenizer.

The longest example goes first, and each goes where it leaves the least room; where it fits nowhere, a new pack is
opened. Examples of the same length are placed together: a pack with room for `k` of them gets `k` at once, so that the
work grows with the number of distinct lengths, not of examples.
"""

from collections import defaultdict

import numpy as np


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Packs examples into as few rows of `capacity` tokens as best-fit decreasing finds.

    Args:
        lengths: tokens of every example, `[n]`, each from 1 to `capacity`.
        capacity: tokens that a pack holds.
        order: a permutation of `0..n-1`. Examples of equal length are placed in this order; another permutation gives
            other packs, equally full. In order of index when left out.

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


def fill(lengths: np.ndarray, capacity: int, packs: int) -> float:
    """Share of the capacity of so many packs that the examples' tokens take up, from 0 to 1."""
    return float(np.sum(lengths, dtype=np.int64) / (packs * capacity)) if packs else 0.0


def _best_fit(descending: np.ndarray, capacity: int) -> np.ndarray:
    """Number of the pack that each length goes to, `[n]`. `descending` is sorted, longest first."""
    pack_of = np.empty(len(descending), dtype=np.int64)
    by_room: defaultdict[int, list[int]] = defaultdict(list)  # tokens of room -> packs; the last one in is used first
    rooms = 0  # bit r is set while by_room[r] has packs, so that the tightest fit is the lowest bit from `size` up
    opened = placed = 0
    negative, counts = np.unique(-descending, return_counts=True)
    for size, count in zip((-negative).tolist(), counts.tolist(), strict=True):
        left = count
        while left:
            fitting = rooms >> size
            room = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // size  # the pack that takes one is the tightest fit for the next, too, as long as one fits
            needed = -(-left // each)
            if not fitting:
                by_room[room].extend(range(opened + needed - 1, opened - 1, -1))
                opened += needed
            packs = by_room[room][: -needed - 1 : -1]
            del by_room[room][-needed:]
            now = min(left, each * len(packs))
            pack_of[placed : placed + now] = np.repeat(packs, each)[:now]
            missing = each * len(packs) - now  # the last pack is not filled as far as the others if lengths run out
            by_room[room - each * size].extend(packs[:-1] if missing else packs)
            if missing:
                by_room[room - (each - missing) * size].append(packs[-1])
            for changed in (room, room - each * size, room - (each - missing) * size):
                rooms = rooms | (1 << changed) if by_room[changed] else rooms & ~(1 << changed)
            placed, left = placed + now, left - now
    return pack_of
