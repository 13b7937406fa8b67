"""Losses that wrap losses: weighted sums, and a smaller weight for tokens beyond the length of the shorter response.

Both are modules, so that the buffers of a wrapped loss are saved and moved to the device.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from oumi_pl.errors import UserError
from oumi_pl.losses.preference.common import require, zero_or_more
from oumi_pl.types import Pairs, PreferenceLoss


class WeightedSum(PreferenceLoss, nn.Module):
    """`sum_k weights[k] losses[k]`.

    MPO, for example, is DPO, BCO and SFT with weights 0.8, 0.2 and 1 (Wang et al. 2024, arXiv:2411.10442). Rewards are
    those of the first loss that has any, i.e. whose `beta` is not 0.

    Args:
        losses: At least one.
        weights: One for each loss, 0 or more.
    """

    def __init__(self, losses: list[PreferenceLoss], weights: list[float]) -> None:
        super().__init__()
        if not losses or len(losses) != len(weights):
            raise UserError(
                f"model.loss: losses has {len(losses)} entries and weights {len(weights)}, but each loss has its weight"
            )
        for index, weight in enumerate(weights):
            zero_or_more(f"weights[{index}]", weight)
        self.losses = list(losses)
        self.weights = list(weights)
        for index, loss in enumerate(losses):
            if isinstance(loss, nn.Module):
                self.add_module(str(index), loss)
        self.beta = next((loss.beta for loss in losses if loss.beta), 0.0)
        self.needs_reference = any(loss.needs_reference for loss in losses)
        starts = [loss.loss_at_start for loss in losses]
        known = [start * weight for start, weight in zip(starts, weights, strict=True) if start is not None]
        self.loss_at_start = sum(known) if len(known) == len(losses) else None

    def __call__(self, pairs: Pairs) -> Tensor:
        terms = [weight * loss(pairs) for weight, loss in zip(self.weights, self.losses, strict=True)]
        return torch.stack(terms).sum(0)

    def metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Those of all losses; of equal names, the first one's."""
        return {name: values for loss in reversed(self.losses) for name, values in loss.metrics(pairs).items()}

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Rewards of the first loss that has any, `[pairs]` each; zeros if none has."""
        first = next((loss for loss in self.losses if loss.beta), self.losses[0])
        return first.rewards(pairs)


class LDDPO(PreferenceLoss, nn.Module):
    """Any loss, with weight `alpha` on tokens beyond the length of the shorter response, in policy and reference.

    Liu et al. 2024, arXiv:2409.06411 (length-desensitised DPO): losses that sum over tokens favour the longer
    response, so that the policy becomes verbose. A loss that divides by numbers of tokens still uses the full ones.
    Wrapped around a `WeightedSum`, it also reweighs the tokens of an `SFTTerm`; inside one it does not.

    Args:
        loss: Called with the reweighted log-probabilities.
        alpha: The weight of the surplus tokens, from 0 (ignored) to 1 (unchanged).
    """

    def __init__(self, loss: PreferenceLoss, alpha: float) -> None:
        super().__init__()
        require(0 <= alpha <= 1, "alpha", alpha, "from 0 to 1")
        self.loss = loss
        self.alpha = alpha
        self.beta = loss.beta
        self.needs_reference = loss.needs_reference
        self.loss_at_start = loss.loss_at_start

    def __call__(self, pairs: Pairs) -> Tensor:
        return self.loss(self._reweighted(pairs))

    def metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Those of the loss, from reweighted log-probabilities."""
        return self.loss.metrics(self._reweighted(pairs))

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Rewards of the loss, made of reweighted log-probabilities, `[pairs]` each."""
        return self.loss.rewards(self._reweighted(pairs))

    def _reweighted(self, pairs: Pairs) -> Pairs:
        branches = pairs.branches
        lengths = branches.new_zeros(2 * pairs.count).index_add(0, branches, torch.ones_like(branches))
        starts = lengths.cumsum(0) - lengths
        positions = torch.arange(len(branches), device=branches.device) - starts[branches]
        surplus = positions >= lengths.view(-1, 2).amin(1)[branches // 2]
        weights = torch.ones_like(pairs.logps).masked_fill(surplus, self.alpha)
        return replace(pairs, logps=pairs.logps * weights, ref_logps=pairs.ref_logps * weights)
