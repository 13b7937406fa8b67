"""A fit loop with which a resumed run also completes a missed validation and the phases after training."""

from typing import Any

from lightning.pytorch.loops.fit_loop import _FitLoop

from oumi_pl.callbacks import find, find_all
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.run_folder import RunFolder


class RunLoop(_FitLoop):
    """A fit loop that completes resumed runs.

    If the checkpoint is at the last update, Lightning skips all hooks. This loop runs the phases that are not complete:
    the last validation, samples, export, report. If the checkpoint was saved before the validation of its step, that
    validation runs first.
    """

    @classmethod
    def replace_in(cls, trainer: Any) -> None:
        """Replaces the fit loop of a trainer that has not run yet."""
        original = trainer.fit_loop
        loop = cls(trainer, original.min_epochs, original.max_epochs)
        loop.epoch_loop = original.epoch_loop
        trainer.fit_loop = loop

    def run(self) -> None:
        """Trains, or only completes a run whose training is complete."""
        trainer: Any = self.trainer
        folder, checkpoints = find(trainer, RunFolder), find(trainer, Checkpoints)
        if folder is None or checkpoints is None or not folder.resumes_unfinished():
            return super().run()
        self.setup_data()
        if not checkpoints.has_ended(trainer):
            return super().run()
        trainer.should_stop = True
        self.on_run_start()
        trainer.lightning_module.restore_generators()  # samples may draw from them
        self.on_run_end()
        return None

    def on_run_start(self) -> None:
        """Calls the start hooks; then validates if the checkpoint was saved before its validation."""
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
        """Saves the last checkpoint before the hooks record training as complete."""
        for checkpoints in find_all(self.trainer, Checkpoints):
            checkpoints.save(self.trainer)
        super().on_run_end()
