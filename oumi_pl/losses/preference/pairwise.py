"""Losses of the difference between the chosen and the rejected response's score.

A constant that a divergence adds to both scores cancels in the difference, so these losses take any divergence.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from oumi_pl.losses.preference.common import above_zero, less_than_half, logistic_loss, require
from oumi_pl.losses.preference.divergences import Divergence, ReverseKL
from oumi_pl.types import Pairs, PreferenceLoss


class PairwiseLoss(PreferenceLoss):
    """Base of these losses: rewards are `beta` times scores, and a pair's logit is the difference of its rewards.

    Args:
        beta: The strength of the regularisation, above 0; larger values keep the policy nearer to the reference.
        divergence: What the regularisation measures; None is the reverse KL divergence of DPO.
    """

    def __init__(self, beta: float = 0.1, divergence: Divergence | None = None) -> None:
        above_zero("beta", beta)
        self.beta = beta
        self.divergence = divergence or ReverseKL()

    def scores(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and the rejected responses, `[pairs]` each."""
        return self.divergence(pairs.chosen_logratios), self.divergence(pairs.rejected_logratios)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """`beta` times the scores, `[pairs]` each: `beta f'(policy / reference)`, as in f-DPO."""
        chosen, rejected = self.scores(pairs)
        return self.beta * chosen, self.beta * rejected

    def logits(self, pairs: Pairs) -> Tensor:
        """By how much the chosen response's reward exceeds the rejected one's, `[pairs]`."""
        chosen, rejected = self.rewards(pairs)
        return chosen - rejected


class Sigmoid(PairwiseLoss):
    """DPO: `-log sigmoid(beta (s_w - s_l))`, `s` the log-ratio of a response, `w` the chosen and `l` the rejected one.

    Rafailov et al. 2023, arXiv:2305.18290: the likelihood of the preferences under a Bradley-Terry model whose reward
    is the policy's own. With `label_smoothing` it is conservative DPO (Mitchell 2023), for noisy labels.

    Args:
        beta: The strength of the regularisation, above 0; the larger, the nearer the policy stays to the reference.
        label_smoothing: The share of labels taken to be wrong, from 0 to below 0.5.
        divergence: What the regularisation measures; None is the reverse KL divergence of DPO.
    """

    loss_at_start = math.log(2)

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)
        less_than_half(label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, pairs: Pairs) -> Tensor:
        return logistic_loss(self.logits(pairs), self.label_smoothing)


