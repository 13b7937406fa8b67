"""Optimizer, schedule and loss of an Oumi config."""

import math
from typing import Any

from oumi_pl.core.configs import TrainingParams
from oumi_pl.core.configs.params.training_params import THROUGH_TRANSFORMERS
from oumi_pl.core.recipe.notes import Notes, given, refuse
from oumi_pl.errors import nearest

ADAM = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "paged_adamw_32bit": "bitsandbytes.optim.PagedAdamW32bit",
}
ADAM_HF = ADAM | {"adamw_bnb_8bit": "bitsandbytes.optim.AdamW8bit"}
ADAM_OUMI = ADAM | {"adam": "Adam", "adamw": "AdamW", "paged_adamw": "bitsandbytes.optim.PagedAdamW"}
"""Names of optimizers with Adam's options -> classes; Oumi's own trainer knows others than transformers'."""

SCHEDULES = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "constant": (),
    "constant_with_warmup": (),
}
"""Name of a schedule -> what `lr_scheduler_kwargs` may hold."""


def optimizer(params: TrainingParams, notes: Notes) -> dict[str, Any]:
    """`model.optimizer`: class and arguments.

    Raises:
        UserError: there is no such optimizer, or it doesn't take what is set.
    """
    theirs = params.trainer_type in THROUGH_TRANSFORMERS
    name = params.optimizer if theirs else params.optimizer.lower()
    adam = ADAM_HF if theirs else ADAM_OUMI
    arguments: dict[str, Any] = {"lr": params.learning_rate}
    if name in adam:
        path, betas = adam[name], [params.adam_beta1, params.adam_beta2]
        arguments |= {"betas": betas} if betas != [0.9, 0.999] else {}
        arguments |= {"eps": params.adam_epsilon} if params.adam_epsilon != 1e-8 else {}
    elif name == "sgd":
        path = "SGD"
        arguments |= given(momentum=params.sgd_momentum or None)
    elif name == "adafactor":
        path = "transformers.Adafactor"
        # eps is always written: without it the config would keep the one number of AdamW, the default class
        arguments |= {"eps": [1e-30, 1e-3], "relative_step": False, "scale_parameter": False}
    else:
        hint = "; did you mean 'adamw_torch'?" if name.lower() in ("adam", "adamw") else ""
        near = hint or nearest(name, [*adam, "sgd", "adafactor"])
        refuse("training.optimizer", f"no counterpart of {name!r}{near}")
    _note_options_of_others(params, name, notes, is_adam=name in adam, theirs=theirs)
    if params.weight_decay and not theirs:
        notes.comment("model.init_args.optimizer", "Oumi's own trainer decays the scales of RMSNorm too; here not")
    notes.became["training.optimizer"] = f"model.optimizer, {path}"
    return {"class_path": path, "init_args": arguments | {"weight_decay": params.weight_decay}}


def _note_options_of_others(params: TrainingParams, name: str, notes: Notes, *, is_adam: bool, theirs: bool) -> None:
    """Notes options of AdamW that the optimizer doesn't have, and refuses a momentum that Oumi wouldn't read."""
    if not is_adam:
        for field, default in {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}.items():
            if getattr(params, field) != default:
                notes.nothing(f"training.{field}", f"{name} has no such option")
                notes.comment("model.init_args.optimizer", f"{field}: {name} has no such option, and Oumi ignores it")
    if params.sgd_momentum and (theirs or name != "sgd"):
        refuse(
            "training.sgd_momentum",
            f"{params.trainer_type.name} has no momentum for {name}; leave it out, or set it in the recipe",
        )


def schedule(params: TrainingParams, notes: Notes) -> dict[str, Any] | None:
    """`model.schedule`: class and arguments; None for a constant rate.

    Raises:
        UserError: there is no such schedule, or it doesn't take what is set.
    """
    name = params.lr_scheduler_type
    if name not in SCHEDULES:
        refuse("training.lr_scheduler_type", f"no counterpart of {name!r}{nearest(name, SCHEDULES)}")
    kwargs = params.lr_scheduler_kwargs
    for key in kwargs:
        if key not in SCHEDULES[name]:
            refuse(f"training.lr_scheduler_kwargs.{key}", f"{name} has no such option{nearest(key, SCHEDULES[name])}")
    arguments = _warmup(params, notes)
    cycles = kwargs.get("num_cycles")
    if name == "constant" and params.trainer_type in THROUGH_TRANSFORMERS:
        if arguments:
            place = "warmup_ratio" if params.warmup_steps is None else "warmup_steps"
            notes.nothing(f"training.{place}", "transformers' constant has no warm-up (constant_with_warmup)")
        return None
    if name.startswith("constant"):
        return {"class_path": "Constant", "init_args": arguments} if arguments else None
    path, default = {"linear": ("Linear", None), "cosine_with_restarts": ("CosineRestarts", 1)}.get(
        name, ("Cosine", 0.5)
    )
    arguments |= _floor(params) if name == "cosine_with_min_lr" else {}
    arguments |= given(cycles=None if cycles == default else cycles)
    notes.became["training.lr_scheduler_type"] = f"model.schedule, {path}"
    return {"class_path": path} | given(init_args=arguments)


def _warmup(params: TrainingParams, notes: Notes) -> dict[str, Any]:
    steps, ratio = params.warmup_steps, params.warmup_ratio
    if steps is not None:
        notes.nothing("training.warmup_ratio", "warmup_steps wins")
        return given(warmup=steps or None)
    if not ratio:
        return {}
    if ratio < 1:
        if params.trainer_type not in THROUGH_TRANSFORMERS:
            notes.comment("model.init_args.schedule", "Oumi's own trainer rounds the warm-up down to whole steps")
        return {"warmup": ratio}
    if params.trainer_type in THROUGH_TRANSFORMERS:
        notes.comment("model.init_args.schedule", "a warmup_ratio of 1.0 is one step in transformers 5")
        return {"warmup": 1}
    if params.max_steps <= 0:
        refuse("training.warmup_ratio", "1.0 is all of the run, whose steps are not known; set warmup_steps")
    return {"warmup": params.max_steps}


def _floor(params: TrainingParams) -> dict[str, Any]:
    kwargs = params.lr_scheduler_kwargs
    given = [key for key in ("min_lr", "min_lr_rate") if kwargs.get(key) is not None]
    if len(given) != 1:
        words = "both are set; keep one" if given else "one of them has to be set"
        refuse("training.lr_scheduler_kwargs", f"cosine_with_min_lr: min_lr or min_lr_rate: {words}")
    floor = kwargs["min_lr_rate"] if given == ["min_lr_rate"] else float(kwargs["min_lr"]) / params.learning_rate
    return {"floor": _short(float(floor))}


def _short(value: float) -> float:
    """A quotient without the digits that are noise: 2e-6 / 2e-5 is 0.1."""
    rounded = float(f"{value:.12g}")
    return rounded if math.isclose(value, rounded, rel_tol=1e-12) else value
