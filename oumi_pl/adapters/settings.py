"""The engine's arguments and when it validates, from the Lightning trainer, the module and the data."""

import os
from typing import Any

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.data.base import TextData
from oumi_pl.errors import UserError
from oumi_pl.modules.base import LanguageModule


def find(trainer: Any, kind: type) -> Any:
    """The trainer's callback of a kind; None without."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


def training_arguments(
    trainer: Any, module: LanguageModule, data: TextData, *, folder: str, total: int, lr: float
) -> dict[str, Any]:
    """Fields of `transformers.TrainingArguments`, and of the subclasses of it in TRL.

    Betas, decay and the schedule are not among them: the engine gets optimizer and schedule themselves.

    Args:
        trainer: Lightning's, which has the recipe's settings.
        module: The recipe's.
        data: The recipe's.
        folder: Where the engine writes its checkpoints.
        total: Optimizer steps of the run.
        lr: The highest learning rate of the first parameter group.
    """
    checkpoints: Checkpoints | None = find(trainer, Checkpoints)
    precision = str(trainer.precision)
    saving: dict[str, Any] = {"save_strategy": "no"}
    if checkpoints is not None:
        saving = {"save_strategy": "steps", "save_steps": checkpoints.every, "save_total_limit": checkpoints.keep}
    return saving | {
        "output_dir": folder,
        "per_device_train_batch_size": data.batch_size,
        "per_device_eval_batch_size": data.eval_batch_size,
        "gradient_accumulation_steps": trainer.accumulate_grad_batches,
        "max_steps": total,
        "learning_rate": lr,
        "max_grad_norm": float(trainer.gradient_clip_val or 0.0),
        "bf16": precision == "bf16-mixed",
        "fp16": precision == "16-mixed",
        "gradient_checkpointing": module.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if module.gradient_checkpointing else None,
        "seed": int(os.environ.get("PL_GLOBAL_SEED", "42")),
        "dataloader_num_workers": data.workers,
        "use_cpu": trainer.strategy.root_device.type == "cpu",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would log the mean so far in place of a loss that is not a number
        "ignore_data_skip": True,  # our loader begins at the position of the checkpoint
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


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
