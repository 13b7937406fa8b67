"""An exported model in vLLM, for `export --check vllm`, which compares it, and for `generate --engine vllm`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from oumi_pl.rollouts.sampling import Completion, Sampling

PROMPTS = (
    "Hello",
    "What is the capital of France?",
    "Say backwards: robin",
    "Write a sentence about the sea.",
    "2 + 3 =",
    "Translate to German: Good morning, how are you?",
    "List three animals, then explain in one sentence why the second one is the largest of them.",
    "x",
)
MOST_TOKENS = 32
"""Most tokens of a completion."""
TOLERANCE = 1e-3
"""Nats by which log-probabilities may differ in float32; measured on CPUs: 1e-5."""
HALF_TOLERANCE = 0.25
"""The same in half precision, in which logits around 20 are rounded to steps of 0.1."""


class Comparison(NamedTuple):
    """How a served model compares with the exported one."""

    version: str
    """Of vLLM."""
    dtype: str
    completions: int
    tokens: int
    difference: float
    """The largest of the log-probabilities of generated tokens, in nats."""
    gap: float
    """How much less likely than the most likely token a generated one is at most here, in nats; 0 if all are equal."""

    def __str__(self) -> str:
        return (
            f"vLLM {self.version} serves it as it was trained: {self.completions} greedy completions of {self.tokens} "
            f"tokens, whose log-probabilities differ by at most {self.difference:.1e} nats ({self.dtype})"
        )


def check_vllm(folder: Path) -> Comparison:
    """Completes prompts greedily with vLLM and compares each token, its log-probability and where completions end.

    The expected values are those of transformers' model, loaded from the same folder; the export has compared that with
    the trained model.

    Args:
        folder: An exported model, or an adapter whose base is on disk or on the hub.

    Raises:
        UserError: vLLM is not installed, can't load it, or serves another model.
    """
    import torch

    from oumi_pl.commands.generate import from_folder, prompt_ids
    from oumi_pl.models.generation import ends_of

    loaded = from_folder(str(folder))
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    prompts = [prompt_ids(tokenizer, text) for text in PROMPTS]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096
    prompts = [ids for ids in prompts if 0 < len(ids) < positions]
    room = min(MOST_TOKENS, positions - max(map(len, prompts)))
    ends = ends_of(model, tokenizer)
    dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    outputs = _vllm_outputs(folder, prompts, room, ends, dtype)
    differences, gaps = [0.0], [0.0]
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([*prompt, *output.ids])
        with torch.no_grad():
            logps = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        own = logps.gather(-1, ids[len(prompt) :, None]).squeeze(-1)
        differences.append(float((own - torch.tensor(output.logps)).abs().max()))
        gaps.append(float((logps.amax(-1) - own).max()))
        _refuse_other_end(output, room, ends)
    import vllm

    installed = vllm.__version__
    tokens = sum(len(output.ids) for output in outputs)
    comparison = Comparison(installed, dtype, len(outputs), tokens, max(differences), max(gaps))
    tolerance = TOLERANCE if dtype == "float32" else HALF_TOLERANCE
    if not (comparison.difference <= tolerance and comparison.gap <= tolerance):
        raise UserError(
            f"--check vllm: vLLM {installed} serves another model than was trained: log-probabilities of its greedy "
            f"completions differ by up to {comparison.difference:.2g} nats, and its tokens are up to "
            f"{comparison.gap:.2g} less likely than the most likely ones ({tolerance:g} would be rounding); {folder} "
            "itself is right"
        )
    return comparison


def _refuse_other_end(output: Any, room: int, ends: Sequence[int]) -> None:
    """Refuses a completion that did not end at the first end token, or at the limit without one.

    Raises:
        UserError: it did not.
    """
    first = next((i for i, token in enumerate(output.ids) if token in ends), None)
    if len(output.ids) != (room if first is None else first + 1):
        raise UserError(
            f"--check vllm: vLLM ends completions elsewhere than the model was trained to: after {len(output.ids)} of "
            f"at most {room} tokens, the tokens {list(output.ids)}; those that end a completion are {list(ends)}"
        )


def _vllm_outputs(
    folder: Path, prompts: Sequence[Sequence[int]], room: int, ends: Sequence[int], dtype: str
) -> list[Any]:
    """Greedy completions of vLLM, each an `oumi_pl.rollouts.vllm.Output`.

    The end tokens of a whole model come from the folder's generation config, as they do when it is served.
    """
    from oumi_pl.rollouts.vllm import CACHE

    served = Served(
        folder,
        max(map(len, prompts)) + room,
        dtype=dtype,
        kv_cache_memory_bytes=CACHE,
        enforce_eager=True,
        generation_config="auto",
    )
    stop = {"stop_token_ids": list(ends)} if served.request is not None else {}
    params = {"max_tokens": room, "temperature": 0.0, "logprobs": 0, **stop}
    return served.complete(prompts, [params] * len(prompts))


class Served:
    """An exported model that vLLM has loaded in this process.

    Args:
        folder: The model, or an adapter whose base is on disk or on the hub.
        longest: Most tokens of a prompt and its completion.
        options: More arguments of `vllm.LLM`.

    Raises:
        UserError: vLLM is not installed, or can't load it.
    """

    def __init__(self, folder: Path, longest: int, **options: Any) -> None:
        from oumi_pl.models.build import read_adapter_config
        from oumi_pl.rollouts import vllm as engine

        self.request: Any = None
        """Names the adapter, if it is one."""
        model: dict[str, Any] = {"model": str(folder)}
        is_adapter = (folder / "adapter_config.json").is_file()
        if is_adapter:
            config = read_adapter_config(folder)
            ranks = max([config["r"], *(config.get("rank_pattern") or {}).values()])
            model = {"model": config["base_model_name_or_path"], **engine.adapter_options(ranks)}
            model["skip_tokenizer_init"] = True  # vLLM looks for a model's config beside the tokenizer
        self.llm = engine.build_llm(**model, tokenizer=str(folder), max_model_len=longest, **options)
        if is_adapter:
            from vllm.lora.request import LoRARequest

            self.request = LoRARequest("exported", 1, str(folder))

    def complete(self, prompts: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]) -> list[Any]:
        """Completes prompts of token ids, each with its `vllm.SamplingParams`; returns an `Output` for each."""
        from vllm import SamplingParams

        from oumi_pl.rollouts.vllm import output_of

        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        settings = [SamplingParams(**p, detokenize=bool(p.get("stop"))) for p in params]
        results = self.llm.generate(inputs, settings, lora_request=self.request, use_tqdm=False)
        return [output_of(result.outputs[0]) for result in results]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: "Sampling",
        ends: Sequence[int],
    ) -> list["Completion"]:
        """Completes prompts as `oumi_pl.rollouts.sampling.sample` does, with random numbers of vLLM's own.

        Args:
            prompts: Token ids.
            seeds: Of each prompt's random numbers, which do not depend on the other prompts.
            sampling: Longest completion, temperature, stop texts.
            ends: Ids that end a completion.
        """
        import numpy as np

        from oumi_pl.rollouts.sampling import Completion
        from oumi_pl.rollouts.vllm import sampling_params

        outputs = self.complete(prompts, [sampling_params(sampling, ends, seed) for seed in seeds])
        completions = []
        for output in outputs:
            ids, logps = np.array(output.ids, dtype=np.int32), np.array(output.logps, dtype=np.float32)
            is_finished = output.finish_reason == "stop" or (len(ids) > 0 and int(ids[-1]) in ends)
            completions.append(Completion(ids, logps, -logps, is_finished))
        return completions
