"""TensorBoard, Weights & Biases, MLflow: what a run tells them beside its metrics."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.runs import folders, loggers

AT_START = (folders.CONFIG, folders.RECIPE, "data.json")
AT_END = ("curves.png", "report.html")
RESULTS = ("train/loss", "val/loss", "val/nll", "val/mean_token_accuracy", "val/exact_match")
"""Metrics that runs are compared by."""


class Tracking(L.Callback):
    """Adds loggers once the run has its folder; gives all of them config and data report, at the end the pictures.

    Comes after the callbacks that make these. Before the folder is made nothing is written, so that a mistake leaves
    nothing behind. A resumed run goes on in the same place.

    Args:
        names: Loggers to add to those of the trainer: `tensorboard`, `wandb`, `mlflow`.

    Raises:
        UserError: one isn't installed, or nobody is logged in.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.added: list[Any] = []
        _refuse_unusable(names)

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Adds the loggers, and gives them what is known."""
        folder = _folder(trainer)
        if folder is None or folder.directory is None:
            return
        run = folder.directory
        earlier = folders.read_state(run).get("loggers", {}) if folder.resume else {}
        kept = dict(earlier)
        for name in self.names:
            logger, where = loggers.make(name, run, trainer.global_step, earlier)
            self.added.append(logger)
            kept |= {name: own} if (own := loggers.own_id(logger)) else {}
            print(f"{name:<11} {where}", file=sys.stderr)  # under the lines of `Start`
        folders.write_state(run, loggers=kept)
        trainer.loggers = [*trainer.loggers, *self.added]
        config, row = yaml.safe_load(folder.config), dict(folder._row or {})
        if step := row.pop("step", None):  # of a checkpoint: the run may have been stopped before it was logged
            for logger in self.added:
                logger.log_metrics(loggers.not_logged(logger, row, step), step)
        for logger in trainer.loggers:
            loggers.log_config(logger, config, resumed=loggers.own_id(logger) in earlier.values())
        self._log_files(trainer, run, AT_START)

    @rank_zero_only
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Gives them the pictures, which are there now."""
        self._end(trainer, success=True)

    @rank_zero_only
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same for a run that was stopped or failed."""
        self._end(trainer, success=False)

    def _end(self, trainer: Any, success: bool) -> None:
        folder = _folder(trainer)
        if folder is None or folder.directory is None:
            return
        try:
            found = trainer.callback_metrics
            metrics = {name: float(found[name]) for name in RESULTS if name in found}
            for logger in trainer.loggers:
                loggers.log_results(logger, yaml.safe_load(folder.config), metrics, trainer.global_step)
            self._log_files(trainer, folder.directory, AT_END)
            for logger in self.added:
                loggers.finish(logger, success)
        except Exception as error:  # of a server; the run itself is whole
            print(f"warning: {', '.join(self.names)} did not get the pictures: {error}", file=sys.stderr)

    def _log_files(self, trainer: Any, run: Path, names: Sequence[str]) -> None:
        for file in (run / name for name in names):
            for logger in trainer.loggers if file.is_file() else ():
                loggers.log_file(logger, file, trainer.global_step)


@rank_zero_only
def _refuse_unusable(names: Sequence[str]) -> None:
    loggers.refuse_unusable(names)


def _folder(trainer: Any) -> RunFolder | None:
    return next((c for c in trainer.callbacks if isinstance(c, RunFolder)), None)
