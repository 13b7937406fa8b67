"""Losses of the policy's log-probabilities alone, without a reference.

`p` is the log-probability of a response, `|.|` its number of tokens; `w` is the chosen response, `l` the rejected one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from oumi_pl.losses.preference.common import above_zero, less_than_half, logistic_loss, zero_or_more
from oumi_pl.types import Pairs, PreferenceLoss

CERTAIN = -1e-7
"""Largest log-probability whose odds are finite in float32."""


class SFTTerm(PreferenceLoss):
    """`-p_w / |w|`: the negative log-likelihood of the chosen response per token, for a `WeightedSum`.

    Added to DPO's loss, it keeps the chosen responses likely (Pang et al. 2024, arXiv:2404.19733). The mean is taken
    within each pair, so that a pair's loss does not depend on its neighbours; TRL's `sft` takes it over all tokens of
    the micro-batch, where long responses weigh more. It has no rewards.
    """

    beta = 0.0
    needs_reference = False

    def __call__(self, pairs: Pairs) -> Tensor:
        return -pairs.chosen_logps / pairs.chosen_tokens


class SimPO(PreferenceLoss):
    """`-log sigmoid(beta (p_w / |w| - p_l / |l|) - gamma)`: the reward is what generation maximises.

    Meng et al. 2024, arXiv:2405.14734.

    Args:
        beta: What log-probabilities per token are multiplied by, above 0; the paper takes 2 and more.
        gamma: Target margin between the two rewards, 0 or more; the authors start from half of
            `beta`.
        label_smoothing: The share of labels taken to be wrong, from 0 to below 0.5.
    """

    needs_reference = False

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> None:
        above_zero("beta", beta)
        zero_or_more("gamma", gamma)
        less_than_half(label_smoothing)
        self.beta = beta
        self.gamma = gamma
        self.label_smoothing = label_smoothing

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return logistic_loss(chosen - rejected - self.gamma, self.label_smoothing)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """`beta p / |.|` of the chosen and the rejected responses, `[pairs]` each."""
        chosen, rejected = _mean_logps(pairs)
        return self.beta * chosen, self.beta * rejected


class CPO(PreferenceLoss):
    """`-log sigmoid(beta (p_w - p_l)) - sft_weight p_w / |w|`: DPO with a uniform reference, and an SFT term.

    Xu et al. 2024, arXiv:2401.08417. The paper sums the second term over tokens; here it is `SFTTerm`.

    Args:
        beta: What differences of log-probabilities are multiplied by, above 0.
        label_smoothing: The share of labels taken to be wrong, from 0 to below 0.5.
        sft_weight: Of the chosen response's negative log-likelihood per token, 0 or more.
    """

    needs_reference = False

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 1.0) -> None:
        above_zero("beta", beta)
        less_than_half(label_smoothing)
        zero_or_more("sft_weight", sft_weight)
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.sft_weight = sft_weight
        self.sft = SFTTerm()

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return logistic_loss(chosen - rejected, self.label_smoothing) + self.sft_weight * self.sft(pairs)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """`beta p` of the chosen and the rejected responses, `[pairs]` each."""
        return self.beta * pairs.chosen_logps, self.beta * pairs.rejected_logps


class ORPO(PreferenceLoss):
    """`-sft_weight p_w / |w| - beta log sigmoid(log(odds_w / odds_l))`, where `odds = P / (1 - P)`, `P = exp(p / |.|)`.

    Hong et al. 2024, arXiv:2403.07691, whose `lambda` is `beta`: fine-tuning and preferences in one stage, from a base
    model. The odds ratio penalises the rejected response only mildly. Log-probabilities per token are clamped to -1e-7,
    where the odds are still finite.

    Args:
        beta: The weight of the odds ratio, above 0.
        sft_weight: Of the chosen response's negative log-likelihood per token, 0 or more.
    """

    needs_reference = False

    def __init__(self, beta: float = 0.1, sft_weight: float = 1.0) -> None:
        above_zero("beta", beta)
        zero_or_more("sft_weight", sft_weight)
        self.beta = beta
        self.sft_weight = sft_weight
        self.sft = SFTTerm()

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = _mean_logps(pairs)
        return self.sft_weight * self.sft(pairs) - self.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """`beta p / |.|` of the chosen and the rejected responses, `[pairs]` each."""
        chosen, rejected = _mean_logps(pairs)
        return self.beta * chosen, self.beta * rejected


def _mean_logps(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Log-probabilities per token of the chosen and the rejected responses, `[pairs]` each."""
    return pairs.chosen_logps / pairs.chosen_tokens, pairs.rejected_logps / pairs.rejected_tokens


def _log_odds(logps: Tensor) -> Tensor:
    logps = logps.clamp(max=CERTAIN)
    return logps - torch.log(-torch.expm1(logps))
