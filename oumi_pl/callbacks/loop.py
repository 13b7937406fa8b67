"""Lightning's training loop, with what a resumed run still has to do before its next update or after its last."""

from typing import Any

import torch
from lightning.pytorch.loops.fit_loop import _FitLoop

from oumi_pl.callbacks import find, find_all
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.run_folder import RunFolder


class RunLoop(_FitLoop):
    """Trains as Lightning does.

    Lightning skips all hooks of a run whose checkpoint is at its last update. Here such a run goes on with the first
    phase that is not complete: the last validation, samples, export, report. A checkpoint that was saved before the
    validation of its step is validated first.
    """

    @classmethod
    def replace_in(cls, trainer: Any) -> None:
        """Replaces the loop of a trainer that has not run yet."""
        before = trainer.fit_loop
        loop = cls(trainer, before.min_epochs, before.max_epochs)
        loop.epoch_loop = before.epoch_loop
        trainer.fit_loop = loop

    def run(self) -> None:
        """Trains, or ends a run that is trained already."""
        trainer: Any = self.trainer
        folder, checkpoints = find(trainer, RunFolder), find(trainer, Checkpoints)
        if folder is None or checkpoints is None or not folder.resumes_unfinished():
            return super().run()
        self.setup_data()
        if not checkpoints.has_ended(trainer):
            return super().run()
        trainer.should_stop = True
        metrics = {name: torch.tensor(value) for name, value in folder.checkpoint_metrics.items()}
        trainer._logger_connector._callback_metrics.update(metrics)
        self.on_run_start()
        trainer.lightning_module.restore_generators()  # samples may draw from them
        self.on_run_end()
        return None

    def on_run_start(self) -> None:
        """Starts training; validates first if that is due."""
        super().on_run_start()
        checkpoints = find(self.trainer, Checkpoints)
        if checkpoints is not None and checkpoints.validation_due:
            checkpoints.validation_due = False
            self._validate()

    def _validate(self) -> None:
        trainer: Any = self.trainer
        loop = self.epoch_loop.val_loop
        trainer.lightning_module.restore_generators(keep=True)
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True

    def on_run_end(self) -> None:
        """Saves what is not saved yet, before the run is recorded as trained."""
        for checkpoints in find_all(self.trainer, Checkpoints):
            checkpoints.save(self.trainer)
        super().on_run_end()
