"""Pretraining: the next-token loss on every token, from random or pretrained weights."""

import math
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from oumi_pl.errors import UserError
from oumi_pl.models.shapes import Shape, scale_residuals, shape_config
from oumi_pl.modules.base import ModelName
from oumi_pl.modules.sft import SFT
from oumi_pl.modules.update import Split
from oumi_pl.types import Batch, Sums

OF_SOURCE = "source {}: "
"""Prefix of the names of sums over one held-out source."""


class Pretrain(SFT):
    """Trains on all tokens; validation logs perplexity and bits per byte, for each source where there are several.

    Args:
        model: Hub id or directory of a pretrained model to train on; leave it out to start from random weights.
        config: `model_type` and values of a config to start from; with `model` or `shape`, values to override.
        shape: Number of parameters of a Llama that starts from random weights.
        optimizer: Class and arguments; AdamW with rate 3e-4, betas 0.9 and 0.95 and decay 0.1 when left out.
        kwargs: See `SFT`.
    """

    validation_metrics = (*SFT.validation_metrics, "val/bits_per_byte")

    def __init__(
        self,
        model: ModelName | None = None,
        config: dict[str, Any] | None = None,
        *,
        shape: Shape | None = None,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
        **kwargs: Any,
    ) -> None:
        if shape is not None and model is not None:
            raise UserError("model.shape starts from random weights, and model.model from pretrained ones: remove one")
        if shape is not None:
            config = shape_config(shape) | (config or {})
        super().__init__(model, config, optimizer=optimizer, **kwargs)

    def on_model_built(self) -> None:
        """Scales the residual projections of random weights (see `oumi_pl.models.shapes`)."""
        super().on_model_built()
        if self.model_name is None and self.model_object is None:
            scale_residuals(self.causal_lm.base)

    def loss_sums(self, batch: Batch, split: Split) -> Sums:
        """The sums of `SFT`; in evaluation also `nll`, targets and bytes of text for each source."""
        sums = super().loss_sums(batch, split)
        if split == "train":
            return sums
        of = OF_SOURCE.format(batch.get("source", 0))
        counts = {"targets": float(len(batch["targets"])), "bytes": float(batch.get("text_bytes", 0))}
        return (
            sums
            | {of + "nll": sums["nll"]}
            | {of + name: torch.tensor(value, device=self.device) for name, value in counts.items()}
        )

    def metrics(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """The metrics of `SFT`, with bits per byte; with several sources, also perplexity and bits per byte of each."""
        metrics = super().metrics({name: value for name, value in sums.items() if ": " not in name}, split)
        if split == "train":
            return metrics
        names = ["all"] if self.data is None else self.data.source_names(split)
        of_sources = [
            {name: sums.get(OF_SOURCE.format(i) + name, torch.zeros(())) for name in ("nll", "targets", "bytes")}
            for i in range(len(names))
        ]
        total = {name: torch.stack([s[name].cpu() for s in of_sources]).sum() for name in of_sources[0]}
        for end, source in [("", total), *((f"/{n}", s) for n, s in zip(names, of_sources, strict=True) if names[1:])]:
            if source["bytes"] > 0:
                metrics[f"bits_per_byte{end}"] = source["nll"] / math.log(2) / source["bytes"]
            if end:
                metrics[f"perplexity{end}"] = (source["nll"] / source["targets"].clamp(min=1)).exp()
        return metrics
