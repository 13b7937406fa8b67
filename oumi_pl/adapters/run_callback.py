"""Logs, validates, saves and stops between two updates of an engine, as Lightning does between two of its own."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from oumi_pl.adapters.batches import EngineLoader
from oumi_pl.adapters.checkpoints import set_step
from oumi_pl.adapters.refusals import OBSERVERS
from oumi_pl.callbacks import find
from oumi_pl.callbacks.checkpoint import enabled_checkpoints
from oumi_pl.callbacks.rollouts import Rollouts
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.callbacks.stopping import Preemption, Stopped
from oumi_pl.data.base import TextData
from oumi_pl.errors import UserError
from oumi_pl.modules.base import LanguageModule
from oumi_pl.runs import folders
from oumi_pl.types import Batch, Sums


class ValidationSchedule:
    """Decides after which updates to validate, by the rules of Lightning.

    Args:
        trainer: The Lightning trainer.
        data: The data module of the recipe.
        length: Micro-batches of the first epoch; None if unknown.
        total: Optimizer steps of the run.

    Raises:
        UserError: validation would be due within an update, where engines can't validate.
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
        """Micro-batches between validations; None to validate at the end of an epoch."""
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
        if step >= self.total:  # a run always ends with a validation
            return True
        if self.every is None:
            return is_epoch_end
        return (step * self.accumulate if self.epochs is None else fetched) % self.every == 0


class RunCallback(TrainerCallback):
    """Logs an engine's updates under our names; calls our callbacks, validates and stops when Lightning would.

    Args:
        lightning: The Lightning trainer. Its loops do not run; it has the recipe's settings, callbacks and loggers.
        module: The module of the recipe.
        data: The data module of the recipe.
        loader: The training loader of the engine.
        validations: Decides when to validate.
    """

    def __init__(
        self,
        lightning: Any,
        module: LanguageModule,
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
        self.checkpoints = enabled_checkpoints(lightning)
        self.metrics_row: dict[str, float] = {}
        """The metrics of the last update, and of the validation after it."""
        self._logged: set[str] = set()  # names of the metrics of the last update

    def call(self, hook: str, *args: Any) -> None:
        """Calls a hook of the trainer's callbacks, of those that only observe."""
        for callback in self.lightning.callbacks:
            if isinstance(callback, OBSERVERS):
                getattr(callback, hook)(self.lightning, self.module, *args)

    def log(self, metrics: dict[str, Any]) -> None:
        """Passes metrics to callbacks and loggers, for the step in `metrics`, else the last update."""
        step = int(metrics.get("step", self.lightning.global_step))
        values = {name: float(value) for name, value in metrics.items() if name != "step"}
        if self.metrics_row.get("step") != step:
            self.metrics_row = {"step": step}
        self.metrics_row |= values
        if "step" in metrics:  # a metric that this update lacks must not keep the value of the one before
            for name in self._logged - values.keys():
                self.lightning.callback_metrics.pop(name, None)
            self._logged = {*values}
        self.lightning.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        is_validation = any(name.startswith("val/") for name in values)
        if is_validation or step % max(1, self.lightning.log_every_n_steps) == 0:
            for logger in self.lightning.loggers:
                logger.log_metrics(values, step)

    # ---- an update

    def start(self) -> None:
        """Creates or continues the run folder, and finds its best weights."""
        self.call("on_train_start")
        if self.checkpoints is not None:
            self.checkpoints.on_train_start(self.lightning, self.module)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Applies the recipe's optimizer settings in place of the checkpoint's, and creates the run folder."""
        self.module.on_train_start()
        schedule: Any = self.module.lr_schedulers()
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]  # the engine logs this
        self.start()
        folder = find(self.lightning, RunFolder)
        if folder is not None and folder.directory is not None:
            args.output_dir = str(folder.directory / folders.CHECKPOINTS)
        if self.preemption is not None:
            self.preemption.on_train_start(self.lightning, self.module)
        self.call("on_train_batch_start", None, 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts timing an update whose completions, if it has some, have been sampled."""
        if (rollouts := find(self.lightning, Rollouts)) is not None:
            rollouts.on_train_batch_start(self.lightning, self.module)

    def add_to_update(self, batch: Batch, sums: Sums) -> None:
        """Adds the sums and counts of a micro-batch to those of the update."""
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
        """Logs the update that has just ended: the engine's loss, gradient norm and learning rate, and our sums.

        Raises:
            UserError: the loss or the gradient norm is not finite.
            Stopped: a signal asked the run to stop, and it writes no checkpoints.
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
        """Stops after saving if a signal asked for it.

        Raises:
            Stopped: a signal asked the run to stop.
        """
        if self._is_stopping:
            self._stop(Path(args.output_dir).parent)

    def _set_epoch(self) -> None:
        """Sets the position in the epoch in the Lightning trainer, from which the metric `epoch` is computed."""
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
        """Validates with the module's own steps on all held-out rows, and saves the best weights."""
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
        """Ends a finished run: marks it as `finished`, and exports the model."""
        self.call("on_train_end")
        self.call("on_fit_end")
        for logger in self.lightning.loggers:
            logger.finalize("success")
