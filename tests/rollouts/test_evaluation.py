"""pass@k: the unbiased estimate from more completions than k."""

import itertools

import numpy as np
import pytest

from oumi_pl.errors import UserError
from oumi_pl.rollouts.evaluation import checked_ks, pass_at_k


def by_subsets(solved, k):
    """The share of the subsets of k completions that have a right one."""
    return [np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in solved]


def test_pass_at_k_is_the_share_of_subsets_with_a_right_completion():
    solved = np.random.default_rng(0).random((12, 7)) < np.linspace(0, 1, 12)[:, None]
    for k in range(1, 8):
        assert pass_at_k(solved, k) == pytest.approx(by_subsets(solved, k), abs=1e-12)


def test_pass_at_k_is_unbiased_and_the_plug_in_estimate_is_not():
    probability, n, k = 0.2, 5, 3
    outcomes = np.array(list(itertools.product([False, True], repeat=n)))
    weights = np.prod(np.where(outcomes, probability, 1 - probability), 1)
    truth = 1 - (1 - probability) ** k
    assert pass_at_k(outcomes, k) @ weights == pytest.approx(truth, abs=1e-12)
    plug_in = 1 - (1 - outcomes.mean(1)) ** k
    assert plug_in @ weights < truth - 0.02


def test_large_numbers_do_not_overflow():
    solved = np.zeros((1, 20_000), dtype=bool)
    solved[0, 0] = True
    assert pass_at_k(solved, 10_000) == pytest.approx([0.5])


def test_ks_default_to_1_and_all_and_are_at_most_the_number_of_completions():
    assert checked_ks(None, 8, "data.pass_at", "data.eval_completions") == [1, 8]
    assert checked_ks(None, 1, "data.pass_at", "data.eval_completions") == [1]
    assert checked_ks([4, 2, 2], 8, "data.pass_at", "data.eval_completions") == [2, 4]
    with pytest.raises(UserError, match=r"data\.pass_at: 9 is not from 1 to 8"):
        checked_ks([9], 8, "data.pass_at", "data.eval_completions")
