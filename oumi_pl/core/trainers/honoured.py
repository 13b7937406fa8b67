"""Which training parameters the native trainer honours: what it does not honour is refused by name, never ignored."""

from operator import attrgetter
from typing import TYPE_CHECKING

from oumi_pl.core.recipe.fields import FIELDS
from oumi_pl.errors import UserError, nearest

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams

OF_OTHER_TYPES = ("reward_functions", "reward_function_kwargs", "grpo", "gkd", "gold", "verl_config_overrides")
NOT_HONOURED = {
    "metrics_function": "evaluation gives the loss and the perplexity; compute more in a callback's on_evaluate",
    **{name: FIELDS[f"training.{name}"].why for name in OF_OTHER_TYPES},
    "dataloader_main_process_only": "every process reads its own share of the rows; leave it out or set it to false",
    "include_alternative_mfu_metrics": "FLOPs are counted by parameters only; leave it out",
    "telemetry.collect_telemetry_for_all_ranks": "telemetry is taken on rank 0",
    "telemetry.track_gpu_temperature": "temperatures are not read; a logger's system metrics have them",
}
"""Field of `training` -> why it can't be set, and what to do instead."""

EXTRA = {
    "metric_for_best_model": None,
    "greater_is_better": None,
    "load_best_model_at_end": False,
    "save_total_limit": None,
    "eval_delay": 0,
    "eval_on_start": False,
}
"""What `trainer_kwargs` may hold, with the defaults: arguments of transformers' that Oumi has no field for."""


def refuse_what_is_not_honoured(params: "TrainingParams", has_eval_dataset: bool) -> None:
    """Refuses parameters that would have no effect, or that contradict each other.

    Args:
        params: What the run was given.
        has_eval_dataset: Whether there is anything to evaluate on.

    Raises:
        UserError: for the first one.
    """
    defaults = type(params)()
    for field, reason in NOT_HONOURED.items():
        value = attrgetter(field)(params)
        if value and value != attrgetter(field)(defaults):
            raise UserError(f"training.{field}: {reason}")
    for name in params.trainer_kwargs:
        if name not in EXTRA:
            raise UserError(f"training.trainer_kwargs: the native trainer has no {name!r}{nearest(name, EXTRA)}")
    # numbers by themselves were checked when the parameters were made
    if params.warmup_steps is not None and params.warmup_ratio is not None:
        raise UserError("training: warmup_steps and warmup_ratio say the same thing; set one of them")
    if params.eval_strategy != "no" and not has_eval_dataset:
        raise UserError(f"training.eval_strategy is {params.eval_strategy}, but there is no eval_dataset")
    extra = EXTRA | params.trainer_kwargs
    if extra["load_best_model_at_end"] and (params.eval_strategy == "no" or not extra["metric_for_best_model"]):
        raise UserError("training.trainer_kwargs.load_best_model_at_end: needs eval_strategy and metric_for_best_model")
    if extra["load_best_model_at_end"] and not (params.save_steps > 0 or params.save_epoch):
        raise UserError("training.trainer_kwargs.load_best_model_at_end: set save_steps or save_epoch to keep the best")
