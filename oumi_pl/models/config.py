"""The config of a causal language model: a pretrained one with values overridden, or one from values alone."""

import inspect
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from oumi_pl.errors import UserError, nearest, reason

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def build_config(
    model: str | None, config: dict[str, Any] | None, tokenizer: "PreTrainedTokenizerBase | None", **hub: Any
) -> "PretrainedConfig":
    """The model's config: from `config` alone (`model_type` and values), or a pretrained one with values overridden.

    Mappings are merged, so that `rope_parameters: {rope_type: linear, factor: 2.0}` keeps the base frequency. Without a
    pretrained config, vocabulary size and special token ids follow the tokenizer.

    Raises:
        UserError: for an unknown model type or key, a value that does not fit, a config that can't be loaded, or
            neither `model` nor `config`.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    values = dict(config or {})
    if model is not None:
        return _overridden(loaded(AutoConfig.from_pretrained, model, **hub), values)
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
    except Exception as error:  # each architecture checks its values in its own way
        cause = " ".join(str(error).split()).rpartition("ValueError: ")[2]
        raise UserError(f"model.config: {cause}") from error


def loaded(load: Any, name: str, **kwargs: Any) -> Any:
    """Calls a `from_pretrained`.

    Raises:
        UserError: it did not work.
    """
    from safetensors import SafetensorError

    try:
        return load(name, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model: {name} needs code of its own to run; if you trust it, set model.trust_remote_code: true"
            ) from error
        damaged = "; the file is damaged or cut short: fetch it again" if isinstance(error, SafetensorError) else ""
        raise UserError(f"model: can't load {name!r}: {reason(error)}{damaged}") from error


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Rows that a model needs: ids may have gaps, so that there may be more than tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _overridden(hf_config: "PretrainedConfig", values: dict[str, Any]) -> "PretrainedConfig":
    values = _with_new_rope_names(values)
    _refuse_unknown_keys(hf_config, values)
    for key, value in values.items():
        old = getattr(hf_config, key, None)
        if isinstance(value, dict) and old is not None and hasattr(old, "to_dict"):  # a part of a model
            _overridden(old, value)
            continue
        try:
            setattr(hf_config, key, old | value if isinstance(value, dict) and isinstance(old, dict) else value)
        except Exception as error:
            raise UserError(f"model.config.{key}: {' '.join(str(error).split())}") from error
    return hf_config


def _with_new_rope_names(values: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` moved to where transformers 5 has them: it would not read them next to those."""
    values = dict(values)
    rope = dict(values.pop("rope_scaling", None) or {})
    if "rope_theta" in values:
        rope["rope_theta"] = values.pop("rope_theta")
    if rope:
        values["rope_parameters"] = rope | (values.get("rope_parameters") or {})
    return values


def _refuse_unknown_keys(hf_config: "PretrainedConfig", values: dict[str, Any]) -> None:
    # HF configs take any keyword silently, so a typo would train another model than the recipe says
    known = (
        set(hf_config.to_dict())
        | set(inspect.signature(type(hf_config).__init__).parameters)
        | set(hf_config.attribute_map)
    )
    for key in values:
        if key not in known:
            raise UserError(f"model.config.{key}: {hf_config.model_type} has no such value{nearest(key, known)}")


def refuse_too_few_positions(hf: Any, max_length: int, longest: tuple[int, int] | None = None) -> None:
    """Refuses rows that are longer than a table of learned positions, and warns where positions are computed.

    Beyond a table (GPT-2, OPT) there is nothing to look up. Rotary positions can be computed, but a model that never
    saw them is worse there, unless its `rope_parameters` are scaled along, or it is trained on them.

    Args:
        hf: A model of transformers, without adapters around it.
        max_length: Tokens of the longest row.
        longest: Positions that the longest path needs surely, and at most, where that is not `max_length`.

    Raises:
        UserError: if there are surely too few positions to look up.
    """
    known = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    surely, at_most = longest or (max_length, max_length)
    if not isinstance(known, int) or not 0 < known < at_most:
        return
    name = type(hf).__name__
    needed, shorten = f"data.max_length is {max_length}", "set it"
    if longest is not None:
        needed, shorten = f"the longest document has {surely} tokens", "set data.max_length"
    if surely <= known:
        needed = f"documents may be as long as {at_most} tokens"
    if not _looks_positions_up(hf):
        rank_zero_warn(f"{needed}, and {name} was made for {known} positions: longer rows may go badly")
    elif surely > known:
        raise UserError(f"{needed}, but {name} has a table of {known} positions: {shorten} to {known}")
    else:
        rank_zero_warn(f"{needed}, and {name} has a table of {known} positions: a longer one stops the run")


def _looks_positions_up(hf: Any) -> bool:
    """Whether the text model, and not only another part of it, such as one that sees, has a table of positions."""
    return any(isinstance(m, nn.Embedding) and _is_of_positions(path) for path, m in hf.get_decoder().named_modules())


def _is_of_positions(path: str) -> bool:
    last = path.rpartition(".")[2]
    return last == "wpe" or "position" in last
