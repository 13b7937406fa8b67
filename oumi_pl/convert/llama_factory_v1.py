"""The YAML of LLaMA-Factory's new trainers (`v1`) as a recipe. What each key means was read in `llamafactory/v1`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from oumi_pl.convert import training
from oumi_pl.convert.formats import __name__ as FORMATS
from oumi_pl.convert.llama_factory import IMAGES, OTHER_METHOD, preference_loss
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
    "eval_dataset": "data.validation",
    "peft_config": "model.lora",
    "quant_config": "model.quantization",
    "optim_config": "model.optimizer",
    "dist_config": "trainer.strategy",
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
    **dict.fromkeys(("dp_size", "cp_size", "cp_mode", "mp_*", "dist_timeout"), SPEED),
    **dict.fromkeys(("sample_backend", "max_new_tokens", "logging_steps"), training.LOGS),
    **dict.fromkeys(("resume_from_checkpoint", "save_ckpt_as_hf"), training.RESUME),
    "full_determinism": training.WITHOUT_EFFECT["full_determinism"],
    "model_class": "the model is of the class that its files name",
}
REFUSED = {"lr_scheduler_config": "schedules of plug-ins have no counterpart", "image_*": IMAGES, "video_*": IMAGES}
KEYS = Keys("LLaMA-Factory", TRANSLATED, WITHOUT_EFFECT, REFUSED, OTHER_NAMES)

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
    settings.comment(OPTIMIZER, "weight_decay: torch's default for AdamW, which LLaMA-Factory leaves as it is")
    init = _model(settings) | (
        {"loss": preference_loss(settings, float(settings.get("pref_beta", 0.1)))} if kind == "DPO" else {}
    )
    init["optimizer"] = _optimizer(settings)
    _accumulate(settings, devices)
    plug_in = (settings.get("dist_config") or {}).get("name")
    if plug_in == "deepspeed":
        settings.values["deepspeed"] = settings.get("dist_config").get("config_file", "zero3")
    elif plug_in:
        settings.values["fsdp"] = plug_in
    data = {"train": train, "max_length": int(settings.noted("cutoff_len", 2048, "data.init_args.max_length"))}
    data |= {"overflow": "keep_start"} | ({"group_by_length": False} if kind == "SFT" else {})
    data["batch_size"] = int(settings.noted("per_device_train_batch_size", 1, "data.init_args.batch_size"))
    if settings.get("custom_chat_template"):
        settings.refuse("custom_chat_template", "save it to a .jinja file, and set data.template to that")
    mixed = "bf16" if settings.get("bf16", True) else None
    trainer = training.trainer(settings, epochs=3, mixed=mixed, devices=devices)
    peft = dict(settings.get("peft_config") or {})
    if peft.get("name") == "freeze":
        if peft.get("freeze_trainable_modules", "all") != "all" or peft.get("freeze_extra_modules"):
            settings.refuse("peft_config", "parts of layers are named by TrainOnly's patterns in the recipe")
        arguments = {"last_layers": int(peft.get("freeze_trainable_layers", 2))}
        trainer["callbacks"] = [{"class_path": "oumi_pl.convert.train_only.TrainOnly", "init_args": arguments}]
    tree = {
        "seed_everything": int(settings.noted("seed", 42, "seed_everything")),
        "model": {"class_path": kind, "init_args": init},
        "data": {"class_path": f"{kind}Data", "init_args": data},
        "trainer": trainer,
    }
    return tree | training.around(settings, output="outputs", save="epoch", save_steps=500, logger=None), settings


def _sources(settings: Settings, folder: Path) -> tuple[str, Any]:
    """Trainer type and sources of `train_dataset`, a YAML file or a data set."""
    name = str(settings.get("train_dataset"))
    if not name.endswith((".yaml", ".yml")):
        return "SFT", name
    places = [Path(name), *(place / name for place in (folder, *folder.resolve().parents))]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        settings.refuse("train_dataset", f"there is no {name}; run this in LLaMA-Factory's folder")
        raise AssertionError
    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"train_dataset: {file} can't be read: {error}") from error
    kinds, sources = set(), []
    for key, entry in table.items():
        converter = entry.get("converter")
        if "multimodal" in key or converter not in (*CONVERTERS, None):
            settings.refuse("train_dataset", f"{key}: {IMAGES}" if converter is None else f"{key}: unknown {converter}")
        kind, shape = CONVERTERS[converter] if converter else ("SFT", {})
        kinds.add(kind)
        sources.append(_source(settings, entry, shape, file))
    if len(kinds) > 1:
        settings.refuse("train_dataset", f"{name} mixes conversations and pairs")
    return kinds.pop(), sources[0] if len(sources) == 1 else sources


def _source(settings: Settings, entry: Mapping[str, Any], shape: Mapping[str, Any], file: Path) -> dict[str, Any]:
    path = entry["path"]
    if entry.get("source") == "local":
        places = (file.parent, *file.resolve().parents)
        path = str(next((place / path for place in places if (place / path).exists()), path))
    if entry.get("weight"):
        settings.comment("data.init_args.train", "weight: rows of this source are not repeated")
    return {"path": path} | given(split=entry.get("split"), sample=entry.get("size")) | dict(shape)


def _model(settings: Settings) -> dict[str, Any]:
    init: dict[str, Any] = {"model": settings.get("model"), "dtype": "auto"}
    peft = dict(settings.get("peft_config") or {})
    if peft and peft.get("name") not in ("lora", "freeze"):
        settings.refuse("peft_config", f"{peft.get('name')}: {OTHER_METHOD}")
    if peft.get("adapter_name_or_path"):
        init["model"] = peft["adapter_name_or_path"]
        settings.comment(training.LORA, training.NEW_ADAPTER)
        if settings.get("quant_config"):
            settings.refuse("quant_config", training.MERGE_FIRST)
    if peft.get("name") == "lora":
        targets = peft.get("target_modules", "all")
        init["lora"] = {"r": peft.get("r", 8), "lora_alpha": peft.get("lora_alpha", 16)} | given(
            lora_dropout=float(peft.get("lora_dropout", 0.05)) or None,
            target_modules=None if targets == "all" else targets,
            modules_to_save=peft.get("modules_to_save"),
            use_rslora=bool(peft.get("use_rslora")),
            use_dora=bool(peft.get("use_dora")),
        )
    quantized = dict(settings.get("quant_config") or {})
    if quantized:
        bits = quantized.get("quantization_bit", 4)
        if quantized.get("name", "bnb") not in ("bnb", "auto") or bits not in (4, 8):
            settings.refuse(
                "quant_config", f"{quantized.get('name')} with {bits} bits: bnb with 4 or 8 has a counterpart"
            )
        init["quantization"] = {4: "nf4", 8: "int8"}[bits]
        settings.values["load_in_4bit"] = True
    checkpointing = bool(settings.noted("enable_activation_checkpointing", True, f"{MODEL}.gradient_checkpointing"))
    return init | given(gradient_checkpointing=checkpointing, trust_remote_code=bool(settings.get("trust_remote_code")))


def _optimizer(settings: Settings) -> dict[str, Any]:
    plug_in = dict(settings.get("optim_config") or {})
    if plug_in and plug_in.get("name") != "muon":
        settings.refuse("optim_config", f"{plug_in.get('name')} has no counterpart; leave it out, or name muon")
    if plug_in:
        settings.values |= {"optim": "muon", "weight_decay": float(plug_in.get("wd", 0.1))}
        betas = plug_in.get("adamw_betas", (0.9, 0.95))
        settings.values |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
    return training.optimizer(settings, "adamw_torch", 1e-4)


def _accumulate(settings: Settings, devices: int | None) -> None:
    rows = settings.get("global_batch_size")
    if rows is None:
        return
    size = int(settings.get("per_device_train_batch_size", 1)) * (devices or 1)
    settings.values["gradient_accumulation_steps"] = max(1, int(rows) // size)
    settings.comment("trainer.accumulate_grad_batches", f"global_batch_size {rows} on {devices or 1} devices")
