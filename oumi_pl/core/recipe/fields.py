"""What becomes of each field of an Oumi config: honoured, refused by name, or without a meaning for training."""

import dataclasses
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe.notes import Notes, refuse


class Field(NamedTuple):
    """What becomes of a field.

    how: `honoured`, the recipe says the same in the key that `why` names; `refused`, unless it has its default, with
    `why` as the reason; `harmless`, what is trained doesn't depend on it, with `why` as the reason.
    """

    how: str
    why: str


def honoured(key: str) -> Field:
    """A field that the recipe says in `key`."""
    return Field("honoured", key)


def refused(why: str) -> Field:
    """A field without a counterpart."""
    return Field("refused", why)


def harmless(why: str) -> Field:
    """A field that doesn't decide what is trained."""
    return Field("harmless", why)


_SPEED = "it decides on speed or memory alone, and these are chosen here without it"
_SHOWN = "it decides on what is shown while training alone"
_VISION = "images are not trained on"

DATASET = {
    "dataset_name": honoured("path"),
    "dataset_path": honoured("path"),
    "subset": honoured("config"),
    "split": honoured("split"),
    "dataset_kwargs": honoured("format and columns"),
    "sample_count": honoured("sample"),
    "mixture_proportion": honoured("weight"),
    "shuffle": honoured("sample_seed, or the order that the run draws for each epoch"),
    "seed": honoured("sample_seed, or the seed of the run"),
    "shuffle_buffer_size": harmless("only torchdata's pipelines read it, which are not used"),
    "trust_remote_code": harmless("only processors of images read it"),
    "transform_num_workers": harmless(_SPEED),
}

SPLIT = {
    "datasets": honoured("a source each"),
    "collator_name": honoured("data.train_on"),
    "collator_kwargs": honoured("data.train_on"),
    "train_target": honoured("data.train_on"),
    "pack": honoured("data.class_path, PackedChatData"),
    "stream": honoured("data.streaming, for documents; other rows are read before training"),
    "target_col": harmless("Oumi reads it no more"),
    "mixture_strategy": honoured("data.exhausted, or the length of an epoch"),
    "seed": harmless("a mixture is drawn anew for each epoch, by the seed of the run"),
    "use_torchdata": refused("torchdata's pipelines are not used; leave it out"),
}

MODEL = {
    "model_name": honoured("model.model"),
    "adapter_model": refused(
        "merge it into its base first (oumi_pl export --merge), and name that as model.model_name"
    ),
    "adapter_trainable": refused("an adapter can't be trained on; merge it into its base first"),
    "tokenizer_name": honoured("data.tokenizer"),
    "tokenizer_pad_token": harmless("padding is masked by position, never by its id"),
    "tokenizer_kwargs": honoured("nothing but padding may be set, which is masked by position"),
    "processor_kwargs": refused(_VISION),
    "model_max_length": honoured("data.max_length"),
    "load_pretrained_weights": honoured("model.config in place of model.model"),
    "trust_remote_code": honoured("model.trust_remote_code and data.trust_remote_code"),
    "torch_dtype_str": honoured("model.dtype"),
    "compile": refused("it stays false; training.compile compiles the model"),
    "chat_template": honoured("data.template"),
    "chat_template_kwargs": harmless("only inference reads it"),
    "attn_implementation": honoured("model.attn"),
    "device_map": harmless("the trainer puts the model on its device"),
    "model_kwargs": honoured("model.config"),
    "enable_liger_kernel": harmless("the loss is computed in chunks without it; the numbers are the same"),
    "shard_for_eval": harmless("only evaluation reads it"),
    "freeze_layers": honoured("model.freeze"),
    "text_only": refused(_VISION),
    "model_revision": honoured("model.revision"),
    "tool_call_parser": harmless("only inference reads it"),
}

