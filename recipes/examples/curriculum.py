"""A curriculum: short rows first. `oumi_pl fit --config quickstart/sft --data curriculum.Curriculum`.

The examples have numbers; `lengths`, `targets` and `examples` describe them. A killed run resumes within the plan.
"""

import numpy as np

from oumi_pl.data.plan import Plan, plan_epoch
from oumi_pl.data.sft import SFTData


class Curriculum(SFTData):
    """Each epoch trains on a larger share of the rows, the shortest first; then on all, shuffled.

    Args:
        stages: Epochs until all rows are trained on.
        args: See `SFTData`.
        kwargs: See `SFTData`.
    """

    def __init__(self, *args, stages: int = 3, **kwargs):
        super().__init__(*args, **kwargs)
        self.stages = stages

    def plan(self, epoch: int) -> Plan:
        if epoch >= self.stages:
            return super().plan(epoch)
        lengths = self.lengths("train")
        ids = np.argsort(lengths, kind="stable")[: -(-len(lengths) * (epoch + 1) // self.stages)]
        rows, seed = self.layout.rows_per_update, self.run_seed
        if self.capacity is not None:  # packs of these rows, in a random order
            return plan_epoch(lengths, ids, rows, seed=seed, epoch=epoch, capacity=self.capacity)
        return Plan(ids, np.arange(len(ids) + 1), rows)
