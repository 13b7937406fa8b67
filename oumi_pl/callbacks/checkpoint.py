"""Writes checkpoints between two updates, and removes an old one only after the new one is complete."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, Timer, WeightAveraging

from oumi_pl.callbacks import find_all
from oumi_pl.errors import UserError, nearest
from oumi_pl.runs import checksums
from oumi_pl.runs.checkpoints import saved_at
from oumi_pl.runs.files import HALF, put, remove
from oumi_pl.runs.folders import TIME, checkpoint_name, saved_steps
from oumi_pl.runs.metrics import MetricsCSV
from oumi_pl.terminal.screen import working
from oumi_pl.terminal.text import echo
from oumi_pl.types import RunModule


class Checkpoints(Checkpoint):
    """Writes `step-*.ckpt` to resume from, and `best.ckpt` with the best weights so far.

    Args:
        every: Optimizer steps between checkpoints; one is always written at the end.
        keep: How many of the newest to keep.
        monitor: Metric that decides what is best, `val/loss` for example; without it no `best.ckpt` is written.
        mode: Whether lower (`min`) or higher (`max`) values are better.
        enabled: Whether to write checkpoints at all. A run without them can't be resumed.
    """

    def __init__(
        self,
        every: int = 500,
        keep: int = 1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        enabled: bool = True,
    ) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"checkpoint: every ({every}) and keep ({keep}) have to be at least 1")
        if monitor is not None and not enabled:
            raise UserError(f"checkpoint.monitor: without checkpoints the best by {monitor!r} can't be kept; drop one")
        self.enabled = enabled
        self.every = every
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.directory: Path | None = None
        """Where checkpoints are written; set when the run folder exists. None writes none."""
        self.best_score: float | None = None
        self.best_model_path = ""
        """Path of `best.ckpt`; empty if there is none. Not saved in checkpoints, because the folder may be moved."""
        self.validation_due = False
        """Whether the checkpoint to resume from was saved before the validation of its step."""
        self.ending: dict[str, Any] | None = None
        """Total steps of the run and what ended it, if the checkpoint is that of the last update."""
        self._saved_step = -1
        self._due = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the best score of the checkpoint unless its weights are those of `best.ckpt` in this run's folder.

        They are not if the checkpoint is of another run, or if `best.ckpt` was written later than the checkpoint.
        """
        if self.directory is not None and (self.directory / checkpoint_name(trainer.global_step)).exists():
            self._saved_step = trainer.global_step
        best = None if self.directory is None else self.directory / "best.ckpt"
        damage = None
        if best is not None and best.exists():
            damage = trainer.strategy.broadcast(checksums.damage(best) if trainer.is_global_zero else None)
        if damage:
            if trainer.is_global_zero:
                echo(f"note: {best} is damaged ({damage}); the best from here on replaces it", file=sys.stderr)
        elif best is not None and best.exists() and saved_at(best) <= trainer.global_step:
            self.best_model_path = str(best)
        else:
            self.best_score, self.best_model_path = None, ""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves after every n-th update and after the last, never within one: a run can't be resumed from there.

        If validation follows, saves after it. The last update is saved before and after: a run that is killed in its
        last validation repeats only that.
        """
        if trainer.fit_loop._should_accumulate() or (trainer.global_step % self.every and not ends(trainer)):
            return
        self._due = validation_follows(trainer)
        if not self._due or ends(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last step if that has not been done.

        By now Lightning counts an epoch that was cut short as complete, so a longer run can't resume from here exactly:
        `LastStep` makes the save happen earlier, in `on_train_batch_end`.
        """
        self.save(trainer)
        self._remove_old(trainer)  # a kill after the last checkpoint can leave too many

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the weights if the monitored metric is the best so far, and saves if a checkpoint is due."""
        if trainer.sanity_checking or self.directory is None:
            return
        if self.monitor is not None:
            self._keep_best(trainer, self.directory, self.monitor)
        if self._due or ends(trainer):
            self._saved_step = -1  # the checkpoint from before the validation is replaced
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
        """Writes a checkpoint of this step unless there is one, then removes the oldest beyond `keep`.

        The rows of `metrics.csv` up to this step are on disk before the checkpoint.
        """
        step = trainer.global_step
        if self.directory is None or step == self._saved_step:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()
        self._saved_step = step
        # on_train_batch_end runs before the validation of a step, all other hooks that save run after it
        self.validation_due = not trainer.validating and trainer.state.fn == "fit" and validation_follows(trainer)
        self._due = self._due and self.validation_due
        self.ending = None
        if ends(trainer):
            self.ending = {"steps": _total_steps(trainer), "by": ended_by(trainer)}
        _save_whole(trainer, self.directory / checkpoint_name(step))
        self._remove_old(trainer)

    def _remove_old(self, trainer: L.Trainer) -> None:
        if self.directory is not None and trainer.is_global_zero:
            for old in saved_steps(self.directory)[: -self.keep]:
                remove(old)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best score so far, whether a validation is due, and how the run ended."""
        return {"best_score": self.best_score, "validation_due": self.validation_due, "ending": self.ending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self.best_score = state_dict["best_score"]
        self.validation_due = bool(state_dict.get("validation_due"))
        self.ending = state_dict.get("ending")

    def has_ended(self, trainer: L.Trainer) -> bool:
        """Whether the last update is done, by the current length of the run or by how the resumed run had ended.

        A resumed run that had ended is not at its end if its length was raised.
        """
        total = _total_steps(trainer)
        if trainer.global_step >= total:
            return True
        if self.ending is None or total > self.ending["steps"]:
            return False
        return self.ending["by"] is None or ended_by(trainer) is not None


def enabled_checkpoints(trainer: Any) -> Checkpoints | None:
    """The `Checkpoints` of a trainer; None if it has none, or if they are disabled."""
    return next((checkpoints for checkpoints in find_all(trainer, Checkpoints) if checkpoints.enabled), None)


def _total_steps(trainer: Any) -> int:
    """Optimizer steps of the whole run."""
    module: RunModule = trainer.lightning_module
    return module.total_steps()


def ends(trainer: L.Trainer) -> bool:
    """Whether the run ends now. With `min_steps` or `min_epochs`, it may continue after a request to stop."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def ended_by(trainer: Any) -> str | None:
    """Returns `trainer.max_time` if that has run out; None if steps, epochs or a callback end the run."""
    left = [timer.time_remaining() for timer in find_all(trainer, Timer)]
    return TIME if any(seconds is not None and seconds <= 0 for seconds in left) else None


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether a validation follows the update that has just ended."""
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


def _write_checksums(trainer: L.Trainer, folder: Path) -> None:
    """Writes the checksums of a sharded checkpoint, of which each rank reads its share."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    own = checksums.of_files(paths[trainer.global_rank :: trainer.world_size])
    shares: list[Any] = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(shares, own)
    if trainer.is_global_zero:
        checksums.write_list(folder, {name: sums for share in shares for name, sums in share.items()})


def _save_whole(trainer: L.Trainer, path: Path, weights_only: bool = False) -> None:
    """Saves under a temporary name, syncs and renames: a kill may leave half of a sharded checkpoint's directory."""
    half = path.with_name(path.name + HALF)
    with working(f"saving {path.name}"):
        trainer.save_checkpoint(half, weights_only=weights_only)
        trainer.strategy.barrier("checkpoint written")
        if half.is_dir():
            _write_checksums(trainer, half)
    if trainer.is_global_zero:
        put(half, path)
    trainer.strategy.barrier("checkpoint in place")
    if torch.cuda.is_available():  # returns what gathering weights and optimizer state allocated
        torch.cuda.empty_cache()
