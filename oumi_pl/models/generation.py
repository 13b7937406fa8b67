"""Completes prompts, greedily by default."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oumi_pl.attention.probe import evaluating
from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The decoder's output for an incomplete UTF-8 character."""


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    on_text: Callable[[str], None] | None = None,
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
        top_p: Samples from the likeliest tokens that make up this much of it (Holtzman et al. 2020, arXiv:1904.09751).
        on_text: For a single prompt: called with each new piece of text while it is generated.

    Raises:
        UserError: the weights are sharded over ranks, which `generate` can't gather.
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
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    ends = ends_of(model, tokenizer, stop)
    with evaluating(model), without_own_settings(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=pad,
            streamer=None if on_text is None else TextStreamer(tokenizer, on_text),
            **sampling,
        )
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)) for row in out]


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Lets `generate` follow its arguments alone.

    The generation configs of published models have penalties, suppressed tokens and more, which would change greedy
    decoding and the log-probabilities of samples.
    """
    from transformers import GenerationConfig

    # PEFT's models look it up in their base; transformers' models with adapters are their own
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config
    base.generation_config = GenerationConfig(use_cache=own.use_cache is not False)
    try:
        yield
    finally:
        base.generation_config = own


def ends_of(model: Any, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[int] = ()) -> list[int]:
    """The ids that end a completion: `stop`, the tokenizer's EOS and those of the model's generation config."""
    own = model.generation_config.eos_token_id
    return sorted({*stop, tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


class TextStreamer:
    """A streamer for `generate`: passes on text once later tokens can no longer change it.

    The whole text is decoded again for each token, because the text of a token can depend on those before it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.ids: list[int] | None = None
        self.passed = ""

    def put(self, ids: Tensor) -> None:
        """Called by `generate` with the prompt, which is skipped, and then with each token."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += ids.flatten().tolist()
        self._pass(self._text().rstrip(UNFINISHED))

    def end(self) -> None:
        """Passes on the rest."""
        self._pass(self._text())

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids or [], skip_special_tokens=True))

    def _pass(self, text: str) -> None:
        if len(text) > len(self.passed) and text.startswith(self.passed):
            self.on_text(text[len(self.passed) :])
            self.passed = text
