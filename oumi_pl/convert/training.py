"""What axolotl, LLaMA-Factory and TRL share: arguments of transformers' `TrainingArguments`, and of PEFT.

Each function reads settings by their names in transformers (of PEFT's in TRL's `ModelConfig`), and gives a part of the
recipe. Defaults that differ from ours are written out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from oumi_pl.convert.settings import Keys, Settings
from oumi_pl.core.recipe.notes import given
from oumi_pl.errors import UserError, reason

MODEL = "model.init_args"
OPTIMIZER, SCHEDULE, LORA = f"{MODEL}.optimizer", f"{MODEL}.schedule", f"{MODEL}.lora"
STRATEGY, VALIDATION = "trainer.strategy", "data.init_args.validation"

SPEED = "it decides on speed or memory alone"
LOGS = "it decides on what is logged or where; metrics.csv has every step"
HUB = "upload the model with `oumi_pl push`"
FP8 = "fp8: matrices are multiplied in bfloat16, which is more exact"
RESUME = "a run is continued with `fit --resume`"

NAMES = {
    "learning_rate": "model.optimizer.lr",
    "optim": "model.optimizer",
    "adam_beta1": "model.optimizer.betas",
    "adam_beta2": "model.optimizer.betas",
    "adam_epsilon": "model.optimizer.eps",
    "weight_decay": "model.optimizer.weight_decay",
    "lr_scheduler_type": "model.schedule",
    "lr_scheduler_kwargs": "model.schedule",
    "warmup_steps": "model.schedule.warmup",
    "warmup_ratio": "model.schedule.warmup",
    "per_device_train_batch_size": "data.batch_size",
    "per_device_eval_batch_size": "data.eval_batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "max_grad_norm": "trainer.gradient_clip_val",
    "num_train_epochs": "trainer.max_epochs",
    "max_steps": "trainer.max_steps",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "seed": "seed_everything",
    "output_dir": "runs_dir and name",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "save_strategy": "checkpoint",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.monitor",
    "metric_for_best_model": "checkpoint.monitor",
    "greater_is_better": "checkpoint.mode",
    "eval_strategy": "val_every",
    "eval_steps": "val_every",
    "report_to": "logger",
    "deepspeed": "trainer.strategy",
    "fsdp": "trainer.strategy",
    "fsdp_config": "trainer.strategy",
    "accelerator_config": "data.batch_size",
    "dataloader_num_workers": "data.workers",
    "label_smoothing_factor": "model.loss.label_smoothing",
    "group_by_length": "data.group_by_length",
    "train_sampling_strategy": "data.group_by_length",
}
"""Argument of `TrainingArguments` that is read here -> key of the recipe."""

WITHOUT_EFFECT = {
    **dict.fromkeys(("tf32", "torch_compile*", "use_liger_kernel", "liger_kernel_config", "use_cpu"), SPEED),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_offloading", "activation_checkpointing*", "ddp_*"), SPEED
    ),
    **dict.fromkeys(("dataloader_*", "low_cpu_mem_usage", "auto_find_batch_size", "torch_empty_cache_steps"), SPEED),
    **dict.fromkeys(("eval_accumulation_steps", "prediction_loss_only", "local_rank"), SPEED),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "use_cache", "debug", "skip_memory_metrics"), SPEED),
    **dict.fromkeys(
        ("eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics", "save_on_each_node"), SPEED
    ),
    **dict.fromkeys(("enable_jit_checkpoint", "length_column_name", "label_names"), SPEED),
    **dict.fromkeys(("restore_callback_states_from_checkpoint", "do_predict"), SPEED),
    **dict.fromkeys(("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"), SPEED),
    **dict.fromkeys(("logging_*", "log_level*", "log_on_each_node", "disable_tqdm", "run_name", "project"), LOGS),
    **dict.fromkeys(("trackio_*", "include_num_input_tokens_seen", "include_for_metrics", "eval_on_start"), LOGS),
    **dict.fromkeys(("push_to_hub*", "hub_*"), HUB),
    **dict.fromkeys(("resume_from_checkpoint", "overwrite_output_dir", "ignore_data_skip", "save_only_model"), RESUME),
    "remove_unused_columns": "columns that a format doesn't read are not kept",
    "average_tokens_across_devices": "the loss is that of all tokens of all devices",
    "save_safetensors": "weights are written as safetensors",
    "do_train": "`fit` trains",
    "do_eval": "there is a validation wherever data.validation is set",
    "eval_delay": "the first validation comes after val_every steps",
    "data_seed": "rows are ordered by seed_everything",
    "full_determinism": "set trainer.deterministic: true if operations have to be deterministic",
}
"""Argument of `TrainingArguments` -> why nothing depends on it."""

REFUSED = {
    "neftune_noise_alpha": "noise on embeddings has no counterpart",
    "optim_target_modules": "it is for GaLore and APOLLO, which have no counterpart",
    "optim_args": "set the optimizer's arguments in the recipe, as model.optimizer.init_args",
    "parallelism_config": "set its sizes in the recipe: shards, replicas and tensor of trainer.strategy",
}

# --- the optimizer and its schedule -----------------------------------------------------------------------------------

BNB = "bitsandbytes.optim"
ADAM = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "AdamW"),
    **dict.fromkeys(("adamw_torch_npu_fused", "adamw_torch_xla"), "AdamW"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit"), f"{BNB}.AdamW8bit"),
    "paged_adamw_8bit": f"{BNB}.PagedAdamW8bit",
    "paged_adamw_32bit": f"{BNB}.PagedAdamW32bit",
    "paged_adamw": f"{BNB}.PagedAdamW32bit",
}
LION = {
    "lion": f"{BNB}.Lion",
    "lion_32bit": f"{BNB}.Lion",
    "lion_8bit": f"{BNB}.Lion8bit",
    "paged_lion_8bit": f"{BNB}.PagedLion8bit",
    "paged_lion_32bit": f"{BNB}.PagedLion32bit",
}
OPTIMIZER_NOTES = {
    "adamw_torch_8bit": "adamw_torch_8bit is torchao's; bitsandbytes' also keeps states in 8 bits, rounded otherwise",
    "adamw_torch_4bit": "adamw_torch_4bit keeps states in 4 bits; here they have 8",
    "muon": "Muon's updates are scaled to the size of AdamW's, so that one rate serves both",
}
"""Name of an optimizer -> how it differs here."""


def optimizer(settings: Settings, default: str, lr: float | None) -> dict[str, Any]:
    """`model.optimizer`.

    Args:
        settings: The settings.
        default: Name of the library's default.
        lr: The library's default of the rate; None if it has none.

    Raises:
        UserError: there is no such optimizer, or no rate.
    """
    name = str(settings.noted("optim", default, OPTIMIZER)).removeprefix("OptimizerNames.").lower()
    if lr is None and not settings.has("learning_rate"):
        settings.refuse("learning_rate", "missing, and there is no default")
    rate = settings.noted("learning_rate", 0.0 if lr is None else lr, OPTIMIZER)
    arguments: dict[str, Any] = {"lr": float(rate)}
    betas = [float(settings.get("adam_beta1", 0.9)), float(settings.get("adam_beta2", 0.999))]
    decay = float(settings.get("weight_decay", 0.0))
    if name in OPTIMIZER_NOTES:
        settings.comment(OPTIMIZER, OPTIMIZER_NOTES[name])
    if name in ADAM:
        arguments |= {"betas": betas} if betas != [0.9, 0.999] else {}
        eps = float(settings.get("adam_epsilon", 1e-8))
        arguments |= {"eps": eps} if eps != 1e-8 else {}
        path = ADAM[name]
    elif name in LION:
        arguments["betas"], path = betas, LION[name]
    elif name == "muon":
        arguments["betas"], path = betas, "MuonAdamW"
    elif name == "sgd":
        path = "SGD"
    elif name == "adafactor":
        path = "transformers.Adafactor"
        arguments |= {"eps": [1e-30, 1e-3], "relative_step": False, "scale_parameter": False}
    else:
        settings.refuse("optim", f"{name!r} has no counterpart; use adamw_torch, or another of {', '.join(ADAM)}")
    return {"class_path": path, "init_args": arguments | {"weight_decay": decay}}


SCHEDULES = {
    "linear": "Linear",
    "cosine": "Cosine",
    "cosine_with_min_lr": "Cosine",
    "cosine_with_restarts": "CosineRestarts",
    "constant": "Constant",
    "constant_with_warmup": "Constant",
    "warmup_stable_decay": "WarmupStableDecay",
}
"""Name of a schedule in transformers -> class."""
SCHEDULE_ARGUMENTS = {"num_cycles": "cycles", "min_lr_rate": "floor", "min_lr": "floor", "num_decay_steps": "decay"}
"""Key of `lr_scheduler_kwargs` -> argument; `min_lr` is divided by the rate."""


def schedule(settings: Settings, default: str, default_warmup: float = 0.0) -> dict[str, Any] | None:
    """`model.schedule`; None for a constant rate.

    Raises:
        UserError: there is no such schedule, or it doesn't take what is set.
    """
    name = str(settings.noted("lr_scheduler_type", default, SCHEDULE)).removeprefix("SchedulerType.").lower()
    if name not in SCHEDULES:
        settings.refuse("lr_scheduler_type", f"{name!r} has no counterpart; use one of {', '.join(SCHEDULES)}")
    arguments = _warmup(settings, default_warmup)
    if name == "constant":
        return None  # which has no warm-up in transformers
    for key, value in dict(settings.get("lr_scheduler_kwargs") or {}).items():
        if key not in SCHEDULE_ARGUMENTS:
            settings.refuse("lr_scheduler_kwargs", f"{key} has no counterpart for {name}")
        ratio = float(value) / float(settings.get("learning_rate", 0.0)) if key == "min_lr" else value
        arguments[SCHEDULE_ARGUMENTS[key]] = ratio
    if name == "constant_with_warmup" and not arguments:
        return None
    return {"class_path": SCHEDULES[name]} | given(init_args=arguments)


def _warmup(settings: Settings, default: float) -> dict[str, Any]:
    """Steps, or their share of the run."""
    steps, ratio = settings.get("warmup_steps", 0), settings.get("warmup_ratio", 0.0)
    if not settings.has("warmup_steps") and not settings.has("warmup_ratio") and default:
        settings.comment(SCHEDULE, f"{settings.name('warmup_ratio')}: {settings.keys.library}'s default")
        ratio = default
    steps = steps if settings.has("warmup_steps") and steps else ratio  # below 1 both are a share
    return {"warmup": int(steps) if float(steps) >= 1 else float(steps)} if steps else {}


# --- the model --------------------------------------------------------------------------------------------------------


def lora(settings: Settings, defaults: dict[str, Any], targets: Any) -> dict[str, Any]:
    """`model.lora`.

    Args:
        settings: The settings, read by their names in TRL.
        defaults: The library's rank, alpha and dropout.
        targets: `target_modules`; None for PEFT's choice, `all-linear` for our default.
    """
    args = {
        "r": settings.noted("lora_r", defaults["r"], LORA),
        "lora_alpha": settings.noted("lora_alpha", defaults["alpha"], LORA),
    }
    args |= given(lora_dropout=float(settings.noted("lora_dropout", defaults["dropout"], LORA)) or None)
    if targets is None:
        settings.comment(LORA, "target_modules: null leaves the choice to PEFT, by architecture")
    args |= {} if targets == "all-linear" else {"target_modules": targets}
    return args | given(
        modules_to_save=settings.get("lora_modules_to_save"),
        target_parameters=settings.get("lora_target_parameters"),
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
    )


def by_length(settings: Settings, kind: str) -> dict[str, Any]:
    """`data.group_by_length`, which the data of SFT alone have; a comment for other data."""
    is_set = bool(settings.get("group_by_length")) or settings.get("train_sampling_strategy") == "group_by_length"
    if kind == "SFT":
        return {"group_by_length": is_set}
    if is_set:
        settings.comment("data", "group_by_length: rows of any length follow each other")
    return {}


def is_on(value: Any) -> bool:
    """Whether a value of YAML means true: `auto` does."""
    return value is not False and str(value).lower() not in ("false", "none", "0", "no", "")


# --- the trainer ------------------------------------------------------------------------------------------------------


def trainer(
    settings: Settings, *, epochs: float, mixed: str | None, devices: int | None, ranks: "Ranks | None" = None
) -> dict[str, Any]:
    """The section `trainer`.

    Args:
        settings: The settings.
        epochs: The library's default.
        mixed: `bf16` or `fp16` if it computes in lower precision.
        devices: Devices per node; None for all.
        ranks: How the library arranges the devices, after `divide_rows`.

    Raises:
        UserError: epochs aren't whole.
    """
    steps = int(settings.get("max_steps", -1))
    whole = None
    if steps <= 0:
        number = float(settings.noted("num_train_epochs", epochs, "trainer.max_epochs"))
        if not number.is_integer():
            settings.refuse("num_train_epochs", f"{number} epochs are no whole ones; set max_steps")
        whole = int(number)
    accumulated = int(settings.get("gradient_accumulation_steps", 1))
    clip = float(settings.noted("max_grad_norm", 1.0, "trainer.gradient_clip_val"))
    return given(devices=devices) | given(
        strategy=strategy(settings, ranks or Ranks(), devices),
        max_steps=steps if steps > 0 else None,
        max_epochs=whole,
        accumulate_grad_batches=None if accumulated == 1 else accumulated,
        gradient_clip_val=clip or None,
        precision={"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(mixed or ""),
    )


NEW_ADAPTER = "a new adapter: the one that is continued is merged into its base, which the export then needs"
MERGE_FIRST = "merge the adapter into its base (`export --merge`) and name that folder: 4 or 8 bits can't take it up"


def refuse_quantized_adapter(settings: Settings, key: str) -> None:
    """Refuses an adapter that is continued on a quantized base, into which it can't be merged.

    Raises:
        UserError: it is so.
    """
    if any(settings.get(name) for name in ("quantization_bit", "load_in_4bit", "load_in_8bit")) or (
        settings.get("adapter") == "qlora"
    ):
        settings.refuse(key, MERGE_FIRST)


@dataclass(frozen=True)
class Ranks:
    """How a library arranges the devices of a run.

    shards: devices over which each weight is divided; None for those that are left. replicas: groups of devices that
    hold all weights each; None for as many as there are. tensor: devices that compute each layer together. sharing:
    devices that read the same rows besides, for context or pipeline parallelism.
    """

    shards: int | None = None
    replicas: int | None = 1
    tensor: int = 1
    sharing: int = 1


def size(settings: Settings, key: str) -> int:
    """A number of devices, 1 if it is left out."""
    return max(1, int(settings.get(key, 1)))


def divide_rows(settings: Settings, ranks: Ranks, batch_size: int) -> Ranks:
    """Keeps the rows of an update where devices that read the same rows become devices with rows of their own.

    Context and pipeline parallelism have no counterpart, and a quantized base no tensor parallelism: each device reads
    fewer rows instead. Rows that can't be divided so are shared by devices that compute each layer together.

    Args:
        settings: The settings, whose rows per device and accumulation are changed.
        ranks: The library's arrangement of the devices.
        batch_size: The library's default of `per_device_train_batch_size`.

    Returns:
        The arrangement here, in which only devices of a `tensor` group share rows.
    """
    is_quantized = any(settings.get(name) for name in ("load_in_4bit", "load_in_8bit", "quantization_bit")) or (
        settings.get("adapter") == "qlora"
    )
    sharing, tensor = (ranks.sharing * ranks.tensor, 1) if is_quantized else (ranks.sharing, ranks.tensor)
    left, divided = sharing, {}
    for key, default in (("gradient_accumulation_steps", 1), ("per_device_train_batch_size", batch_size)):
        number = int(settings.get(key, default))
        if (factor := math.gcd(number, left)) > 1:
            left, divided[settings.name(key)] = left // factor, number // factor
            settings.values[settings.name(key)] = number // factor
    if divided:
        changed = " and ".join(f"{name} {number}" for name, number in divided.items())
        settings.comment(
            "trainer",
            f"{sharing // left} devices share rows in {settings.keys.library}; here each has its own, and {changed} "
            "keep the rows of an update",
        )
    if left > 1 and is_quantized:
        settings.comment(
            "trainer",
            f"an update has {left} times as many rows as in {settings.keys.library}, where devices share them, unless "
            f"you train on 1/{left} of the devices",
        )
    elif left > 1:
        settings.comment("trainer", f"{left} devices share rows; here they compute each layer together (tensor)")
        tensor *= left
    shards = None if ranks.shards is None else ranks.shards * sharing // left
    return Ranks(shards, ranks.replicas, tensor)


FSDP_KEYS = Keys(
    "FSDP",
    {"offload_params": "trainer.strategy.offload", "sharding_strategy": "trainer.strategy"},
    {
        **dict.fromkeys(("version", "backward_prefetch", "forward_prefetch", "limit_all_gathers", "xla*"), SPEED),
        **dict.fromkeys(("use_orig_params", "sync_module_states", "cpu_ram_efficient_loading"), SPEED),
        **dict.fromkeys(("auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"), SPEED),
        **dict.fromkeys(("reshard_after_forward", "cpu_offload_pin_memory", "activation_checkpointing"), SPEED),
        **dict.fromkeys(("state_dict_type", "final_state_dict_type"), "checkpoints are written by all devices"),
        "mixed_precision_policy": "trainer.precision says in which precision layers compute",
    },
)
"""What becomes of the keys of `fsdp_config`, without `fsdp_`."""
ACCELERATOR_KEYS = Keys(
    "accelerate",
    {},
    dict.fromkeys(
        (
            *("dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking", "use_configured_state"),
            "gradient_accumulation_kwargs",
        ),
        SPEED,
    ),
    {"split_batches": "it divides a batch among the devices: set the batch size of each device"},
)
"""What becomes of the keys of `accelerator_config`."""


def strategy(settings: Settings, ranks: Ranks, devices: int | None = None) -> Any:
    """`trainer.strategy`, if devices share weights or states; None for Lightning's choice.

    Args:
        settings: The settings.
        ranks: How devices are arranged here.
        devices: Their number, if it is known.
    """
    settings.part("accelerator_config", ACCELERATOR_KEYS)
    if settings.has("accelerator_config"):
        settings.became_nothing("accelerator_config", SPEED)
    deepspeed = settings.get("deepspeed")
    if isinstance(deepspeed, str):
        deepspeed = read(deepspeed) or deepspeed
    is_fsdp, offload, sharding = _fsdp(settings)
    offload |= bool(deepspeed) and _offloads(deepspeed)
    if not deepspeed and not is_fsdp and ranks.tensor == 1:
        if ranks.shards or (ranks.replicas or 1) > 1:
            settings.comment("trainer", "without FSDP, each device holds all weights")
        return None
    if settings.get("load_in_8bit") or settings.get("quantization_bit") == 8:
        settings.comment(STRATEGY, "a base in 8 bits is not sharded here: each device holds it; the numbers are equal")
        return "ddp"
    if sharding in ("NO_SHARD", "3") and ranks.tensor == 1:
        settings.comment(STRATEGY, "DDP takes the place of FSDP without sharding; the numbers are equal")
        return "ddp"
    if deepspeed and not is_fsdp and not offload and not _is_stage_3(deepspeed) and ranks.tensor == 1:
        settings.comment(STRATEGY, "DDP takes the place of DeepSpeed below ZeRO-3; the numbers are equal")
        return "ddp"
    return _sharded(settings, ranks, devices, offload=offload)


def _sharded(settings: Settings, ranks: Ranks, devices: int | None, *, offload: bool) -> Any:
    replicas = ranks.replicas
    if replicas is None and ranks.shards and devices:
        replicas = max(1, devices // (ranks.shards * ranks.tensor))
    elif replicas is None and ranks.shards:
        settings.comment(STRATEGY, f"{ranks.shards} shards; on more devices, set replicas to the number of such groups")
    sizes = given(
        shards=ranks.shards,
        replicas=None if replicas == 1 else replicas,
        tensor=None if ranks.tensor == 1 else ranks.tensor,
    )
    held = "kept and updated in host memory (offload)" if offload else "kept on the devices"
    settings.comment(
        STRATEGY,
        f"FSDP2 shards weights, gradients and optimizer states, which are {held}; the numbers are equal",
    )
    arguments = sizes | given(offload=offload)
    return {"class_path": "Sharded", "init_args": arguments} if arguments else "fsdp2"


def read(name: str) -> Any:
    """The content of a JSON or YAML file that a config names; None if it is not here.

    Raises:
        UserError: it is neither.
    """
    if not Path(name).is_file():
        return None
    try:
        return yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{name}: can't be read as JSON or YAML: {reason(error)}") from error


def _fsdp(settings: Settings) -> tuple[bool, bool, str]:
    """Whether FSDP is on, whether it offloads, and its sharding strategy as it is named."""
    named, config = settings.get("fsdp"), settings.get("fsdp_config")
    words = str(named or "").replace("'", " ").replace(",", " ").strip("[]").split() if named is not True else []
    if isinstance(config, str):  # a file, as on command lines
        if (content := read(config)) is None:
            settings.comment(STRATEGY, f"fsdp_config: {config} is not here, so whether it offloads is not known")
            return True, "offload" in words, ""
        config = content
    if config and not isinstance(config, Mapping):
        settings.refuse("fsdp_config", f"{config!r:.40} is no mapping")
    keys = {str(key).removeprefix("fsdp_"): value for key, value in (config or {}).items()}
    part = Settings(keys, FSDP_KEYS, settings, "fsdp_config")
    sharding = str(part.get("sharding_strategy", "")).upper()
    if sharding.startswith("HYBRID"):
        settings.comment(STRATEGY, f"{sharding}: set replicas to the number of nodes to shard within each (Sharded)")
    return bool(named or config), is_on(part.get("offload_params", False)) or "offload" in words, sharding


def _is_stage_3(deepspeed: Any) -> bool:
    if isinstance(deepspeed, Mapping):
        return int(deepspeed.get("zero_optimization", {}).get("stage", 0)) == 3
    name = Path(str(deepspeed)).stem.lower()
    return any(stage in name for stage in ("zero3", "z3", "stage3", "zero_3"))


def _offloads(deepspeed: Any) -> bool:
    """Whether DeepSpeed keeps parameters or optimizer states in host memory, by its config or the name of its file."""
    if not isinstance(deepspeed, Mapping):
        return "offload" in Path(str(deepspeed)).stem.lower()
    zero = deepspeed.get("zero_optimization", {})
    parts = (zero.get(key) or {} for key in ("offload_optimizer", "offload_param"))
    return any(part.get("device", "none") not in (None, "none") for part in parts)


def sections(
    settings: Settings, kind: str, model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]
) -> dict[str, Any]:
    """The sections of a recipe: seed, model, data and trainer.

    Args:
        settings: The settings.
        kind: Trainer type.
        model: Arguments of the module.
        data: Arguments of the data module.
        trainer: The section `trainer`.
    """
    return {
        "seed_everything": int(settings.noted("seed", 42, "seed_everything")),
        "model": {"class_path": kind, "init_args": model},
        "data": {"class_path": f"{kind}Data", "init_args": data},
        "trainer": trainer,
    }


def around(settings: Settings, *, output: str, save: str, save_steps: int, logger: Any) -> dict[str, Any]:
    """The keys beside `trainer`: the run's folder, when it is saved and validated, its loggers.

    Args:
        settings: The settings.
        output: The library's default of `output_dir`.
        save: Its default of `save_strategy`: `steps`, `epoch` or `no`.
        save_steps: Its default.
        logger: `wandb` and the like, if the config names one.
    """
    folder = Path(str(settings.get("output_dir", output)))
    section: dict[str, Any] = {"name": folder.name or "output", "runs_dir": str(folder.parent)}
    when = str(settings.get("eval_strategy", "no"))
    if when == "steps":
        steps = settings.get("eval_steps", 0) or settings.get("logging_steps", 500)
        if float(steps) >= 1:
            section["val_every"] = int(steps)
        else:
            settings.comment("data", f"{settings.name('eval_steps')}: {steps} of the run; set val_every, in steps")
    return section | given(checkpoint=_checkpoints(settings, save, save_steps), logger=logger)


def _checkpoints(settings: Settings, save: str, save_steps: int) -> dict[str, Any]:
    when = str(settings.get("save_strategy", save))
    kept = given(keep=settings.get("save_total_limit"))
    if settings.get("load_best_model_at_end") or when == "best":
        metric = str(settings.get("metric_for_best_model") or "loss").removeprefix("eval_")
        higher = settings.get("greater_is_better", not metric.endswith("loss"))
        kept |= {"monitor": f"val/{metric}"} | ({"mode": "max"} if higher else {})
    steps = float(settings.get("save_steps", save_steps))
    if when == "no":
        return {"enabled": False}
    if when != "steps" or steps < 1:
        settings.comment(
            "checkpoint",
            f"{settings.keys.library} saves {when if when != 'steps' else f'every {steps} of the run'}; "
            "steps are counted here, 500 unless `every` says otherwise, and the end is always saved",
        )
        return kept
    return {"every": int(steps)} | kept


def loggers(value: Any) -> Any:
    """`logger` from `report_to`; None without one that there is here."""
    names = [value] if isinstance(value, str) else list(value or [])
    known = [name for name in names if name in ("wandb", "tensorboard", "mlflow")]
    return known[0] if len(known) == 1 else known or None
