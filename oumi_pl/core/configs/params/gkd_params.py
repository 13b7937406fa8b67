"""Generalized knowledge distillation: the teacher, and how student and teacher are compared."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oumi_pl.core.configs.params.base_params import BaseParams, honoured


@dataclass
class GkdParams(BaseParams):
    """What TRL_GKD reads besides the rest of `training`."""

    teacher_model_name_or_path: str | None = honoured("model.teacher", None)
    teacher_model_init_kwargs: dict[str, Any] = honoured("model.teacher_dtype", {"dtype": "auto"})
    """Arguments of `from_pretrained` for the teacher."""
    temperature: float = honoured("data.sampling.temperature", 0.9)
    """Of sampling, above 0 and at most 1. TRL compares at temperature 1."""
    lmbda: float = honoured("data.lmbda", 0.5)
    """Share of updates that train on what the student generates."""
    beta: float = honoured("model.divergence", 0.5)
    """0: KL(teacher || student), 1: KL(student || teacher), between: the generalized Jensen-Shannon divergence."""
    max_new_tokens: int = honoured("data.sampling.max_new_tokens", 128)
    disable_dropout: bool = honoured("true is how it is done", True)
    seq_kd: bool = honoured("false is how it is done", False)
    """Whether the other updates train on what the teacher generates."""

    def to_hf_trainer_kwargs(self) -> dict[str, Any]:
        """Arguments of TRL's `GKDConfig`; its trainer gets the teacher itself, as `teacher_model`."""
        section = {name: value for name, value in self if name != "teacher_model_name_or_path"}
        section["teacher_model_init_kwargs"] = {"dtype": "auto"} | self.teacher_model_init_kwargs
        return section

    def _problems(self) -> Iterator[str]:
        if not 0 < self.temperature <= 1:
            yield f"temperature is {self.temperature:g}, but has to be above 0 and at most 1"
        yield from self._no_share("lmbda")
        yield from self._no_share("beta")
        yield from self._below(1, "max_new_tokens")
