"""Samples completions of prompts, token ids in and token ids out, with the log-probability of each sampled token.

`generate` of transformers runs the model; the tokens are drawn here, from one uniform number per token. The numbers of
a completion depend on the run's seed, the update, the prompt and the completion's index alone, so a resumed run and a
run on another number of ranks draw the same completions.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from oumi_pl.attention.probe import evaluating
from oumi_pl.errors import UserError
from oumi_pl.models.generation import without_own_settings


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    Args:
        max_new_tokens: Most tokens of a completion.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Samples from the likeliest tokens that make up this much of the distribution.
        top_k: Samples from this many of the likeliest tokens; 0 from all.
        min_p: Samples from tokens with at least this share of the likeliest token's probability.
        stop: Texts that end a completion; the text itself belongs to the completion.

    Raises:
        UserError: a value is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "min_p": (0 <= self.min_p < 1, "from 0 to below 1"),
        }
        for name, (is_right, wanted) in ranges.items():
            if not is_right:
                raise UserError(f"sampling.{name} is {getattr(self, name)}, but has to be {wanted}")

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens can't be sampled, so that log-probabilities are not those of the model."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class Completion(NamedTuple):
    """A sampled completion."""

    ids: np.ndarray
    """`[tokens]` int32, with the token that ended it."""
    logps: np.ndarray
    """`[sampled]` float32: the log-probability of each sampled token under the distribution that it was sampled from.

    All tokens are sampled, except those of an environment.
    """
    entropies: np.ndarray
    """`[sampled]` float32: the entropy of that distribution, in nats."""
    is_finished: bool
    """Whether it ended by itself; False if `max_new_tokens` cut it."""
    replies: tuple[tuple[int, int], ...] = ()
    """Where each turn of an environment starts and stops within `ids`."""
    policy_logps: np.ndarray | None = None
    """`[sampled]` float32: the log-probability of each sampled token under the policy, recomputed, if `logps` are of an
    engine whose are not exactly these."""

    @property
    def is_sampled(self) -> np.ndarray:
        """Which tokens the policy sampled, `[tokens]` bool."""
        sampled = np.ones(len(self.ids), dtype=bool)
        for start, stop in self.replies:
            sampled[start:stop] = False
        return sampled

    @property
    def turns(self) -> list[tuple[bool, np.ndarray]]:
        """Whether the policy sampled it, and the ids, of each turn."""
        turns, end = [], 0
        for start, stop in self.replies:
            turns += [(True, self.ids[end:start]), (False, self.ids[start:stop])]
            end = stop
        return [*turns, (True, self.ids[end:])]


def uniforms(seed: Sequence[int], tokens: int) -> np.ndarray:
    """The numbers from 0 to 1 that decide the tokens of a completion, `[tokens]` float64.

    Args:
        seed: Run seed, number of the prompt within the run, and index of the completion.
        tokens: Most tokens of a completion.
    """
    return np.random.default_rng(list(seed)).random(tokens)


class Draw(LogitsProcessor):
    """Draws the next token of each row, and lets `generate` see only that one.

    Args:
        sampling: The settings.
        numbers: `[rows, max_new_tokens]` from 0 to 1.
    """

    def __init__(self, sampling: Sampling, numbers: Tensor) -> None:
        self.sampling = sampling
        self.numbers = numbers
        self.logps: list[Tensor] = []
        """`[rows]` for each new token."""
        self.entropies: list[Tensor] = []
        """The same."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Maps scores `[rows, vocab]` to 0 for the drawn token and -inf for all others."""
        if self.sampling.temperature == 0:
            logps = scores.float().log_softmax(-1)
            drawn = scores.argmax(-1, keepdim=True)
        else:
            logps = truncated(scores.float() / self.sampling.temperature, self.sampling).log_softmax(-1)
            drawn = draw(logps, self.numbers[:, len(self.logps)])
        self.logps.append(logps.gather(-1, drawn).squeeze(-1))
        self.entropies.append(torch.special.entr(logps.exp()).sum(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def draw(logps: Tensor, numbers: Tensor) -> Tensor:
    """Draws from log-probabilities `[rows, vocab]` with one number from 0 to 1 per row; returns `[rows, 1]`."""
    # float64: with float32 the sum over a large vocabulary would miss rare tokens
    cumulated = logps.double().exp().cumsum(-1)
    thresholds = numbers.to(cumulated)[:, None] * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, thresholds, right=True)
    # a number just below 1 can lie beyond the last token with a probability
    last = (logps > -torch.inf).long().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(drawn, last)


def truncated(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sets the logits `[rows, vocab]` of tokens that can't be sampled to -inf."""
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the likeliest token is always kept
        logits = logits.masked_fill((before >= sampling.top_p).gather(-1, order.argsort(-1)), -torch.inf)
    if sampling.min_p:
        floor = logits.amax(-1, keepdim=True) + np.log(sampling.min_p)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits


class _StopTexts(StoppingCriteria):
    """Ends rows whose completion contains a text. Remembers after how many tokens."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int, rows: int) -> None:
        self.tokenizer, self.texts, self.start = tokenizer, texts, start
        self.ended: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, ids in enumerate(input_ids[:, self.start :].tolist()):
            if self.ended[row] is None and any(stop in self.tokenizer.decode(ids) for stop in self.texts):
                self.ended[row] = len(ids)
        return torch.tensor([end is not None for end in self.ended], device=input_ids.device)


class _Limits(StoppingCriteria):
    """Ends each row at its own length, `[rows]`, with its prompt."""

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.lengths


class Engine(ABC):
    """Samples completions from the policy of a run."""

    is_exact: bool = True
    """Whether its log-probabilities are those of the policy that is trained, computed by the same operations."""

    def check(self, sampling: Sampling) -> None:  # noqa: B027 - engines need not override it
        """Refuses settings that it can't honour; this one honours all.

        Raises:
            UserError: names the setting.
        """

    def synchronise(self, policy: Any) -> None:  # noqa: B027
        """Brings the weights that sample up to date; called by all ranks before any of them samples.

        Does nothing here: an engine that samples with the policy's own weights needs nothing.

        Args:
            policy: The module that is trained.
        """

    @abstractmethod
    def sample(
        self,
        policy: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        ends: Iterable[int],
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Samples a completion for each prompt.

        Args:
            policy: The module that is trained; `policy.causal_lm.hf` is its model.
            tokenizer: Its tokenizer.
            prompts: Token ids, at least one each.
            seeds: Run seed, number of the prompt within the run, and index of the completion, of each prompt; with an
                extra round or a later turn some more numbers.
            sampling: The settings.
            ends: Token ids that end a completion.
            limits: Most tokens of each completion, if some have fewer than `sampling.max_new_tokens`, as the turns of
                an environment have; the model may have no positions for more.
        """


class Generate(Engine):
    """The default: transformers' `generate` on the policy itself.

    Args:
        bucket: Pads prompts to a multiple of so many tokens and allocates the cache of keys and values before the first
            token, so that the shapes of calls repeat; transformers compiles such decoding on a GPU. 0 does neither.

    Raises:
        UserError: `bucket` is negative.
    """

    bucket = 0

    def __init__(self, bucket: int = 0) -> None:
        if bucket < 0:
            raise UserError(f"data.engine.bucket is {bucket}, but has to be 0 or more")
        self.bucket = bucket

    def sample(
        self,
        policy: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        ends: Iterable[int],
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """See `Engine`; in one batch."""
        numbers = np.stack([uniforms(seed, sampling.max_new_tokens) for seed in seeds])
        settings: Any = {"numbers": numbers, "sampling": sampling, "ends": ends, "bucket": self.bucket}
        if limits is None:
            return sample(policy.causal_lm.hf, tokenizer, prompts, **settings)
        last = [len(prompt) + limit - 1 for prompt, limit in zip(prompts, limits, strict=True)]
        with _bounded_positions(policy.causal_lm.base, last):
            return sample(policy.causal_lm.hf, tokenizer, prompts, limits=limits, **settings)


@contextmanager
def _bounded_positions(model: Any, last: Sequence[int]) -> Iterator[None]:
    """Keeps the position of each row in `generate` from going past its last one.

    `generate` computes rows that have ended until the longest ends; a model with learned positions would fail there.
    """
    update = model._update_model_kwargs_for_generation

    def bounded(*args: Any, **kwargs: Any) -> Any:
        values = update(*args, **kwargs)
        if "position_ids" in values:
            positions = values["position_ids"]
            values["position_ids"] = torch.minimum(positions, positions.new_tensor(last)[:, None])
        return values

    with replaced(model, "_update_model_kwargs_for_generation", bounded):
        yield


@contextmanager
def replaced(model: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of a model, and removes or restores it afterwards."""
    before = vars(model).get(name)
    setattr(model, name, value)
    try:
        yield
    finally:
        delattr(model, name)
        if before is not None:
            setattr(model, name, before)


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    numbers: np.ndarray,
    sampling: Sampling,
    ends: Iterable[int],
    limits: Sequence[int] | None = None,
    streamer: Any = None,
    bucket: int = 0,
) -> list[Completion]:
    """Samples a completion for each prompt, in one batch. Training modes are left as they were.

    Args:
        model: A Hugging Face model with `generate`.
        tokenizer: Its tokenizer.
        prompts: Token ids, at least one each.
        numbers: `[prompts, max_new_tokens]`, as of `uniforms`.
        sampling: The settings.
        ends: Token ids that end a completion.
        limits: See `Engine.sample`.
        streamer: Of transformers, for a single prompt.
        bucket: See `Generate`.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    longest = -(-longest // bucket) * bucket if bucket else longest
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    drawing = Draw(sampling, torch.from_numpy(numbers).to(device))
    stopping = _StopTexts(tokenizer, sampling.stop, longest, len(prompts)) if sampling.stop else None
    ending = sorted(set(ends))
    criteria: list[Any] = [stopping] if stopping else []
    if limits is not None:
        criteria.append(_Limits(longest + torch.tensor(limits, device=device)))
    with evaluating(model), without_own_settings(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=ending or None,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([drawing]),
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=streamer,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            cache_implementation="static" if bucket else None,
        )
    for module in model.modules() if bucket else ():
        # by which transformers would make the next cache longer than this call needs, but not after a resume
        vars(module).pop("_previous_max_cache_length", None)
    stops = [None] * len(prompts) if stopping is None else stopping.ended
    completions = _completions(out[:, longest:], drawing, ending, stops)
    return completions if limits is None else list(map(_cut, completions, limits))


def _cut(completion: Completion, limit: int) -> Completion:
    """A completion of at most `limit` tokens; one that is cut is not finished."""
    ids, logps, entropies, is_finished, *_ = completion
    return Completion(ids[:limit], logps[:limit], entropies[:limit], is_finished and len(ids) <= limit)


def _completions(out: Tensor, drawing: Draw, ending: Sequence[int], stops: Sequence[int | None]) -> list[Completion]:
    """Cuts the rows of new tokens where they end: at an id of `ending`, or after as many tokens as a stop text says."""
    tokens = out.cpu().numpy().astype(np.int32)
    logps, entropies = (torch.stack(v, 1).float().cpu().numpy() for v in (drawing.logps, drawing.entropies))
    completions = []
    for row, (sampled, end) in enumerate(zip(tokens, stops, strict=True)):
        hits = np.flatnonzero(np.isin(sampled, ending))
        length = int(hits[0]) + 1 if len(hits) else None
        if end is not None:
            length = end if length is None else min(length, end)
        kept = slice(length)
        completions.append(Completion(sampled[kept], logps[row, kept], entropies[row, kept], length is not None))
    return completions