class LengthNormalizedSigmoid(Sigmoid):
    """DPO per token: `-log sigmoid(beta (s_w / |w| - s_l / |l|))`, with the number `|.|` of a response's tokens.

    Lambert et al. 2024 (Tulu 3), arXiv:2411.15124: a long response has no advantage. Rewards are per token too,
    so `beta` is far larger than in DPO: Tulu 3 trained with 5.
    """

    def __init__(self, beta: float = 5.0, label_smoothing: float = 0.0, divergence: Divergence | None = None) -> None:
        super().__init__(beta, label_smoothing, divergence)

    def scores(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Scores per token of the chosen and the rejected responses, `[pairs]` each."""
        return _per_token(pairs, super().scores(pairs))


class Hinge(PairwiseLoss):
    """`max(0, 1 - beta (s_w - s_l))`: pairs with a margin of 1 or more have no loss.

    The hinge of SLiC (Zhao et al. 2023, arXiv:2305.10425) on log-ratios, as in RSO (Liu et al. 2023,
    arXiv:2309.06657). `beta` is the inverse of SLiC's margin.
    """

    loss_at_start = 1.0

    def __call__(self, pairs: Pairs) -> Tensor:
        return torch.relu(1 - self.logits(pairs))


class IPO(PairwiseLoss):
    """`(s_w / |w| - s_l / |l| - 1 / (2 beta))^2`: the log-ratios per token should differ by a fixed amount.

    Azar et al. 2023, arXiv:2310.12036, equation 17, whose `tau` is `beta`: a fixed target keeps unanimous preferences
    from driving the policy further and further away. The paper writes sums over tokens. Here, as in TRL (confirmed by
    the paper's authors), log-ratios are divided by the number `|.|` of tokens: otherwise long responses, whose
    log-ratios are larger, would dominate the square.

    Args:
        beta: Sets the target, `1 / (2 beta)` per token; above 0.
        divergence: What the regularisation measures; None is the reverse KL divergence.
    """

    def __init__(self, beta: float = 0.1, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)
        self.loss_at_start = 1 / (4 * beta**2)

    def scores(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Scores per token of the chosen and the rejected responses, `[pairs]` each."""
        return _per_token(pairs, super().scores(pairs))

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self.scores(pairs)
        return (chosen - rejected - 1 / (2 * self.beta)).square()


class EXO(PairwiseLoss):
    """`q_w log(q_w / (1 - e)) + q_l log(q_l / e)`, with `q_w = sigmoid(beta (s_w - s_l))` and `q_l = 1 - q_w`.

    Ji et al. 2024, arXiv:2402.00856, equation 16: the reverse KL divergence from the labels, smoothed by `e`, to what
    the policy prefers, where DPO minimises the forward one. Its minimum lies at a logit of `log((1 - e) / e)`; pairs
    that are ranked very wrongly get almost no gradient.

    Args:
        beta: The strength of the regularisation, above 0.
        label_smoothing: `e`, above 0 and below 0.5: without it the divergence is infinite. The paper takes 1e-3.
        divergence: What the regularisation measures; None is the reverse KL divergence.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 1e-3, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)
        require(0 < label_smoothing < 0.5, "label_smoothing", label_smoothing, "above 0 and below 0.5")
        self.label_smoothing = label_smoothing
        self.loss_at_start = -math.log(2) - 0.5 * math.log(label_smoothing * (1 - label_smoothing))

    def __call__(self, pairs: Pairs) -> Tensor:
        logits = self.logits(pairs)
        chosen = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-self.label_smoothing))
        rejected = (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(self.label_smoothing))
        return chosen + rejected


class Robust(Sigmoid):
    """`(-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)`, with `z = beta (s_w - s_l)`.

    Chowdhury et al. 2024, arXiv:2403.00409 (rDPO): if a share `e` of the labels is flipped at random, its expectation
    is DPO's loss on the right labels. It has no lower bound, so losses of single pairs may be negative.

    Args:
        beta: The strength of the regularisation, above 0.
        label_smoothing: The share `e` of flipped labels, from 0 to below 0.5; 0 gives DPO.
        divergence: What the regularisation measures; None is the reverse KL divergence.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.1, divergence: Divergence | None = None) -> None:
        super().__init__(beta, label_smoothing, divergence)

    def __call__(self, pairs: Pairs) -> Tensor:
        logits, flipped = self.logits(pairs), self.label_smoothing
        right, wrong = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        return ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)


class DiscoPOP(PairwiseLoss):
    """`(1 - m) (-log sigmoid(z)) + m exp(-z)`, with `z = beta (s_w - s_l)` and `m = sigmoid(z / tau)`.

    Lu et al. 2024, arXiv:2406.08414, equation 5: a loss that a language model proposed, logistic where the pair is
    ranked wrongly and exponential where it is ranked right. It is not convex: it dips around `z = 0`.

    Args:
        beta: The strength of the regularisation, above 0.
        tau: The width of the transition between the two losses, above 0 and at most 1: above 1 the exponential part
            would grow without bound on pairs that are ranked wrongly. The paper takes 0.05.
        divergence: What the regularisation measures; None is the reverse KL divergence.
    """

    loss_at_start = 0.5 * math.log(2) + 0.5

    def __init__(self, beta: float = 0.1, tau: float = 0.05, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)
        require(0 < tau <= 1, "tau", tau, "above 0 and at most 1")
        self.tau = tau

    def __call__(self, pairs: Pairs) -> Tensor:
        logits = self.logits(pairs)
        modulation = logits / self.tau
        logistic = torch.sigmoid(-modulation) * -F.logsigmoid(logits)
        # the product of both factors is bounded where exp(-z) alone would overflow
        exponential = torch.exp(F.logsigmoid(modulation) - logits)
        return logistic + exponential


def _per_token(pairs: Pairs, scores: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Divides scores of whole responses by the responses' numbers of tokens."""
    return scores[0] / pairs.chosen_tokens, scores[1] / pairs.rejected_tokens
