"""Token-level DPO (Zeng et al. 2024, arXiv:2404.11999): DPO with the divergence of each response's tokens.

oumi_pl fit --config quickstart/dpo --model tdpo.TDPO --model.alpha 0.5
"""

import torch
import torch.nn.functional as F

from oumi_pl.models.lm import States
from oumi_pl.modules.dpo import DPO


class TDPO(DPO):
    """TDPO2. The reference is in memory, since its whole distributions are needed.

    Args:
        beta: Factor from log-ratios to rewards.
        alpha: Weight of the difference between the divergences of rejected and chosen response.
    """

    def __init__(self, *args, beta: float = 0.1, alpha: float = 0.5, **kwargs):
        super().__init__(*args, reference="online", **kwargs)
        self.beta, self.alpha = beta, alpha

    def loss_sums(self, batch, split):
        policy = self.causal_lm(batch, States.logits).log_softmax(-1)  # [targets, vocab]
        with torch.no_grad():
            reference = self.reference.frozen_model(batch, States.logits).log_softmax(-1)
        logps, ref_logps = (each.gather(1, batch["targets"][:, None])[:, 0] for each in (policy, reference))
        pairs = self.pairs(batch, logps, ref_logps)
        chosen, rejected = pairs.sums((reference.exp() * (reference - policy)).sum(-1))  # KL(reference | policy)
        margins = pairs.chosen_logratios - pairs.rejected_logratios
        losses = -F.logsigmoid(self.beta * (margins - self.alpha * (rejected - chosen.detach())))
        sums = {"loss": losses.sum(), "kl/chosen": chosen.sum(), "kl/rejected": rejected.sum()}
        return self.pair_sums(pairs, losses.detach()) | sums
