"""The YAML of LLaMA-Factory's new trainers (`v1`) as a recipe. What each key means was read in `llamafactory/v1`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from oumi_pl.convert import training
from oumi_pl.convert.formats import __name__ as FORMATS
from oumi_pl.convert.llama_factory import IMAGES, OTHER_METHOD, find, freeze, preference_loss, quantization
from oumi_pl.convert.settings import Keys, Settings
from oumi_pl.convert.training import MODEL, OPTIMIZER, SPEED
from oumi_pl.core.recipe.notes import given
from oumi_pl.errors import UserError

OTHER_NAMES = {
    "per_device_train_batch_size": "micro_batch_size",
}
TRANSLATED = {
    "model": "model.model",
    "train_dataset": "data.train",
    "peft_config": "model.lora",
    "quant_config": "model.quantization",
    "optim_config": "model.optimizer",
    **dict.fromkeys(("dist_config", "mp_replicate_size", "mp_shard_size"), "trainer.strategy"),
    "dp_size": "trainer.devices",
    "cp_size": "the rows of each device",
    "micro_batch_size": "data.batch_size",
    "global_batch_size": "trainer.accumulate_grad_batches",
    "cutoff_len": "data.max_length and overflow",
    "enable_activation_checkpointing": "model.gradient_checkpointing",
    "save_epochs": "checkpoint",
    "custom_chat_template": "data.template",
    **dict.fromkeys(
        ("pref_loss", "pref_beta", "pref_ftx", "simpo_gamma", "dpo_label_smoothing", "ld_alpha"), "model.loss"
    ),
    **{
        name: training.NAMES[name]
        for name in ("learning_rate", "num_train_epochs", "max_steps", "max_grad_norm", "bf16")
    },
    **{name: training.NAMES[name] for name in ("output_dir", "save_steps", "save_total_limit", "seed")},
    "trust_remote_code": "model.trust_remote_code",
}
WITHOUT_EFFECT = {
    **dict.fromkeys(("kernel_config", "flash_attn", "init_config", "batching_strategy", "batching_workers"), SPEED),
    **dict.fromkeys(("cp_mode", "dist_timeout"), SPEED),
    **dict.fromkeys(("sample_backend", "max_new_tokens", "logging_steps"), training.LOGS),
    **dict.fromkeys(("resume_from_checkpoint", "save_ckpt_as_hf"), training.RESUME),
    "full_determinism": training.WITHOUT_EFFECT["full_determinism"],
    "eval_dataset": "LLaMA-Factory's v1 does not read it; set data.validation to score held-out rows",
    "model_class": "the model is of the class that its files name",
}
REFUSED = {"lr_scheduler_config": "schedules of plug-ins have no counterpart", "image_*": IMAGES, "video_*": IMAGES}
NULL = dict.fromkeys(("bf16", "enable_activation_checkpointing"), False)
"""Key that is on by default -> what null means."""
KEYS = Keys("LLaMA-Factory", TRANSLATED, WITHOUT_EFFECT, REFUSED, OTHER_NAMES, NULL)

PEFT_KEYS = Keys(
    "LLaMA-Factory",
    {
        **dict.fromkeys(("name", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"), "model.lora"),
        **dict.fromkeys(("use_rslora", "use_dora", "adapter_name_or_path"), "model.lora"),
        **dict.fromkeys(("freeze_trainable_layers", "freeze_trainable_modules"), "trainer.callbacks, TrainOnly"),
    },
    {
        **dict.fromkeys(("export_*", "infer_dtype"), "it decides on exports"),
        "cast_trainable_params_to_fp32": "weights that are trained have model.dtype",
    },
    {"freeze_extra_modules": "parts of layers are named by TrainOnly's patterns in the recipe"},
    {"lora_r": "r", "lora_modules_to_save": "modules_to_save"},
)
QUANTIZATION_KEYS = Keys(
    "LLaMA-Factory",
    dict.fromkeys(("name", "quantization_bit", "quantization_type", "double_quantization"), "model.quantization"),
    {"compute_dtype": "layers compute in trainer.precision"},
    null={"double_quantization": False},
)
OPTIMIZER_KEYS = Keys(
    "LLaMA-Factory",
    dict.fromkeys(("name", "wd", "adamw_betas", "adamw_eps", "momentum", "ns_steps", "nesterov"), "model.optimizer"),
    {"lr": "learning_rate overrides it"},
    dict.fromkeys(("*",), "it has no counterpart; set the optimizer's arguments in the recipe"),
)
DISTRIBUTION_KEYS = Keys(
    "LLaMA-Factory",
    dict.fromkeys(("name", "config_file", "offload_params"), "trainer.strategy"),
    {
        **dict.fromkeys(("reshard_after_forward", "pin_memory", "ep_size", "ep_dispatcher"), SPEED),
        **dict.fromkeys(("hook_modules", "fsdp_implementation", "fsdp_ignored_modules"), SPEED),
        "dcp_path": "the model is loaded from its own files",
    },
)
ENTRY_KEYS = Keys(
    "LLaMA-Factory",
    dict.fromkeys(("path", "source", "split", "size", "weight", "converter"), "a source"),
    {"streaming": "rows are read and tokenized before training, and not streamed"},
)
"""What becomes of the keys of each plug-in, and of a data set."""

CONVERTERS = {
    "alpaca": ("SFT", {"format": f"{FORMATS}.concatenated_alpaca"}),
    "sharegpt": ("SFT", {"format": "sharegpt"}),
    "openai": ("SFT", {"format": "messages"}),
    "pair": ("DPO", {"format": "implicit_prompt"}),
}
"""`converter` of a data set -> trainer type, and how its rows are read."""


def recipe(values: Mapping[str, Any], folder: Path, devices: int | None = None) -> tuple[dict[str, Any], Settings]:
    """The recipe that trains what LLaMA-Factory's `v1` trains with a config, and the notes on it.

    Args:
        values: The config.
        folder: Its folder, in or above which `train_dataset` is looked for.
        devices: Devices per node.

    Raises:
        UserError: something has no counterpart.
    """
    settings = Settings(values, KEYS)
    kind, train = _sources(settings, folder)
    settings.values |= {"weight_decay": 0.01, "save_strategy": "steps" if settings.has("save_steps") else "epoch"}
    if epochs := settings.get("save_epochs"):
        settings.comment("checkpoint", f"save_epochs {epochs}: set `every` to so many steps")
    settings.comment(OPTIMIZER, "weight_decay: torch's default for AdamW, which LLaMA-Factory leaves as it is")
    peft = settings.part("peft_config", PEFT_KEYS)
    init = _model(settings, peft) | ({"loss": preference_loss(settings)} if kind == "DPO" else {})
    init["optimizer"] = _optimizer(settings)
    devices, ranks = _distribution(settings, devices)
    data = {"train": train, "max_length": int(settings.noted("cutoff_len", 2048, "data.init_args.max_length"))}
    data |= {"overflow": "keep_start"} | ({"group_by_length": False} if kind == "SFT" else {})
    data["batch_size"] = int(settings.noted("per_device_train_batch_size", 1, "data.init_args.batch_size"))
    if settings.get("custom_chat_template"):
        settings.refuse("custom_chat_template", "save it to a .jinja file, and set data.template to that")
    mixed = "bf16" if settings.get("bf16", True) else None
    trainer = training.trainer(settings, epochs=3, mixed=mixed, devices=devices, ranks=ranks)
    trainer |= given(callbacks=freeze(peft) if peft.get("name") == "freeze" else [])
    tree = training.sections(settings, kind, init, data, trainer)
    return tree | training.around(settings, output="outputs", save="epoch", save_steps=500, logger=None), settings


def _sources(settings: Settings, folder: Path) -> tuple[str, Any]:
    """Trainer type and sources of `train_dataset`, a YAML file or a data set."""
    name = str(settings.get("train_dataset"))
    if not name.endswith((".yaml", ".yml")):
        return "SFT", name
    file = find(name, folder)
    if file is None:
        settings.refuse("train_dataset", f"there is no {name}; run this in LLaMA-Factory's folder")
        raise AssertionError
    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"train_dataset: {file} can't be read: {error}") from error
    kinds, sources = set(), []
    for key, values in table.items():
        entry = Settings(values, ENTRY_KEYS, settings, f"train_dataset.{key}")
        converter = entry.get("converter")
        if "multimodal" in key or converter not in (*CONVERTERS, None):
            settings.refuse("train_dataset", f"{key}: {IMAGES}" if converter is None else f"{key}: unknown {converter}")
        kind, shape = CONVERTERS[converter] if converter else ("SFT", {})
        kinds.add(kind)
        sources.append(_source(settings, entry, shape, file))
    if len(kinds) > 1:
        settings.refuse("train_dataset", f"{name} mixes conversations and pairs")
    return kinds.pop(), sources[0] if len(sources) == 1 else sources


def _source(settings: Settings, entry: Settings, shape: Mapping[str, Any], file: Path) -> dict[str, Any]:
    path = str(entry.get("path"))
    if entry.get("source") == "local":
        path = str(find(path, file.parent) or path)
    if weight := entry.get("weight"):
        settings.comment("data.init_args.train", f"{path}: weight {weight}: its rows are taken once")
    return {"path": path} | given(split=entry.get("split"), sample=entry.get("size")) | dict(shape)


def _model(settings: Settings, peft: Settings) -> dict[str, Any]:
    init: dict[str, Any] = {"model": settings.get("model"), "dtype": "auto"}
    name = peft.get("name")
    if peft.values and name not in ("lora", "freeze"):
        settings.refuse("peft_config", f"{name}: {OTHER_METHOD}")
    if adapter := peft.get("adapter_name_or_path"):
        init["model"] = adapter
        settings.comment(training.LORA, training.NEW_ADAPTER)
        if settings.get("quant_config"):
            settings.refuse("quant_config", training.MERGE_FIRST)
    if name == "lora":
        targets = peft.get("target_modules", "all")
        defaults = {"r": 8, "alpha": 16, "dropout": 0.05}
        init["lora"] = training.lora(peft, defaults, "all-linear" if targets == "all" else targets)
    quantized = settings.part("quant_config", QUANTIZATION_KEYS)
    if (plug_in := quantized.get("name", "bnb")) not in ("bnb", "auto"):
        settings.refuse("quant_config", f"{plug_in} has no counterpart; name bnb, with 4 or 8 bits")
    bits = quantized.get("quantization_bit", 4 if quantized.values and plug_in == "bnb" else None)
    if bits is not None:
        init["quantization"] = quantization(quantized, bits)
        settings.values["load_in_8bit" if bits == 8 else "load_in_4bit"] = True
    checkpointing = bool(settings.noted("enable_activation_checkpointing", True, f"{MODEL}.gradient_checkpointing"))
    return init | given(gradient_checkpointing=checkpointing, trust_remote_code=bool(settings.get("trust_remote_code")))


def _optimizer(settings: Settings) -> dict[str, Any]:
    plug_in = settings.part("optim_config", OPTIMIZER_KEYS)
    if not plug_in.values:
        return training.optimizer(settings, "adamw_torch", 1e-4)
    if plug_in.get("name") != "muon" or not plug_in.get("nesterov", True):
        settings.refuse(
            "optim_config", "only muon, with Nesterov's momentum, has a counterpart; leave it out for AdamW"
        )
    betas = plug_in.get("adamw_betas", (0.9, 0.95))
    settings.values |= {"optim": "muon", "weight_decay": float(plug_in.get("wd", 0.1))}
    settings.values |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
    optimizer = training.optimizer(settings, "adamw_torch", 1e-4)
    optimizer["init_args"] |= given(
        momentum=plug_in.get("momentum"), ns_steps=plug_in.get("ns_steps"), eps=plug_in.get("adamw_eps")
    )
    return optimizer


def _distribution(settings: Settings, devices: int | None) -> tuple[int | None, training.Ranks]:
    """Devices and their arrangement; the accumulation and the strategy are set as other libraries name them."""
    plug_in = settings.part("dist_config", DISTRIBUTION_KEYS)
    if plug_in.get("name") == "deepspeed":
        settings.values["deepspeed"] = plug_in.get("config_file", "zero3")
    elif plug_in.get("name"):
        settings.values["fsdp"] = plug_in.get("name")
        settings.values["fsdp_config"] = {"offload_params": bool(plug_in.get("offload_params"))}
    shards, replicas = settings.get("mp_shard_size"), training.size(settings, "mp_replicate_size")
    sharing = training.size(settings, "cp_size")
    if ranks := settings.get("dp_size"):
        devices = devices or int(ranks) * sharing
    if rows := settings.get("global_batch_size"):
        devices = devices or sharing
        _accumulate(settings, int(rows), devices, sharing)
    # the groups that hold all weights span devices that share rows as well
    ranks = training.divide_rows(settings, training.Ranks(sharing=sharing), 1)
    shards = None if shards is None else int(shards) // ranks.tensor
    return devices, training.Ranks(shards if (shards or 1) > 1 else None, replicas, ranks.tensor)


def _accumulate(settings: Settings, rows: int, devices: int, sharing: int) -> None:
    """Sets batch size and accumulation so that an update has its rows on these devices.

    Raises:
        UserError: the rows can't be divided among them.
    """
    groups = max(1, devices // sharing)
    if rows % groups:
        settings.refuse("global_batch_size", f"{rows} rows are no multiple of the {groups} devices that read them")
    size = math.gcd(rows // groups, int(settings.get("per_device_train_batch_size", 1)))
    settings.values |= {"micro_batch_size": size, "gradient_accumulation_steps": rows // groups // size}
    settings.comment(
        "trainer",
        f"global_batch_size: an update has {rows} rows on {devices} devices; for N of them, convert with --devices N",
    )
