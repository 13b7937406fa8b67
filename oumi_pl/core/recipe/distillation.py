"""The teacher of an Oumi config (the section `training.gkd`), and how the student is compared with it."""

from typing import Any

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe.notes import Notes, given, refuse

PLACE = "training.gkd"
SPEED = ("attn_implementation", "device_map", "low_cpu_mem_usage")
"""Arguments of the teacher that decide on speed alone."""


def distillation(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """`teacher`, `teacher_dtype` and `divergence` of TRL's GKD.

    Raises:
        UserError: the teacher would generate, or there is none, or an argument has no counterpart.
    """
    params = config.training.gkd
    if params.seq_kd and params.lmbda < 1:
        refuse(
            f"{PLACE}.seq_kd",
            "true would train on what the teacher generates; write its answers once with `oumi_pl generate`, name them "
            "in data.train.datasets, and set it to false",
        )
    if params.seq_kd:
        notes.nothing(f"{PLACE}.seq_kd", "with lmbda 1, all updates train on what the student generates")
    if not params.disable_dropout:
        refuse(f"{PLACE}.disable_dropout", "False has no counterpart; leave it out")
    if not (teacher := params.teacher_model_name_or_path):
        refuse(f"{PLACE}.teacher_model_name_or_path", "missing: name the model to learn from")
    return {"teacher": teacher} | _dtype(config, notes) | given(divergence=_divergence(params.beta))


def alternating(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """Arguments of `DistillData` for training on what the student generates; empty with `lmbda: 0`."""
    params = config.training.gkd
    if not params.lmbda:
        for key in ("temperature", "max_new_tokens"):
            notes.nothing(f"{PLACE}.{key}", "it is for generating, which lmbda 0 doesn't do")
        return {}
    notes.comment("data.init_args.lmbda", "the kind of an update is drawn for all of it; in TRL, for each micro-batch")
    notes.comment(
        "data.init_args.max_length",
        "rows whose prompt leaves no room in it for max_new_tokens are left out; TRL's grow",
    )
    return {
        "lmbda": float(params.lmbda),
        "sampling": {"max_new_tokens": params.max_new_tokens, "temperature": float(params.temperature)},
    }


def _divergence(beta: float) -> dict[str, Any] | None:
    """TRL's `beta`: at 0 and 1 it is not the limit of the generalized JSD, which is 0, but the two KLs."""
    if beta == 0:
        return None
    if beta == 1:
        return {"class_path": "ReverseKL"}
    return {"class_path": "JSD", "init_args": {"beta": beta}}


def _dtype(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    kwargs = dict(config.training.gkd.teacher_model_init_kwargs)
    place = f"{PLACE}.teacher_model_init_kwargs"
    if kwargs.pop("trust_remote_code", config.model.trust_remote_code) != config.model.trust_remote_code:
        refuse(f"{place}.trust_remote_code", "is that of model.trust_remote_code here; set that")
    name = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
    for key in kwargs:
        if key not in SPEED:
            refuse(f"{place}.{key}", "has no counterpart; leave it out")
        notes.became[f"{place}.{key}"] = "nothing: it decides on speed alone"
    if name not in ("auto", "float32", "bfloat16", "float16"):
        refuse(f"{place}.dtype", f"{name}: weights are float32, bfloat16, float16 or auto")
    return {"teacher_dtype": name}
