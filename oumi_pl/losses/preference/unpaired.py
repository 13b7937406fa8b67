"""Losses of each response's own reward `r = beta log(policy / reference)`.

A loss of the difference is also satisfied if both responses become less likely, the rejected one faster. These losses
say in which direction each response should move. `w` is the chosen response, `l` the rejected one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from oumi_pl.losses.preference.common import above_zero
from oumi_pl.types import Pairs, PreferenceLoss


class _Unpaired(PreferenceLoss):
    """Base of these losses: `beta`, with DPO's rewards.

    Args:
        beta: The scale of log-ratios, above 0; larger values keep the policy nearer to the reference.
    """

    def __init__(self, beta: float = 0.1) -> None:
        above_zero("beta", beta)
        self.beta = beta


class NCA(_Unpaired):
    """`-log sigmoid(r_w) - 0.5 log sigmoid(-r_w) - 0.5 log sigmoid(-r_l)`.

    Chen et al. 2024, arXiv:2402.05369 (noise contrastive alignment, for pairs): keeps the likelihood of chosen
    responses from falling, as it often does under DPO, and from rising without bound: `r_w` has its optimum at log 2.
    """

    loss_at_start = 2 * math.log(2)

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


class BCO(_Unpaired):
    """`-log sigmoid(r_w) - log sigmoid(-r_l)`: a classifier of good and bad responses.

    Jung et al. 2024, arXiv:2404.04656, applied to pairs and without the paper's reward shift (a running mean of all
    rewards that is subtracted from each), as TRL's `bco_pair`. MPO adds it to DPO's loss, as a measure of
    absolute quality (Wang et al. 2024, arXiv:2411.10442).
    """

    loss_at_start = 2 * math.log(2)

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


class SPPO(_Unpaired):
    """`(s_w - 1 / (2 beta))^2 + (s_l + 1 / (2 beta))^2`, with the log-ratios `s` of whole responses.

    Wu et al. 2024, arXiv:2405.00675, equation 4.7 with hard labels: the chosen response wins with probability 1 and the
    rejected one with 0, against an average opponent. Each log-ratio has a fixed target.

    Args:
        beta: Sets the targets, `1 / (2 beta)` above and below the reference; above 0.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta)
        self.loss_at_start = 1 / (2 * beta**2)

    def __call__(self, pairs: Pairs) -> Tensor:
        target = 1 / (2 * self.beta)
        return (pairs.chosen_logratios - target).square() + (pairs.rejected_logratios + target).square()


class APOZero(_Unpaired):
    """`1 - sigmoid(r_w) + sigmoid(r_l)`: raises the chosen response and lowers the rejected one.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7, for chosen responses that are better than what the model
    would say. Both terms are bounded, so responses that have moved far get no more gradient.
    """

    loss_at_start = 1.0

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


class APODown(_Unpaired):
    """`sigmoid(r_w) + 1 - sigmoid(r_w - r_l)`: lowers the chosen response, and the rejected one more.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8, for chosen responses that are worse than what the model
    would say.
    """

    loss_at_start = 1.0

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
