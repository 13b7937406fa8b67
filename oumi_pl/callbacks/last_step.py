"""The last update of a run is validated, whatever the interval: what the run came to should not be left unsaid."""

from typing import Any

import lightning as L


class LastStep(L.Callback):
    """Tells Lightning to stop when the last update is done, upon which it validates first if there is anything to."""

    def __init__(self) -> None:
        self._total = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Notes where the run ends."""
        self._total = pl_module.total_steps()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stops at the end of the last update."""
        if not trainer.fit_loop._should_accumulate() and trainer.global_step >= self._total:
            trainer.should_stop = True
