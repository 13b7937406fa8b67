"""Counts what an update allocates, computes and communicates, operation by operation, without its values."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed._tools.mem_tracker import MemTracker, _RefType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from oumi_pl.losses.linear_head import COLUMN_MULTIPLE
from oumi_pl.planning.cards import NODE
from oumi_pl.planning.moved import moved_bytes

aten, c10d, functional = torch.ops.aten, torch.ops.c10d, torch.ops._c10d_functional


class Kind(_RefType):
    """What memory is for."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    """With the gradients of activations, the batch, and all temporary tensors."""
    HEAD = "head chunk"
    """Logits and their gradients."""
    COMMUNICATION = "communication"
    """Gathered weights, unreduced gradients, and buffers of collectives."""


class Operation(NamedTuple):
    """What one operation costs."""

    flops: int
    dtype: torch.dtype
    moved: int
    """Bytes read and written."""


class Collective(NamedTuple):
    """One message among the ranks of a group."""

    name: str
    """`all_gather`, `reduce_scatter`, `all_reduce`, or torch's name of another one."""
    size: int
    """Bytes of the whole tensor."""
    ranks: int
    nodes: int = 1
    """Nodes that these ranks are on."""
    is_waited_for: bool = False
    """Whether the next operation needs what it brings. Others are sent while the card computes."""

    @property
    def sent(self) -> float:
        """Bytes that each rank sends with a ring algorithm."""
        rounds = 2 if self.name == "all_reduce" else 1
        return rounds * self.size * (self.ranks - 1) / self.ranks


@dataclass
class Costs:
    """What an update costs on one rank."""

    operations: Counter[Operation] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)

    def add(self, other: "Costs", times: int) -> None:
        """Adds costs a number of times."""
        self.operations.update({operation: n * times for operation, n in other.operations.items()})
        self.collectives.update({collective: n * times for collective, n in other.collectives.items()})

    @property
    def flops(self) -> int:
        """Floating-point operations, recomputation included."""
        return sum(n * operation.flops for operation, n in self.operations.items())

    @property
    def sent(self) -> float:
        """Bytes that the rank sends."""
        return sum(n * collective.sent for collective, n in self.collectives.items())


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    # torch's table lacks the kernels for CPUs
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
NAMES = {
    c10d._allgather_base_.default: "all_gather",
    c10d.allgather_.default: "all_gather",
    functional.all_gather_into_tensor.default: "all_gather",
    functional.all_gather_into_tensor_out.default: "all_gather",
    c10d._reduce_scatter_base_.default: "reduce_scatter",
    functional.reduce_scatter_tensor.default: "reduce_scatter",
    c10d.allreduce_.default: "all_reduce",
    functional.all_reduce.default: "all_reduce",
    functional.all_reduce_.default: "all_reduce",
}


class Tracker(MemTracker):
    """Follows storages from allocation to release, by `Kind`, and counts operations and collectives.

    It uses the accounting of torch's `MemTracker`, but none of its hooks on modules, which allow one forward pass of
    the root per update: references and micro-batches need several.

    Args:
        columns: Matrices of floating-point numbers with so many columns, or with the next multiple of
            `COLUMN_MULTIPLE`, are the head's chunk of logits, while what is allocated counts as activations.
        ranks_per_node: Ranks on a node, which are consecutive.
        offloaded: What is kept in host memory, which is not counted.
        layer_ranks: The ranks that compute each layer together, if there are several. Messages among exactly these are
            waited for.
    """

    def __init__(
        self,
        columns: Collection[int],
        ranks_per_node: int = NODE,
        offloaded: Collection[Kind] = (),
        layer_ranks: Collection[int] = (),
    ) -> None:
        super().__init__()
        self._on_device = [kind for kind in Kind if kind not in offloaded]
        self._ref_class = Kind
        self._is_paused = False
        self._ranks_per_node = ranks_per_node
        self._layer_ranks = set(layer_ranks)
        self.costs = Costs()
        self.kind = Kind.ACTIVATIONS
        """The kind of what is allocated now."""
        self._logits = {*columns} | {-(-size // COLUMN_MULTIPLE) * COLUMN_MULTIPLE for size in columns}

    def __enter__(self) -> "Tracker":
        self._track_resize()
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def propagate_uncounted(*args: Any) -> Any:
            with self.paused():  # tensors of the whole size, to find out shapes
                return propagate(*args)

        self._propagation = patch.object(ShardingPropagator, propagate.__name__, propagate_uncounted)
        self._propagation.start()
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *args: Any) -> None:
        TorchDispatchMode.__exit__(self, *args)
        self._propagation.stop()
        self._restore_resize()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing of what happens within it."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @contextmanager
    def allocating(self, kind: Kind) -> Iterator[None]:
        """Counts what is allocated within it as one kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def mark(self, tensor: Tensor, kind: Kind) -> None:
        """Counts a tensor that exists already, or as another kind from now on."""
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        self._update_and_maybe_create_winfos(local, kind)
        self._note_peak()

    def count_message(self, name: str, size: int, ranks: Sequence[int]) -> None:
        """Counts a collective of a whole tensor, in bytes, among these ranks of the run."""
        nodes = len({rank // self._ranks_per_node for rank in ranks})
        message = Collective(name, size, len(ranks), nodes, is_waited_for=set(ranks) == self._layer_ranks)
        self.costs.collectives[message] += 1

    @property
    def peak(self) -> dict[Kind, int]:
        """Bytes of each kind at the moment at which most memory was in use."""
        total: Counter[Kind] = Counter()
        for snapshot in self._peak_mem_snap.values():
            total.update({kind: snapshot[kind] for kind in self._on_device})
        return dict(total)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # so that DTensor runs first, and this sees the operations on its shards
        result = args[0] if func is functional.wait_tensor.default else func(*args, **kwargs)
        if self._is_paused:
            return result
        if func in collective_ops:
            if func not in sync_ops:
                self._count_collective(func, result, args, kwargs)
        else:
            self._count_operation(func, result, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track(self._kind_of(tensor), tensor)
        self._note_peak()
        return result

    def _kind_of(self, tensor: Tensor) -> Kind:
        is_logits = tensor.dim() == 2 and tensor.shape[-1] in self._logits and self.kind is Kind.ACTIVATIONS
        return Kind.HEAD if is_logits and tensor.is_floating_point() else self.kind

    def _note_peak(self) -> None:
        for device, snapshot in self._curr_mem_snap.items():
            used = sum(snapshot[kind] for kind in self._on_device)
            if self._peak_mem.get(device, 0) < used:
                self._peak_mem[device] = used
                self._peak_mem_snap[device] = dict(snapshot)

    def _count_collective(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        ranks = dist.get_process_group_ranks(CollectiveOp.get_process_group(func, args))
        size = CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
        self.count_message(NAMES.get(func, str(func)), size, ranks)
        for tensor in tree_leaves(args[:2]):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() == size:  # the buffer of all ranks
                self.mark(tensor, Kind.COMMUNICATION)

    def _count_operation(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        moved = moved_bytes(func, result, args, kwargs)
        if not moved:
            return
        count = FLOPS.get(func._overloadpacket)
        args = [arg for arg in args if not isinstance(arg, torch.dtype)]  # torch's counts don't know `out_dtype`
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=result))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        factor = tensors[1] if func._overloadpacket is aten.addmm else tensors[0]  # what is added may be in float32
        self.costs.operations[Operation(flops, factor.dtype, moved)] += 1
