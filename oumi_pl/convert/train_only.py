"""Trains some parameters alone, chosen by patterns of names or by layer, as axolotl and LLaMA-Factory do."""

import re
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning
from torch.optim import Optimizer

from oumi_pl.errors import UserError

_LAYER = re.compile(r"\.(\d+)\.")


class TrainOnly(BaseFinetuning):
    """Freezes all parameters but those that are named.

    Args:
        patterns: Regular expressions that names of parameters begin with; a point is a point.
        last_layers: Train all of so many of the last layers; negative: of the first ones.
        spread: Train the last layer of each of `last_layers` equal blocks instead: those that LLaMA Pro inserts.
    """

    def __init__(self, patterns: list[str] | None = None, last_layers: int = 0, spread: bool = False) -> None:
        super().__init__()
        self.patterns = [
            re.compile(pattern.replace("\\.", ".").replace(".*", "\0").replace(".", "\\.").replace("\0", ".*"))
            for pattern in patterns or []
        ]
        self.last_layers = last_layers
        self.spread = spread

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        """Freezes what isn't named.

        Raises:
            UserError: no parameter is named.
        """
        model: Any = pl_module.model
        parameters = dict(model.hf.named_parameters())
        trained = self.trained(parameters)
        if not trained:
            raise UserError("trainer.callbacks, TrainOnly: the model has no such parameters")
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)

    def trained(self, names: Iterable[str]) -> set[str]:
        """The names of the parameters that are trained.

        Raises:
            UserError: the layers can't be divided into blocks.
        """
        names = list(names)
        count = 1 + max((int(match[1]) for name in names if (match := _LAYER.search(name))), default=-1)
        layers = range(max(0, count - self.last_layers), count) if self.last_layers > 0 else range(-self.last_layers)
        if self.spread:
            if count % self.last_layers:
                raise UserError(f"trainer.callbacks, TrainOnly: {count} layers are no {self.last_layers} equal blocks")
            stride = count // self.last_layers
            layers = range(stride - 1, count, stride)
        return {
            name
            for name in names
            if any(pattern.match(name) for pattern in self.patterns)
            or ((match := _LAYER.search(name)) is not None and int(match[1]) in layers)
        }

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Nothing is added later."""
