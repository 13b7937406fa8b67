"""How many bytes an operation reads and writes on a GPU, from its schema and the shapes of its tensors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed.fsdp  # defines `torch.ops.fsdp`
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

UNMOVED = (
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten._unsafe_view, aten.set_, aten.resize_),
)
"""Operations that read and write nothing: they allocate memory, or return the memory of an argument, as views do whose
schemas say so."""
SHAPED = (
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full),
    *(aten.rand_like, aten.randn_like, aten.randint_like),
)
"""Operations that take no more than a shape from their argument."""
OVERWRITING = (
    *(aten.copy_, aten.fill_, aten.zero_, aten._foreach_copy_, aten._foreach_zero_),
    *(aten.scatter_, aten.index_copy_),
    *(aten.normal_, aten.uniform_, aten.bernoulli_, aten.exponential_, aten.random_),
)
"""Operations that change a tensor without reading it."""
PICKING = (aten.embedding, aten.gather, aten.index_select, aten.index)
"""Operations that read as much of their first argument as they return."""
PUTTING = (
    *(aten.scatter_, aten.scatter_add_, aten.scatter_reduce_),
    *(aten.index_put_, aten._index_put_impl_, aten.index_add_, aten.index_copy_),
)
"""Operations that change about as many elements of their first argument as the largest of the others has."""


def moved_bytes(func: Any, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes that an operation reads and writes.

    An argument that the schema calls written is written, and read too, unless it is an `out` argument or the operation
    only overwrites it. Other tensors are read, and results that are not arguments are written.

    Args:
        func: The overload, as a dispatch mode gets it.
        result: What it returned.
        args: Its positional arguments.
        kwargs: Its other arguments.
    """
    packet, schema = func._overloadpacket, func._schema
    # operations of `prim` only ask for a device
    if func.is_view or func.namespace == "prim" or packet in UNMOVED:
        return 0
    if packet is torch.ops.fsdp.all_gather_copy_in:  # copies its first argument into the buffer that is its second
        return 2 * _size(args[0])
    values = [args[i] if i < len(args) else kwargs.get(argument.name) for i, argument in enumerate(schema.arguments)]
    sizes = [_size(value) for value in values]
    if packet in SHAPED:
        sizes[0] = 0
    elif packet in PICKING:
        sizes[0] = _size(result)
    elif packet in PUTTING:
        sizes[0] = max(map(_elements, tree_leaves(values[1:]))) * args[0].element_size()
    results = [result] if len(schema.returns) == 1 else result or ()
    moved = sum(_size(one) for one, returned in zip(results, schema.returns, strict=True) if not returned.is_write)
    for argument, size in zip(schema.arguments, sizes, strict=True):
        # fused optimizers write to gradients only to divide them by the scale of float16
        is_left = argument.name == "grads" and kwargs.get("grad_scale") is None
        is_written = argument.is_write and not is_left
        is_read = not (argument.is_out or (is_written and packet in OVERWRITING))
        moved += size * (is_read + is_written)
    return moved


def _elements(value: Any) -> int:
    """The elements of a tensor. Those that it repeats along a dimension, as `expand` does, count once."""
    if not isinstance(value, Tensor):
        return 0
    return math.prod(size for size, step in zip(value.shape, value.stride(), strict=True) if step or not size)


def _size(values: Any) -> int:
    """Bytes of the tensors among these values."""
    return sum(_elements(one) * one.element_size() for one in tree_leaves(values) if isinstance(one, Tensor))