TRAINING = {
    "use_peft": honoured("model.lora"),
    "trainer_type": honoured("model.class_path, data.class_path and engine"),
    "enable_gradient_checkpointing": honoured("model.gradient_checkpointing"),
    "gradient_checkpointing_kwargs": honoured("use_reentrant: false is how it is done"),
    "output_dir": honoured("runs_dir and name"),
    "per_device_train_batch_size": honoured("data.batch_size"),
    "per_device_eval_batch_size": honoured("data.eval_batch_size"),
    "gradient_accumulation_steps": honoured("trainer.accumulate_grad_batches"),
    "max_steps": honoured("trainer.max_steps"),
    "num_train_epochs": honoured("trainer.max_epochs"),
    "save_epoch": honoured("checkpoint.every, where save_steps doesn't say when"),
    "save_steps": honoured("checkpoint.every"),
    "save_final_model": honoured("export.enabled"),
    "seed": honoured("seed_everything"),
    "data_seed": honoured("data.seed"),
    "use_deterministic": honoured("trainer.deterministic"),
    "full_determinism": honoured("trainer.deterministic"),
    "run_name": honoured("trainer.logger"),
    "metrics_function": refused("there are no functions of metrics; write a callback, or read metrics.csv"),
    "reward_functions": refused("rewards are for reinforcement learning"),
    "reward_function_kwargs": refused("rewards are for reinforcement learning"),
    "grpo": refused("GRPO is not among the trainer types here"),
    "gkd": refused("GKD is not among the trainer types here"),
    "gold": refused("GOLD is not among the trainer types here"),
    "log_level": harmless(_SHOWN),
    "dep_log_level": harmless(_SHOWN),
    "log_examples": harmless(_SHOWN),
    "enable_wandb": honoured("trainer.logger"),
    "enable_mlflow": honoured("trainer.logger"),
    "enable_tensorboard": honoured("trainer.logger"),
    "logging_strategy": harmless("every step is written to metrics.csv"),
    "logging_dir": honoured("trainer.logger"),
    "logging_steps": harmless("every step is written to metrics.csv"),
    "logging_first_step": harmless("every step is written to metrics.csv"),
    "eval_strategy": honoured("data.validation and val_every"),
    "eval_steps": honoured("val_every"),
    "learning_rate": honoured("model.optimizer.lr"),
    "lr_scheduler_type": honoured("model.schedule"),
    "lr_scheduler_kwargs": honoured("model.schedule"),
    "warmup_ratio": honoured("model.schedule.warmup"),
    "warmup_steps": honoured("model.schedule.warmup"),
    "optimizer": honoured("model.optimizer"),
    "weight_decay": honoured("model.optimizer.weight_decay"),
    "adam_beta1": honoured("model.optimizer.betas"),
    "adam_beta2": honoured("model.optimizer.betas"),
    "adam_epsilon": honoured("model.optimizer.eps"),
    "sgd_momentum": honoured("model.optimizer.momentum"),
    "mixed_precision_dtype": honoured("trainer.precision"),
    "compile": honoured("model.compile"),
    "include_performance_metrics": harmless("throughput is in metrics.csv in any case"),
    "include_alternative_mfu_metrics": harmless("throughput is in metrics.csv in any case"),
    "log_model_summary": honoured("trainer.enable_model_summary, and telemetry/model_summary.txt"),
    "resume_from_checkpoint": honoured("fit --resume"),
    "try_resume_from_last_checkpoint": honoured("fit --resume"),
    "dataloader_num_workers": honoured("data.workers"),
    "dataloader_persistent_workers": harmless(_SPEED),
    "dataloader_prefetch_factor": harmless(_SPEED),
    "dataloader_main_process_only": harmless("each rank takes its share of the same rows"),
    "ddp_find_unused_parameters": honoured("trainer.strategy"),
    "max_grad_norm": honoured("trainer.gradient_clip_val"),
    "trainer_kwargs": honoured("the keys that have a counterpart, one by one"),
    "verl_config_overrides": refused("verl is not driven from here"),
    "profiler.enable_cpu_profiling": refused("set trainer.profiler in the recipe, e.g. `profiler: pytorch`"),
    "profiler.enable_cuda_profiling": refused("set trainer.profiler in the recipe, e.g. `profiler: pytorch`"),
    "profiler": harmless("it is only read while profiling"),
    "telemetry": harmless("it is about figures of the machine; throughput is in metrics.csv"),
    "empty_device_cache_steps": harmless(_SPEED),
    "nccl_default_timeout_minutes": refused("set `timeout` of trainer.strategy in the recipe"),
    "label_ignore_index": harmless("tokens without loss are told apart by a mask"),
}

