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

    how: `honoured`, `why` names the key of the recipe that says the same; `refused`, unless it has its default, and
    `why` is the reason; `harmless`, what is trained doesn't depend on it, and `why` is the reason.
    """

    how: str
    why: str


def _fields(place: str, **tables: dict[str, str]) -> dict[str, Field]:
    """The fields of a section, given for each `how` as reason, or key of the recipe -> names, separated by spaces."""
    return {
        f"{place}.{name}": Field(how, why)
        for how, table in tables.items()
        for why, names in table.items()
        for name in names.split()
    }


_SPEED = "it decides on speed or memory alone, and these are chosen here without it"
_VISION = "images are not trained on"
_BLOCKS = "FSDP2 shards by the model's own blocks"

FIELDS: dict[str, Field] = {
    **_fields(
        "model",
        honoured={
            "model.model": "model_name",
            "data.tokenizer": "tokenizer_name",
            "nothing but padding may be set, which is masked by position": "tokenizer_kwargs",
            "data.max_length": "model_max_length",
            "model.config in place of model.model": "load_pretrained_weights",
            "model.trust_remote_code and data.trust_remote_code": "trust_remote_code",
            "model.dtype": "torch_dtype_str",
            "data.template": "chat_template",
            "model.attn": "attn_implementation",
            "model.config": "model_kwargs",
            "model.freeze": "freeze_layers",
            "model.revision": "model_revision",
        },
        refused={
            "merge it into its base first (oumi_pl export --merge), and name that as model.model_name": "adapter_model",
            "an adapter can't be trained on; merge it into its base first": "adapter_trainable",
            _VISION: "processor_kwargs text_only",
            "it stays false; training.compile compiles the model": "compile",
        },
        harmless={
            "padding is masked by position, never by its id": "tokenizer_pad_token",
            "only inference reads it": "chat_template_kwargs tool_call_parser",
            "the trainer puts the model on its device": "device_map",
            "the loss is computed in chunks without it; the numbers are the same": "enable_liger_kernel",
            "only evaluation reads it": "shard_for_eval",
        },
    ),
    **_fields(
        "training",
        honoured={
            "model.lora": "use_peft",
            "model.class_path, data.class_path and engine": "trainer_type",
            "model.gradient_checkpointing": "enable_gradient_checkpointing",
            "use_reentrant: false is how it is done": "gradient_checkpointing_kwargs",
            "runs_dir and name": "output_dir",
            "data.batch_size": "per_device_train_batch_size",
            "data.eval_batch_size": "per_device_eval_batch_size",
            "trainer.accumulate_grad_batches": "gradient_accumulation_steps",
            "trainer.max_steps": "max_steps",
            "trainer.max_epochs": "num_train_epochs",
            "checkpoint.every, where save_steps doesn't say when": "save_epoch",
            "checkpoint.every": "save_steps",
            "export.enabled": "save_final_model",
            "seed_everything": "seed",
            "data.seed": "data_seed",
            "trainer.deterministic": "use_deterministic full_determinism",
            "trainer.logger": "run_name enable_wandb enable_mlflow enable_tensorboard logging_dir",
            "data.validation and val_every": "eval_strategy",
            "val_every": "eval_steps",
            "model.optimizer": "optimizer",
            "model.optimizer.lr": "learning_rate",
            "model.optimizer.weight_decay": "weight_decay",
            "model.optimizer.betas": "adam_beta1 adam_beta2",
            "model.optimizer.eps": "adam_epsilon",
            "model.optimizer.momentum": "sgd_momentum",
            "model.schedule": "lr_scheduler_type lr_scheduler_kwargs",
            "model.schedule.warmup": "warmup_ratio warmup_steps",
            "trainer.precision": "mixed_precision_dtype",
            "model.compile": "compile",
            "trainer.enable_model_summary, and telemetry/model_summary.txt": "log_model_summary",
            "fit --resume": "resume_from_checkpoint try_resume_from_last_checkpoint",
            "data.workers": "dataloader_num_workers",
            "trainer.strategy": "ddp_find_unused_parameters",
            "trainer.gradient_clip_val": "max_grad_norm",
            "the keys that have a counterpart, one by one": "trainer_kwargs",
        },
        refused={
            "there are no functions of metrics; write a callback, or read metrics.csv": "metrics_function",
            "rewards are for reinforcement learning": "reward_functions reward_function_kwargs",
            "GRPO is not among the trainer types here": "grpo",
            "GKD is not among the trainer types here": "gkd",
            "GOLD is not among the trainer types here": "gold",
            "verl is not driven from here": "verl_config_overrides",
            "set trainer.profiler in the recipe, e.g. `profiler: pytorch`": (
                "profiler.enable_cpu_profiling profiler.enable_cuda_profiling"
            ),
            "set `timeout` of trainer.strategy in the recipe": "nccl_default_timeout_minutes",
        },
        harmless={
            "it decides on what is shown while training alone": "log_level dep_log_level log_examples",
            "every step is written to metrics.csv": "logging_strategy logging_steps logging_first_step",
            "throughput is in metrics.csv in any case": "include_performance_metrics include_alternative_mfu_metrics",
            _SPEED: "dataloader_persistent_workers dataloader_prefetch_factor empty_device_cache_steps",
            "each rank takes its share of the same rows": "dataloader_main_process_only",
            "it is only read while profiling": "profiler",
            "it is about figures of the machine; throughput is in metrics.csv": "telemetry",
            "tokens without loss are told apart by a mask": "label_ignore_index",
        },
    ),
    **_fields(
        "peft",
        honoured={
            **{f"model.lora.{name}": f"lora_{name}" for name in ("r", "bias", "target_modules", "exclude_modules")},
            **{f"model.lora.{name}": f"lora_{name}" for name in ("target_parameters", "modules_to_save")},
            "model.lora.lora_alpha": "lora_alpha",
            "model.lora.lora_dropout": "lora_dropout",
            "model.lora.init_lora_weights": "lora_init_weights",
            "model.quantization": "q_lora q_lora_bits bnb_4bit_quant_type",
            "model.quantization, which nests": "use_bnb_nested_quant",
            "model.quantization, which computes in bfloat16": "bnb_4bit_compute_dtype",
            "export.merge": "peft_save_mode",
        },
        refused={
            "causal language models are all that is trained": "lora_task_type",
            "all linear layers but the head are quantized": "llm_int8_skip_modules",
        },
        harmless={"it decides on how the 4-bit numbers lie in memory alone": "bnb_4bit_quant_storage"},
    ),
    **_fields(
        "fsdp",
        honoured={"trainer.strategy": "enable_fsdp sharding_strategy", "trainer.precision": "mixed_precision"},
        refused={"shards stay on their GPU; leave it out, and use more GPUs, LoRA or shorter rows": "cpu_offload"},
        harmless={
            _SPEED: "backward_prefetch forward_prefetch",
            "FSDP2 always keeps parameters as they are": "use_orig_params",
            "checkpoints are sharded, and the model at the end is whole": "state_dict_type",
            f"{_BLOCKS}; the numbers are the same": "auto_wrap_policy min_num_params",
            f"{_BLOCKS}, which the architecture names": "transformer_layer_cls",
            "every rank loads the same weights": "sync_module_states",
        },
    ),
    **_fields(
        "deepspeed",
        refused={
            "DeepSpeed is not driven from here; what shards the same is fsdp.enable_fsdp: true": "enable_deepspeed"
        },
    ),
    "deepspeed": Field("harmless", "it is only read with deepspeed.enable_deepspeed"),
    "data.test": Field("harmless", "Oumi's training never reads it"),
}
"""Field, or section, by its dotted path -> what becomes of it."""
for _split in ("data.train", "data.validation"):
    FIELDS |= _fields(
        _split,
        honoured={
            "a source each": "datasets",
            "data.train_on": "collator_name collator_kwargs train_target",
            "data.class_path, PackedChatData": "pack",
            "data.streaming, for documents; other rows are read before training": "stream",
            "data.exhausted, or the length of an epoch": "mixture_strategy",
        },
        refused={"torchdata's pipelines are not used; leave it out": "use_torchdata"},
        harmless={
            "Oumi reads it no more": "target_col",
            "a mixture is drawn anew for each epoch, by the seed of the run": "seed",
        },
    )
    FIELDS |= _fields(
        f"{_split}.datasets",
        honoured={
            "path": "dataset_name dataset_path",
            "config": "subset",
            "split": "split",
            "format and columns": "dataset_kwargs",
            "sample": "sample_count",
            "weight": "mixture_proportion",
            "sample_seed, or the order that the run draws for each epoch": "shuffle",
            "sample_seed, or the seed of the run": "seed",
        },
        harmless={
            "only torchdata's pipelines read it, which are not used": "shuffle_buffer_size",
            "only processors of images read it": "trust_remote_code",
            _SPEED: "transform_num_workers",
        },
    )

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
