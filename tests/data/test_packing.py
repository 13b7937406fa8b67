import itertools

import numpy as np
import pytest

from oumi_pl.data.plan import pack


def packs_of(lengths, capacity, order=None):
    members, starts = pack(np.array(lengths), capacity, order)
    return [members[a:b].tolist() for a, b in itertools.pairwise(starts)]


def naive_best_fit(lengths, capacity, order):
    """One example after the other into the tightest pack; among equals, into the one that was last added to."""
    rank = {int(example): k for k, example in enumerate(order)}
    packs, rooms, touched = [], [], []
    for time, example in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], rank[i]))):
        fitting = [p for p in range(len(packs)) if rooms[p] >= lengths[example]]
        if not fitting:
            packs.append([])
            rooms.append(capacity)
            touched.append(time)
            fitting = [len(packs) - 1]
        best = min(fitting, key=lambda p: (rooms[p], -touched[p]))
        packs[best].append(example)
        rooms[best] -= lengths[example]
        touched[best] = time
    return packs


@pytest.mark.parametrize("seed", range(40))
def test_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    longest = int(rng.integers(1, capacity + 1))
    lengths = rng.integers(1, longest + 1, size=int(rng.integers(1, 250)))
    order = rng.permutation(len(lengths))
    assert packs_of(lengths, capacity, order) == naive_best_fit(lengths.tolist(), capacity, order)


def test_packs_of_an_example_worked_by_hand():
    # 7 opens a pack (room 3), 5 and 5 fill the next, 3 goes to the 7, and 4 needs a third
    assert packs_of([5, 3, 7, 4, 5], 10) == [[2, 1], [0, 4], [3]]


def test_every_example_once_and_no_pack_too_full():
    lengths = np.random.default_rng(0).integers(1, 513, size=5000)
    members, starts = pack(lengths, 512)
    assert sorted(members.tolist()) == list(range(5000))
    assert starts[0] == 0
    assert starts[-1] == 5000
    tokens = np.add.reduceat(lengths[members], starts[:-1])
    assert tokens.max() <= 512
    assert np.diff(starts).min() >= 1


def test_same_order_same_packs_other_order_other_packs_equally_many():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 50, size=2000)
    one, two = rng.permutation(2000), rng.permutation(2000)
    assert packs_of(lengths, 128, one) == packs_of(lengths, 128, one)
    packed_one, packed_two = packs_of(lengths, 128, one), packs_of(lengths, 128, two)
    assert {frozenset(p) for p in packed_one} != {frozenset(p) for p in packed_two}
    assert [[lengths[i] for i in p] for p in packed_one] == [[lengths[i] for i in p] for p in packed_two]


def test_the_input_is_not_changed_and_may_be_int32():
    lengths, order = np.array([3, 1, 2], dtype=np.int32), np.array([2, 0, 1])
    members, starts = pack(lengths, 3, order)
    assert lengths.tolist() == [3, 1, 2]
    assert order.tolist() == [2, 0, 1]
    assert members.tolist() == [0, 2, 1]
    assert members.dtype == starts.dtype == np.int64


def test_nothing_to_pack():
    members, starts = pack(np.array([], dtype=np.int64), 8)
    assert len(members) == 0
    assert starts.tolist() == [0]


@pytest.mark.parametrize("lengths", [[3, 9], [3, 0], [-1]])
def test_refuses_lengths_that_no_pack_can_hold(lengths):
    with pytest.raises(ValueError, match="a pack holds 1 to 8 tokens"):
        pack(np.array(lengths), 8)


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1], [1, 2, 3]])
def test_refuses_an_order_that_is_no_permutation(order):
    with pytest.raises(ValueError, match="no permutation of 3"):
        pack(np.array([1, 2, 3]), 8, np.array(order))


def test_fill_of_a_realistic_set_is_at_least_99_percent():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.5, size=8000), 1, 2048).astype(np.int64)
    _, starts = pack(lengths, 2048)
    assert lengths.sum() / (2048 * (len(starts) - 1)) >= 0.99
