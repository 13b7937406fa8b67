"""Linear layers that multiply in 8-bit floating point, through torchao.

Weights stay what they are, and so do checkpoints and exports: inputs, weights and gradients are rounded for each
product, with a scale per tensor that its largest value gives. The output head and adapters multiply as without it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn

from oumi_pl.errors import UserError

KEY = "model.fp8"
FP8 = bool | Literal["emulated"]
"""Whether layers multiply in fp8; `emulated`: in float32, of rounded values, on any device."""
LEAST_CAPABILITY = (8, 9)
"""Compute capability of the first cards with such products: Ada (L40S, RTX 4090) and Hopper (H100)."""
MULTIPLE = 16
"""What sizes have to be multiples of."""
ROUTERS = ("gate", "router")
"""Layers that choose the experts of a token: rounding would change the choice."""


def refuse_unfit_device(setting: FP8, device: torch.device) -> None:
    """Refuses a device that has no products in fp8.

    Raises:
        UserError: it has none.
    """
    if setting is not True:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type.upper()}"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise UserError(
            f"{KEY} needs a GPU of compute capability 8.9 or more (H100, L40S, RTX 4090), and the run is on {name}; "
            "leave it out"
        )


def convert(blocks: list[nn.Module], setting: FP8) -> None:
    """Lets the linear layers of blocks multiply in fp8, but not adapters, routers, and sizes that 16 does not divide.

    Call it before blocks are compiled or sharded.

    Raises:
        UserError: torchao is not installed, or no layer is left.
    """
    if not setting:
        return
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(f"{KEY} needs torchao: pip install 'oumi_pl[low-bit]'") from error
    # the gradient of a weight is a sum over tokens, whose number is seldom a multiple of 16
    config = Float8LinearConfig(emulate=setting == "emulated", pad_inner_dim=True)
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=_is_converted, config=config)
    if not any(fp8_layers(block) for block in blocks):
        raise UserError(f"{KEY}: the model has no linear layer whose sizes are multiples of {MULTIPLE}; leave it out")


def _is_converted(layer: nn.Module, name: str) -> bool:
    parts = name.split(".")
    is_adapter = any(part.startswith("lora_") for part in parts)
    is_router = parts[-1] in ROUTERS
    is_fitting = type(layer) is nn.Linear and not any(size % MULTIPLE for size in layer.weight.shape)
    return is_fitting and not is_adapter and not is_router


def fp8_layers(model: nn.Module) -> list[Any]:
    """The layers of a model that multiply in fp8."""
    module = sys.modules.get("torchao.float8.float8_linear")
    return [] if module is None else [layer for layer in model.modules() if isinstance(layer, module.Float8Linear)]


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Lets a model multiply without rounding, for comparisons: scales in fp8 depend on all tokens of a batch."""
    layers = [layer for layer in fp8_layers(model) if "forward" not in vars(layer)]  # calls may be nested
    for layer in layers:
        layer.forward = MethodType(nn.Linear.forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
