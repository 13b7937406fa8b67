"""Sums over a pass through held-out data, exact whatever the batches and ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric


class Sums(nn.Module):
    """Named sums over batches and ranks, in float64: a mean of millions of terms must not depend on their order."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.metrics: Any = nn.ModuleDict({name: SumMetric().set_dtype(torch.float64) for name in names})

    def add(self, sums: dict[str, Tensor]) -> None:
        """Adds a batch."""
        for name, metric in self.metrics.items():
            if metric.sum_value.is_inference() and not torch.is_inference_mode_enabled():
                metric.reset()  # left by `validate`; validation within `fit` may not write to it
            metric.update(sums[name])

    def take(self) -> dict[str, Tensor]:
        """The sums over all batches and ranks; the next pass starts from zero."""
        totals = {name: metric.compute() for name, metric in self.metrics.items()}
        for metric in self.metrics.values():
            metric.reset()
        return totals
