"""Oumi's training parameters as the arguments of transformers' and TRL's trainers."""

import dataclasses
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from oumi_pl.core.configs.params.base_params import default_of
from oumi_pl.core.trainers.data import number_of_workers
from oumi_pl.core.trainers.honoured import EXTRA
from oumi_pl.core.trainers.loggers import trackers
from oumi_pl.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from oumi_pl.core.configs import TrainerType, TrainingParams

CLASSES = {
    "HF": {"trainer": ("transformers", "Trainer"), "arguments": ("transformers", "TrainingArguments")},
    "TRL_SFT": {"trainer": ("trl", "SFTTrainer"), "arguments": ("trl", "SFTConfig")},
    "TRL_DPO": {"trainer": ("trl", "DPOTrainer"), "arguments": ("trl", "DPOConfig")},
    "TRL_KTO": {"trainer": ("trl", "KTOTrainer"), "arguments": ("trl", "KTOConfig")},
    "TRL_GRPO": {"trainer": ("trl", "GRPOTrainer"), "arguments": ("trl", "GRPOConfig")},
    "TRL_GKD": {"trainer": ("trl.experimental.gkd", "GKDTrainer"), "arguments": ("trl.experimental.gkd", "GKDConfig")},
}
"""Trainer type -> library and name of its classes."""
SAME = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "eval_strategy", "eval_steps", "logging_first_step", "run_name", "learning_rate",
    "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed", "data_seed",
    "full_determinism",
)  # fmt: skip
"""Fields that are arguments of the same name and meaning."""


def to_hf(params: "TrainingParams", trainer_type: "TrainerType | None" = None) -> "TrainingArguments":
    """The arguments of the trainer that a type names: TrainingArguments, or a config of TRL.

    TRL's own defaults never apply to what Oumi has a field for: the learning rate of DPO is 5e-5 unless it is set.

    Args:
        params: Oumi's parameters.
        trainer_type: HF, TRL_SFT, TRL_DPO, TRL_KTO, TRL_GKD or TRL_GRPO; that of the parameters if left out.

    Raises:
        UserError: for `trainer_kwargs` that a field sets already or that the class does not have, and for parameters
            that have no effect there.
    """
    kind = trainer_type or params.trainer_type
    cls = class_of(kind.name, "arguments")
    if params.metrics_function:
        raise UserError("training.metrics_function: there is no registry; give compute_metrics to the trainer instead")
    _refuse_unknown_names(params)
    passed = _arguments(params) | {"report_to": trackers(params)}
    passed |= _sections(params).get(kind.name, {})
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in params.trainer_kwargs:
        if name in passed:
            raise UserError(f"training.trainer_kwargs: {name} is set by a field of training already")
        if name not in known:
            raise UserError(f"training.trainer_kwargs: {cls.__name__} has no {name!r}{nearest(name, known)}")
    try:
        return cls(**passed, **params.trainer_kwargs)
    except ValueError as error:
        raise UserError(f"training: {error}") from error


def callback_arguments(params: "TrainingParams") -> "TrainingArguments":
    """What callbacks of transformers are given as `args`: a TrainingArguments with what a native run does.

    It is built without its own `__post_init__`, which would choose a device and start process groups: those are
    Lightning's.
    """
    from transformers import TrainingArguments
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    arguments: Any = TrainingArguments.__new__(TrainingArguments)
    for field in dataclasses.fields(TrainingArguments):
        default = default_of(field)
        setattr(arguments, field.name, None if default is dataclasses.MISSING else default)
    values = _arguments(params) | EXTRA | params.trainer_kwargs | {"logging_dir": params.logging_dir, "report_to": []}
    metric = values["metric_for_best_model"]
    if values["greater_is_better"] is None and metric is not None:
        values["greater_is_better"] = not metric.endswith("loss")
    for name, value in values.items():
        setattr(arguments, name, value)
    arguments.save_strategy = SaveStrategy(arguments.save_strategy)
    arguments.eval_strategy = IntervalStrategy(arguments.eval_strategy)
    arguments.logging_strategy = IntervalStrategy(arguments.logging_strategy)
    return arguments


def class_of(kind: str, what: Literal["trainer", "arguments"]) -> Any:
    """The class of a trainer, or of its arguments, by the name of the trainer type."""
    library, name = CLASSES[kind][what]
    return getattr(import_module(library), name)


def _refuse_unknown_names(params: "TrainingParams") -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for field, names in (("optimizer", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        value, known = getattr(params, field), [str(name.value) for name in names]
        if value not in known:
            raise UserError(f"training.{field}: transformers has no {value!r}{nearest(value, known)}")


def _sections(params: "TrainingParams") -> dict[str, dict[str, Any]]:
    """Trainer type -> the arguments that its section sets."""
    return {"TRL_GKD": params.gkd.to_hf_trainer_kwargs(), "TRL_GRPO": params.grpo.to_hf_trainer_kwargs()}


def _arguments(params: "TrainingParams") -> dict[str, Any]:
    exact, workers = params.use_deterministic, number_of_workers(params.dataloader_num_workers)
    silent = params.logging_strategy == "steps" and params.logging_steps <= 0
    # a float of 1 or more would be read as a number of steps
    ratio = min(params.warmup_ratio or 0.0, 1 - 1e-9)
    accelerator = {"split_batches": False, "even_batches": True, "use_seedable_sampler": True}
    dispatches = False if exact else params.dataloader_main_process_only
    passed = {name: getattr(params, name) for name in SAME} | {
        "save_strategy": "steps" if params.save_steps > 0 else "epoch" if params.save_epoch else "no",
        "save_steps": params.save_steps or 500,
        "logging_strategy": "no" if silent else params.logging_strategy,
        "logging_steps": params.logging_steps or 500,
        "logging_nan_inf_filter": True,
        "log_level": params.dep_log_level,
        "push_to_hub": False,
        "include_num_input_tokens_seen": params.include_performance_metrics,
        "optim": params.optimizer,
        "lr_scheduler_kwargs": dict(params.lr_scheduler_kwargs),
        "warmup_steps": params.warmup_steps if params.warmup_steps is not None else ratio,
        "max_grad_norm": params.max_grad_norm or 0.0,
        "gradient_checkpointing": params.enable_gradient_checkpointing and not exact,
        "gradient_checkpointing_kwargs": dict(params.gradient_checkpointing_kwargs) or None,
        "fp16": params.mixed_precision_dtype.name == "FP16",
        "bf16": params.mixed_precision_dtype.name == "BF16",
        "torch_compile": params.compile,
        "torch_empty_cache_steps": params.empty_device_cache_steps,
        "dataloader_num_workers": workers,
        "dataloader_prefetch_factor": params.dataloader_prefetch_factor if workers else None,
        "dataloader_persistent_workers": params.dataloader_persistent_workers and workers > 0,
        "dataloader_pin_memory": True,
        "ddp_broadcast_buffers": True if exact else None,
        "ddp_find_unused_parameters": False if exact else params.ddp_find_unused_parameters,
        "accelerator_config": accelerator | {"dispatch_batches": dispatches},
    }
    if params.nccl_default_timeout_minutes is not None:
        passed["ddp_timeout"] = round(60 * params.nccl_default_timeout_minutes)
    return passed
