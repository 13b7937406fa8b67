"""What is kept of a layer's forward pass for its backward pass: policies of activation checkpointing.

`gradient_checkpointing: true` keeps the inputs of each layer and runs the layer again in the backward pass. The
policies here keep more of it, or keep it in host memory. A policy of your own is a subclass of `Recomputation`.

All of them go through the function that transformers' layers call in place of their `forward`, so they run inside the
hooks of FSDP2, and gradients are those without recomputation: random numbers are drawn again from the same state.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "model.gradient_checkpointing"
Run = Callable[..., Any]
"""A function that is called with the `forward` of a layer and its positional arguments, and returns the output."""


class Recomputation(ABC):
    """Decides what each layer keeps for its backward pass."""

    sees_operations: ClassVar[bool] = False
    """Whether it looks at single operations, which layers that are compiled do not show."""

    @abstractmethod
    def function_of(self, layer: nn.Module, index: int) -> Run | None:
        """The function that runs a layer; None: the layer keeps all that its backward pass needs.

        Args:
            layer: A layer of the model.
            index: Its place in the model, from 0.
        """


class Full(Recomputation):
    """Keeps the inputs of each layer, and recomputes the layer: what `true` stands for."""

    def function_of(self, layer: nn.Module, index: int) -> Run:
        """Returns torch's checkpoint."""
        return partial(checkpoint, use_reentrant=False)


class EveryNth(Recomputation):
    """Recomputes every n-th layer, from the first one on. Others keep everything.

    Args:
        n: 1 recomputes all layers, 2 half of them.
    """

    def __init__(self, n: int = 2) -> None:
        self.n = n

    def function_of(self, layer: nn.Module, index: int) -> Run | None:
        """Returns torch's checkpoint for every n-th layer.

        Raises:
            UserError: `n` is below 1.
        """
        if self.n < 1:  # not in the constructor: the parser would take it for a value of another type
            raise UserError(f"{KEY}.n is {self.n}, but has to be at least 1")
        return Full().function_of(layer, index) if index % self.n == 0 else None


class Selective(Recomputation):
    """Keeps the results of matrix products and of attention, and recomputes the rest: norms, activations, sums.

    These take little time, but about half of the memory. Layers that are compiled do so by themselves.
    """

    sees_operations = True

    def function_of(self, layer: nn.Module, index: int) -> Run:
        """Returns torch's checkpoint, with a policy for operations."""
        contexts = partial(create_selective_checkpoint_contexts, _products_and_attention)
        return partial(checkpoint, use_reentrant=False, context_fn=contexts)


class Offload(Recomputation):
    """Moves what layers keep to host memory, and back for the backward pass. Weights stay where they are.

    Without `recompute`, a tensor that several operations keep is moved for each of them, and under bf16-mixed so are
    the copies of weights in bfloat16. On a CPU nothing is moved.

    Args:
        recompute: Whether layers are recomputed, so that only their inputs are kept.
    """

    def __init__(self, recompute: bool = True) -> None:
        self.recompute = recompute

    def function_of(self, layer: nn.Module, index: int) -> Run:
        """Runs the layer with hooks on what is kept."""
        return partial(_offloaded, layer, Full().function_of(layer, index) if self.recompute else None)


PRODUCTS = {"mm", "addmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm"}
"""torch's names of products with weights. Batched products are those of attention that is not fused: they are large."""


def _products_and_attention(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the result of an operation is kept."""
    namespace, _, name = operation._schema.name.partition("::")
    is_product = namespace == "aten" and name in PRODUCTS
    is_attention = ("attention" in name or "attn" in name) and not _draws_numbers(operation, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if is_product or is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def _draws_numbers(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an attention kernel drops out weights: what follows would draw other numbers if it were not run again."""
    names = [argument.name for argument in operation._schema.arguments]
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("dropout_p"))


def _offloaded(layer: nn.Module, run: Run | None, forward: Callable[..., Any], *args: Any) -> Any:
    weights = {_storage(weight) for weight in layer.parameters()}

    def pack(tensor: Tensor) -> Any:
        return tensor if _storage(tensor) in weights else to_host(tensor)

    with saved_tensors_hooks(pack, from_host):
        return forward(*args) if run is None else run(forward, *args)


def _storage(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()._cdata


class OnHost:
    """A tensor that was moved to host memory.

    Args:
        tensor: A tensor on a device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        # pinned, so that neither copy makes the host wait; both are on the stream that computes
        self.copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self.copy.copy_(tensor, non_blocking=True)

    def to_device(self) -> Tensor:
        """The tensor, on its device."""
        return self.copy.to(self.device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor | OnHost:
    """A tensor in host memory; itself if it is there."""
    return tensor if tensor.device.type == "cpu" else OnHost(tensor)


def from_host(kept: Tensor | OnHost) -> Tensor:
    """What `to_host` was given."""
    return kept.to_device() if isinstance(kept, OnHost) else kept


def as_policy(setting: bool | Recomputation) -> Recomputation | None:
    """The policy that a setting stands for; None if nothing is recomputed."""
    return Full() if setting is True else setting or None


def refuse_compiled(setting: bool | Recomputation) -> None:
    """Refuses a policy that can't be had with compiled layers.

    Raises:
        UserError: it is one.
    """
    policy = as_policy(setting)
    if policy is not None and policy.sees_operations:
        raise UserError(
            f"{KEY}: {type(policy).__name__} can't be had with model.compile: compiled layers recompute what takes "
            "little time by themselves; leave one of them out"
        )


def recompute(hf: "PreTrainedModel", setting: bool | Recomputation, name: str | None = None) -> None:
    """Lets the layers of a model keep what a policy says.

    Args:
        hf: The model, before it is wrapped, sharded or compiled.
        setting: `model.gradient_checkpointing`.
        name: Of the model, for messages; that of its class if left out.

    Raises:
        UserError: the model has no layers that can be recomputed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    policy, name = as_policy(setting), name or type(hf).__name__
    if policy is None:
        return
    if not hf.supports_gradient_checkpointing:
        raise UserError(f"{KEY}: {name} does not support it; leave it out, or recompute in forward")
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = {path: m for path, m in hf.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    if not layers and setting is not True:
        raise UserError(f"{KEY}: {name} has no layers to choose from; set true, which its own code reads")
    for path, layer in layers.items():
        place = path.rpartition(".")[2]
        run = policy.function_of(layer, int(place) if place.isdecimal() else 0)
        layer.gradient_checkpointing = run is not None
        if run is not None:
            layer._gradient_checkpointing_func = run  # type: ignore[assignment]


def is_recomputed(hf: "PreTrainedModel", block: nn.Module) -> bool:
    """Whether a block of a model does not run by its own `forward` alone."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (
        block.gradient_checkpointing if isinstance(block, GradientCheckpointingLayer) else hf.is_gradient_checkpointing
    )
