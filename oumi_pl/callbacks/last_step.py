"""Validates after the last update of a run, whatever the interval, so that its final metrics are known."""

from typing import Any

import lightning as L

from oumi_pl.types import RunModule


class LastStep(L.Callback):
    """Asks Lightning to stop after the last update; it then validates first, if there is anything to validate on."""

    def __init__(self) -> None:
        self._total = 0

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Notes where the run ends."""
        self._total = pl_module.total_steps()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Stops at the end of the last update."""
        if not trainer.fit_loop._should_accumulate() and trainer.global_step >= self._total:
            trainer.should_stop = True
