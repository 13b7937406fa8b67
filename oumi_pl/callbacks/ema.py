"""Keeps a moving average of the weights."""

import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from oumi_pl.errors import UserError


class EMA(EMAWeightAveraging):
    """Keeps an exponential moving average of the weights, and validates, samples, exports and compares that average.

    `average = decay * average + (1 - decay) * weights` (Polyak and Juditsky 1992). Training updates the weights
    themselves. A `step-*.ckpt` holds both, with the average as its `state_dict`, so that `validate`, `predict` and
    `export` read the weights that the metrics belong to. The average needs a second copy of all weights on the device.

    Args:
        decay: Weight of the old average at each of its updates; the average spans about `1 / (1 - decay)` of them.
        every: Optimizer steps between updates of the average.
        start: Optimizer steps before its first update; until then it equals the initial weights.
    """

    def __init__(self, decay: float = 0.999, every: int = 1, start: int = 0) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay is {decay}, but has to be at least 0 and below 1")
        if every < 1 or start < 0:
            raise UserError(f"EMA: every ({every}) has to be at least 1, and start ({start}) at least 0")
        super().__init__(decay=decay, update_every_n_steps=every, update_starting_at_step=start)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copies the initial weights to the device that trains.

        Raises:
            UserError: the strategy shards the weights.
        """
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError("EMA: sharded weights can't be averaged; train with strategy ddp, or without EMA")
        # by default the average is on the module's device, but the module is moved to its own only later
        self._device = trainer.strategy.root_device
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*overrides the configure_model.*")  # applies to sharded weights only
            super().setup(trainer, pl_module, stage)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the average in place. Lightning would swap it out, but other callbacks use the model in this hook."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swaps the trained weights back in."""
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the average as the checkpoint's `state_dict`, and the trained weights beside it."""
        if self._average_model is not None:
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = self._average_model.module.state_dict()
            checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores both. From a checkpoint of a run without EMA, the average starts at its weights."""
        if self._average_model is None:
            return  # not training: the `state_dict`, which is the average, is loaded as the model
        # not strict: checkpoints leave out frozen weights that can be loaded from their source
        self._average_model.module.load_state_dict(checkpoint["state_dict"], strict=False)
        if "current_model_state" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=False)
            self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
