"""Translates our losses to those of the engines, and refuses losses that an engine can't compute."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from oumi_pl.errors import UserError
from oumi_pl.losses import distillation
from oumi_pl.losses.linear_head import checked_losses
from oumi_pl.losses.policy import BNPOLoss, CISPOLoss, DAPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss
from oumi_pl.losses.preference import (
    AOT,
    BCO,
    EXO,
    IPO,
    LDDPO,
    NCA,
    SPPO,
    Alpha,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    ForwardKL,
    Hinge,
    JensenShannon,
    LengthNormalizedSigmoid,
    ReverseKL,
    Robust,
    Sigmoid,
    WeightedSum,
)
from oumi_pl.losses.responses import APOZeroUnpaired, KTOLoss
from oumi_pl.losses.reward import BradleyTerry, PairLoss
from oumi_pl.rollouts.advantages import GroupMean
from oumi_pl.types import IGNORE_INDEX, PreferenceLoss, TokenLoss

TRL_NAMES: dict[type, str] = {
    Sigmoid: "sigmoid",
    LengthNormalizedSigmoid: "sigmoid_norm",
    Hinge: "hinge",
    IPO: "ipo",
    EXO: "exo_pair",
    Robust: "robust",
    DiscoPOP: "discopop",
    NCA: "nca_pair",
    BCO: "bco_pair",
    SPPO: "sppo_hard",
    AOT: "aot",
    AOTUnpaired: "aot_unpaired",
    APOZero: "apo_zero",
    APODown: "apo_down",
}
"""Our class -> TRL's `loss_type`, where both compute the same (`tests/parity/test_trl_losses.py`)."""
TRL_RESPONSE_NAMES: dict[type, str] = {KTOLoss: "kto", APOZeroUnpaired: "apo_zero_unpaired"}
"""The same for losses of single responses (`tests/parity/test_trl_kto.py`)."""
DIVERGENCES: dict[type, str] = {
    ReverseKL: "reverse_kl",
    ForwardKL: "forward_kl",
    JensenShannon: "js_divergence",
    Alpha: "alpha_divergence",
}
SMOOTHED = (EXO, Robust, AOT, AOTUnpaired)
"""Losses whose label smoothing TRL supports."""
INSTEAD = "or train with --engine lightning"


