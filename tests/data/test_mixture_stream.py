"""Mixtures by tokens: near their shares at any time, deterministic, with a defined end."""

import itertools

import numpy as np
import pytest

from oumi_pl.data.row_stream import TokenMixture
from oumi_pl.errors import UserError


class Fixed:
    """Documents of given lengths, all of whose tokens are `token`."""

    def __init__(self, token, lengths):
        self.name, self.token, self.lengths = f"source {token}", token, lengths

    def read(self, start):
        return (np.full(n, self.token) for n in self.lengths[start:])


def sources(*counts, seed=0, longest=50):
    rng = np.random.default_rng(seed)
    return [Fixed(i, rng.integers(1, longest + 1, n).tolist()) for i, n in enumerate(counts)]


def taken(mixture, n=10**6):
    return list(itertools.islice(mixture, n))


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1]])
def test_tokens_are_within_a_document_of_their_share_at_any_time(weights):
    mixture = TokenMixture(sources(*[1000] * len(weights)), weights, "restart")
    shares, tokens = np.array(weights) / sum(weights), np.zeros(len(weights))
    for ids in taken(mixture, 1500):
        tokens[ids[0]] += len(ids)
        assert (tokens - shares * tokens.sum() <= 50).all()
        assert (shares * tokens.sum() - tokens <= 50 * (len(weights) - 1)).all()
    assert mixture.state()["tokens"] == tokens.tolist()


def test_without_weights_one_after_the_other():
    actual = [int(ids[0]) for ids in taken(TokenMixture(sources(3, 2), [None, None], "stop"))]
    assert actual == [0, 0, 0, 1, 1]


def test_restart_begins_again_and_counts_the_passes():
    mixture = TokenMixture(sources(3, 2), [None, None], "restart")
    assert [int(ids[0]) for ids in taken(mixture, 12)] == [0, 0, 0, 1, 1] * 2 + [0, 0]
    assert mixture.state()["passes"] == [2, 2]
    weighted = TokenMixture(sources(4, 1000), [1, 1], "restart")
    taken(weighted, 200)
    passes = weighted.state()["passes"]
    assert passes[0] > 3
    assert passes[1] == 0


def test_stop_ends_with_the_first_source_that_is_at_its_end():
    mixture = TokenMixture(sources(4, 1000), [1, 1], "stop")
    actual = [int(ids[0]) for ids in taken(mixture)]
    assert actual.count(0) == 4
    assert next(mixture, None) is None


@pytest.mark.parametrize("weights", [[2, 1], [None, None]])
def test_a_restored_state_yields_the_remaining_documents(weights):
    whole = [ids.tolist() for ids in taken(TokenMixture(sources(30, 20), weights, "restart"), 120)]
    first, second = (TokenMixture(sources(30, 20), weights, "restart") for _ in range(2))
    before = taken(first, 47)
    second.restore(first.state())
    assert [ids.tolist() for ids in before + taken(second, 73)] == whole


def test_refusals():
    with pytest.raises(UserError, match="1 of 2 sources have a weight, but not number 2"):
        TokenMixture(sources(1, 1), [1, None], "stop")
    with pytest.raises(UserError, match="source number 2 has the weight 0"):
        TokenMixture(sources(1, 1), [1, 0], "stop")
    with pytest.raises(UserError, match="source 1: there are no documents in it"):
        taken(TokenMixture(sources(1, 0), [None, None], "stop"))
    state = TokenMixture(sources(1, 1), [None, None], "stop").state()
    with pytest.raises(UserError, match="made with 2 sources, this run has 3"):
        TokenMixture(sources(1, 1, 1), [None] * 3, "stop").restore(state)
