"""Makes `curves.png` and `report.html` when a run ends: finished, stopped or failed."""

import sys
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.runs.metrics import MetricsCSV


class Report(L.Callback):
    """Draws the run's curves and writes its page. What goes wrong there is told, and does not end the run otherwise."""

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports on a finished run, after the export."""
        self._make(trainer)

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Reports on a run that was stopped or failed. Who presses Ctrl-C twice does not want to wait for it."""
        if not isinstance(exception, KeyboardInterrupt):
            self._make(trainer)

    def _make(self, trainer: Any) -> None:
        folder = next((c for c in trainer.callbacks if isinstance(c, RunFolder)), None)
        if folder is None or folder.directory is None:
            return
        try:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.finalize("report")  # the last step's line is still open
            folder.note()
            from oumi_pl.report.page import make

            made = make(folder.directory)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            again = f"oumi_pl runs report {folder.directory}"
            print(f"warning: no report: {what} (the run itself is whole; to try again: {again})", file=sys.stderr)
            return
        if made is not None:
            print(f"report -> {made}")
