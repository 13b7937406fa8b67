"""Token losses that LLaMA-Factory and axolotl have by a switch."""

import torch.nn.functional as F
from torch import Tensor

from oumi_pl.types import TokenLoss


class ProbabilityWeighted(TokenLoss):
    """Cross-entropy times the token's probability, which gets no gradient: dynamic fine-tuning (arXiv:2508.05629)."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses `[n]` of logits `[n, vocab]`."""
        nll = F.cross_entropy(logits, targets, reduction="none")
        return (-nll).exp().detach() * nll


class EntropyWeighted(TokenLoss):
    """Cross-entropy times a power of the entropy over the most likely tokens, which gets no gradient.

    Args:
        alpha: The power.
        top_k: Number of tokens; their probabilities are normalised.
        scale: What the entropy is divided by, 3 in LLaMA-Factory and 1 in axolotl.
    """

    def __init__(self, alpha: float = 1.0, top_k: int = 20, scale: float = 1.0) -> None:
        self.alpha = alpha
        self.top_k = top_k
        self.scale = scale

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses `[n]` of logits `[n, vocab]`."""
        top = logits.detach().topk(min(self.top_k, logits.shape[-1]), dim=-1).values.log_softmax(-1)
        entropy = -(top.exp() * top).sum(-1)
        return F.cross_entropy(logits, targets, reduction="none") * (entropy / self.scale) ** self.alpha
