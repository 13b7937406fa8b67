"""Completions of prompts, greedy unless asked otherwise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    Args:
        model: A Hugging Face model with `generate`.
        tokenizer: Its tokenizer.
        prompts: Token ids; padded on the left to one batch.
        max_new_tokens: Longest completion.
        stop: Token ids that end a completion, besides the tokenizer's EOS.
        temperature: 0 is greedy.
    """
    device = model.get_input_embeddings().weight.device
    longest = max(len(p) for p in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    ends = sorted({*stop, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])})
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    training = model.training
    model.eval()
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        **sampling,
    )
    model.train(training)
    return [tokenizer.decode(row[longest:], skip_special_tokens=True) for row in out]
