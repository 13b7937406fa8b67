"""Writes `curves.png` and `report.html` at the end of a run, whether finished, stopped or failed."""

import sys
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks import find
from oumi_pl.callbacks.run_folder import RunFolder, completed
from oumi_pl.errors import is_disk_failure
from oumi_pl.runs.metrics import MetricsCSV
from oumi_pl.terminal.text import echo
from oumi_pl.types import RunModule


class Report(L.Callback):
    """Draws the curves of a run and writes its report.

    An error in here is printed and does not fail the run, unless the disk is full or read-only: then the run is not
    finished yet, and a resume writes its report.
    """

    @rank_zero_only
    def on_train_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Reports a finished run, after the export. The run is marked as finished only after its report."""
        if self._write(trainer, "finished"):
            completed(trainer, "report")

    @rank_zero_only
    def on_exception(self, trainer: Any, pl_module: RunModule, exception: BaseException) -> None:
        """Reports a run that was stopped or failed, unless a second Ctrl-C asked to end at once or a disk is full."""
        if not isinstance(exception, KeyboardInterrupt) and not is_disk_failure(exception):
            self._write(trainer)

    def _write(self, trainer: Any, condition: str | None = None) -> bool:
        folder = find(trainer, RunFolder)
        if folder is None or folder.directory is None:
            return False
        try:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.finalize("report")  # the line of the last step is still in memory
            folder.record()
            from oumi_pl.report.page import make

            page = make(folder.directory, condition)
        except Exception as error:
            if condition == "finished" and is_disk_failure(error):
                raise
            retry = f"to try again: oumi_pl runs report {folder.directory}"
            complete = "the run itself is complete; " if condition == "finished" else ""
            echo(f"warning: no report: {type(error).__name__}: {error} ({complete}{retry})", file=sys.stderr)
            return False
        if page is not None:
            echo(f"report -> {page}")
        return True
