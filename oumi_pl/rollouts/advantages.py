"""From rewards to advantages: how much better a completion is than what was to be expected of its prompt."""

from abc import ABC, abstractmethod
from typing import Literal, get_args

import numpy as np

from oumi_pl.errors import UserError, nearest

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""
Scale = Literal["group", "batch", "none"]


class Advantage(ABC):
    """Maps rewards to advantages. Subclass it and name the class by `class_path` to train with it."""

    @abstractmethod
    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        """Maps rewards `[prompts, completions]` of an update, float64, to advantages of the same shape."""


class GroupMean(Advantage):
    """`(r - mean of its group) / standard deviation` (Shao et al. 2024, arXiv:2402.03300).

    Args:
        scale: Which standard deviation: of the `group`, of all rewards of the `batch` (Liu et al. 2025,
            arXiv:2508.08221), or `none`, which does not divide (Liu et al. 2025, arXiv:2503.20783: dividing weighs
            questions that are too easy or too hard more).
    """

    def __init__(self, scale: Scale = "group") -> None:
        if scale not in get_args(Scale):
            raise UserError(f"scale: unknown {scale!r}{nearest(str(scale), get_args(Scale))}")
        self.scale = scale

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        """Centers, and divides by the standard deviation (with `n - 1`) plus 1e-4, as TRL does."""
        centered = rewards - rewards.mean(1, keepdims=True)
        if self.scale == "none":
            return centered
        if self.scale == "batch":
            return centered / (rewards.std(ddof=1) + EPSILON if rewards.size > 1 else 1.0)
        return centered / (rewards.std(1, ddof=1, keepdims=True) + EPSILON)


class LeaveOneOut(Advantage):
    """`r - mean of the others of its group` (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740): unbiased."""

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        """Subtracts the mean of the others."""
        others = rewards.shape[1] - 1
        return (rewards - rewards.mean(1, keepdims=True)) * (others + 1) / others


class BatchMean(Advantage):
    """`r - mean of all rewards of the update`: REINFORCE with a baseline, which needs no groups."""

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        """Subtracts the mean."""
        return rewards - rewards.mean()
