"""Gives a run its folder: rank 0 chooses the name, everything that writes is told, and `run.json` follows the state."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl import __version__, runs
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.preemption import Stopped
from oumi_pl.errors import UserError
from oumi_pl.metrics import MetricsCSV


class RunFolder(L.Callback):
    """Creates or continues `runs/<name>` and keeps `run.json`, `config.yaml` and `data.json` in it.

    Args:
        root: Directory of all runs.
        name: Name of the run; a number is added when it is taken.
        recipe: What the run is found by when it is resumed.
        config: The whole config as YAML.
        resume: Folder of the run to continue.
    """

    def __init__(self, root: Path, name: str, recipe: str, config: str, resume: Path | None = None) -> None:
        self.root = root
        self.name = name
        self.recipe = recipe
        self.config = config
        self.resume = resume
        self.directory: Path | None = None
        self._row: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks whether a folder can be made; it is made when all else stands, so that no mistake leaves one behind."""
        pl_module.run_config = self.config  # type: ignore[assignment]
        if stage in ("fit", "predict") and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            runs.refuse_unwritable(self.resume or self.root)

    def _make(self, trainer: L.Trainer) -> None:
        """Rank 0 makes the folder, the others are told."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        chosen = (self.resume or runs.create(self.root, self.name)) if trainer.is_global_zero else None
        self.directory = Path(trainer.strategy.broadcast(str(chosen)))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.directory = self.directory / runs.CHECKPOINTS

    def _describe(self, trainer: Any, directory: Path) -> None:
        (directory / runs.CONFIG).write_text(self.config)
        (directory / "data.json").write_text(json.dumps(trainer.datamodule.report(), indent=1) + "\n")
        created = {} if self.resume else {"created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "created_ns": time.time_ns()}
        runs.write_state(
            directory,
            recipe=self.recipe,
            status="running",
            command=" ".join(sys.argv),
            pid=os.getpid(),
            oumi_pl=__version__,
            **created,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the folder, says in it what runs, and opens the metrics file where the run stands."""
        self._make(trainer)
        if self.directory is not None and trainer.is_global_zero:
            self._describe(trainer, self.directory)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV) and self.directory is not None and trainer.is_global_zero:
                logger.open(self.directory / "metrics.csv", trainer.global_step, self._row)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the metrics of this step in the checkpoint: a kill may come before they are in the file."""
        kinds = ("train/", "val/", "epoch") if trainer.validating else ("train/", "epoch")
        row = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith(kinds)}
        checkpoint["metrics_row"] = row | {"step": trainer.global_step}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes up the metrics of the checkpoint's step."""
        self._row = checkpoint.get("metrics_row")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the folder."""
        self._make(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says so if there was nothing to train: the checkpoint stands where the run ends, or beyond.

        Raises:
            UserError: if no update was due.
        """
        if self.directory is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise UserError(
                f"nothing is left to train: the run ends at step {trainer.global_step}, where the checkpoint stands; "
                "raise trainer.max_steps or trainer.max_epochs"
            )

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Marks the run as finished."""
        if self.directory is not None:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("train/", "val/"))}
            runs.write_state(self.directory, status="finished", step=trainer.global_step, metrics=metrics)

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Marks the run as stopped or failed, and writes the metrics that are still in memory."""
        with contextlib.suppress(OSError):  # a disk that is full: what went wrong first is what is told
            for logger in trainer.loggers:
                logger.finalize("failed")
        if self.directory is not None:
            stopped = isinstance(exception, Stopped | KeyboardInterrupt)
            with contextlib.suppress(OSError):
                runs.write_state(self.directory, status="stopped" if stopped else "failed", step=trainer.global_step)
