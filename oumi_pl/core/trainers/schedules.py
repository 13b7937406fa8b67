"""Learning-rate schedules by Oumi's names, as factors on the learning rate."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from oumi_pl.errors import UserError, nearest

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams

Factor = Callable[[int], float]
"""Factor for the update that follows so many updates."""


def _linear(progress: float) -> float:
    return max(0.0, 1 - progress)


def _cosine(progress: float, num_cycles: float = 0.5) -> float:
    return max(0.0, 0.5 * (1 + math.cos(2 * math.pi * num_cycles * progress)))


def _cosine_with_restarts(progress: float, num_cycles: float = 1) -> float:
    return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * ((num_cycles * progress) % 1)))


def _cosine_with_min_lr(progress: float, num_cycles: float = 0.5, min_lr_rate: float = 0.0) -> float:
    return min_lr_rate + (1 - min_lr_rate) * 0.5 * (1 + math.cos(2 * math.pi * num_cycles * progress))


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, tuple[Callable[..., float], tuple[str, ...]]] = {
    "linear": (_linear, ()),
    "cosine": (_cosine, ("num_cycles",)),
    "cosine_with_restarts": (_cosine_with_restarts, ("num_cycles",)),
    "cosine_with_min_lr": (_cosine_with_min_lr, ("num_cycles", "min_lr_rate", "min_lr")),
    "constant": (_constant, ()),
    "constant_with_warmup": (_constant, ()),
}
"""Name -> the factor by the progress after the warm-up, from 0 to 1, and what `lr_scheduler_kwargs` may hold."""


def schedule(params: "TrainingParams", total: int) -> Factor:
    """The factor over the optimizer steps of a run: a linear warm-up from 0, then the schedule that is named.

    With `W` steps of warm-up, the factor of step `s` is `s / W` before `W`, and after it that of the progress
    `(s - W) / (total - W)`. A `warmup_ratio` is rounded up to whole steps, as transformers does.

    Args:
        params: `lr_scheduler_type`, `lr_scheduler_kwargs`, `warmup_steps` or `warmup_ratio`, `learning_rate`.
        total: Optimizer steps of the whole run.

    Raises:
        UserError: for a name or an argument that there is not.
    """
    name = params.lr_scheduler_type
    if name not in SCHEDULES:
        raise UserError(f"training.lr_scheduler_type: there is no {name!r}{nearest(name, SCHEDULES)}")
    shape, known = SCHEDULES[name]
    kwargs = dict(params.lr_scheduler_kwargs or {})
    for key in kwargs:
        if key not in known:
            hint = nearest(key, known) or "; it takes none"
            raise UserError(f"training.lr_scheduler_kwargs: {name} has no {key!r}{hint}")
    _resolve_minimum(kwargs, params.learning_rate)
    warmup = params.warmup_steps if params.warmup_steps is not None else math.ceil((params.warmup_ratio or 0) * total)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return shape((step - warmup) / max(1, total - warmup), **kwargs)

    return factor


def _resolve_minimum(kwargs: dict[str, Any] | Mapping[str, Any], learning_rate: float) -> None:
    """Turns `min_lr`, a learning rate, into `min_lr_rate`, a share of the highest."""
    if "min_lr" not in kwargs or not isinstance(kwargs, dict):
        return
    if "min_lr_rate" in kwargs:
        raise UserError("training.lr_scheduler_kwargs: min_lr and min_lr_rate say the same thing; set one of them")
    kwargs["min_lr_rate"] = float(kwargs.pop("min_lr")) / learning_rate
