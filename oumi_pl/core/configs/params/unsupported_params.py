"""Sections of trainer types that are not here, so that files which Oumi has written with their defaults still load.

A value that differs from Oumi's default would have no effect, and is refused.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from oumi_pl.core.configs.params.base_params import BaseParams, default_of, with_fields

TEXT, FLOAT = (str | None, None), (float | None, None)


@dataclasses.dataclass
class Unsupported(BaseParams):
    """A section of a trainer type that is not here."""

    def unsupported(self) -> Iterator[str]:
        """Values that would have no effect; checked by whoever holds the section, after the trainer type."""
        method = type(self).__name__.removesuffix("Params").upper()
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != default_of(field):
                yield f"{field.name}: {method} is not among the trainer types here; remove the section"


GOLD: dict[str, Any] = {
    "teacher_model_name_or_path": TEXT, "teacher_model_init_kwargs": {"torch_dtype": "auto"},
    "teacher_tokenizer_name_or_path": TEXT, "temperature": 0.9, "top_p": 0.95, "top_k": 0, "lmbda": 0.5, "beta": 0.5,
    "max_completion_length": 128, "disable_dropout": True, "seq_kd": False,
    "use_uld_loss": False, "use_extended_uld": True, "uld_use_hybrid_loss": False, "uld_hybrid_matched_weight": FLOAT,
    "uld_hybrid_unmatched_weight": FLOAT, "uld_crossentropy_weight": 0.0, "uld_distillation_weight": 1.0,
    "uld_student_temperature": 1.0, "uld_teacher_temperature": 1.0, "uld_skip_student_eos": True,
    "uld_skip_teacher_eos": True,
    "use_transformers_paged": False, "use_vllm": False, "vllm_mode": "server", "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8001, "vllm_server_timeout": 240.0, "vllm_gpu_memory_utilization": 0.9,
    "vllm_tensor_parallel_size": 1, "vllm_guided_decoding_regex": TEXT, "vllm_sync_frequency": 1,
    "vllm_enable_sleep_mode": False,
}  # fmt: skip
"""Fields and defaults of Oumi's section."""


@with_fields(GOLD)
class GoldParams(Unsupported):
    """Distillation across tokenizers: not here."""
