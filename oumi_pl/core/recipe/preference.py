"""The loss of TRL's DPO by the arguments that `trainer_kwargs` gives it."""

from typing import Any

from oumi_pl.core.recipe.notes import refuse
from oumi_pl.errors import nearest

PLACE = "training.trainer_kwargs"

LOSSES = {
    "sigmoid": "Sigmoid",
    "hinge": "Hinge",
    "ipo": "IPO",
    "exo_pair": "EXO",
    "nca_pair": "NCA",
    "robust": "Robust",
    "bco_pair": "BCO",
    "sppo_hard": "SPPO",
    "aot": "AOT",
    "aot_unpaired": "AOTUnpaired",
    "apo_zero": "APOZero",
    "apo_down": "APODown",
    "discopop": "DiscoPOP",
    "sigmoid_norm": "LengthNormalizedSigmoid",
    "sft": "SFTTerm",
}
SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired")
BETA = 0.1

KWARGS = (
    "beta",
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "discopop_tau",
    "ld_alpha",
    "sync_ref_model",
    "ref_model_sync_steps",
    "ref_model_mixup_alpha",
    "precompute_ref_log_probs",
    "disable_dropout",
    "truncation_mode",
)
"""Arguments of TRL's DPO that have a counterpart."""


def preference(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`model.loss`, and `sync_every` and `mixup` of a reference that moves, as far as they aren't the defaults.

    Raises:
        UserError: there is no such loss, or an argument has no counterpart.
    """
    for key, only in {"disable_dropout": True, "truncation_mode": "keep_start"}.items():
        if kwargs.get(key, only) != only:
            refuse(f"{PLACE}.{key}", f"{kwargs[key]!r} has no counterpart; leave it out")
    made: dict[str, Any] = {}
    loss = _loss(kwargs)
    if loss is not None:
        made["loss"] = loss
    if kwargs.get("sync_ref_model"):
        made |= {"sync_every": kwargs.get("ref_model_sync_steps", 512)}
        made |= {"mixup": kwargs["ref_model_mixup_alpha"]} if "ref_model_mixup_alpha" in kwargs else {}
    return made


def _loss(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    given = kwargs.get("loss_type") or "sigmoid"
    names = list(given) if isinstance(given, list | tuple) else [given]
    losses = [_single(str(name), kwargs) for name in names]
    weights = kwargs.get("loss_weights")
    loss = losses[0]
    if len(losses) > 1:
        arguments = {"losses": losses, "weights": [float(w) for w in weights or [1.0] * len(losses)]}
        loss = {"class_path": "WeightedSum", "init_args": arguments}
    elif weights and list(weights) != [1.0]:
        refuse(f"{PLACE}.loss_weights", "there is one loss, which needs no weight; leave it out")
    if kwargs.get("ld_alpha") is not None:
        return {"class_path": "LDDPO", "init_args": {"loss": loss, "alpha": kwargs["ld_alpha"]}}
    return loss


def _single(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    if name not in LOSSES:
        refuse(f"{PLACE}.loss_type", f"no counterpart of {name!r}{nearest(name, LOSSES)}")
    arguments: dict[str, Any] = {} if name == "sft" else {"beta": float(kwargs.get("beta", BETA))}
    smoothing = kwargs.get("label_smoothing")
    if smoothing:
        if name not in SMOOTHED:
            refuse(f"{PLACE}.label_smoothing", f"{name} takes none; leave it out")
        arguments["label_smoothing"] = float(smoothing)
    elif name == "robust":
        refuse(f"{PLACE}.label_smoothing", "robust needs the share of labels that are wrong, above 0")
    if name == "discopop" and "discopop_tau" in kwargs:
        arguments["tau"] = float(kwargs["discopop_tau"])
    return {"class_path": LOSSES[name], "init_args": arguments} if arguments else {"class_path": LOSSES[name]}
