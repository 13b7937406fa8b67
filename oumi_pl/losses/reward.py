"""Losses of reward models: of pairs of responses, and of responses with an outcome.

Rewards are scores of whole responses, float32 and differentiable. An argument outside of its range raises a `UserError`
when the loss is created.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from oumi_pl.losses.preference.common import less_than_half, logistic_loss, zero_or_more


class PairLoss(ABC):
    """A loss on the rewards of pairs. Subclass it and name the class by `class_path` to train with it."""

    needs_margins: bool = False
    """Whether all pairs need a margin. If not, margins may be NaN."""

    @abstractmethod
    def __call__(self, chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
        """Maps rewards of the chosen and the rejected responses and the rows' margins, `[pairs]` each, to losses
        `[pairs]`.
        """


class BradleyTerry(PairLoss):
    """`-log sigmoid(r_w - r_l)`, with the rewards `r_w` of the chosen and `r_l` of the rejected response.

    The likelihood of the preferences under the model of Bradley and Terry, as in Ouyang et al. 2022 (arXiv:2203.02155).

    Args:
        margin: Subtract the row's margin from the difference of the rewards, as in Llama 2 (Touvron et al. 2023,
            arXiv:2307.09288): pairs with a larger margin have to be further apart. All rows then need one.
        label_smoothing: The share of labels taken to be wrong, from 0 to below 0.5.
        center_rewards_coefficient: Weight of `(r_w + r_l)^2`, which keeps rewards around 0 (Eisenstein et al. 2023,
            arXiv:2312.09244, who take 0.01). The loss itself does not determine their mean.
    """

    def __init__(
        self, margin: bool = False, label_smoothing: float = 0.0, center_rewards_coefficient: float = 0.0
    ) -> None:
        less_than_half(label_smoothing)
        zero_or_more("center_rewards_coefficient", center_rewards_coefficient)
        self.needs_margins = margin
        self.label_smoothing = label_smoothing
        self.center_rewards_coefficient = center_rewards_coefficient

    def __call__(self, chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
        """Losses `[pairs]`."""
        differences = chosen - rejected - margins if self.needs_margins else chosen - rejected
        losses = logistic_loss(differences, self.label_smoothing)
        if self.center_rewards_coefficient:
            losses = losses + self.center_rewards_coefficient * (chosen + rejected).square()
        return losses


class OutcomeLoss(ABC):
    """A loss on the reward of a response with a known outcome. Subclass it and name the class by `class_path`."""

    metric: ClassVar[str]
    """Name of what `quality` measures."""
    least: ClassVar[float] = float("-inf")
    """The smallest outcome that it is defined for."""
    most: ClassVar[float] = float("inf")
    """The largest one."""

    @abstractmethod
    def __call__(self, rewards: Tensor, outcomes: Tensor) -> Tensor:
        """Maps rewards and outcomes `[rows]` to losses `[rows]`."""

    @abstractmethod
    def quality(self, rewards: Tensor, outcomes: Tensor) -> Tensor:
        """A number per row, `[rows]`, whose mean is logged."""


class BCE(OutcomeLoss):
    """`-y log sigmoid(r) - (1 - y) log sigmoid(-r)`: the reward is the logit of the probability that `y` is 1.

    As for the outcome verifiers of Cobbe et al. 2021 (arXiv:2110.14168). `y` may also be a probability.
    """

    metric = "accuracies"
    least, most = 0.0, 1.0

    def __call__(self, rewards: Tensor, outcomes: Tensor) -> Tensor:
        """Losses `[rows]`."""
        return F.binary_cross_entropy_with_logits(rewards, outcomes, reduction="none")

    def quality(self, rewards: Tensor, outcomes: Tensor) -> Tensor:
        """Whether reward and outcome are on the same side of an even chance."""
        return (rewards > 0) == (outcomes > 0.5)


class MSE(OutcomeLoss):
    """`(r - y)^2`: the reward predicts the score `y`, as in HelpSteer (Wang et al. 2023, arXiv:2311.09528)."""

    metric = "errors"

    def __call__(self, rewards: Tensor, outcomes: Tensor) -> Tensor:
        """Losses `[rows]`."""
        return (rewards - outcomes).square()

    def quality(self, rewards: Tensor, outcomes: Tensor) -> Tensor:
        """The distance from the score."""
        return torch.abs(rewards - outcomes)
