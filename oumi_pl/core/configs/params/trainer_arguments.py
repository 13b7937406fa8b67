"""Arguments of transformers' and TRL's trainers that fields of Oumi set: `trainer_kwargs` may not set them too."""

BY_OTHER_NAME = {
    "optim": "optimizer",
    "log_level": "dep_log_level",
    "gradient_checkpointing": "enable_gradient_checkpointing",
    "torch_compile": "compile",
    "fp16": "mixed_precision_dtype",
    "bf16": "mixed_precision_dtype",
    "report_to": "enable_wandb, enable_mlflow and enable_tensorboard",
    "torch_empty_cache_steps": "empty_device_cache_steps",
    "save_strategy": "save_steps and save_epoch",
    "include_num_input_tokens_seen": "include_performance_metrics",
    "include_tokens_per_second": "include_performance_metrics",
    "ddp_broadcast_buffers": "use_deterministic",
    "accelerator_config": "dataloader_main_process_only",
}
"""Argument -> the field of `training` that sets it."""

BY_THE_SAME_NAME = (
    "gradient_accumulation_steps",
    "logging_steps",
    "logging_strategy",
    "max_steps",
    "num_train_epochs",
    "output_dir",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "run_name",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "gradient_checkpointing_kwargs",
    "save_steps",
    "logging_first_step",
    "eval_strategy",
    "eval_steps",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "full_determinism",
    "ddp_find_unused_parameters",
    "max_grad_norm",
    "seed",
    "data_seed",
)

FIXED = ("logging_nan_inf_filter", "push_to_hub", "dataloader_pin_memory")


def set_elsewhere(argument: str) -> str | None:
    """What sets an argument of a trainer already; None if `trainer_kwargs` may set it."""
    if argument in FIXED:
        return "is fixed, and can't be set"
    if argument in BY_THE_SAME_NAME:
        return f"is set by training.{argument}"
    return f"is set by training.{BY_OTHER_NAME[argument]}" if argument in BY_OTHER_NAME else None
