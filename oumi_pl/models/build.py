"""Builds and loads causal language models: config, weights, new token rows, adapters. Nothing else loads weights."""

import copy
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from oumi_pl import attention
from oumi_pl.attention.interface import NO_PACKING
from oumi_pl.errors import UserError, is_out_of_memory, nearest, reason
from oumi_pl.models.hub import locate
from oumi_pl.models.lora import SCORE, merged, with_lora
from oumi_pl.models.recomputation import Recomputation, recompute
from oumi_pl.models.sharding import Loading, Source, is_empty
from oumi_pl.models.text_part import text_part, whole_model
from oumi_pl.runs.checksums import refuse_damaged_weights
from oumi_pl.runs.files import parse
from oumi_pl.terminal.screen import working
from oumi_pl.terminal.text import echo

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AUTO_SCORING = "AutoModelForSequenceClassification"

DType = Literal["auto", "float32", "bfloat16", "float16"]

USUAL = ("gemma2", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Some architectures with a sequence-classification class, for messages."""
BITSANDBYTES_ON_CPU = (0, 50)
"""The first version that quantizes and computes on CPUs."""
_WEIGHT_FREE_INITS = (True, False, "gaussian", "orthogonal")
"""Values of PEFT's `init_lora_weights` that don't read the weights of the base."""
_HARMLESS = ("dropout", "pdrop", "router", "use_cache")
"""Parts of the names of config values that do not change what a trained model computes."""


def build_config(
    model: str | None, config: dict[str, Any] | None, tokenizer: "PreTrainedTokenizerBase | None", **hub: Any
) -> "PretrainedConfig":
    """Creates a model's config from `config` alone (`model_type` and values), or pretrained with values overridden.

    Mappings are merged, so that `rope_parameters: {rope_type: linear, factor: 2.0}` keeps the base frequency. Without a
    pretrained config, vocabulary size and special token ids follow the tokenizer.

    Raises:
        UserError: an unknown model type or key, an invalid value, a config that can't be loaded, or neither `model` nor
            `config`.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    values = dict(config or {})
    if model is not None:
        pretrained = loaded(AutoConfig.from_pretrained, model, **hub)
        _refuse_large_numbers(pretrained.to_dict(), f"model: {model}: config.json")
        return _overridden(pretrained, values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise UserError(
            "model: name a model (`model: HuggingFaceTB/SmolLM2-135M`) or a `config: {model_type: llama, …}`"
        )
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model.config.model_type: unknown architecture {model_type!r}{nearest(model_type, CONFIG_MAPPING)}"
        )
    values = _with_new_rope_names(values)
    _refuse_unknown_keys(CONFIG_MAPPING[model_type](), values)
    if tokenizer is not None:
        values = {
            "vocab_size": vocabulary(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        } | values
        if isinstance(values["vocab_size"], int) and values["vocab_size"] < vocabulary(tokenizer):
            raise UserError(
                f"model.config.vocab_size: {values['vocab_size']} is too small, the tokenizer has "
                f"{vocabulary(tokenizer)} tokens; leave it out to make it fit"
            )
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # every architecture raises different errors for invalid values
        cause = " ".join(str(error).split()).rpartition("ValueError: ")[2]
        raise UserError(f"model.config: {cause}") from error


def _refuse_large_numbers(value: Any, key: str) -> None:
    """Refuses whole numbers beyond 64 bits, which torch can't take, anywhere in a config.

    Raises:
        UserError: names the key.
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{key} is a number of {value.bit_length():,} bits, but has to fit into 64 bits")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, item in items:
        _refuse_large_numbers(item, f"{key}: {name}" if key.endswith("config.json") else f"{key}.{name}")


def loaded(load: Any, name: str, **kwargs: Any) -> Any:
    """Calls a `from_pretrained`, and turns its errors into one message.

    Raises:
        UserError: it failed.
    """
    from safetensors import SafetensorError

    try:
        return load(name, **kwargs)
    except BaseException as error:  # a damaged file can raise anything, also Rust's panics
        is_panic = type(error).__name__ == "PanicException"
        if not isinstance(error, Exception) and not is_panic:
            raise
        if is_out_of_memory(error):
            raise
        if kwargs.get("trust_remote_code") and not isinstance(error, (OSError, ValueError, SafetensorError)):
            raise  # by code that came with the model
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model: {name} runs code from its repository; if you trust it, set model.trust_remote_code: true"
            ) from error
        damaged = "; the file is damaged or cut short: fetch it again" if isinstance(error, SafetensorError) else ""
        what = f"KeyError: {error}" if isinstance(error, KeyError) else reason(error)
        raise UserError(f"model: can't load {name!r}: {what}{damaged}") from error


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Embedding rows that a model needs: the largest id + 1, since ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _overridden(hf_config: "PretrainedConfig", values: dict[str, Any]) -> "PretrainedConfig":
    values = _with_new_rope_names(values)
    _refuse_unknown_keys(hf_config, values)
    if (other := values.get("model_type", hf_config.model_type)) != hf_config.model_type:
        raise UserError(
            f"model.config.model_type is {other!r}, and the pretrained model is {hf_config.model_type!r}; leave it out"
        )
    for key, value in values.items():
        old = getattr(hf_config, key, None)
        if isinstance(value, dict) and old is not None and hasattr(old, "to_dict"):  # the config of a part of the model
            _overridden(old, value)
            continue
        try:
            setattr(hf_config, key, old | value if isinstance(value, dict) and isinstance(old, dict) else value)
        except Exception as error:
            raise UserError(f"model.config.{key}: {' '.join(str(error).split())}") from error
    return hf_config


def _with_new_rope_names(values: dict[str, Any]) -> dict[str, Any]:
    """Moves `rope_theta` and `rope_scaling` into `rope_parameters`: transformers 5 ignores the old keys beside it."""
    values = dict(values)
    rope = dict(values.pop("rope_scaling", None) or {})
    if "rope_theta" in values:
        rope["rope_theta"] = values.pop("rope_theta")
    if rope:
        values["rope_parameters"] = rope | (values.get("rope_parameters") or {})
    return values


def _refuse_unknown_keys(hf_config: "PretrainedConfig", values: dict[str, Any]) -> None:
    # HF configs accept any keyword silently, so a typo would train another model than intended
    arguments = inspect.signature(type(hf_config).__init__).parameters
    known = {*hf_config.to_dict(), *arguments, *hf_config.attribute_map}
    for key in values:
        if key not in known and not _is_read(hf_config, key):
            raise UserError(f"model.config.{key}: {hf_config.model_type} has no such value{nearest(key, known)}")


def _is_read(hf_config: "PretrainedConfig", key: str) -> bool:
    """Whether the code of an architecture reads a value that its config does not declare.

    Qwen3-MoE for example has no `head_dim`, but reads it with `getattr`.
    """
    folder = Path(inspect.getfile(type(hf_config))).parent
    reading = re.compile(rf"""config\.{re.escape(key)}\b|getattr\((\w+\.)*config, ["']{re.escape(key)}["']""")
    return any(reading.search(file.read_text(encoding="utf-8")) for file in folder.glob("modeling_*.py"))


def refuse_too_few_positions(hf: Any, max_length: int, longest: tuple[int, int] | None = None) -> None:
    """Refuses rows longer than a model's table of learned positions; warns if its positions are computed.

    A table (GPT-2, OPT) has no entry for a longer row. Rotary positions can be computed for any length, but a model is
    worse at positions it was not trained on, unless its `rope_parameters` are scaled or it is trained further.

    Args:
        hf: A model of transformers, without PEFT's wrapper.
        max_length: Tokens of the longest row.
        longest: Lower and upper bound on the positions of the longest path; None: `max_length`.

    Raises:
        UserError: the table is certainly too small.
    """
    known = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    least, most = longest or (max_length, max_length)
    if not isinstance(known, int) or not 0 < known < most:
        return
    name = type(hf).__name__
    needed, shorten = f"data.max_length is {max_length}", "set it"
    if longest is not None:
        needed, shorten = f"the longest document has {least} tokens", "set data.max_length"
    if least <= known:
        needed = f"documents may be as long as {most} tokens"
    if not _has_position_table(hf):
        rank_zero_warn(f"{needed}, and {name} was trained on {known} positions: quality may drop beyond them")
    elif least > known:
        raise UserError(f"{needed}, but {name} has a table of {known} positions: {shorten} to {known}")
    else:
        rank_zero_warn(f"{needed}, and {name} has a table of {known} positions: a longer document stops the run")


def _has_position_table(hf: Any) -> bool:
    """Whether the text model has a table of positions; those of other parts, such as a vision tower, don't count."""
    tables = [path for path, m in hf.get_decoder().named_modules() if isinstance(m, nn.Embedding)]
    names = [path.rpartition(".")[2] for path in tables]
    return any(name == "wpe" or "position" in name for name in names)


def build_model(
    model: str | None,
    *,
    config: dict[str, Any] | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    added_tokens: Sequence[int] = (),
    dtype: DType = "float32",
    attn: str | None = None,
    lora: dict[str, Any] | None = None,
    quantization: Literal["nf4", "int8"] | None = None,
    unquantized: Sequence[str] = (),
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool | Recomputation = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    scoring: bool = False,
    text_only: bool = False,
    loading: Loading = Loading(),  # noqa: B008 - it is not changed
) -> "PreTrainedModel":
    """Builds a causal LM in training mode, with new token rows, frozen parts and adapters.

    Arguments are those of the modules. `model` may also be the folder of an adapter, which is then merged into its base
    before training. Without `attn`, transformers chooses. With `scoring`, builds the architecture's
    sequence-classification model with one label: its head `score`, random if `model` has none, replaces that of the LM.
    With `text_only`, takes the text model out of one that has other parts. `loading` is how a rank gets its weights.

    Raises:
        UserError: something can't be loaded, or parts don't fit together.
    """
    attention.register()
    base, adapter, revision = _located(model, revision)
    _say_what_is_not_read(adapter or base)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    hf_config = build_config(base, config, tokenizer, **hub)
    attn = _with_soft_cap(hf_config, attn)
    if scoring:
        _prepare_for_scores(hf_config)
    loading.check(hf_config)
    if base is None:
        hf = loading.random(lambda: _random_weights(hf_config, attn, dtype, trust_remote_code, scoring))
    else:
        kept = _not_to_quantize(hf_config, unquantized, trust_remote_code, scoring)
        kwargs = {"overrides": config or {}} | _quantized(quantization, kept) | hub
        hf = loading.pretrained(lambda: _pretrained(base, hf_config, attn, dtype, scoring, **kwargs))
        hf = text_part(hf, attn) if text_only else hf
        hf.taken_from = None if scoring or text_only else whole_model(hf, base, hf_config, **hub)
    if scoring:
        _refuse_other_heads(hf)
    attention.separate_frequencies(hf)
    if adapter:
        hf = _with_adapter_merged(hf, adapter)
    new_rows = 0 if base is None or tokenizer is None else fit_vocabulary(hf, tokenizer, added_tokens)
    freeze_modules(hf, freeze)
    recompute(hf, gradient_checkpointing)
    if lora is not None:
        hf = with_lora(hf, lora, added_tokens, revision, task="SEQ_CLS" if scoring else "CAUSAL_LM")
        freeze_adapters(hf, freeze)
        hf.why_not_alone = _why_not_alone(base, adapter, config or {}, new_rows)
    return hf.train()  # `from_pretrained` returns eval mode, which Lightning would keep


LEFT = {"optimizer": "optimizer.*", "schedule": "scheduler.pt", "random states": "rng_state*"}
"""What a checkpoint of transformers' Trainer holds besides the weights -> its files."""


@cache
def _say_what_is_not_read(model: str | None) -> None:
    """Prints, for a checkpoint of transformers' or TRL's trainers, that its weights alone are the start of this run."""
    folder = Path(model or "")
    file = folder / "trainer_state.json"
    if model is None or not file.is_file() or int(os.environ.get("RANK") or 0):
        return
    try:
        step = json.loads(file.read_text(encoding="utf-8")).get("global_step", "?")
    except (OSError, ValueError, AttributeError):
        step = "?"
    left = [name for name, files in LEFT.items() if next(folder.glob(files), None)]
    echo(
        f"note: {folder} is a checkpoint of transformers' Trainer, at step {step}: the run starts from its weights; "
        f"not taken over: {', '.join([*left, 'step', 'position in the data'])}"
    )


def source_of_weights(
    model: str | None,
    *,
    config: dict[str, Any] | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    added_tokens: Sequence[int],
    lora: dict[str, Any] | None,
    quantization: str | None,
    revision: str | None,
    trust_remote_code: bool,
    text_only: bool,
) -> Source:
    """Where the ranks of a sharded run get the weights of a model, by what `build_model` does with them.

    Arguments are those of `build_model`.

    Raises:
        UserError: the weights can't be sharded.
    """
    if quantization == "int8":  # its layers find their scales at the weight itself, which FSDP2 replaces
        raise UserError("model.quantization: int8 weights can't be sharded; set nf4, or trainer.strategy ddp")
    needs_values = lora is not None and (
        lora.get("use_dora") or lora.get("init_lora_weights", True) not in _WEIGHT_FREE_INITS
    )
    if quantization is not None or text_only or needs_values:
        return "every rank"
    if model is None:
        return "first rank"
    base, adapter, revision = _located(model, revision)
    if adapter:
        return "every rank"
    hf_config = build_config(base, config, tokenizer, revision=revision, trust_remote_code=trust_remote_code)
    pad = None if tokenizer is None else tokenizer.pad_token_id
    has_new_rows = bool(added_tokens) or (pad is not None and pad >= hf_config.get_text_config().vocab_size)
    return "first rank" if has_new_rows else "parts"


def _located(model: str | None, revision: str | None) -> tuple[str | None, str | None, str | None]:
    """The folder of the base model, that of the adapter to merge into it, and the revision of the base."""
    if model is None:
        return None, None, revision
    folder = locate(model, "model", revision)
    _refuse_without_config(Path(folder))
    if not _is_adapter(Path(folder)):
        return folder, None, revision
    base, revision = _base_of(folder)
    return base, folder, revision


def _why_not_alone(base: str | None, adapter: str | None, config: dict[str, Any], new_rows: int) -> str:
    """Why the adapter alone, loaded onto its base from disk, would not be the trained model; empty if it would be."""
    if base is None:
        return "its base model has random weights"
    if adapter:
        return "its base model was itself loaded from an adapter"
    if new_rows:
        return f"its vocabulary has {new_rows} rows more than the base model on disk, for added tokens"
    changed = [key for key in config if not any(part in key for part in _HARMLESS)]
    return f"its base model was changed by model.config ({', '.join(changed)})" if changed else ""


def _torch_dtype(dtype: DType) -> torch.dtype:
    return getattr(torch, "float32" if dtype == "auto" else dtype)


def _prepare_for_scores(hf_config: "PretrainedConfig") -> None:
    """Sets one label in the config of a reward model; refuses an architecture that has no such model."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    auto_map = getattr(hf_config, "auto_map", None) or {}
    if type(hf_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and AUTO_SCORING not in auto_map:
        raise UserError(
            f"model: transformers has no sequence-classification class for {hf_config.model_type}, so nothing could "
            f"load a reward model of it; start from an architecture that has one, for example {', '.join(USUAL)}"
        )
    hf_config.num_labels = 1


def _refuse_other_heads(hf: "PreTrainedModel") -> None:
    if not isinstance(getattr(hf, SCORE, None), nn.Linear):
        raise UserError(
            f"model: {type(hf).__name__} has no linear head `{SCORE}` on its last token, so it can't be a reward model "
            f"here; take a causal architecture, for example {', '.join(USUAL)}"
        )


def _with_soft_cap(hf_config: "PretrainedConfig", attn: str | None) -> str | None:
    """The attention to use: not sdpa for a soft cap on attention logits, which transformers below 5.21 leaves out.

    Raises:
        UserError: sdpa was asked for.
    """
    if getattr(hf_config.get_text_config(), "attn_logit_softcapping", None) is None or attn not in (None, "sdpa"):
        return attn
    if attn is None:
        return "eager"
    raise UserError(
        "model.attn: 'sdpa' can't apply the soft cap on this model's attention logits; leave it out, or set eager"
    )


def _auto_class(scoring: bool) -> Any:
    import transformers

    return getattr(transformers, AUTO_SCORING if scoring else "AutoModelForCausalLM")


def _random_weights(
    hf_config: "PretrainedConfig", attn: str | None, dtype: DType, trust_remote_code: bool, scoring: bool
) -> "PreTrainedModel":
    try:
        return _auto_class(scoring).from_config(
            hf_config, attn_implementation=attn, dtype=_torch_dtype(dtype), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # sizes that don't match raise whatever error the layer raises
        refuse_attention(attn, error)
        raise UserError(
            f"model.config: can't build this {hf_config.model_type}: {type(error).__name__}: {reason(error)}"
        ) from error


def _pretrained(
    model: str,
    hf_config: "PretrainedConfig",
    attn: str | None,
    dtype: DType,
    scoring: bool,
    *,
    overrides: Mapping[str, Any],
    **kwargs: Any,
) -> "PreTrainedModel":
    _refuse_without_weights(Path(model))
    refuse_damaged_weights(Path(model), "model")
    loaded_dtype = dtype if dtype == "auto" else _torch_dtype(dtype)
    kwargs |= {"config": hf_config, "attn_implementation": attn, "dtype": loaded_dtype}
    # mismatches are reported below in one line: transformers would print a table and fill in random weights
    kwargs |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with working(f"loading {model}"), without_load_report():
            hf, info = loaded(_auto_class(scoring).from_pretrained, model, **kwargs)
    except (UserError, KeyError) as error:
        refuse_attention(attn, error.__cause__ or error)
        raise
    if wrong := sorted(info["mismatched_keys"]):
        name, saved, own = wrong[0]
        raise UserError(
            f"model: the weights in {model} don't fit the config with model.config: {name} is {list(saved)} there "
            f"and {list(own)} here"
        )
    # a causal LM has no scoring head yet
    if dropped := _dropped_layers(hf, info["unexpected_keys"]):
        if set(overrides) & set(hf_config.to_dict()):
            raise UserError(
                f"model.config ({', '.join(overrides)}): {len(dropped)} trained weights of {model} would be left out, "
                f"first {dropped[0]}: layers can't be taken from a trained model; leave the value out"
            )
        raise UserError(
            f"model: {model} has weights of more layers than its config.json, first {dropped[0]}: they would be "
            "dropped; correct the config (num_hidden_layers)"
        )
    refuse_invalid_token_ids(hf, "model", model)
    new_head = {f"{SCORE}.weight"} if scoring else set()
    if missing := sorted(set(info["missing_keys"]) - new_head):
        raise UserError(
            f"model: {model} lacks {len(missing)} of the weights that {type(hf).__name__} has, first {missing[0]}: "
            "it has another architecture, or model.config adds weights to it"
        )
    return keep_differentiable(hf)


def refuse_invalid_token_ids(hf: "PreTrainedModel", key: str, model: str) -> None:
    """Refuses token ids in `generation_config.json` that can't be ids: sampling and the export use them.

    Args:
        hf: The model.
        key: The key or option that names it, for the message.
        model: Its folder or hub id.

    Raises:
        UserError: names the first.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id") if hf.can_generate() else ():
        value = getattr(hf.generation_config, name, None)
        ids = value if isinstance(value, list) else [value]
        # -1 stands for none in some models; what is larger than any vocabulary doesn't fit into a tensor of ids
        if not all(one is None or (type(one) is int and -1 <= one < 2**31) for one in ids):
            raise UserError(
                f"{key}: {name} in the generation_config.json of {model} is {value!a}; it has to be a token id, or a "
                "list of them"
            )


def _dropped_layers(hf: "PreTrainedModel", unexpected: Iterable[str]) -> list[str]:
    """The weights of layers beyond the last that the model has, sorted."""
    last = {name: len(part) - 1 for name, part in hf.named_modules() if isinstance(part, nn.ModuleList)}
    return [
        name
        for name in sorted(unexpected)
        if any(int(match[1]) > last.get(name[: match.start()], 10**9) for match in _NUMBER.finditer(name))
    ]


_NUMBER = re.compile(r"\.(\d{1,9})(?=\.)")


@contextmanager
def without_load_report() -> Iterator[None]:
    """Silences transformers' report of missing and unexpected weights."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


def _refuse_without_config(folder: Path) -> None:
    if not folder.is_dir() or (folder / "config.json").is_file() or _is_adapter(folder):
        return
    inside = folder / "model"  # if `folder` is a run folder
    meant = f"; did you mean {inside.as_posix()!r}?" if (inside / "config.json").is_file() else ""
    raise UserError(f"model: {folder} has no config.json, so it is not a model folder{meant}")


def _refuse_without_weights(folder: Path) -> None:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = next(folder.glob("*.bin"), None)
    right = "a run leaves them in its model/, and `export` makes them of a checkpoint"
    if pickled:
        right = f"{pickled.name} may run code when it is read: save it as safetensors"
    raise UserError(f"model: {folder} holds no weights (no *.safetensors); {right}")


def refuse_attention(attn: str | None, error: BaseException) -> None:
    """Explains an error that an attention implementation caused; does nothing for other errors.

    Raises:
        UserError: the implementation is the cause.
    """
    if attn == attention.NAME and isinstance(error, KeyError) and error.args[:1] == (attn,):
        # this architecture has a dictionary from implementation names to attention classes
        raise UserError(f"this architecture's attention can't keep packed documents apart; {NO_PACKING}") from error
    if attn is not None and ("attention implementation" in str(error) or "attn_implementation" in str(error)):
        raise UserError(
            f"model.attn: {attn!r} does not work for this model; leave it out, or try 'eager' or 'flash_attention_2'"
        ) from error


def _not_to_quantize(
    hf_config: "PretrainedConfig", names: Sequence[str], trust_remote_code: bool, scoring: bool
) -> list[str] | None:
    """The modules of these names, and those that transformers would leave alone if none were named: heads.

    None if no names are given, which leaves it to transformers.

    Raises:
        UserError: the model has no linear layer of a name.
    """
    if not names:
        return None
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    with torch.device("meta"):
        hf = _random_weights(copy.deepcopy(hf_config), None, "float32", trust_remote_code, scoring)
    linear = [name for name, module in hf.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        if all(should_convert_module(layer, [name]) for layer in linear):
            ends = sorted({layer.rpartition(".")[2] for layer in linear})
            raise UserError(f"model.unquantized: the model has no linear layer {name!r}{nearest(name, ends)}")
    return [*get_keys_to_not_convert(hf), *names]


def _quantized(quantization: str | None, kept: list[str] | None = None) -> dict[str, Any]:
    if quantization is None:
        return {}
    try:
        installed = version("bitsandbytes")
    except PackageNotFoundError:
        raise UserError("model.quantization needs bitsandbytes: pip install 'oumi_pl[gpu]'") from None
    if not torch.cuda.is_available() and tuple(map(int, installed.split(".")[:2])) < BITSANDBYTES_ON_CPU:
        least = ".".join(map(str, BITSANDBYTES_ON_CPU))
        raise UserError(
            f"model.quantization without a CUDA device needs bitsandbytes {least} or newer, and {installed} is "
            "installed; leave it out to train in full precision"
        )
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)}
    # QLoRA's storage format (Dettmers et al. 2023, arXiv:2305.14314)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=kept,  # in 4 bits as well
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": nf4}


def keep_differentiable(hf: "PreTrainedModel") -> "PreTrainedModel":
    """Keeps 4-bit weights on CPUs in the layout that has gradients.

    bitsandbytes repacks them in the first evaluation on a CPU with AVX512-BF16, for a kernel of its own. That rounds
    their scales, and has no backward pass: training that goes on after it would lose all gradients below.
    """
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast("Any", module).support_avx512bf16_for_cpu = False
    return hf


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of an adapter's `adapter_config.json`.

    Raises:
        UserError: it can't be read.
    """
    try:
        config = parse((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model: can't read {folder / 'adapter_config.json'}: {reason(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"model: {folder / 'adapter_config.json'} holds no object")
    return config


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _base_of(adapter: str) -> tuple[str, str | None]:
    """Path or hub id, and revision, of the base model of an adapter."""
    config = read_adapter_config(Path(adapter))
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name:
        raise UserError(f"model: the adapter in {adapter} doesn't name its base model; export it with --merge")
    return locate(str(name), f"model: the base of {adapter}", revision), revision


def _with_adapter_merged(hf: "PreTrainedModel", adapter: str) -> "PreTrainedModel":
    from peft import PeftModel

    refuse_damaged_weights(Path(adapter), "model")
    try:
        bare = merged(PeftModel.from_pretrained(hf, adapter))
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"model: the adapter in {adapter} does not fit its base model: {reason(error)}") from error
    for parameter in bare.parameters():  # PEFT has frozen the base
        parameter.requires_grad_(parameter.is_floating_point())
    return bare


@torch.no_grad()
def fit_vocabulary(
    hf: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    added_tokens: Sequence[int],
    known: Sequence[int] = (),
) -> int:
    """Initialises the rows of added tokens to the mean of the trained rows; returns how many rows were appended.

    A pad token without a row gets one too, so that padded rows can be computed.

    With the mean, a new token starts with an average logit (Hewitt 2021, "Initializing New Word Embeddings for
    Pretrained Language Models"). Rows that only pad the vocabulary were never trained, and are left out of the mean.

    Args:
        hf: A pretrained model.
        tokenizer: The tokenizer, with the added tokens.
        added_tokens: Ids that were added to the tokenizer, whose rows are to be initialised.
        known: Ids that were added before, whose rows are kept.

    Raises:
        UserError: the tokenizer has ids without a row in the model, besides the added ones.
    """
    rows = len(cast("Tensor", hf.get_input_embeddings().weight))
    pad = {tokenizer.pad_token_id} - {None, *range(rows)}
    own = max(set(tokenizer.get_vocab().values()) - {*added_tokens, *known, *pad}, default=-1) + 1
    if own > rows:
        raise UserError(
            f"model: the tokenizer has {own} tokens, the model's vocabulary {rows}: they don't belong together; "
            "set data.tokenizer to the model's own"
        )
    new = sorted({*added_tokens, *pad})
    if not new:
        return 0
    needed = vocabulary(tokenizer)
    if needed > rows:
        hf.resize_token_embeddings(needed, mean_resizing=False)
    for layer in (hf.get_input_embeddings(), hf.get_output_embeddings()):
        for values in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if values is not None and not is_empty(values):  # else another rank sends the values
                values[new] = values[: min(new)].mean(dim=0, dtype=torch.float32).to(values.dtype)
    return max(0, needed - rows)


def freeze_modules(hf: "PreTrainedModel", freeze: Sequence[str]) -> None:
    """Freezes the modules of these names.

    Raises:
        UserError: the model has no such module.
    """
    modules = dict(hf.named_modules())
    for name in freeze:
        if name not in modules:
            raise UserError(f"model.freeze: the model has no module {name!r}{nearest(name, modules)}")
        modules[name].requires_grad_(False)


def freeze_adapters(hf: Any, freeze: Sequence[str]) -> None:
    """Freezes the adapters in modules of these names; `hf.adapter_weights` are the names of all adapters' weights."""
    hf.adapter_weights = frozenset(name for name, parameter in hf.named_parameters() if parameter.requires_grad)
    freeze_modules(hf.get_base_model(), freeze)
