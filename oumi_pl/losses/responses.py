"""Losses of single responses, each desirable or not, as KTO trains on.

`r = beta log(policy / reference)` is a response's reward, and `z = beta KL` the reward that the policy gets on average,
estimated on mismatched responses.
"""

import torch
from torch import Tensor

from oumi_pl.losses.preference.common import above_zero
from oumi_pl.types import ResponseLoss, Responses


class KTOLoss(ResponseLoss):
    """`1 - sigmoid(r - z)` if the response is desirable, else `1 - sigmoid(z - r)`.

    Ethayarajh et al. 2024, arXiv:2402.01306, equation 7, without its weights, which are `desirable_weight` and
    `undesirable_weight` of the module. Losses are bounded, so that responses that have moved far get no more gradient.

    Args:
        beta: The scale of log-ratios, above 0; larger values keep the policy nearer to the reference.
    """

    loss_at_start = 0.5

    def __init__(self, beta: float = 0.1) -> None:
        above_zero("beta", beta)
        self.beta = beta

    def __call__(self, responses: Responses) -> Tensor:
        over = self.rewards(responses) - self.beta * responses.kl
        return torch.sigmoid(torch.where(responses.desirable, -over, over))


class APOZeroUnpaired(ResponseLoss):
    """`1 - sigmoid(r)` if the response is desirable, else `sigmoid(r)`: KTO's loss without the KL divergence.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7 of its pairs, as TRL's `apo_zero_unpaired`; for desirable
    responses that are better than what the model would say.

    Args:
        beta: The scale of log-ratios, above 0; larger values keep the policy nearer to the reference.
    """

    needs_kl = False
    loss_at_start = 0.5

    def __init__(self, beta: float = 0.1) -> None:
        above_zero("beta", beta)
        self.beta = beta

    def __call__(self, responses: Responses) -> Tensor:
        rewards = self.rewards(responses)
        return torch.sigmoid(torch.where(responses.desirable, -rewards, rewards))
