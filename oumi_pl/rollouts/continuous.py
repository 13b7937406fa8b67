"""An engine that samples with transformers' continuous batching: a completion that ends makes room for the next one."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oumi_pl.attention.probe import evaluating
from oumi_pl.errors import UserError
from oumi_pl.rollouts.sampling import Completion, Engine, Sampling, draw, replaced, truncated, uniforms

POLL = 1.0
"""Seconds between two looks at whether the thread that samples is still alive."""


class ContinuousBatching(Engine):
    """Samples as `Generate` does, the same completions, with transformers' continuous batching on the policy itself.

    All prompts of a call go into one queue. Each forward pass computes the next token of the running completions and
    prefills waiting prompts, so no pass is spent on completions that a token has ended, and nothing is padded. Stop
    texts are looked for afterwards: until then their completions go on. Prompts that begin alike share keys and values.
    Raise `data.prompts_per_call`: what is sampled in one call shares a queue.

    Args:
        page_size: Tokens of a page of the cache of keys and values.
        tokens: Most tokens of a forward pass; a longer prompt is prefilled in parts.
        requests: Most completions that run at the same time; they can't be more than `tokens`.
        pages: Pages of the cache; as many as `requests` completions need at most when left out. With fewer, some wait.
        flash: Let transformers take a flash attention kernel on a GPU, which rounds differently from training;
            log-probabilities are then recomputed, as for vLLM.

    Raises:
        UserError: a value is below 1.
    """

    def __init__(
        self,
        page_size: int = 32,
        tokens: int = 1024,
        requests: int = 256,
        pages: int | None = None,
        flash: bool = False,
    ) -> None:
        sizes = {"page_size": page_size, "tokens": tokens, "requests": requests, "pages": pages}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise UserError(f"data.engine.{name} is {value}, but has to be at least 1")
        self.page_size, self.tokens, self.pages, self.flash = page_size, tokens, pages, flash
        self.requests = min(requests, tokens)
        self.is_exact = not flash

    @torch.no_grad()
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
        """See `Engine`. Training modes, attention and the random state are left as they were.

        Raises:
            UserError: the model can't be sampled from in this way, or a prompt could not be completed.
        """
        model, ending = policy.causal_lm.base, sorted(set(ends))
        numbers = np.stack([uniforms(seed, sampling.max_new_tokens) for seed in seeds])
        drawing = _draw(sampling, numbers, [len(prompt) for prompt in prompts])
        with ExitStack() as contexts:
            contexts.enter_context(torch.random.fork_rng([model.device] if model.device.type == "cuda" else []))
            contexts.enter_context(torch.inference_mode(False))
            contexts.enter_context(evaluating(model))
            contexts.enter_context(_plain_attention(model))
            contexts.enter_context(_processors(model, drawing))
            most = [sampling.max_new_tokens] * len(prompts) if limits is None else list(limits)
            sampled = self._run(model, drawing, prompts, most, ending)
        return [drawing.completion(row, ids, tokenizer, ending) for row, ids in enumerate(sampled)]

    def _run(
        self, model: Any, drawing: Any, prompts: Sequence[Sequence[int]], most: list[int], ending: list[int]
    ) -> list[list[int]]:
        """The sampled ids of each prompt, at most `most`."""
        from transformers import GenerationConfig

        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max(most), eos_token_id=ending or -1, pad_token_id=0
        )
        try:
            manager = model.init_continuous_batching(settings, self._config(prompts, most))
        except (ValueError, AttributeError, NotImplementedError) as error:
            raise UserError(f"data.engine: {type(model).__name__} has no continuous batching: {error}") from error
        # transformers counts the tensors of its own processors only
        manager.logit_processor.tensors_required = 1
        if torch.is_autocast_enabled(model.device.type):
            manager.model = _Autocast(model)
            manager.warmup()  # creates the cache, which takes values of one dtype only
            cache = manager.batch_processor.cache
            cache.update = _cast(cache.update, model.dtype)
        for row, (prompt, limit) in enumerate(zip(prompts, most, strict=True)):
            manager.add_request(list(prompt), str(row), limit, eos_token_id=ending or -1)
        manager.start()
        try:
            return _results(manager, len(prompts))
        finally:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()

    def _config(self, prompts: Sequence[Sequence[int]], most: Sequence[int]) -> Any:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        lengths = [len(prompt) + limit for prompt, limit in zip(prompts, most, strict=True)]
        pages = sorted((-(-length // self.page_size) for length in lengths), reverse=True)
        requests = min(self.requests, len(prompts))
        return ContinuousBatchingConfig(
            page_size=self.page_size,
            max_batch_tokens=self.tokens,
            num_blocks=self.pages or sum(pages[:requests]) + requests,
            max_requests_per_batch=requests,
            # tokens are drawn in Python, from the random numbers of their completion
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=self.flash,
        )


def _results(manager: Any, count: int) -> list[list[int]]:
    """The sampled ids of all requests.

    Raises:
        UserError: one failed, or the thread that samples has ended before all are complete.
    """
    finished: dict[int, list[int]] = {}
    while len(finished) < count:
        result = manager.get_result(timeout=POLL)
        if result is not None and result.error is not None:
            raise UserError(f"data.engine: continuous batching failed: {result.error}")
        if result is not None and result.is_finished():
            finished[int(result.request_id)] = list(result.generated_tokens)
        elif result is None and not manager.is_running():
            error = manager.background_thread_status.fatal_error
            raise UserError(
                f"data.engine: continuous batching ended after {len(finished)} of {count} completions: {error}"
            ) from error
    return [finished[row] for row in range(count)]


def _draw(sampling: Sampling, numbers: np.ndarray, lengths: list[int]) -> Any:
    """A logits processor that draws each request's next token from its own random numbers, and keeps what it drew.

    Defined in a function, so that transformers' module is imported only if it is used.
    """
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

    class Draw(ContinuousBatchingLogitsProcessor):
        supported_kwargs: dict[str, type] = {}  # noqa: RUF012
        ignored_kwargs = ()

        def __init__(self) -> None:
            self.places: list[tuple[int, int]] = []
            """Row and number of the token that each logit of the current forward pass is for."""
            self.logps = np.zeros(numbers.shape, dtype=np.float32)
            self.entropies = np.zeros(numbers.shape, dtype=np.float32)

        def fill_defaults(self, int32_tensor: Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
            states = [request.state for request in requests_with_new_token]
            # a request that had to give up its place in the cache begins again with what it has as its prompt
            tokens = [len(state.initial_tokens) + len(state.generated_tokens) for state in states]
            rows = [int(state.request_id) for state in states]
            self.places = [(row, n - lengths[row]) for row, n in zip(rows, tokens, strict=True)]
            return torch.zeros(len(states), dtype=torch.int32)

        def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
            drawn = torch.full_like(scores, -torch.inf)
            # prompts of which a part is left to prefill have rows as well, after those with a next token
            if self.places:
                drawn[: len(self.places)].scatter_(-1, self._drawn(scores[: len(self.places)]), 0.0)
            return drawn

        def _drawn(self, scores: Tensor) -> Tensor:
            rows, tokens = (list(values) for values in zip(*self.places, strict=True))
            if sampling.temperature == 0:
                logps = scores.float().log_softmax(-1)
                drawn = scores.argmax(-1, keepdim=True)
            else:
                logps = truncated(scores.float() / sampling.temperature, sampling).log_softmax(-1)
                drawn = draw(logps, torch.from_numpy(numbers[rows, tokens]).to(scores.device))
            self.logps[rows, tokens] = logps.gather(-1, drawn).squeeze(-1).cpu().numpy()
            self.entropies[rows, tokens] = torch.special.entr(logps.exp()).sum(-1).cpu().numpy()
            return drawn

        def completion(self, row: int, ids: list[int], tokenizer: Any, ending: list[int]) -> Completion:
            """The completion of a row, cut after the first stop text."""
            stopped = _stop_length(tokenizer, ids, sampling.stop) if sampling.stop else None
            kept, is_finished = slice(stopped or len(ids)), stopped is not None or ids[-1] in ending
            return Completion(
                np.array(ids[kept], np.int32), self.logps[row, kept], self.entropies[row, kept], is_finished
            )

    return Draw()


def _stop_length(tokenizer: Any, ids: list[int], stops: Sequence[str]) -> int | None:
    """How many of the tokens it takes until their text has one of the texts `stops`; None if it has none."""

    def has_stop(n: int) -> bool:
        text = tokenizer.decode(ids[:n])
        return any(stop in text for stop in stops)

    # more tokens don't take a text away, so a binary search finds where it is complete
    return bisect_left(range(len(ids)), True, lo=1, key=has_stop) if has_stop(len(ids)) else None


@contextmanager
def _processors(model: Any, drawing: Any) -> Iterator[None]:
    """Makes a logits processor the only one of a model."""
    from transformers import LogitsProcessorList

    with replaced(model, "_get_logits_processor", lambda *_args, **_kwargs: LogitsProcessorList([drawing])):
        yield


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Lets a model compute with transformers' own attention: ours is for packed rows."""
    own = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class _Autocast:
    """A model that other threads run under the autocast of this one, which they don't inherit."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.autocast_dtype = torch.get_autocast_dtype(model.device.type)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **kwargs: Any) -> Any:
        with torch.autocast(self.model.device.type, self.autocast_dtype):
            return self.model(**kwargs)


def _cast(update: Any, dtype: torch.dtype) -> Any:
    """A cache's `update` for keys and values of any dtype: under autocast, only rotary keys are in float32."""

    def cast(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(keys.to(dtype), values.to(dtype), *args, **kwargs)

    return cast
