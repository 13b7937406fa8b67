"""Logs config, data report and pictures to TensorBoard, Weights & Biases and MLflow."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks import find
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.runs import folders, loggers
from oumi_pl.terminal.text import echo
from oumi_pl.types import RunModule

AT_START = (folders.CONFIG, folders.RECIPE, "data.json")
AT_END = ("curves.png", "report.html")
RESULTS = ("train/loss", "val/loss", "val/nll", "val/mean_token_accuracy", "val/exact_match")
"""Final metrics that TensorBoard shows beside the hyper-parameters."""


class Tracking(L.Callback):
    """Adds loggers once the run folder exists; logs config and data report to them, and at the end the pictures.

    Has to come after the callbacks that write these files. Nothing is logged before the folder exists, so that a
    mistake in the recipe leaves no trace. A resumed run continues the runs of its loggers.

    Args:
        names: Loggers to add to those of the trainer: `tensorboard`, `wandb`, `mlflow`.

    Raises:
        UserError: a logger isn't installed, or no account is logged in.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.added: list[Any] = []
        rank_zero_only(loggers.refuse_unusable)(names)

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Adds the loggers, and logs the config and the files that exist at the start."""
        folder = find(trainer, RunFolder)
        if folder is None or folder.directory is None:
            return
        run = folder.directory
        earlier = folders.read_state(run).get("loggers", {}) if folder.resume else {}
        kept = dict(earlier)
        for name in self.names:
            logger, where = loggers.make(name, run, trainer.global_step, earlier)
            self.added.append(logger)
            kept |= {name: own} if (own := loggers.own_id(logger)) else {}
            echo(f"{name:<11} {where}", file=sys.stderr)  # aligned with the lines of `Start`
        folders.write_state(run, loggers=kept)
        trainer.loggers = [*trainer.loggers, *self.added]
        config, row = yaml.safe_load(folder.config), dict(folder.checkpoint_row or {})
        if step := row.pop("step", None):  # from the checkpoint: a kill may have come before it was logged
            for logger in self.added:
                logger.log_metrics(loggers.not_logged(logger, row, step), step)
        for logger in trainer.loggers:
            loggers.log_config(logger, config, resumed=loggers.own_id(logger) in earlier.values())
        self._log_files(trainer, run, AT_START)

    @rank_zero_only
    def on_fit_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Logs results and pictures: the callbacks that draw them have run by now."""
        self._end(trainer, success=True)

    @rank_zero_only
    def on_exception(self, trainer: Any, pl_module: RunModule, exception: BaseException) -> None:
        """Logs results and pictures of a run that was stopped or failed."""
        self._end(trainer, success=False)

    def _end(self, trainer: Any, success: bool) -> None:
        folder = find(trainer, RunFolder)
        if folder is None or folder.directory is None:
            return
        try:
            logged = trainer.callback_metrics
            metrics = {name: float(logged[name]) for name in RESULTS if name in logged}
            for logger in trainer.loggers:
                loggers.log_results(logger, yaml.safe_load(folder.config), metrics, trainer.global_step)
            self._log_files(trainer, folder.directory, AT_END)
            for logger in self.added:
                loggers.finish(logger, success)
        except Exception as error:  # of a server, for example; the run itself is complete
            echo(f"warning: {', '.join(self.names)} did not get the pictures: {error}", file=sys.stderr)

    def _log_files(self, trainer: Any, run: Path, names: Sequence[str]) -> None:
        for file in (run / name for name in names):
            for logger in trainer.loggers if file.is_file() else ():
                loggers.log_file(logger, file, trainer.global_step)