PEFT = {
    "lora_r": honoured("model.lora.r"),
    "lora_alpha": honoured("model.lora.lora_alpha"),
    "lora_dropout": honoured("model.lora.lora_dropout"),
    "lora_target_modules": honoured("model.lora.target_modules"),
    "lora_exclude_modules": honoured("model.lora.exclude_modules"),
    "lora_target_parameters": honoured("model.lora.target_parameters"),
    "lora_modules_to_save": honoured("model.lora.modules_to_save"),
    "lora_bias": honoured("model.lora.bias"),
    "lora_init_weights": honoured("model.lora.init_lora_weights"),
    "lora_task_type": refused("causal language models are all that is trained"),
    "q_lora": honoured("model.quantization"),
    "q_lora_bits": honoured("model.quantization"),
    "bnb_4bit_quant_type": honoured("model.quantization"),
    "llm_int8_skip_modules": refused("all linear layers but the head are quantized"),
    "use_bnb_nested_quant": honoured("model.quantization, which nests"),
    "bnb_4bit_quant_storage": harmless("it decides on how the 4-bit numbers lie in memory alone"),
    "bnb_4bit_compute_dtype": honoured("model.quantization, which computes in bfloat16"),
    "peft_save_mode": honoured("export.merge"),
}

FSDP = {
    "enable_fsdp": honoured("trainer.strategy"),
    "sharding_strategy": honoured("trainer.strategy"),
    "cpu_offload": refused("shards stay on their GPU; leave it out, and use more GPUs, LoRA or shorter rows"),
    "mixed_precision": honoured("trainer.precision"),
    "backward_prefetch": harmless(_SPEED),
    "forward_prefetch": harmless(_SPEED),
    "use_orig_params": harmless("FSDP2 always keeps parameters as they are"),
    "state_dict_type": harmless("checkpoints are sharded, and the model at the end is whole"),
    "auto_wrap_policy": harmless("FSDP2 shards by the model's own blocks; the numbers are the same"),
    "min_num_params": harmless("FSDP2 shards by the model's own blocks; the numbers are the same"),
    "transformer_layer_cls": harmless("FSDP2 shards by the model's own blocks, which the architecture names"),
    "sync_module_states": harmless("every rank loads the same weights"),
}

DEEPSPEED = {
    "enable_deepspeed": refused("DeepSpeed is not driven from here; what shards the same is fsdp.enable_fsdp: true"),
    "": harmless("it is only read with deepspeed.enable_deepspeed"),
}


def _under(place: str, fields: dict[str, Field]) -> dict[str, Field]:
    return {f"{place}.{name}".rstrip("."): field for name, field in fields.items()}


FIELDS: dict[str, Field] = {
    **_under("model", MODEL),
    **_under("training", TRAINING),
    **_under("peft", PEFT),
    **_under("fsdp", FSDP),
    **_under("deepspeed", DEEPSPEED),
    "data.test": harmless("Oumi's training never reads it"),
}
"""Field, or section, by its dotted path -> what becomes of it."""
for _split in ("data.train", "data.validation"):
    FIELDS |= _under(_split, SPLIT) | _under(f"{_split}.datasets", DATASET)

ONLY_WITH = {
    "peft": "training.use_peft",
    "fsdp": "fsdp.enable_fsdp",
    "deepspeed": "deepspeed.enable_deepspeed",
}
"""Section -> the field without which Oumi reads none of it."""


def field_of(path: str) -> Field | None:
    """What becomes of a field, list indices aside, or of the section that it is in; None if nothing is said of it."""
    name = re.sub(r"\[\d+\]", "", path)
    while name not in FIELDS and "." in name:
        name = name.rpartition(".")[0]
    return FIELDS.get(name)


def walk(section: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """All fields of a config as (dotted path, value, default), sections and lists of sections gone through."""
    for field in dataclasses.fields(section):
        path = f"{place}.{field.name}" if place else field.name
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, path)
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield path, value, default
        for number, item in enumerate(value if isinstance(value, list) else ()):
            if dataclasses.is_dataclass(item):
                yield from walk(item, f"{path}[{number}]")


def note_fields(config: TrainingConfig, notes: Notes) -> None:
    """Refuses fields without a counterpart, and notes what becomes of all others that differ from their defaults.

    Raises:
        UserError: at the first one that is refused.
    """
    switches = {section: _value(config, switch) for section, switch in ONLY_WITH.items()}
    for path, value, default in walk(config):
        if value == default:
            continue
        section = path.partition(".")[0]
        field = field_of(path)
        if not switches.get(section, True):
            notes.became[path] = f"nothing: it is only read with {ONLY_WITH[section]}"
        elif field is None:
            refuse(path, "is not known here")
        elif field.how == "refused":
            refuse(path, f"{shown(value)} is set, and has no counterpart: {field.why}")
        else:
            notes.became[path] = field.why if field.how == "honoured" else f"nothing: {field.why}"


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def shown(value: Any) -> str:
    """A value in the words of a config file."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return value.name if isinstance(value, Enum) else str(value)
