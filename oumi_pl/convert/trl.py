"""TRL's command lines and YAML as a recipe: `trl sft`, `dpo`, `kto` and `reward` of TRL 1.16, with its defaults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oumi_pl.convert import training
from oumi_pl.convert.settings import Keys, Settings, number
from oumi_pl.convert.training import MODEL, SPEED
from oumi_pl.core.recipe.notes import given
from oumi_pl.core.recipe.trainer_kwargs import LOSSES, RESPONSE_LOSSES, SMOOTHED

TRAINERS = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward"}
RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "reward": 1e-4}
"""Trainer -> default of `learning_rate`; the other defaults are the same for all."""
LORA_DEFAULTS = {"r": 16, "alpha": 32, "dropout": 0.05}
TRAIN, TRAIN_ON = "data.init_args.train", "data.init_args.train_on"

_MODEL = {
    **dict.fromkeys(("model_name_or_path", "model"), "model.model"),
    "model_revision": "model.revision",
    **dict.fromkeys(("dtype", "torch_dtype"), "model.dtype"),
    "attn_implementation": "model.attn",
    "trust_remote_code": "model.trust_remote_code",
    **dict.fromkeys(("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), "model.lora"),
    **dict.fromkeys(("lora_target_parameters", "lora_modules_to_save", "use_rslora", "use_dora"), "model.lora"),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"), "model.quantization"
    ),
}
_DEVICES = {
    **dict.fromkeys(("accelerate_config", "config_file"), "trainer.strategy"),
    "num_processes": "trainer.devices",
    "num_machines": "trainer.num_nodes",
    "launcher": "nothing",
}
_DATA = {
    **dict.fromkeys(("dataset_name", "datasets"), "data.train"),
    "dataset_config": "data.train.config",
    "dataset_train_split": "data.train.split",
    "dataset_test_split": "data.validation.split",
    "max_length": "data.max_length",
    "pad_token": "data.pad_token",
}
_OF_SFT = {
    "packing": "data.packing",
    "dataset_text_field": "data.train.columns",
    "completion_only_loss": "data.train_on",
    "assistant_only_loss": "data.train_on",
    "chat_template_path": "data.template",
    "loss_type": "model.loss",
    "packing_strategy": "data.packing",
    "truncation_mode": "data.overflow",
}
_OF_DPO = {
    **dict.fromkeys(("beta", "loss_type", "loss_weights", "label_smoothing", "discopop_tau", "ld_alpha"), "model.loss"),
    **dict.fromkeys(("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"), "model.sync_every and mixup"),
    "truncation_mode": "data.overflow",
}
_OF_KTO = {
    **dict.fromkeys(("beta", "loss_type"), "model.loss"),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), "its name here"),
    **dict.fromkeys(("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"), "model.sync_every and mixup"),
}
_OF_REWARD = {
    "center_rewards_coefficient": "model.loss.center_rewards_coefficient",
    "chat_template_path": "data.template",
}

WITHOUT_EFFECT = training.WITHOUT_EFFECT | {
    **dict.fromkeys(("padding_free", "pad_to_multiple_of", "dataset_num_proc", "precompute_ref_*"), SPEED),
    **dict.fromkeys(("bnb_4bit_quant_storage",), SPEED),
    "eval_packing": "the loss of validation is that of the rows in any layout",
    "dataset_kwargs": "rows are tokenized here in any case",
    "ignore_bias_buffers": "buffers are not synchronised",
    "lora_task_type": "it follows from the trainer type",
    "disable_dropout": "dropout is off where there is a reference",
    "eos_token": "a turn ends as the template ends it",
    "shuffle_dataset": "rows are shuffled in each epoch",
    "dataset_streaming": "rows are read and tokenized before training, and not streamed",
}
REFUSED = training.REFUSED | {
    **dict.fromkeys(("use_weighting", "router_aux_loss_coef"), "it has no counterpart"),
    "model_init_kwargs": "write the arguments of the model into the recipe, under model.config",
    "f_alpha_divergence_coef": "only reverse_kl has a counterpart",
}
ONLY = {
    "f_divergence_type": ("reverse_kl",),
    "packing_strategy": ("bfd",),
    "truncation_mode": ("keep_start",),
    "bnb_4bit_quant_type": ("nf4",),
}
"""Argument -> the values that have a counterpart."""
UNCUT = 32_768
"""Tokens of a row where TRL cuts none: longer ones stop the run."""
NULL = {"max_grad_norm": 0.0, "gradient_checkpointing": False, "max_length": -1}
"""Argument -> the value that null stands for; of others it is the default, or refused by TRL."""
KEYS = {
    name: Keys(
        "TRL",
        training.NAMES | _MODEL | _DEVICES | _DATA | own | {"f_divergence_type": "model.loss"},
        WITHOUT_EFFECT,
        REFUSED,
        null=NULL,
    )
    for name, own in {"sft": _OF_SFT, "dpo": _OF_DPO, "kto": _OF_KTO, "reward": _OF_REWARD}.items()
}
"""Trainer -> its keys."""


def recipe(values: Mapping[str, Any], name: str | None, devices: int | None = None) -> tuple[dict[str, Any], Settings]:
    """The recipe that trains what TRL trains, and the notes on it.

    Args:
        values: Arguments by name.
        name: `sft`, `dpo`, `kto` or `reward`.
        devices: Devices per node.

    Raises:
        UserError: something has no counterpart, or the trainer isn't named.
    """
    settings = Settings(values, KEYS[trainer_name(name)])
    name = trainer_name(name)
    for argument, known in ONLY.items():
        if settings.has(argument) and settings.get(argument) not in known:
            settings.refuse(argument, f"{settings.get(argument)!r} has no counterpart; the only value is {known[0]}")
    if not settings.has("model_name_or_path") and not settings.has("model"):
        settings.refuse("model_name_or_path", "missing, and there is no default")
    data = _data(settings, name)
    init = _model(settings) | _OBJECTIVES[name](settings)
    init["optimizer"] = training.optimizer(settings, "adamw_torch_fused", RATES[name])
    if (schedule := training.schedule(settings, "linear")) is not None:
        init["schedule"] = schedule
    mixed = "fp16" if settings.get("fp16") else "bf16" if settings.noted("bf16", True, "trainer.precision") else None
    launched = _launch(settings, devices)
    trainer = launched | training.trainer(settings, epochs=3.0, mixed=mixed, devices=launched.get("devices"))
    tree = training.sections(settings, TRAINERS[name], init, data, trainer)
    logger = training.loggers(settings.get("report_to"))
    return tree | training.around(
        settings, output="trainer_output", save="steps", save_steps=500, logger=logger
    ), settings


def trainer_name(name: str | None) -> str:
    """The trainer.

    Raises:
        UserError: it isn't one that has a counterpart.
    """
    from oumi_pl.errors import UserError

    if name not in TRAINERS:
        raise UserError(
            f"TRL's config doesn't say which trainer it is for: add --trainer {', '.join(TRAINERS)}"
            if name is None
            else f"--trainer {name}: unknown; there are {', '.join(TRAINERS)}"
        )
    return name


STARTING = "it decides on how processes are started"
LAUNCH_KEYS = Keys(
    "accelerate",
    dict.fromkeys(("fsdp_config", "deepspeed_config", "num_processes", "num_machines"), "trainer"),
    {"mixed_precision": "bf16 and fp16 decide", "*": STARTING},
    {"parallelism_config": training.REFUSED["parallelism_config"]},
)
"""What becomes of the keys of a config of `accelerate`."""
ZERO = {"zero1": 1, "zero2": 2, "zero3": 3}
SUPPLIED: dict[str, dict[str, Any]] = {
    **{name: {"fsdp_config": {"offload_params": False}, "num_processes": 8} for name in ("fsdp1", "fsdp2")},
    **{name: {"deepspeed_config": {"zero_stage": stage}, "num_processes": 8} for name, stage in ZERO.items()},
    "multi_gpu": {"num_processes": 8},
    "single_gpu": {"num_processes": 1},
}
"""TRL's own configs of `accelerate`, without what decides on nothing here."""


