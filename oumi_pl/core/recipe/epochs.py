"""Checkpoints at the end of each epoch: Oumi's `save_epoch`."""

from typing import Any

import lightning as L

from oumi_pl.callbacks.checkpoint import Checkpoints


class SaveEachEpoch(L.Callback):
    """Sets the steps between checkpoints to those of an epoch, once the data are there and it is known how many.

    The last update of an epoch may be a short one, and counts.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sets them; data without a length have no epochs, and are saved at the end alone."""
        length: Any = trainer.num_training_batches
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints) and length != float("inf"):
                callback.every = max(1, -(-int(length) // trainer.accumulate_grad_batches))
