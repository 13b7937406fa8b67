"""Pretraining: the next-token loss on every token, from random weights or from a model that is trained on."""

import math
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from oumi_pl.errors import UserError
from oumi_pl.models.shapes import Shape, scale_residuals, shape_config
from oumi_pl.modules.sft import SFT
from oumi_pl.modules.sums import Sums
from oumi_pl.types import Batch, TokenLoss

SUMS = ("nll", "targets", "bytes")


class Pretrain(SFT):
    """Trains on all tokens; validation tells perplexity and bits per byte, for each source where there are several.

    Args:
        model: Hub id or directory of a pretrained model to train on; leave it out to start from random weights.
        config: `model_type` and values of a config to start from; with `model` or `shape`, values to override.
        shape: A Llama of about so many parameters, to start from random weights.
        loss: Loss per token; `{class_path: CrossEntropy, init_args: {z_loss: 1.0e-4}}` holds the logits down.
        optimizer: Class and arguments; AdamW with rate 3e-4, betas 0.9 and 0.95 and decay 0.1 when left out.
        kwargs: As of `LanguageModule`.
    """

    validation_metrics = (*SFT.validation_metrics, "val/bits_per_byte")

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        *,
        shape: Shape | None = None,
        loss: TokenLoss | None = None,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
        **kwargs: Any,
    ) -> None:
        if shape is not None and model is not None:
            raise UserError("model.shape is for random weights, and model.model names pretrained ones: drop one")
        if shape is not None:
            config = shape_config(shape) | (config or {})
        super().__init__(model, config, loss=loss, optimizer=optimizer, **kwargs)
        self._by_source: nn.ModuleDict = nn.ModuleDict()

    def on_model_built(self) -> None:
        """Scales the residual projections of random weights (see `oumi_pl.models.shapes`)."""
        if self.model_name is None:
            scale_residuals(self.causal_lm.base)

    def _source_names(self, stage: str) -> list[str]:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        split = {"validate": "validation", "test": "test"}[stage]
        return list(data.source_names(split)) if hasattr(data, "source_names") else ["all"]

    def _sums_of(self, stage: str, source: int) -> Sums:
        """Sums of a stage's source. All are made at once: every rank has to hold the same."""
        if f"{stage}-0" not in self._by_source:
            for i, _ in enumerate(self._source_names(stage)):
                self._by_source[f"{stage}-{i}"] = Sums(*SUMS).to(self.device)
        return cast("Sums", self._by_source[f"{stage}-{source}"])

    def _evaluate(self, stage: str, batch: Batch) -> dict[str, Tensor]:
        sums = super()._evaluate(stage, batch)
        size = torch.tensor(float(batch.get("text_bytes", 0)), device=self.device)
        self._sums_of(stage, batch.get("source", 0)).add(sums | {"bytes": size})
        return sums

    def _log_evaluation(self, stage: str, prefix: str) -> None:
        super()._log_evaluation(stage, prefix)
        names = self._source_names(stage)
        sums = [self._sums_of(stage, i).take() for i in range(len(names))]
        metrics: dict[str, Tensor] = {}
        for name, found in [("", _total(sums)), *(zip(names, sums, strict=True) if len(names) > 1 else [])]:
            end = f"/{name}" if name else ""
            if found["bytes"] > 0:
                metrics[f"bits_per_byte{end}"] = found["nll"] / math.log(2) / found["bytes"]
            if name:
                metrics[f"perplexity{end}"] = (found["nll"] / found["targets"].clamp(min=1)).exp()
        self.log_evaluation(prefix, metrics)


def _total(sums: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([found[name] for found in sums]).sum() for name in SUMS}
