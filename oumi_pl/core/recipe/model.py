"""The model of an Oumi config: weights, precision, adapters, quantization, frozen layers."""

import inspect
from typing import Any

from oumi_pl.core.configs import ModelParams, TrainingConfig
from oumi_pl.core.recipe.notes import Notes, given, refuse
from oumi_pl.core.registry import REGISTRY

CUSTOM = ("MLPEncoder", "CNNClassifier")
DROPPED = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map")
"""Keys of a model's config file that don't describe its shape."""
BEGINNINGS: dict[str, bool | str] = {"DEFAULT": True, "RANDOM": False, "GAUSSIAN": "gaussian"}
"""Oumi's names for how adapters begin -> PEFT's; the others rewrite the base, or don't work."""

_REWRITES = "it rewrites the base weights, on which the saved adapter is to be put; use DEFAULT or GAUSSIAN"
WHY_NOT = {
    "EVA": "Oumi never runs it, so that it is DEFAULT; say that",
    **dict.fromkeys(("PISA", "OLORA"), _REWRITES),
    **dict.fromkeys(("PISSA_NITER", "LOFTQ"), "Oumi can't run it; use DEFAULT or GAUSSIAN"),
}


def model(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """The arguments of the LightningModule but for optimizer, schedule and loss.

    Raises:
        UserError: something has no counterpart.
    """
    params, training = config.model, config.training
    _refuse_names(params)
    args = _weights(params, notes) | _dtype(params, notes) | (_lora(config, notes) if training.use_peft else {})
    frozen = list(params.freeze_layers)
    if frozen and training.use_peft:
        frozen = []
        notes.nothing("model.freeze_layers", "Oumi trains the adapters in these layers, and all else is frozen anyway")
    elif frozen:
        notes.comment(
            "model.init_args.freeze",
            "freeze_layers: a name that the model doesn't have is refused, and not passed over",
        )
    if params.model_revision is not None:
        notes.comment(
            "model.init_args.revision",
            "model_revision is of the model alone: the tokenizer is that of the default branch",
        )
    return args | given(
        attn=None if params.attn_implementation == "sdpa" else params.attn_implementation,
        freeze=frozen,
        gradient_checkpointing=_checkpointing(config, notes),
        compile=training.compile,
        revision=params.model_revision,
        trust_remote_code=params.trust_remote_code,
        text_only=params.text_only,
    )


def _refuse_names(params: ModelParams) -> None:
    name = params.model_name
    if "://" in name:
        refuse("model.model_name", f"{name!r} is an address; name a model of the hub or a folder")
    if REGISTRY.get_model(name) is not None:
        refuse("model.model_name", f"{name!r} is registered: `train` trains it, and there is no recipe of it")
    if name in CUSTOM:
        refuse("model.model_name", f"Oumi's {name} is no language model; name a model of the hub or a folder")
    for key in params.tokenizer_kwargs:
        if key not in ("pad_token", "padding_side"):
            refuse(f"model.tokenizer_kwargs.{key}", "has no counterpart; save such a tokenizer, and name its folder")


def _weights(params: ModelParams, notes: Notes) -> dict[str, Any]:
    values = dict(params.model_kwargs)
    disable_dropout = values.pop("disable_dropout", False)
    if "quantization_config" in values:
        values["quantization_config"] = _dequantized(values["quantization_config"], notes)
    if params.load_pretrained_weights:
        if disable_dropout:
            values = _no_dropout(_read_config(params)) | values
        return {"model": params.model_name} | ({"config": values} if values else {})
    read = _read_config(params)
    shape = {"model_type": read.model_type, "vocab_size": read.vocab_size} | _not_default(read)
    shape |= _no_dropout(read) if disable_dropout else {}
    notes.became["model.model_name"] = "model.config, its shape with random weights, and data.tokenizer"
    return {"config": shape | values}


def _dequantized(quantization: Any, notes: Notes) -> dict[str, Any]:
    """How weights that are quantized on the disk are read: MXFP4 alone can be trained, once it is dequantized."""
    place = "model.model_kwargs.quantization_config"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "mxfp4":
        why = f"weights in {method} can't be trained; name a model in full precision, and peft.q_lora to quantize it"
        refuse(place, why)
    notes.became[place] = "model.config.quantization_config: the weights are dequantized as they are read"
    return {"quant_method": method, "dequantize": True}


def _read_config(params: ModelParams) -> Any:
    """The config of the model on the disk or the hub."""
    from transformers import AutoConfig

    from oumi_pl.models.build import loaded
    from oumi_pl.models.hub import locate

    folder = locate(params.model_name, "model.model_name", params.model_revision)
    hub = {"revision": params.model_revision, "trust_remote_code": params.trust_remote_code}
    return loaded(AutoConfig.from_pretrained, folder, **hub)


def _not_default(read: Any) -> dict[str, Any]:
    """What a config says beyond the defaults of its architecture; keys that this doesn't read are left out."""
    default = type(read)()
    values = default.to_dict()
    known = set(values) | set(inspect.signature(type(read).__init__).parameters)
    given = read.to_dict().items()
    return {k: v for k, v in given if k in known and k not in DROPPED and v != values.get(k)}


def _no_dropout(read: Any) -> dict[str, float]:
    return {key: 0.0 for key, value in read.to_dict().items() if "drop" in key and isinstance(value, float) and value}


def _dtype(params: ModelParams, notes: Notes) -> dict[str, Any]:
    name = params.dtype
    if name in ("float64", "uint8"):
        refuse("model.torch_dtype_str", f"{params.torch_dtype_str}: weights are float32, bfloat16 or float16")
    if name is None and not params.load_pretrained_weights:
        notes.comment("model.init_args.config", "random weights are float32, whatever the checkpoint's type is")
        return {}
    notes.became["model.torch_dtype_str"] = f"model.dtype {name or 'auto'}"
    return {} if name == "float32" else {"dtype": name or "auto"}


def _checkpointing(config: TrainingConfig, notes: Notes) -> bool:
    training = config.training
    for key, value in training.gradient_checkpointing_kwargs.items():
        if (key, value) != ("use_reentrant", False):
            why = f"{value!r} has no counterpart: activations are recomputed with use_reentrant: false"
            refuse(f"training.gradient_checkpointing_kwargs.{key}", why)
    ignored = training.use_deterministic and training.trainer_type.name != "OUMI"
    if ignored:
        notes.nothing("training.enable_gradient_checkpointing", "use_deterministic turns it off in Oumi")
    return training.enable_gradient_checkpointing and not ignored


# --- adapters -------------------------------------------------------------------------------------------------------


def _lora(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """`model.lora` and `model.quantization`."""
    peft = config.peft
    name = peft.lora_init_weights.name
    if name not in BEGINNINGS:
        refuse("peft.lora_init_weights", f"{name} has no counterpart: {WHY_NOT[name]}")
    args = given(
        r=peft.lora_r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout or None,
        bias=None if peft.lora_bias == "none" else peft.lora_bias,
        exclude_modules="|".join(f"(?:{pattern})" for pattern in peft.lora_exclude_modules or ()),
        target_parameters=peft.lora_target_parameters,
        modules_to_save=peft.lora_modules_to_save,
    )
    targets = peft.lora_target_modules
    if targets == ["all-linear"]:
        notes.became["peft.lora_target_modules"] = "all linear layers, which is so without model.lora.target_modules"
    else:
        args["target_modules"] = targets
    if targets is None:
        notes.comment("model.init_args.lora", "target_modules: null leaves the choice to PEFT, by architecture")
    if name != "DEFAULT":
        args["init_lora_weights"] = BEGINNINGS[name]
    notes.became["training.use_peft"] = "model.lora"
    return {"lora": args} | _quantization(config, notes)


def _quantization(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    peft = config.peft
    if not peft.q_lora:
        return {}
    skipped = peft.llm_int8_skip_modules or []
    if skipped:
        notes.comment("model.init_args.unquantized", "the head is not quantized either; in Oumi it is, unless named")
    kept = {"unquantized": skipped} if skipped else {}
    if peft.q_lora_bits == 8:
        if config.is_sharded:
            refuse("peft.q_lora_bits", "8 bits are not sharded; set 4, or leave section fsdp or deepspeed out")
        return {"quantization": "int8"} | kept
    if peft.bnb_4bit_quant_type != "nf4":
        refuse("peft.bnb_4bit_quant_type", f"{peft.bnb_4bit_quant_type} has no counterpart; set nf4")
    if peft.bnb_4bit_compute_dtype not in ("bfloat16", "bf16"):
        why = f"{peft.bnb_4bit_compute_dtype} has no counterpart; set bfloat16, which it is"
        refuse("peft.bnb_4bit_compute_dtype", why)
    notes.nothing("peft.use_bnb_nested_quant", "the constants of quantization are quantized in any case")
    if not peft.use_bnb_nested_quant:
        notes.comment("model.init_args.quantization", "the constants of quantization are quantized too (nested)")
    return {"quantization": "nf4"} | kept
