"""Optimizers by Oumi's names."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from oumi_pl.errors import UserError, nearest
from oumi_pl.optim import parameter_groups

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams

ADAMW = ("adamw", "adamw_torch", "adamw_torch_fused")
BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_32bit": "PagedAdamW32bit",
}
OPTIMIZERS = ("adam", *ADAMW, *BITSANDBYTES, "sgd", "adafactor")


def refuse_unknown_optimizer(name: str) -> None:
    """Refuses a name that `optimizer` does not know.

    Raises:
        UserError: with the nearest name.
    """
    if name.lower() not in OPTIMIZERS:
        raise UserError(f"training.optimizer: there is no {name!r}{nearest(name, OPTIMIZERS)}")


def optimizer(model: nn.Module, params: "TrainingParams") -> Optimizer:
    """The optimizer that the parameters name, over the trainable parameters of a model.

    Weights with two or more dimensions are decayed; biases and the scales of norms are not, those of RMSNorm included.

    Raises:
        UserError: for an unknown name, a model without trainable parameters, or a missing library.
    """
    refuse_unknown_optimizer(params.optimizer)
    groups = parameter_groups(model.named_parameters())
    if not groups:
        raise UserError("model: no parameter is trainable")
    name, decay = params.optimizer.lower(), params.weight_decay
    betas = (params.adam_beta1, params.adam_beta2)
    adam: dict[str, Any] = {"lr": params.learning_rate, "betas": betas, "eps": params.adam_epsilon}
    adam["weight_decay"] = decay
    # a fused step unscales float16 gradients by itself, after they would have been clipped
    devices = {p.device.type for group in groups for p in group["params"]}
    fused: dict[str, Any] = (
        {"fused": True} if devices == {"cuda"} and params.mixed_precision_dtype.name != "FP16" else {}
    )
    try:
        if name in BITSANDBYTES:
            return _bitsandbytes(BITSANDBYTES[name])(groups, **adam)
        if name == "adafactor":
            from transformers import Adafactor

            return Adafactor(
                groups, lr=params.learning_rate, weight_decay=decay, relative_step=False, scale_parameter=False
            )
        if name == "sgd":
            return SGD(groups, lr=params.learning_rate, momentum=params.sgd_momentum, weight_decay=decay, **fused)
        return (Adam if name == "adam" else AdamW)(groups, **adam, **fused)
    except ValueError as error:
        raise UserError(f"training.optimizer: {error}") from error


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise UserError(
            "training.optimizer: optimizers in 8 bits and paged ones are bitsandbytes'; "
            "install them with: pip install 'oumi_pl[gpu]'"
        ) from error
    return getattr(optim, name)
