"""What callbacks of transformers are given as `args`: its TrainingArguments, filled from Oumi's parameters."""

import dataclasses
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from oumi_pl.core.trainers.honoured import EXTRA

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams

SAME = (
    "output_dir",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "logging_first_step",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "seed",
    "data_seed",
    "run_name",
    "lr_scheduler_kwargs",
    "full_determinism",
    "ddp_find_unused_parameters",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
)
"""Fields that both have by the same name and with the same meaning."""


def callback_arguments(params: "TrainingParams") -> TrainingArguments:
    """A TrainingArguments that tells what this run does.

    It is made without its own `__post_init__`, which would choose a device and start process groups: those are
    Lightning's.
    """
    made: Any = TrainingArguments.__new__(TrainingArguments)
    for field in dataclasses.fields(TrainingArguments):
        factory: Any = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        setattr(made, field.name, None if default is dataclasses.MISSING else default)
    for name in SAME:
        setattr(made, name, getattr(params, name))
    for name, value in (EXTRA | params.trainer_kwargs).items():
        setattr(made, name, value)
    if made.greater_is_better is None and made.metric_for_best_model is not None:
        made.greater_is_better = not made.metric_for_best_model.endswith("loss")
    saves = "steps" if params.save_steps > 0 else "epoch" if params.save_epoch else "no"
    made.save_strategy = SaveStrategy(saves)
    made.eval_strategy = IntervalStrategy(params.eval_strategy)
    silent = params.logging_strategy == "steps" and params.logging_steps <= 0
    made.logging_strategy = IntervalStrategy("no" if silent else params.logging_strategy)
    made.max_grad_norm = params.max_grad_norm or 0.0
    made.gradient_checkpointing = params.enable_gradient_checkpointing
    made.bf16 = params.mixed_precision_dtype.name == "BF16"
    made.fp16 = params.mixed_precision_dtype.name == "FP16"
    made.logging_dir = params.logging_dir
    made.report_to = []
    return made
