"""The logistic loss, of labels that may be wrong."""

import torch.nn.functional as F
from torch import Tensor


def logistic_loss(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Computes `-(1 - e) log sigmoid(z) - e log sigmoid(-z)` of logits `z` `[pairs]` and a share `e` of wrong labels.

    Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences") makes of it a loss with a minimum: at a
    logit of `log((1 - e) / e)`, where without smoothing a larger logit is always better.
    """
    losses = -F.logsigmoid(logits)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    return losses
