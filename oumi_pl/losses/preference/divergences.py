"""Scores from log-ratios, one class per divergence from the reference (f-DPO, Wang et al. 2023).

DPO's reward `beta log(policy / reference)` follows from keeping the policy near the reference by the reverse KL
divergence. Other f-divergences work too (Wang et al. 2023, arXiv:2309.16240): the reward is then
`beta f'(policy / reference)`, up to a constant that drops out of differences.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from oumi_pl.losses.preference.common import require

LARGEST_EXPONENT = 36.0
"""Above this exponent `exp` is replaced by its tangent, or squared differences of scores would overflow float32."""


class Divergence(ABC):
    """A divergence of the policy from the reference. Subclass it and name the class by `class_path` to use it."""

    @abstractmethod
    def __call__(self, logratios: Tensor) -> Tensor:
        """Maps log-ratios `[pairs]` of whole responses to scores `[pairs]`: increasing, and 0 at 0."""


class ReverseKL(Divergence):
    """`f'(t) = log t`: the score is the log-ratio itself, as in DPO; mode-seeking."""

    def __call__(self, logratios: Tensor) -> Tensor:
        return logratios


class ForwardKL(Divergence):
    """`f'(t) = 1 - 1 / t`: mass-covering.

    The score falls exponentially with the log-ratio. Below a log-ratio of -36 it follows the tangent, so that
    scores and gradients stay finite where float32 would overflow.
    """

    def __call__(self, logratios: Tensor) -> Tensor:
        return -_expm1(-logratios)


class JensenShannon(Divergence):
    """`f'(t) = log(2 t / (1 + t))`: between both KL divergences; scores have an upper bound, log 2."""

    def __call__(self, logratios: Tensor) -> Tensor:
        return math.log(2) + F.logsigmoid(logratios)


class Alpha(Divergence):
    """`f'(t) = (t^(alpha - 1) - 1) / (alpha - 1)`: a family with the reverse KL at `alpha` 1 and the forward KL at 0.

    As in TRL; the paper's own parameter is `1 - alpha`. Where `(alpha - 1) log t` exceeds 36 the score follows the
    tangent, so that scores and gradients stay finite.

    Args:
        alpha: Any finite number; 1 gives the reverse and 0 the forward KL divergence, 0.5 is halfway between both.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        require(math.isfinite(alpha), "alpha", alpha, "finite")
        self.alpha = alpha

    def __call__(self, logratios: Tensor) -> Tensor:
        power = self.alpha - 1
        if abs(power) < 1e-6:  # the limit, where the quotient would be 0 / 0
            return logratios
        return _expm1(power * logratios) / power


def _expm1(x: Tensor) -> Tensor:
    """Computes `exp(x) - 1`, and beyond the largest exponent its tangent at that point."""
    near = x.clamp(max=LARGEST_EXPONENT)
    # autograd computes the gradient of expm1 as its result + 1, which cancels far below 0
    value = torch.where(near.abs() < 1, near.expm1(), near.exp() - 1)
    return value + near.exp() * (x - near)
