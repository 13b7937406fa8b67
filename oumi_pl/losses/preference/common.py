"""Shared by the preference losses: the logistic loss, and checks of arguments."""

import math

import torch.nn.functional as F
from torch import Tensor

from oumi_pl.errors import UserError


def logistic_loss(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Computes `-(1 - e) log sigmoid(z) - e log sigmoid(-z)` of logits `z` `[pairs]` and a share `e` of wrong labels.

    With `e > 0` it is that of conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"), with its
    minimum at the logit `log((1 - e) / e)`; without smoothing a larger logit is always better.
    """
    losses = -F.logsigmoid(logits)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    return losses


def require(holds: bool, name: str, value: float, wanted: str) -> None:
    """Refuses the `value` of the setting `name` unless `holds`.

    Raises:
        UserError: it does not hold; `wanted` ends the sentence "but has to be".
    """
    if not holds:
        raise UserError(f"model.loss: {name} is {value}, but has to be {wanted}")


def above_zero(name: str, value: float) -> None:
    """Raises a UserError unless the value is a finite number above 0."""
    require(value > 0, name, value, "above 0")
    require(value < math.inf, name, value, "finite")


def zero_or_more(name: str, value: float) -> None:
    """Raises a UserError unless the value is a finite number of 0 or more."""
    require(value >= 0, name, value, "0 or more")
    require(value < math.inf, name, value, "finite")


def less_than_half(label_smoothing: float) -> None:
    """Raises a UserError unless a share of wrong labels is in `[0, 0.5)`: from 0.5 on, labels say nothing."""
    require(0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "from 0 to below 0.5")
