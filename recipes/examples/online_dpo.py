"""Online DPO (Guo et al. 2024, arXiv:2402.04792): DPO on the best and the worst completion of each sampled group.

oumi_pl fit --config quickstart/grpo --model online_dpo.OnlineDPO --model.beta 0.5
"""

import torch

from oumi_pl.losses.preference import Sigmoid
from oumi_pl.modules.grpo import GRPO
from oumi_pl.types import Pairs


class OnlineDPO(GRPO):
    """Groups whose completions all got the same reward have no pair, and count as a loss of 0.

    Args:
        beta: Factor from log-ratios to rewards.
    """

    def __init__(self, *args, beta: float = 0.1, **kwargs):
        super().__init__(*args, kl=beta, **kwargs)  # a penalty asks for the reference
        self.of_pairs = Sigmoid(beta)

    def loss_sums(self, batch, split):
        if split != "train":
            return super().loss_sums(batch, split)
        logps = self.causal_lm(batch, lambda states: states.logps(self.data.sampling.temperature))
        ref_logps, members = self.ref_logps(batch), batch["completions"]
        rewards = batch["rewards"].view(-1, members)
        has_pair = (rewards.amax(1) > rewards.amin(1)).nonzero()[:, 0]
        ends = torch.stack([rewards.argmax(1), rewards.argmin(1)], 1)[has_pair] + members * has_pair[:, None]
        side = torch.full((len(batch["rewards"]),), -1, device=logps.device)  # 2 i or 2 i + 1 for those of pair i
        side[ends.flatten()] = torch.arange(ends.numel(), device=logps.device)
        branches = side[batch["target_segments"]]
        kept, margins = branches >= 0, torch.zeros(len(ends), device=logps.device)
        losses = self.of_pairs(Pairs(logps[kept], ref_logps[kept], branches[kept], len(ends), margins))
        # the update divides by all completions
        loss = members * losses.sum() if len(ends) else logps.sum() * 0
        return self.rollout_sums(batch, self.completions(batch, logps)) | {"loss": loss}
