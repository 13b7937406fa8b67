"""Losses that compare distributions instead of pairs: sorted values of good and of bad responses.

Unlike all other losses, these depend on how pairs are divided into micro-batches, because they sort within the
micro-batch of one rank. With one pair per micro-batch they equal DPO.
"""

import math

from torch import Tensor

from oumi_pl.losses.preference.common import above_zero, less_than_half, logistic_loss
from oumi_pl.types import Pairs, PreferenceLoss


class _Transport(PreferenceLoss):
    """Base of both losses: a logistic loss of sorted differences.

    Args:
        beta: The strength of the regularisation, above 0.
        label_smoothing: The share of labels taken to be wrong, from 0 to below 0.5.
    """

    loss_at_start = math.log(2)

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        above_zero("beta", beta)
        less_than_half(label_smoothing)
        self.beta = beta
        self.label_smoothing = label_smoothing

    def _losses(self, better: Tensor, worse: Tensor) -> Tensor:
        difference = better.sort().values - worse.sort().values
        return logistic_loss(self.beta * difference, self.label_smoothing)


class AOT(_Transport):
    """DPO's loss on sorted gaps between chosen and rejected log-probabilities, of the policy and of the reference.

    `-log sigmoid(beta (sort(log policy_w - log policy_l) - sort(log reference_w - log reference_l)))`, quantile by
    quantile: Melnyk et al. 2024, arXiv:2406.05882, alignment by optimal transport. The policy's gaps should
    exceed the reference's as a distribution, not pair by pair. Entry `i` of the result is the `i`-th quantile's loss.

    Depends on how pairs are put into micro-batches: give it large ones.
    """

    def __call__(self, pairs: Pairs) -> Tensor:
        """Maps pairs to losses `[pairs]`, by quantiles and not in the order of the pairs."""
        gaps = pairs.chosen_logps - pairs.rejected_logps
        return self._losses(gaps, pairs.ref_chosen_logps - pairs.ref_rejected_logps)


class AOTUnpaired(_Transport):
    """DPO's loss on sorted log-ratios: chosen against rejected responses, whatever their prompts.

    `-log sigmoid(beta (sort(s_w) - sort(s_l)))`, with log-ratios `s`: Melnyk et al. 2024, arXiv:2406.05882, for data
    whose good and bad responses are not paired. Entry `i` of the result is the `i`-th quantile's loss.

    Depends on how pairs are put into micro-batches: give it large ones.
    """

    def __call__(self, pairs: Pairs) -> Tensor:
        """Maps pairs to losses `[pairs]`, by quantiles and not in the order of the pairs."""
        return self._losses(pairs.chosen_logratios, pairs.rejected_logratios)
