"""Completions of prompts, greedy unless asked otherwise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
"""What published models may set otherwise in their generation config, so that greedy would not be greedy."""


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
) -> list[str]:
    """Completes a batch of prompts of token ids and returns the text, without special tokens.

    A prompt's greedy completion does not depend on the others in the batch. Training modes are left as they were.

    Args:
        model: A Hugging Face model with `generate`.
        tokenizer: Its tokenizer.
        prompts: Token ids, at least one each; padded on the left to one batch.
        max_new_tokens: Longest completion.
        stop: Token ids that end a completion, besides the tokenizer's and the model's EOS.
        temperature: 0 is greedy; else samples from the whole distribution.

    Raises:
        UserError: if the weights are sharded over ranks, which `generate` can't gather.
    """
    if not prompts:
        return []
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise UserError(
            "can't generate from sharded weights: export the checkpoint, and generate from that on one device"
        )
    device = next(model.parameters()).device
    longest = max(len(p) for p in prompts)
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=_ends(model, tokenizer, stop) or None,
            pad_token_id=pad,
            **PLAIN,
            **sampling,
        )
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)) for row in out]


def _ends(model: Any, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[int]) -> list[int]:
    own = model.generation_config.eos_token_id
    return sorted({*stop, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})
