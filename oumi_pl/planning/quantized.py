"""Linear layers with the memory and the products of layers in 4 or 8 bits; they have no values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

BITS = {"nf4": 4, "int8": 8}
BLOCK = 64
"""Weights that share a scale, which takes a byte (double quantization)."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer in few bits. Its weight is decoded for each product, in both passes.

    Args:
        linear: The layer to replace.
        bits: Of a weight.
    """

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        count = self.in_features * self.out_features
        self.weight = nn.Parameter(torch.empty(count * bits // 8, 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", torch.empty(count // BLOCK, dtype=torch.uint8))
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """Multiplies by the decoded weight."""
        out = _Product.apply(states, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """A tensor of the weight's size, `[out, in]`."""
        return torch.empty(self.out_features, self.in_features, dtype=dtype)


class _Product(torch.autograd.Function):
    """Keeps no decoded weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return states @ layer.decoded(states.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.decoded(gradient.dtype), None


def quantize(model: nn.Module, head: nn.Module, kind: str, kept: Sequence[str] = ()) -> None:
    """Replaces the frozen linear layers of a model, except its output head, as bitsandbytes does.

    Args:
        model: The model, with its adapters.
        head: The output head.
        kind: A key of `BITS`.
        kept: Names of layers that are left as they are, as `model.unquantized` has them.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    for path, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            is_frozen = type(layer) is nn.Linear and layer is not head and not layer.weight.requires_grad
            # without what PEFT adds to a name
            if is_frozen and should_convert_module(f"{path}.{name}".removesuffix(".base_layer"), list(kept)):
                setattr(parent, name, QuantizedLinear(layer, BITS[kind]))