def compute_loss_func(loss: TokenLoss) -> Callable[..., Tensor]:
    """Wraps a token loss as an engine's `compute_loss_func`: on full logits, normalised by the targets of the update.

    It is called with the model's output, our shifted labels `[batch, seq]`, and the number of targets of the update.
    """

    def function(output: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        carries_loss = labels != IGNORE_INDEX
        logits = output.logits[carries_loss].float()
        if not len(logits):  # no targets: a zero gradient for every parameter, not None
            return output.logits.sum() * 0.0
        return checked_losses(loss, logits, labels[carries_loss]).sum() / num_items_in_batch

    return function


def dpo_settings(loss: PreferenceLoss) -> dict[str, Any]:
    """The arguments of `trl.DPOConfig` that make TRL compute a preference loss.

    Raises:
        UserError: TRL has no such loss, or not with these settings.
    """
    losses, weights, alphas = _terms(loss)
    for term in losses:
        _refuse_unknown(term)
    settings = {
        "loss_type": [TRL_NAMES[type(term)] for term in losses],
        "loss_weights": weights,
        "beta": _common("beta", [term.beta for term in losses]),
        "ld_alpha": _common("alpha of LDDPO", alphas),
        "label_smoothing": _common(
            "label_smoothing", [t.label_smoothing for t in losses if isinstance(t, SMOOTHED)] or [0.0]
        ),
    }
    if temperatures := [term.tau for term in losses if isinstance(term, DiscoPOP)]:
        settings["discopop_tau"] = _common("tau", temperatures)
    divergences = [getattr(term, "divergence", None) or ReverseKL() for term in losses]
    settings["f_divergence_type"] = _common("divergence", [DIVERGENCES[type(d)] for d in divergences])
    if alpha := [divergence.alpha for divergence in divergences if isinstance(divergence, Alpha)]:
        settings["f_alpha_divergence_coef"] = _common("alpha of the divergence", alpha)
    return settings


def kto_settings(module: Any) -> dict[str, Any]:
    """The arguments of `trl.KTOConfig` that make TRL compute the loss of a KTO module.

    Raises:
        UserError: TRL has no such loss, or not without the KL divergence.
    """
    name = type(module.loss).__name__
    if type(module.loss) not in TRL_RESPONSE_NAMES:
        known = ", ".join(cls.__name__ for cls in TRL_RESPONSE_NAMES)
        raise UserError(f"model.loss: {name} has no counterpart in TRL; --engine trl knows {known}; {INSTEAD}")
    if module.loss.needs_kl and not module.kl:
        raise UserError(f"model.kl: TRL computes {name} with the KL divergence only; take APOZeroUnpaired, {INSTEAD}")
    return {
        "loss_type": TRL_RESPONSE_NAMES[type(module.loss)],
        "beta": module.loss.beta,
        "desirable_weight": module.desirable_weight,
        "undesirable_weight": module.undesirable_weight,
    }


TRL_POLICY_NAMES: dict[type, str] = {
    GRPOLoss: "grpo",
    BNPOLoss: "bnpo",
    DAPOLoss: "dapo",
    DrGRPOLoss: "dr_grpo",
    GSPOLoss: "grpo",
    CISPOLoss: "cispo",
}
"""The same for losses of sampled completions (`tests/parity/test_trl_grpo.py`)."""


def grpo_settings(module: Any) -> dict[str, Any]:
    """The arguments of `trl.GRPOConfig` that make TRL compute the loss of a GRPO module.

    Raises:
        UserError: TRL has no such loss or penalty.
    """
    loss = module.loss
    if type(loss) not in TRL_POLICY_NAMES:
        known = ", ".join(cls.__name__ for cls in TRL_POLICY_NAMES)
        name = type(loss).__name__
        raise UserError(f"model.loss: {name} has no counterpart in TRL; --engine trl knows {known}; {INSTEAD}")
    if module.kl and (module.kl_estimator != "k3" or module.kl_in != "loss"):
        raise UserError(f"model.kl: TRL's GRPO knows kl_estimator: k3 and kl_in: loss; set them, {INSTEAD}")
    if module.kl_corrected and isinstance(loss, GSPOLoss):
        raise UserError(f"model.kl_corrected: TRL weighs by the ratio of the sequence; set it to false, {INSTEAD}")
    if type(module.advantage) is not GroupMean:
        name = type(module.advantage).__name__
        raise UserError(f"model.advantage: TRL's GRPO knows GroupMean, not {name}; {INSTEAD[3:]}")
    bounds = {"epsilon": getattr(loss, "epsilon", 0.2), "epsilon_high": loss.epsilon_high}
    if isinstance(loss, CISPOLoss):  # TRL's bound is that of the ratio itself
        bounds["epsilon_high"] += 1
    return bounds | {
        "loss_type": TRL_POLICY_NAMES[type(loss)],
        "importance_sampling_level": "sequence" if isinstance(loss, GSPOLoss) else "token",
        "use_bias_correction_kl": module.kl_corrected,
    }


def reward_settings(loss: PairLoss) -> dict[str, Any]:
    """The arguments of `trl.RewardConfig` that make TRL compute a reward model's loss of pairs.

    Raises:
        UserError: TRL has no such loss, or not with these settings.
    """
    if type(loss) is not BradleyTerry:
        raise UserError(f"model.loss: TRL's RewardTrainer knows BradleyTerry, not {type(loss).__name__}; {INSTEAD[3:]}")
    if loss.label_smoothing:
        raise UserError(f"model.loss: TRL's RewardTrainer has no label_smoothing; set it to 0, {INSTEAD}")
    return {"center_rewards_coefficient": loss.center_rewards_coefficient or None}


def gkd_settings(module: Any) -> dict[str, Any]:
    """The arguments of TRL's `GKDConfig` that make TRL compute the loss of a distillation.

    Raises:
        UserError: TRL has no such divergence, or mixes in no cross-entropy.
    """
    divergence = module.divergence
    betas = {distillation.ForwardKL: 0.0, distillation.ReverseKL: 1.0, distillation.JSD: getattr(divergence, "beta", 0)}
    if type(divergence) not in betas:
        known, name = ", ".join(cls.__name__ for cls in betas), type(divergence).__name__
        raise UserError(f"model.divergence: {name} has no counterpart in TRL; --engine trl knows {known}; {INSTEAD}")
    if module.cross_entropy:
        raise UserError(f"model.cross_entropy: TRL's GKDTrainer mixes in none; leave it out, {INSTEAD}")
    return {"beta": betas[type(divergence)], "lmbda": 0.0}


def _terms(loss: PreferenceLoss) -> tuple[list[Any], list[float], list[float | None]]:
    """The losses of a weighted sum, their weights, and the alpha of an enclosing `LDDPO` for each, or None."""
    if type(loss) is LDDPO:
        losses, weights, alphas = _terms(loss.loss)
        if any(alpha is not None for alpha in alphas):
            raise UserError(f"model.loss: LDDPO within LDDPO has no counterpart in TRL; take one, {INSTEAD}")
        return losses, weights, [loss.alpha] * len(losses)
    if type(loss) is WeightedSum:
        parts = [_terms(part) for part in loss.losses]
        return (
            [term for part in parts for term in part[0]],
            [own * weight for part, own in zip(parts, loss.weights, strict=True) for weight in part[1]],
            [alpha for part in parts for alpha in part[2]],
        )
    return [loss], [1.0], [None]


def _refuse_unknown(loss: Any) -> None:
    name = type(loss).__name__
    if type(loss) not in TRL_NAMES:
        why = {
            "SFTTerm": ": TRL's averages over the tokens of a micro-batch, and not within each pair",
        }.get(name, "")
        known = ", ".join(cls.__name__ for cls in TRL_NAMES)
        raise UserError(f"model.loss: {name} has no counterpart in TRL{why}; --engine trl knows {known}; {INSTEAD}")
    if not isinstance(loss, SMOOTHED) and getattr(loss, "label_smoothing", False):
        raise UserError(f"model.loss: TRL's {name} has no label_smoothing; set it to 0, take Robust, {INSTEAD}")
    divergence = getattr(loss, "divergence", None)
    if divergence is not None and type(divergence) not in DIVERGENCES:
        raise UserError(f"model.loss: TRL has no divergence {type(divergence).__name__}; {INSTEAD[3:]}")


def _common(name: str, values: list[Any]) -> Any:
    """The value that all losses of a sum share. TRL has only one for all of them."""
    if any(value != values[0] for value in values):
        raise UserError(
            f"model.loss: TRL has one {name} for all losses of a sum, and here there are "
            f"{', '.join(map(str, values))}; use one, {INSTEAD}"
        )
    return values[0]
