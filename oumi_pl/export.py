"""From live weights to a folder that `transformers` loads: safetensors, tokenizer, chat template, model card."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from oumi_pl import __version__
from oumi_pl.causal_lm import CausalLM
from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_model(
    model: CausalLM,
    directory: Path,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    merge: bool = False,
    stop_tokens: Sequence[int] = (),
    card: str | None = None,
) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads, with the live model's logits.

    An adapter is written alone unless `merge` adds it to a copy of the base weights, which needs memory for both.
    Under FSDP2 all ranks have to call this; rank 0 writes.

    Raises:
        UserError: for an adapter alone whose base model has no name to load it by, or merging sharded weights.
    """
    hf = model.hf
    is_adapter = hasattr(hf, "peft_config")
    if is_adapter and not merge and not model.base.config._name_or_path:
        raise UserError("the adapter's base model has random weights and can't be loaded by name: export with --merge")
    state = _gathered(model)
    if not _is_rank_zero():
        return
    if is_adapter and merge:
        if state is not None:
            raise UserError("a sharded adapter can't be merged here: export the checkpoint with --merge afterwards")
        hf = copy.deepcopy(hf).merge_and_unload()
    _set_generation_config(model, tokenizer, stop_tokens)
    directory.mkdir(parents=True, exist_ok=True)
    hf.save_pretrained(directory, **({} if state is None else {"state_dict": state}))
    if is_adapter and not merge:
        model.base.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if card is not None:
        (directory / "README.md").write_text(card)


def model_card(config: Mapping[str, Any], yaml_text: str, metrics: Mapping[str, float], recipe: str) -> str:
    """A model card: what it was made from, on which data, how, and how well it did."""
    base = _argument(config, "model", "model")
    data = _argument(config, "data", "train")
    scores = "\n".join(f"| `{name}` | {value:.4g} |" for name, value in sorted(metrics.items()))
    header = ["---", "library_name: transformers", "tags: [oumi_pl]"]
    if base:
        header.append(f"base_model: {base}")
    trainer = _class_name(config.get("model"))
    return "\n".join(
        [
            *header,
            "---",
            "",
            f"# {recipe}",
            "",
            f"Trained by `oumi_pl` {__version__} ({trainer}) from {f'`{base}`' if base else 'random weights'} "
            f"on `{data}`.",
            "",
            "| metric | value |",
            "|---|---|",
            scores,
            "",
            "## Recipe",
            "",
            "```yaml",
            yaml_text.strip(),
            "```",
            "",
        ]
    )


def _argument(config: Mapping[str, Any], section: str, name: str) -> Any:
    return ((config.get(section) or {}).get("init_args") or {}).get(name)


def _class_name(section: Any) -> str:
    return str((section or {}).get("class_path", "")).rsplit(".", 1)[-1]


def _set_generation_config(model: CausalLM, tokenizer: Any, stop_tokens: Sequence[int]) -> None:
    """Lets plain `generate` stop where an answer ends."""
    if tokenizer is None:
        return
    generation = model.base.generation_config
    eos = generation.eos_token_id
    ends = {*stop_tokens, *(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    generation.eos_token_id = sorted(ends) if len(ends) > 1 else next(iter(ends), None)
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id


def _gathered(model: CausalLM) -> dict[str, Any] | None:
    """The whole state dict of a sharded model on rank 0, in the names that `save_pretrained` expects; None if whole."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model.hf, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _is_rank_zero() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
