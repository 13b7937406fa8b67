"""The engine's arguments, read off the Lightning trainer, the module and the data."""

import os
from pathlib import Path
from typing import Any

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.errors import UserError


def find(trainer: Any, kind: type) -> Any:
    """The trainer's callback of a kind; None without."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


def arguments(trainer: Any, module: Any, data: Any, *, output_dir: Path, total: int, lr: float) -> dict[str, Any]:
    """Fields of `transformers.TrainingArguments`, and of those that TRL makes of it.

    Betas, decay and the schedule have no place here that would hold all of ours: the engine gets optimizer and
    schedule themselves.

    Args:
        trainer: Lightning's, which knows what the recipe says.
        module: The recipe's.
        data: The recipe's.
        output_dir: Where the engine writes its checkpoints.
        total: Optimizer steps of the run.
        lr: The highest learning rate of the first parameter group.
    """
    checkpoints: Checkpoints | None = find(trainer, Checkpoints)
    precision = str(trainer.precision)
    saving: dict[str, Any] = {"save_strategy": "no"}
    if checkpoints is not None:
        saving = {"save_strategy": "steps", "save_steps": checkpoints.every, "save_total_limit": checkpoints.keep}
    return saving | {
        "output_dir": str(output_dir),
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
        "logging_nan_inf_filter": False,  # it would show the mean of before in place of what is not a number
        "ignore_data_skip": True,  # our loader begins where the checkpoint stands
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


class Validations:
    """After which updates the recipe validates, as Lightning counts.

    Args:
        trainer: Lightning's.
        data: The recipe's.
        length: Micro-batches of the first epoch; None if that isn't known.
        total: Optimizer steps of the run.

    Raises:
        UserError: validation would fall between two micro-batches of an update, where engines can't stop.
    """

    def __init__(self, trainer: Any, data: Any, length: int | None, total: int) -> None:
        self.accumulate = trainer.accumulate_grad_batches
        self.total = total
        self.epochs: int | None = trainer.check_val_every_n_epoch
        self.enabled = data.sources["validation"] is not None
        interval = trainer.val_check_interval
        if isinstance(interval, float) and interval != 1.0 and length is not None:
            interval = max(1, int(length * interval))
        # None: at the end of an epoch
        self.every: int | None = None if isinstance(interval, float) else interval
        if self.enabled and isinstance(interval, float) and interval != 1.0:
            raise UserError(
                f"trainer.val_check_interval: {interval} of an epoch whose length isn't known; set val_every instead"
            )
        if self.enabled and self.every is not None and self.every % self.accumulate:
            raise UserError(
                f"trainer.val_check_interval: {self.every} micro-batches end within an update of {self.accumulate}, "
                "where this engine can't validate; set val_every instead, in optimizer steps"
            )

    def due(self, step: int, epoch: int, handed: int, is_epoch_end: bool) -> bool:
        """Whether to validate once `step` updates are done, `handed` micro-batches of `epoch` lying behind."""
        if not self.enabled or (self.epochs is not None and (epoch + 1) % self.epochs):
            return False
        if step >= self.total:  # what the run came to should not be left unsaid
            return True
        if self.every is None:
            return is_epoch_end
        return (step * self.accumulate if self.epochs is None else handed) % self.every == 0
