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
        UserError: it would generate, has no teacher, or an argument has no counterpart.
    """
    params = config.training.gkd
    if params.lmbda:
        why = f"{params.lmbda:g} of the updates would train on what the student generates, which waits for online"
        refuse(f"{PLACE}.lmbda", f"{why} distillation; set it to 0")
    if params.seq_kd:
        why = "it would train on what the teacher generates, which waits for online distillation; set it to false"
        refuse(f"{PLACE}.seq_kd", why)
    if not params.disable_dropout:
        refuse(f"{PLACE}.disable_dropout", "False has no counterpart; leave it out")
    if not (teacher := params.teacher_model_name_or_path):
        refuse(f"{PLACE}.teacher_model_name_or_path", "missing: name the model to learn from")
    return {"teacher": teacher} | _dtype(config, notes) | given(divergence=_divergence(params.beta))


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
