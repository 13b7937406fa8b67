"""Dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629): the loss of a token, times its probability.

oumi_pl fit --config quickstart/sft --model.loss dft.DFT
"""

import torch.nn.functional as F

from oumi_pl.types import TokenLoss


class DFT(TokenLoss):
    """Cross-entropy with each token weighted by its probability, which gets no gradient.

    Args:
        power: Exponent of the probability. 0 is cross-entropy; with a negative one, rare tokens count more (focal).
    """

    def __init__(self, power: float = 1.0):
        self.power = power

    def __call__(self, logits, targets):
        nll = F.cross_entropy(logits, targets, reduction="none")
        return (-nll).exp().detach() ** self.power * nll

    def metrics(self, logits, targets):
        """Logged as `train/probability`, `val/probability`, and so on."""
        probabilities = logits.softmax(-1)
        entropy = -(probabilities * logits.log_softmax(-1)).sum(-1)
        return {"probability": probabilities.gather(1, targets[:, None])[:, 0], "entropy": entropy}
