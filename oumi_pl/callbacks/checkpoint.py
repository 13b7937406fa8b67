"""Writes checkpoints between two updates, and removes an old one only after the new one is complete."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging

from oumi_pl.callbacks import find_all
from oumi_pl.errors import UserError, nearest
from oumi_pl.runs.folders import HALF, checkpoint_name, remove, saved_steps
from oumi_pl.terminal.screen import working


class Checkpoints(Checkpoint):
    """Writes `step-*.ckpt` to resume from, and `best.ckpt` with the best weights so far.

    Args:
        every: Optimizer steps between checkpoints; one is always written at the end.
        keep: How many of the newest to keep.
        monitor: Metric that decides what is best, `val/loss` for example; without it no `best.ckpt` is written.
        mode: Whether lower (`min`) or higher (`max`) values are better.
    """

    def __init__(
        self, every: int = 500, keep: int = 1, monitor: str | None = None, mode: Literal["min", "max"] = "min"
    ) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"checkpoint: every ({every}) and keep ({keep}) have to be at least 1")
        self.every = every
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.directory: Path | None = None
        self.best_score: float | None = None
        self.best_model_path = ""
        self._saved_step = -1
        self._due = False

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves after every n-th update and after the last, never within one: a run can't be resumed from there.

        If validation follows, saves after it: a resumed run would not repeat it, and its metrics would be lost.
        """
        if trainer.fit_loop._should_accumulate() or (trainer.global_step % self.every and not trainer.should_stop):
            return
        if _validation_follows(trainer):
            self._due = True
        else:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last step if that has not been done.

        By now Lightning counts an epoch that was cut short as complete, so a longer run can't resume from here exactly:
        `LastStep` makes the save happen earlier, in `on_train_batch_end`.
        """
        self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the weights if the monitored metric is the best so far, and saves if a checkpoint is due."""
        if trainer.sanity_checking or self.directory is None:
            return
        if self.monitor is not None:
            self._keep_best(trainer, self.directory, self.monitor)
        if self._due or trainer.should_stop:
            self.save(trainer)

    def _keep_best(self, trainer: L.Trainer, directory: Path, monitor: str) -> None:
        if monitor not in trainer.callback_metrics:
            hint = nearest(monitor, trainer.callback_metrics)
            raise UserError(f"checkpoint.monitor: unknown metric {monitor!r}{hint}")
        score = float(trainer.callback_metrics[monitor])
        if self.best_score is None or (score < self.best_score if self.mode == "min" else score > self.best_score):
            self.best_score = score
            self.best_model_path = str(directory / "best.ckpt")
            with _validated_weights(trainer):
                _save_whole(trainer, Path(self.best_model_path), weights_only=True)

    def save(self, trainer: L.Trainer) -> None:
        """Writes a checkpoint of this step unless there is one, then removes the oldest beyond `keep`."""
        step = trainer.global_step
        if self.directory is None or step == self._saved_step:
            return
        self._saved_step = step
        self._due = False
        _save_whole(trainer, self.directory / checkpoint_name(step))
        if trainer.is_global_zero:
            for old in saved_steps(self.directory)[: -self.keep]:
                remove(old)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best_score": self.best_score, "best_model_path": self.best_model_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best score so far."""
        self.best_score = state_dict["best_score"]
        self.best_model_path = state_dict["best_model_path"]


def _validation_follows(trainer: L.Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or not sum(trainer.num_val_batches):  # Lightning may say yes without held-out rows
        return False
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


@contextmanager
def _validated_weights(trainer: L.Trainer) -> Iterator[None]:
    """Swaps in the averaged weights, if any: Lightning leaves them out of `weights_only` checkpoints."""
    averages = find_all(trainer, WeightAveraging)
    for average in averages:
        average._swap_models(trainer.lightning_module)
    try:
        yield
    finally:
        for average in averages:
            average._swap_models(trainer.lightning_module)


def _save_whole(trainer: L.Trainer, path: Path, weights_only: bool = False) -> None:
    """Saves under a temporary name, then renames: a kill may leave half of a sharded checkpoint's directory."""
    half = path.with_name(path.name + HALF)
    with working(f"saving {path.name}"):
        trainer.save_checkpoint(half, weights_only=weights_only)
        trainer.strategy.barrier("checkpoint written")
    if trainer.is_global_zero:
        if path.exists():
            remove(path)
        half.replace(path)
    trainer.strategy.barrier("checkpoint in place")
    if torch.cuda.is_available():  # returns what gathering weights and optimizer state allocated
        torch.cuda.empty_cache()