def _launch(settings: Settings, devices: int | None) -> dict[str, Any]:
    """Devices per node and nodes; the strategy of a config of `accelerate` is set as transformers names it."""
    name = settings.get("accelerate_config") or settings.get("config_file")
    values = SUPPLIED.get(str(name))
    if name is not None and values is None and (values := training.read(str(name))) is None:
        settings.comment("trainer", f"{name}: there is no such file here; set devices and strategy as it says")
    config = Settings(values or {}, LAUNCH_KEYS, settings, str(name))
    if (fsdp := config.get("fsdp_config")) is not None:
        settings.values.setdefault("fsdp", "full_shard")
        settings.values.setdefault("fsdp_config", fsdp)
    if isinstance(deepspeed := config.get("deepspeed_config"), Mapping):
        if file := deepspeed.get("deepspeed_config_file"):
            settings.values.setdefault("deepspeed", file)
        offload = {part: {"device": deepspeed.get(f"{part}_device")} for part in ("offload_optimizer", "offload_param")}
        stage = {"stage": deepspeed.get("zero_stage", 2)}
        settings.values.setdefault("deepspeed", {"zero_optimization": stage | offload})
    for option in str(settings.get("launcher", "")).split():  # each by its name
        settings.notes.became[f"launcher.{option}"] = f"nothing: {STARTING}"
    settings.notes.became.pop("launcher", None)
    processes = int(settings.get("num_processes", config.get("num_processes", 0)))
    machines = max(1, int(settings.get("num_machines", config.get("num_machines", 1))))
    return given(devices=devices or processes // machines or None, num_nodes=machines if machines > 1 else None)


def _model(settings: Settings) -> dict[str, Any]:
    init: dict[str, Any] = {"model": settings.get("model_name_or_path") or settings.get("model")}
    dtype = str(settings.get("dtype") or settings.get("torch_dtype") or "float32").removeprefix("torch.")
    init |= {} if dtype == "float32" else {"dtype": dtype}
    if settings.get("use_peft"):
        targets = settings.get("lora_target_modules")
        targets = targets[0] if isinstance(targets, list) and len(targets) == 1 else targets
        init["lora"] = training.lora(settings, LORA_DEFAULTS, targets)
        bits = {"nf4": settings.get("load_in_4bit"), "int8": settings.get("load_in_8bit")}
        if settings.get("load_in_4bit") and not settings.get("use_bnb_nested_quant"):
            settings.comment(f"{MODEL}.quantization", "the constants of quantization are quantized too")
        init |= given(quantization=next((name for name, is_set in bits.items() if is_set), None))
    for key in ("load_in_4bit", "load_in_8bit"):
        if settings.get(key) and not settings.get("use_peft"):
            settings.became_nothing(key, "only the base of an adapter is quantized")
    attention = settings.get("attn_implementation")
    revision = settings.get("model_revision")
    checkpointing = bool(settings.noted("gradient_checkpointing", True, f"{MODEL}.gradient_checkpointing"))
    return init | given(
        attn=None if attention in (None, "sdpa", "flash_attention_2", "flash_attention_3") else attention,
        gradient_checkpointing=checkpointing,
        revision=None if revision == "main" else revision,
        trust_remote_code=bool(settings.get("trust_remote_code")),
    )


# --- the data ---------------------------------------------------------------------------------------------------------


def _data(settings: Settings, name: str) -> dict[str, Any]:
    text = settings.get("dataset_text_field", "text")
    columns = {"columns": {"text": text}} if text != "text" else {}
    if settings.has("datasets"):
        values = settings.get("datasets")
        listed = [_dataset(settings, one, f"datasets[{i}]") | columns for i, one in enumerate(values)]
    elif settings.has("dataset_name"):
        first = {"path": settings.get("dataset_name"), "name": settings.get("dataset_config")}
        first |= {"split": settings.get("dataset_train_split", "train")}
        listed = [_dataset(settings, first, "dataset_name") | columns]
    else:
        settings.refuse("dataset_name", "missing, so there is nothing to train on")
    args: dict[str, Any] = {"train": listed[0] if len(listed) == 1 else listed}
    if str(settings.get("eval_strategy", "no")) != "no":
        args["validation"] = listed[0] | {"split": settings.get("dataset_test_split", "test")}
    args |= given(pad_token=settings.get("pad_token"), template=_template(settings))
    length = int(settings.noted("max_length", 1024, "data.init_args.max_length"))
    args |= {"max_length": length if length > 0 else UNCUT, "overflow": "keep_start" if length > 0 else "error"}
    if length < 0:
        settings.comment("data.init_args.max_length", "TRL cuts no row; a longer one stops the run here: raise this")
    args["batch_size"] = int(settings.noted("per_device_train_batch_size", 8, "data.init_args.batch_size"))
    args |= given(eval_batch_size=settings.get("per_device_eval_batch_size"))
    args |= given(
        workers=settings.get("dataloader_num_workers") or None,
        trust_remote_code=bool(settings.get("trust_remote_code")),
    )
    return args | (_tokens(settings) if name == "sft" else training.by_length(settings, TRAINERS[name]))


DATASET_KEYS = Keys(
    "TRL",
    dict.fromkeys(("path", "name", "split", "data_files", "columns"), "a source"),
    refused={"data_dir": "of a data set no single files are read; fetch them, and name them"},
)
"""What becomes of the keys of a data set."""


def _dataset(settings: Settings, values: Mapping[str, Any], place: str) -> dict[str, Any]:
    one = Settings(values, DATASET_KEYS, settings, place)
    files, path = one.get("data_files"), one.get("path")
    if files and path not in ("json", "csv", "parquet", "text"):
        settings.refuse("datasets", f"{path}: of a data set no single files are read; fetch them, and name them")
    source: dict[str, Any] = {"path": str(files if files else path)} | given(config=one.get("name"))
    if columns := one.get("columns"):
        settings.comment(TRAIN, f"columns {columns}: other columns that a format reads are read too")
    return source | ({"split": one.get("split")} if one.get("split", "train") != "train" else {})


def _tokens(settings: Settings) -> dict[str, Any]:
    if settings.get("assistant_only_loss"):
        train_on = "assistant"
    elif settings.get("completion_only_loss") is not None:
        train_on = "completion" if settings.get("completion_only_loss") else "all"
    else:
        train_on = "completion_or_all"
        settings.comment(TRAIN_ON, "of rows with `prompt` and `completion` the completion, of others all, as in TRL")
    if settings.get("packing"):
        settings.comment(
            "data.init_args.packing", "rows of a pack never see each other; in TRL they do without flash attention"
        )
        return {"train_on": train_on, "packing": True}
    return {"train_on": train_on} | training.by_length(settings, "SFT")


def _template(settings: Settings) -> str | None:
    path = settings.get("chat_template_path")
    if path is not None and not str(path).endswith(".jinja"):
        settings.refuse("chat_template_path", f"{path}: the template of another model is no file; save it as .jinja")
    return None if path is None else str(Path(path))


# --- the objective ----------------------------------------------------------------------------------------------------


def _sft(settings: Settings) -> dict[str, Any]:
    if settings.get("loss_type", "nll") != "nll":
        settings.refuse("loss_type", f"{settings.get('loss_type')!r} has no counterpart; the only value is nll")
    smoothing = float(settings.get("label_smoothing_factor", 0.0))
    return {"loss": {"class_path": "CrossEntropy", "init_args": {"label_smoothing": smoothing}}} if smoothing else {}


def _dpo(settings: Settings) -> dict[str, Any]:
    named = settings.get("loss_type") or "sigmoid"
    names = [str(one) for one in (named if isinstance(named, list) else [named])]
    losses = [_single(settings, one) for one in names]
    loss, weights = losses[0], settings.get("loss_weights") or [1.0] * len(losses)
    weights = [number(weight) for weight in weights]
    if not all(isinstance(weight, int | float) for weight in weights):
        settings.refuse("loss_weights", f"{weights!r:.40} are no numbers")
    if len(losses) > 1 or weights != [1.0]:
        loss = {
            "class_path": "WeightedSum",
            "init_args": {"losses": losses, "weights": [float(w) for w in weights]},
        }
    if settings.has("ld_alpha"):
        loss = {"class_path": "LDDPO", "init_args": {"loss": loss, "alpha": float(settings.get("ld_alpha", 1.0))}}
    return {"loss": loss} | _moving(settings)


def _single(settings: Settings, name: str) -> dict[str, Any]:
    if name not in LOSSES:
        settings.refuse("loss_type", f"{name!r} has no counterpart; use one of {', '.join(LOSSES)}")
    arguments = {} if name == "sft" else {"beta": float(settings.noted("beta", 0.1, f"{MODEL}.loss"))}
    smoothing = float(settings.get("label_smoothing", 0.0))
    if smoothing and name not in SMOOTHED:
        settings.refuse("label_smoothing", f"{name} takes none")
    arguments |= given(label_smoothing=smoothing or None)
    if name == "discopop":
        arguments["tau"] = float(settings.get("discopop_tau", 0.05))
    return {"class_path": LOSSES[name]} | given(init_args=arguments)


def _kto(settings: Settings) -> dict[str, Any]:
    name = str(settings.get("loss_type", "kto"))
    if name not in RESPONSE_LOSSES:
        settings.refuse("loss_type", f"{name!r} has no counterpart; use one of {', '.join(RESPONSE_LOSSES)}")
    settings.comment("data", "the KL divergence is estimated once per update; TRL's is of the micro-batch")
    beta = float(settings.noted("beta", 0.1, f"{MODEL}.loss"))
    weights = {key: float(settings.get(key, 1.0)) for key in ("desirable_weight", "undesirable_weight")}
    return {"loss": {"class_path": RESPONSE_LOSSES[name], "init_args": {"beta": beta}}} | weights | _moving(settings)


def _moving(settings: Settings) -> dict[str, Any]:
    if not settings.get("sync_ref_model"):
        return {}
    steps, alpha = settings.get("ref_model_sync_steps", 512), settings.get("ref_model_mixup_alpha", 0.6)
    return {"sync_every": int(steps), "mixup": float(alpha)}


def _reward(settings: Settings) -> dict[str, Any]:
    value = settings.get("center_rewards_coefficient")
    return {
        "loss": {"class_path": "BradleyTerry"}
        | ({"init_args": {"center_rewards_coefficient": float(value)}} if value else {})
    }


_OBJECTIVES = {"sft": _sft, "dpo": _dpo, "kto": _kto, "reward": _reward}
"""Trainer -> arguments of the module for its loss."""
