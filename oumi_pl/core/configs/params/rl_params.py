"""Sections of the trainer types that are not here, so that files which Oumi has written with their defaults still load.

A value that differs from Oumi's default would have no effect, and is refused.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from oumi_pl.core.configs.errors import OumiConfigError
from oumi_pl.core.configs.params.base_params import BaseParams


@dataclass
class _NotHere(BaseParams):
    """A section of a trainer type that is not here."""

    def _check(self) -> None:
        for each in dataclasses.fields(self):
            made = each.default_factory
            default = each.default if made is dataclasses.MISSING else made()
            if getattr(self, each.name) != default:
                method = type(self).__name__.removesuffix("Params").upper()
                raise OumiConfigError(f"{each.name}: {method} is not among the trainer types here; remove the section")


@dataclass
class GrpoParams(_NotHere):
    """Group-relative policy optimization: not here."""

    model_init_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    num_generations: int | None = None
    temperature: float = 0.9
    remove_unused_columns: bool = False
    repetition_penalty: float | None = 1.0
    use_vllm: bool = False
    vllm_mode: str | None = None
    vllm_gpu_memory_utilization: float = 0.9
    epsilon: float = 0.2
    log_completions: bool = False
    rollout_function: str | None = None


@dataclass
class GkdParams(_NotHere):
    """Generalized knowledge distillation: not here."""

    teacher_model_name_or_path: str | None = None
    teacher_model_init_kwargs: dict[str, Any] = field(default_factory=lambda: {"dtype": "auto"})
    temperature: float = 0.9
    lmbda: float = 0.5
    beta: float = 0.5
    max_new_tokens: int = 128
    disable_dropout: bool = True
    seq_kd: bool = False


@dataclass
class GoldParams(_NotHere):
    """Distillation across tokenizers: not here."""

    teacher_model_name_or_path: str | None = None
    teacher_model_init_kwargs: dict[str, Any] = field(default_factory=lambda: {"torch_dtype": "auto"})
    teacher_tokenizer_name_or_path: str | None = None
    temperature: float = 0.9
    top_p: float = 0.95
    top_k: int = 0
    lmbda: float = 0.5
    beta: float = 0.5
    max_completion_length: int = 128
    disable_dropout: bool = True
    seq_kd: bool = False
    use_uld_loss: bool = False
    use_extended_uld: bool = True
    uld_use_hybrid_loss: bool = False
    uld_hybrid_matched_weight: float | None = None
    uld_hybrid_unmatched_weight: float | None = None
    uld_crossentropy_weight: float = 0.0
    uld_distillation_weight: float = 1.0
    uld_student_temperature: float = 1.0
    uld_teacher_temperature: float = 1.0
    uld_skip_student_eos: bool = True
    uld_skip_teacher_eos: bool = True
    use_transformers_paged: bool = False
    use_vllm: bool = False
    vllm_mode: str = "server"
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8001
    vllm_server_timeout: float = 240.0
    vllm_gpu_memory_utilization: float = 0.9
    vllm_tensor_parallel_size: int = 1
    vllm_guided_decoding_regex: str | None = None
    vllm_sync_frequency: int = 1
    vllm_enable_sleep_mode: bool = False
