"""What happens between two updates of an engine, as between two of Lightning's: metrics, validation, checkpoints."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from oumi_pl.adapters.batches import EngineLoader
from oumi_pl.adapters.checkpoints import set_step
from oumi_pl.adapters.refusals import OBSERVERS
from oumi_pl.callbacks import find
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.callbacks.stopping import Preemption, Stopped
from oumi_pl.data.base import TextData
from oumi_pl.errors import UserError
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.sft import SFT
from oumi_pl.runs import folders
from oumi_pl.types import Batch, Sums


class ValidationSchedule:
    """After which updates the recipe validates, as Lightning counts.

    Args:
        trainer: Lightning's.
        data: The recipe's.
        length: Micro-batches of the first epoch; None if that isn't known.
        total: Optimizer steps of the run.

    Raises:
        UserError: validation would fall between two micro-batches of an update, where engines can't stop.
    """

    def __init__(self, trainer: Any, data: TextData, length: int | None, total: int) -> None:
        self.accumulate = trainer.accumulate_grad_batches
        self.total = total
        self.epochs: int | None = trainer.check_val_every_n_epoch
        self.enabled = data.sources["validation"] is not None
        interval = trainer.val_check_interval
        if isinstance(interval, float) and interval != 1.0 and length is not None:
            interval = max(1, int(length * interval))
        self.every: int | None = None if isinstance(interval, float) else interval
        """Micro-batches between validations; None: at the end of an epoch."""
        if self.enabled and isinstance(interval, float) and interval != 1.0:
            raise UserError(
                f"trainer.val_check_interval: {interval} of an epoch whose length isn't known; set val_every instead"
            )
        if self.enabled and self.every is not None and self.every % self.accumulate:
            raise UserError(
                f"trainer.val_check_interval: {self.every} micro-batches end within an update of {self.accumulate}, "
                "where this engine can't validate; set val_every instead, in optimizer steps"
            )

    def is_due(self, step: int, epoch: int, fetched: int, is_epoch_end: bool) -> bool:
        """Whether to validate after `step` updates of the run, and after `fetched` micro-batches of `epoch`."""
        if not self.enabled or (self.epochs is not None and (epoch + 1) % self.epochs):
            return False
        if step >= self.total:  # the end of a run is always validated
            return True
        if self.every is None:
            return is_epoch_end
        return (step * self.accumulate if self.epochs is None else fetched) % self.every == 0


class RunCallback(TrainerCallback):
    """Logs an engine's updates under our names; calls our callbacks, validates and stops where Lightning would.

    Args:
        lightning: The Lightning trainer, which runs nothing here, but has the recipe's settings, callbacks and loggers.
        module: The recipe's.
        data: The recipe's.
        loader: What the engine trains on.
        validations: After which updates to validate.
    """

    def __init__(
        self,
        lightning: Any,
        module: SFT | DPO,
        data: TextData,
        loader: EngineLoader,
        validations: ValidationSchedule,
    ) -> None:
        self.lightning = lightning
        self.module = module
        self.data = data
        self.loader = loader
        self.validations = validations
        self.preemption = find(lightning, Preemption)
        self.checkpoints = find(lightning, Checkpoints)
        self.metrics_row: dict[str, float] = {}
        """The metrics of the last update, and of the validation that followed."""

    def call(self, hook: str, *args: Any) -> None:
        """Calls a hook of those callbacks of the Lightning trainer that only observe."""
        for callback in self.lightning.callbacks:
            if isinstance(callback, OBSERVERS):
                getattr(callback, hook)(self.lightning, self.module, *args)

    def log(self, metrics: dict[str, Any]) -> None:
        """Passes metrics to callbacks and loggers, as of `step` where they name it, else of the last update."""
        step = int(metrics.get("step", self.lightning.global_step))
        values = {name: float(value) for name, value in metrics.items() if name != "step"}
        if self.metrics_row.get("step") != step:
            self.metrics_row = {"step": step}
        self.metrics_row |= values
        self.lightning.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        is_validation = any(name.startswith("val/") for name in values)
        if is_validation or step % max(1, self.lightning.log_every_n_steps) == 0:
            for logger in self.lightning.loggers:
                logger.log_metrics(values, step)

    # ---- an update

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets the recipe's optimizer settings win over those of a checkpoint, and begins the run folder."""
        self.module.on_train_start()
        schedule: Any = self.module.lr_schedulers()
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]  # what the engine logs
        self.call("on_train_start")
        folder = find(self.lightning, RunFolder)
        if folder is not None and folder.directory is not None:
            args.output_dir = str(folder.directory / folders.CHECKPOINTS)
        if self.preemption is not None:
            self.preemption.on_train_start(self.lightning, self.module)
        self.call("on_train_batch_start", None, 0)

    def add_to_update(self, batch: Batch, sums: Sums) -> None:
        """Adds a micro-batch's sums and counts to those of the update."""
        counts = {name: torch.tensor(value) for name, value in self.module.count(batch).items()}
        self.module.add_to_update(sums | counts)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decides whether to validate, and to save before a requested stop."""
        loader = self.loader
        control.should_evaluate = self.validations.is_due(
            state.global_step, loader.epoch, loader.fetched, loader.is_epoch_end
        )
        if self._is_stopping and self.checkpoints is not None:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Logs the update that has just ended: the engine's loss, norm and rate, and the sums over its micro-batches.

        Raises:
            UserError: the loss or the norm is not a finite number.
            Stopped: a signal asked for it, and the run writes no checkpoints.
        """
        if "loss" not in logs:  # the engine's summary at the end
            return
        self._set_epoch()
        self.module.finish_update(torch.tensor(logs["grad_norm"]), logs["learning_rate"], loss=logs["loss"])
        set_step(self.lightning, state.global_step)
        self.call("on_train_batch_end", None, None, state.global_step - 1)
        if self._is_stopping and self.checkpoints is None:
            self._stop(None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops, now that this step is saved, if a signal asked for it.

        Raises:
            Stopped: it did.
        """
        if self._is_stopping:
            self._stop(Path(args.output_dir).parent)

    def _set_epoch(self) -> None:
        """Shows the Lightning trainer how far the epoch is: the metric `epoch` is computed from it."""
        loop, loader = self.lightning.fit_loop, self.loader
        loop.max_batches = loader.epoch_length or float("inf")
        loop.epoch_progress.current.completed = loader.epoch
        loop.epoch_loop.batch_progress.current.ready = loader.fetched
        loop.epoch_loop.batch_progress.is_last_batch = loader.is_epoch_end

    @property
    def _is_stopping(self) -> bool:
        return self.preemption is not None and bool(self.preemption.signum)

    def _stop(self, run: Path | None) -> None:
        assert self.preemption is not None
        raise Stopped(self.preemption.signum, self.lightning.global_step, run)

    # ---- validation and the end

    def validate(self) -> dict[str, float]:
        """Validates by the module's own sums over all held-out rows, and keeps the best weights."""
        module, lightning = self.module, self.lightning
        module.eval()
        with torch.no_grad():
            self.call("on_validation_start")
            module.on_validation_start()
            for i, batch in enumerate(self.data.val_dataloader()):
                module.validation_step(lightning.strategy.batch_to_device(batch), i)
                self.call("on_validation_batch_end", None, batch, i)
            self.call("on_validation_epoch_end")
            module.on_validation_epoch_end()
        self.call("on_validation_end")
        if self.checkpoints is not None:
            self.checkpoints.on_validation_end(lightning, module)
        module.train()
        return {name: value for name, value in self.metrics_row.items() if name.startswith("val/")}

    def finish(self) -> None:
        """Ends a run that was trained to its end: it is `finished`, and exported."""
        self.call("on_train_end")
        self.call("on_fit_end")
        for logger in self.lightning.loggers:
            logger.finalize("success")
