import numpy as np
import pytest

from oumi_pl.data.plan import mixture_counts, mixture_epoch
from oumi_pl.errors import UserError


def test_without_weights_the_counts_are_the_sizes():
    assert mixture_counts([5, 2], [None, None]) == [5, 2]


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([10, 30], [1.0, 1.0], [20, 20]),
        ([10, 30], [3.0, 1.0], [30, 10]),
        ([10, 30], [0.003, 0.001], [30, 10]),
        ([4, 3, 3], [1.0, 1.0, 1.0], [4, 3, 3]),  # 3.33 each: the one left over goes to the first
        ([5, 5], [0.26, 0.74], [3, 7]),  # 2.6 and 7.4
        ([7], [2.5], [7]),
    ],
)
def test_shares_by_largest_remainder(sizes, weights, counts):
    assert mixture_counts(sizes, weights) == counts


@pytest.mark.parametrize("seed", range(20))
def test_counts_sum_to_the_sizes_and_miss_the_share_by_less_than_one(seed):
    rng = np.random.default_rng(seed)
    sizes, weights = rng.integers(1, 1000, size=7).tolist(), rng.uniform(0.01, 10, size=7).tolist()
    counts = mixture_counts(sizes, weights)
    assert sum(counts) == sum(sizes)
    shares = np.array(weights) / sum(weights) * sum(sizes)
    assert np.abs(np.array(counts) - shares).max() < 1


@pytest.mark.parametrize(
    ("sizes", "weights", "parts"),
    [
        ([5, 5, 5], [1.0, None, 2.0], ["2 of 3 sources have a weight", "number 2", "all or none"]),
        ([5, 5], [1.0, 0.0], ["source number 2", "0.0", "above 0"]),
        ([5, 5], [-1.0, 1.0], ["source number 1", "-1.0"]),
        ([5, 5], [1.0, float("nan")], ["source number 2", "nan"]),
        ([5, 5], [float("inf"), 1.0], ["source number 1", "inf"]),
        ([5, 0], [1.0, 1.0], ["source number 2", "no rows"]),
    ],
)
def test_wrong_weights_are_refused(sizes, weights, parts):
    with pytest.raises(UserError) as caught:
        mixture_epoch(sizes, weights, 0, 0)
    for part in parts:
        assert part in str(caught.value)


def test_without_weights_every_row_once_in_mixed_order():
    drawn = mixture_epoch([30, 0, 70], [None, None, None], seed=1, epoch=0)
    assert drawn.dtype == np.int64
    assert sorted(drawn.tolist()) == list(range(100))
    assert 5 < (drawn[:50] < 30).sum() < 25  # 15 expected in either half


def test_every_row_of_a_small_source_is_used_before_one_is_repeated():
    drawn = mixture_epoch([10, 90], [0.25, 0.75], seed=3, epoch=0)
    times = np.bincount(drawn, minlength=100)
    assert times[:10].sum() == 25
    assert set(times[:10].tolist()) == {2, 3}
    assert times[10:].sum() == 75
    assert times[10:].max() == 1


def test_a_pure_function_of_seed_and_epoch_drawn_anew_each_epoch():
    def draw(seed, epoch):
        return mixture_epoch([10, 90], [1.0, 3.0], seed, epoch)

    assert np.array_equal(draw(5, 2), draw(5, 2))
    assert set(draw(5, 2).tolist()) != set(draw(5, 3).tolist())  # other rows, not just another order
    assert not np.array_equal(draw(5, 2), draw(6, 2))
    assert not np.array_equal(draw(2, 5), draw(5, 2))


def test_the_shuffle_differs_from_others_with_the_same_seed():
    drawn = mixture_epoch([1000], [None], seed=5, epoch=2)
    assert not np.array_equal(drawn, np.random.default_rng([5, 2]).permutation(1000))


def test_nothing_to_draw():
    assert mixture_epoch([0, 0], [None, None], 0, 0).tolist() == []
