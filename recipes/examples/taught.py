"""A preference loss with a teacher: DPO, and the divergence from a third model on the chosen responses.

oumi_pl fit --config quickstart/dpo --model taught.TaughtDPO --model.teacher FOLDER
"""

from oumi_pl.models.lm import States
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.reference import OtherModel


class TaughtDPO(DPO):
    """DPO of any preference loss, plus `weight` times the divergence KL(teacher | policy) per pair.

    Args:
        teacher: Hub id or directory of a model that reads the same tokens.
        weight: Weight of the divergence.
    """

    def __init__(self, *args, teacher: str, weight: float = 0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = OtherModel(self, teacher)
        self.weight = weight

    def loss_sums(self, batch, split):
        sums = super().loss_sums(batch, split)
        teacher = self.teacher(batch, States.logits).log_softmax(-1)  # [targets, vocab]
        policy = self.causal_lm(batch, States.logits).log_softmax(-1)
        of_tokens = (teacher.exp() * (teacher - policy)).sum(-1)
        divergence = of_tokens[batch["target_segments"] % 2 == 0].sum()  # even segments are chosen responses
        return sums | {"teacher_kl": divergence, "loss": sums["loss"] + self.weight * divergence}
