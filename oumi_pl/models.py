"""Builds and loads causal language models. The only place that loads weights."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from oumi_pl import attention
from oumi_pl.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DType = Literal["auto", "float32", "bfloat16", "float16"]


def build_config(
    model: str | None, config: dict[str, Any] | None, tokenizer: "PreTrainedTokenizerBase | None", **hub: Any
) -> "PretrainedConfig":
    """The model's config: from `config` alone (`model_type` and its values), or a pretrained one with values overridden.

    Without a pretrained config, vocabulary size and special token ids follow the tokenizer.

    Raises:
        UserError: for an unknown model type or key, a config that can't be loaded, or neither `model` nor `config`.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    values = dict(config or {})
    if model is not None:
        hf_config = _loaded(AutoConfig.from_pretrained, model, **hub)
        _refuse_unknown_keys(hf_config, values)
        for key, value in values.items():
            setattr(hf_config, key, value)
        return hf_config
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise UserError("model: name a model (`model: HuggingFaceTB/SmolLM2-135M`) or a `config: {model_type: llama, …}`")
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"model.config.model_type: unknown architecture {model_type!r}{nearest(model_type, CONFIG_MAPPING)}")
    if tokenizer is not None:
        values.setdefault("vocab_size", len(tokenizer))
        values = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        } | values
    _refuse_unknown_keys(CONFIG_MAPPING[model_type](), values)
    return AutoConfig.for_model(model_type, **values)


def build_model(
    model: str | None,
    *,
    config: dict[str, Any] | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    added_tokens: Sequence[int] = (),
    dtype: DType = "float32",
    attn: str = "sdpa",
    lora: dict[str, Any] | None = None,
    quantization: Literal["nf4", "int8"] | None = None,
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """A causal LM in training mode: weights, new token rows, frozen parts, adapters. Arguments as of the modules.

    Raises:
        UserError: for anything that can't be loaded or does not fit together.
    """
    attention.register()
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    hf_config = build_config(model, config, tokenizer, **hub)
    if model is None:
        hf = _random_weights(hf_config, attn, dtype, trust_remote_code)
    else:
        hf = _pretrained(model, hf_config, attn, dtype, quantization, hub)
    _add_token_rows(hf, tokenizer, added_tokens)
    _freeze(hf, freeze)
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is not None:
        hf = _with_lora(hf, lora, added_tokens)
    # from_pretrained returns eval mode, and Lightning would keep it
    return hf.train()


def lora_config(lora: dict[str, Any], added_tokens: Sequence[int] = ()) -> Any:
    """`peft.LoraConfig` from a recipe's `lora:`; all linear layers unless `target_modules` says otherwise.

    Rows of added tokens are trained (and saved) with the adapter: a frozen mean would never learn what they mean.

    Raises:
        UserError: for a key that `peft.LoraConfig` does not know.
    """
    from peft import LoraConfig

    known = inspect.signature(LoraConfig).parameters
    for key in lora:
        if key not in known:
            raise UserError(f"model.lora.{key}: unknown key{nearest(key, known)} (the keys are those of peft.LoraConfig)")
    values = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"} | lora
    if added_tokens:
        values.setdefault("trainable_token_indices", list(added_tokens))
    return LoraConfig(**values)


def _loaded(load: Any, name: str, **kwargs: Any) -> Any:
    try:
        return load(name, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model: can't load {name!r}: {reason}") from error


def _refuse_unknown_keys(hf_config: "PretrainedConfig", values: dict[str, Any]) -> None:
    # HF configs take any keyword silently, so a typo would train another model than the recipe says
    known = set(hf_config.to_dict()) | set(inspect.signature(type(hf_config).__init__).parameters) | set(hf_config.attribute_map)
    for key in values:
        if key not in known:
            raise UserError(f"model.config.{key}: {hf_config.model_type} has no such value{nearest(key, known)}")


def _torch_dtype(dtype: DType) -> torch.dtype:
    return getattr(torch, "float32" if dtype == "auto" else dtype)


def _random_weights(hf_config: "PretrainedConfig", attn: str, dtype: DType, trust_remote_code: bool) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(
            hf_config, attn_implementation=attn, dtype=_torch_dtype(dtype), trust_remote_code=trust_remote_code
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"model: {str(error).strip().splitlines()[0]}") from error


def _pretrained(
    model: str, hf_config: "PretrainedConfig", attn: str, dtype: DType, quantization: str | None, hub: dict[str, Any]
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    kwargs: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else _torch_dtype(dtype)}
    if quantization is not None:
        kwargs["quantization_config"] = _quantization_config(quantization)
    return _loaded(
        AutoModelForCausalLM.from_pretrained,
        model,
        config=hf_config,
        attn_implementation=attn,
        use_safetensors=True,
        **kwargs,
        **hub,
    )


def _quantization_config(quantization: str) -> Any:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise UserError("model.quantization needs bitsandbytes: pip install 'oumi_pl[gpu]'")
    if not torch.cuda.is_available():
        raise UserError("model.quantization needs a CUDA device, and none is visible; leave it out to train in full precision")
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # QLoRA's storage format (Dettmers et al. 2023, arXiv:2305.14314)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


@torch.no_grad()
def _add_token_rows(
    hf: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", added_tokens: Sequence[int]
) -> None:
    """Gives added tokens a row, initialised to the mean of the rows that were trained."""
    if tokenizer is None:
        return
    rows = hf.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        if not added_tokens:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {rows}: "
                "they don't belong together; set data.tokenizer to the model's own"
            )
        hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if not added_tokens:
        return
    old = min(added_tokens)
    for layer in {hf.get_input_embeddings(), hf.get_output_embeddings()}:
        if layer is not None:
            layer.weight[list(added_tokens)] = layer.weight[:old].float().mean(dim=0).to(layer.weight.dtype)


def _freeze(hf: "PreTrainedModel", freeze: Sequence[str]) -> None:
    modules = dict(hf.named_modules())
    for name in freeze:
        if name not in modules:
            raise UserError(f"model.freeze: the model has no module {name!r}{nearest(name, modules)}")
        modules[name].requires_grad_(False)


def _with_lora(hf: "PreTrainedModel", lora: dict[str, Any], added_tokens: Sequence[int]) -> Any:
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(hf, "is_quantized", False):
        hf = prepare_model_for_kbit_training(hf, use_gradient_checkpointing=False)
    try:
        return get_peft_model(hf, lora_config(lora, added_tokens))
    except ValueError as error:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in hf.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"model.lora: {str(error).strip().splitlines()[0]} (linear layers of this model: {', '.join(linear)})"
        ) from error
