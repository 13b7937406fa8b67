"""Group-relative policy optimization: how completions are sampled."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oumi_pl.core.configs.params.base_params import BaseParams, harmless, honoured, refused

OF_VLLM = "completions are sampled by generate, which draws from the same distribution"
"""Where vLLM is not installed, or can't be used."""


@dataclass
class GrpoParams(BaseParams):
    """What TRL_GRPO and VERL_GRPO read besides the rest of `training`."""

    model_init_kwargs: dict[str, Any] = refused("the section model says how it is loaded", {})
    """Arguments of `from_pretrained`."""
    max_prompt_length: int | None = honoured("data.max_length", None)
    """Most tokens of a prompt; null: what is left of `model.model_max_length`."""
    max_completion_length: int | None = honoured("data.sampling.max_new_tokens", None)
    """Most tokens of a completion; null: TRL's default."""
    num_generations: int | None = honoured("data.completions", None)
    """Completions per prompt; null: TRL's default."""
    temperature: float = honoured("data.sampling.temperature", 0.9)
    """Of sampling, from 0 to 1."""
    remove_unused_columns: bool = harmless("rewards are given all columns", False)
    repetition_penalty: float | None = refused(
        "log-probabilities would be those of another distribution than the model's", 1.0
    )
    use_vllm: bool = harmless(OF_VLLM, False)
    vllm_mode: str | None = harmless(OF_VLLM, None)
    vllm_gpu_memory_utilization: float = harmless(OF_VLLM, 0.9)
    epsilon: float = honoured("model.loss", 0.2)
    """How far ratios may move before they are clipped."""
    log_completions: bool = harmless("it only decides what is shown while training", False)
    rollout_function: str | None = refused("there is no registry; subclass oumi_pl.rollouts.sampling.Engine", None)

    def to_hf_trainer_kwargs(self) -> dict[str, Any]:
        """Arguments of TRL's `GRPOConfig`: what is null has TRL's default, and vLLM's are passed if it is used."""
        vllm = ("vllm_mode", "vllm_gpu_memory_utilization")
        return {
            name: value
            for name, value in self
            if name != "rollout_function" and value not in (None, {}) and (self.use_vllm or name not in vllm)
        }

    def _problems(self) -> Iterator[str]:
        yield from self._below(1, "max_prompt_length", "max_completion_length", "num_generations")
        yield from self._no_share("temperature")
