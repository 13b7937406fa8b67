"""Losses of reward models against values worked out by hand."""

import math

import pytest
import torch

from oumi_pl.errors import UserError
from oumi_pl.losses.reward import BCE, MSE, BradleyTerry

CHOSEN, REJECTED = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
NO_MARGINS = torch.full((2,), float("nan"))


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("loss", "margins", "expected"),
    [
        (BradleyTerry(), NO_MARGINS, [softplus(-1), softplus(2)]),
        (BradleyTerry(margin=True), torch.tensor([0.5, -1.0]), [softplus(-0.5), softplus(1)]),
        (BradleyTerry(label_smoothing=0.1), NO_MARGINS, [softplus(-1) + 0.1, softplus(2) - 0.2]),
        (BradleyTerry(center_rewards_coefficient=0.5), NO_MARGINS, [softplus(-1) + 0.5 * 9, softplus(2)]),
    ],
    ids=["plain", "margin", "smoothed", "centred"],
)
def test_bradley_terry(loss, margins, expected):
    assert loss(CHOSEN, REJECTED, margins).tolist() == pytest.approx(expected)


def test_outcome_losses():
    rewards, outcomes = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0])
    assert BCE()(rewards, outcomes).tolist() == pytest.approx([softplus(-2), softplus(1), softplus(0.5)])
    assert BCE().quality(rewards, outcomes).tolist() == [True, False, False]
    assert MSE()(rewards, outcomes).tolist() == [1.0, 4.0, 0.25]
    assert MSE().quality(rewards, outcomes).tolist() == [1.0, 2.0, 0.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5, but has to be from 0 to below 0.5"),
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient is -1.0, but has to be 0 or more"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(UserError, match=message):
        BradleyTerry(**values)
