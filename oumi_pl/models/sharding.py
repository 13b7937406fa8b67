"""Divides a model over the ranks of a run: how it is built without being whole anywhere, and how FSDP2 shards it.

A model that needs several devices should not have to fit into the memory of their host once per rank. A rank loads one
weight at a time and keeps its own part (`Parts`). Random weights are drawn by the first rank alone, so that they are
the same for any number of ranks, and the others build the structure (`Structure`). What is built then holds
placeholders: tensors of the right shape with a single number behind them. Code that only looks at shapes, or runs the
model to see which layers it calls, works on them as usual, and torch refuses to write to them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from oumi_pl.errors import UserError
from oumi_pl.models.lm import LM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
FSDP2 = "fsdp2"
"""The value of `trainer.strategy` for `Sharded()`."""
Source = Literal["parts", "first rank", "every rank"]
"""Where a rank's part of the weights comes from:

- `parts`: it keeps its part of each weight as it is read.
- `first rank`: that loads or draws all weights, and sends the others their parts.
- `every rank`: it loads all weights and drops the rest, for models that are changed in ways which need all values.
"""


class Sharded(ModelParallelStrategy):
    """Divides the weights, gradients and optimizer states over devices: FSDP2, and HSDP with replicas.

    `strategy: fsdp2` divides them over all devices. Otherwise `devices x num_nodes` has to be `shards x replicas`.

    Args:
        shards: Devices over which each weight is divided; those that `replicas` leaves if it is left out.
        replicas: Groups of devices that hold all weights each. Weights are gathered within a group, which should be a
            node, and only gradients are summed between groups (HSDP).
        save_distributed_checkpoint: Write a folder with a file for each rank, instead of one file through rank 0.
        process_group_backend: `nccl` or `gloo`; that of the device when left out.
        timeout: After which a rank that waits for another gives up; 30 minutes when left out.
    """

    def __init__(
        self,
        shards: int | None = None,
        replicas: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        kwargs: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            **kwargs,
        )
        self.shards = shards
        self.replicas = replicas

    def setup_environment(self) -> None:
        """Starts the process group, and arranges the ranks in a mesh `replicas x shards`.

        Raises:
            UserError: a size is below 1, or they don't multiply to the number of devices.
        """
        # not in the constructor: the parser would take it for a value of another type
        for name, size in (("shards", self.shards), ("replicas", self.replicas)):
            if size is not None and size < 1:
                raise UserError(f"trainer.strategy.{name} is {size}, but has to be at least 1")
        world = self.num_processes * self.num_nodes
        shards = self.shards or max(1, world // self.replicas)
        if shards * self.replicas != world:
            left = f"shards {self.shards} x replicas {self.replicas}" if self.shards else f"replicas {self.replicas}"
            raise UserError(
                f"trainer.strategy: {left} does not divide {world} devices; shards x replicas has to be their number"
            )
        # the base class checks its two sizes against the devices, and makes a mesh of them, which is replaced
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        super().setup_environment()
        if self.replicas > 1:
            device = self.root_device.type
            mesh = init_device_mesh(device, (self.replicas, shards), mesh_dim_names=("replicate", "shard"))
            self._device_mesh = mesh
            cast("Any", self.lightning_module)._device_mesh = mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank reads rows of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}


StrategyRegistry.register(FSDP2, Sharded, description="Weights divided over all devices (FSDP2)", override=True)


def is_to_be_sharded(module: L.LightningModule) -> bool:
    """Whether the strategy of the run is one for which `shard` shards."""
    return isinstance(module.trainer.strategy, ModelParallelStrategy)


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds only parts of the weights."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(value: Tensor) -> Tensor:
    """The whole weight on the CPU. Sharded weights are gathered, so all ranks have to call this."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().contiguous()


def decoder_layers(model: LM) -> list[nn.Module]:
    """The transformer blocks: the modules that the architecture lists as not to be split, without those within them."""
    names = set(model.base._no_split_modules or [])
    blocks = {name: m for name, m in model.base.named_modules() if type(m).__name__ in names}
    # some architectures list a block and its parts, as Mamba does
    return [m for name, m in blocks.items() if not any(name.startswith(f"{outer}.") for outer in blocks)]


def compile_layers(model: LM, is_recomputed: bool) -> None:
    """Compiles the transformer blocks, or all of the body if the architecture does not say which they are.

    Blocks alike share what is compiled, which takes no longer for many of them. Compiled for sizes that vary, because
    the rows of nearly every batch have another length.

    Args:
        model: The model.
        is_recomputed: Whether blocks are recomputed in the backward pass. The parts of a block are compiled then:
            attention to documents is left out, and torch compiles no recomputation from which something is left out.
    """
    for block in decoder_layers(model) or [model.body]:
        for module in block.children() if is_recomputed else (block,):
            module.compile(dynamic=True)


# ---- building


class Loading:
    """How a rank gets the weights of a model that is built: all of them."""

    def pretrained(self, load: Callable[[], T]) -> T:
        """Calls a function that loads weights with `from_pretrained`."""
        return load()

    def random(self, build: "Callable[[], PreTrainedModel]") -> "PreTrainedModel":
        """Calls a function that builds a model with random weights."""
        return build()


class Parts(Loading):
    """Keeps a rank's part of each weight while a model is loaded, and a placeholder for the whole.

    Args:
        rank: The index of the parts to keep.
        ranks: The number of parts that each weight is divided into, along its first dimension.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def pretrained(self, load: Callable[[], T]) -> T:
        """Calls `load`. Weights are replaced as soon as they are set, so that only one is ever whole."""

        def part_of(weight: nn.Parameter) -> nn.Parameter:
            return _placeholder(weight, _part(weight.detach(), self.rank, self.ranks))

        with _replacing(part_of, _is_loaded), _one_at_a_time():
            return load()


class Structure(Loading):
    """Builds a model with placeholders in place of its weights, which another rank holds."""

    def pretrained(self, load: Callable[[], T]) -> T:
        """Calls `load`, which reads the weights one at a time; none is kept."""
        with _replacing(_placeholder, _is_loaded), _one_at_a_time():
            return load()

    def random(self, build: "Callable[[], PreTrainedModel]") -> "PreTrainedModel":
        """Calls `build` without drawing any number. Buffers are computed, since no other rank sends them."""
        # on the meta device, since initialisation writes to the weights, and placeholders can't be written to
        with _replacing(_on_meta, lambda weight: weight.device.type != "meta"):
            model = build()
        _replace_parameters(model, _placeholder)
        return model


class FirstRank(Loading):
    """Loads all weights on the first rank, which sends the others their parts: `shard` recognises it."""


def loading_of(module: L.LightningModule, source: Source) -> Loading:
    """How this rank gets the weights of a run's model.

    Args:
        module: The module of the run.
        source: Where each rank's part of the weights comes from.
    """
    if module._trainer is None or not is_to_be_sharded(module) or source == "every rank":
        return Loading()
    if source == "first rank":
        return FirstRank() if module.trainer.global_rank == 0 else Structure()
    return Parts(*_share(_mesh(module)))


@contextmanager
def _replacing(
    replace: Callable[[nn.Parameter], nn.Parameter], is_replaced: Callable[[nn.Parameter], bool]
) -> Iterator[None]:
    """Replaces parameters as modules get them, if `is_replaced`."""
    register = nn.Module.register_parameter

    def replaced(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and is_replaced(parameter):
            parameter = replace(parameter)
        register(module, name, parameter)

    nn.Module.register_parameter = replaced  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keeps the threads of transformers' loader from reading all weights before the first is taken."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _is_loaded(weight: nn.Parameter) -> bool:
    """Whether transformers sets a weight that it has read; else it is missing and will be drawn, or is tied."""
    return getattr(weight, "_is_hf_initialized", False) and not isinstance(weight, Placeholder)


class Placeholder(nn.Parameter):
    """A parameter of the shape and dtype of a weight, without its memory."""

    part: Tensor | None
    """This rank's part of the values; None if another rank sends it."""


def _placeholder(weight: nn.Parameter, part: Tensor | None = None) -> Placeholder:
    placeholder = Placeholder(torch.zeros((), dtype=weight.dtype).expand(weight.shape), weight.requires_grad)
    placeholder.__dict__.update(weight.__dict__)  # transformers marks weights that it has loaded
    placeholder.part = part
    return placeholder


@contextmanager
def runnable(model: nn.Module) -> Iterator[None]:
    """Lets a model with placeholders run: each module has zeros as its weights while it is called, and only then.

    For what does not depend on values. Some kernels, such as grouped matrix products, take no placeholders.
    """

    def materialise(module: nn.Module, _: Any) -> None:
        for name, weight in placeholders[module].items():
            module._parameters[name] = nn.Parameter(torch.zeros_like(weight), weight.requires_grad)

    def restore(module: nn.Module, *_: Any) -> None:
        module._parameters.update(placeholders[module])

    placeholders = {
        m: {n: p for n, p in m.named_parameters(recurse=False) if isinstance(p, Placeholder)} for m in model.modules()
    }
    hooks = []
    for module, weights in placeholders.items():
        if weights:
            hooks.append(module.register_forward_pre_hook(materialise))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_empty(weight: nn.Parameter) -> bool:
    """Whether a weight is a placeholder on a rank that holds no part of it."""
    return isinstance(weight, Placeholder) and weight.part is None


def _on_meta(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().to("meta"), weight.requires_grad)


def _part(value: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's part of a weight, as FSDP2 divides it: along the first dimension, where the last parts may be empty."""
    parts = value.chunk(ranks)
    # a copy, so that the whole is freed
    return parts[rank].clone() if rank < len(parts) else value.new_empty((0, *value.shape[1:]))


def _replace_parameters(model: nn.Module, replace: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Replaces each parameter once, also where modules share it."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = replace(parameter)
                setattr(module, name, replaced[id(parameter)])


def same_generator(module: L.LightningModule) -> None:
    """Gives all ranks the first one's generator of random numbers, since only that one may have drawn weights."""
    torch.set_rng_state(module.trainer.strategy.broadcast(torch.get_rng_state()))


# ---- sharding


def shard(
    model: LM, module: L.LightningModule, loading: Loading, *, dtype: torch.dtype | None = None, copy: bool = False
) -> LM | None:
    """Shards each decoder layer, then the wrapper as the root, over the data-parallel ranks.

    The root holds what is left: embeddings, final norm and head. It is gathered while the wrapper's `forward` runs,
    which is where the chunked loss reads the head's weight.

    Args:
        model: The model, as `loading` built it.
        module: The module of the run, on its device.
        loading: How this rank got the weights.
        dtype: Of all weights but adapters, which are float32; as they are if left out.
        copy: Whether a second sharded model with the same weights is needed.

    Returns:
        The second model.

    Raises:
        UserError: under tensor parallelism, for which no plan is written, or a copy of a quantized model is needed.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, device = _mesh(module), module.trainer.strategy.root_device
    policy = MixedPrecisionPolicy()
    if module.trainer.precision == "bf16-mixed":
        # gather and multiply in bfloat16; keep weights, and sum gradients over ranks, in float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # heads beside the model, a reward head for example, are sharded and reduced like it
    heads = [child for child in module.children() if child is not model and any(True for _ in child.parameters())]
    is_quantized = any(not p.is_floating_point() for p in model.parameters())
    if is_quantized and copy:
        raise UserError(
            "model.reference: a quantized model can't be copied while it is sharded; set reference: initial"
        )
    # quantized weights are of a class of their own, and can't be cut here
    values = {} if is_quantized else _detach_values(model, mesh, loading, dtype)
    second = deepcopy(model) if copy else None  # on the meta device, so without memory
    for layer in [*decoder_layers(model), model, *heads]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if values:
        _load_values(model, values, device, isinstance(loading, FirstRank | Structure))
    if second is not None:
        for layer in [*decoder_layers(second), second]:
            # the root, too, is divided again after a call: no backward pass follows that would need it
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        _load_values(
            second, {n: cast("DTensor", p).to_local().clone() for n, p in model.named_parameters()}, device, False
        )
    return second


def reshard(model: nn.Module) -> None:
    """Divides weights that are gathered since a call without a backward pass, before an optimizer looks at them."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _mesh(module: L.LightningModule) -> DeviceMesh:
    """The ranks that FSDP2 divides weights over: `[shard]`, or `[replicate, shard]`.

    Raises:
        UserError: the run has tensor parallelism.
    """
    mesh: Any = module.device_mesh
    if "tensor_parallel" not in mesh.mesh_dim_names:
        return mesh
    if mesh["tensor_parallel"].size() > 1:
        raise UserError("trainer.strategy: tensor_parallel_size has to be 1; shard over data_parallel_size instead")
    return mesh["data_parallel"]


def _share(mesh: DeviceMesh) -> tuple[int, int]:
    """The index of this rank among those that divide a weight, and their number."""
    sharding = mesh["shard"] if mesh.ndim > 1 else mesh
    return sharding.get_local_rank(), sharding.size()


def _detach_values(
    model: LM, mesh: DeviceMesh, loading: Loading, dtype: torch.dtype | None
) -> dict[str, Tensor | None]:
    """Takes the values out of a model, and leaves its weights on the meta device, in their dtypes.

    Returns:
        Name of a weight -> this rank's part; if the first rank sends the parts, the whole there, and None elsewhere.
    """
    values: dict[str, Tensor | None] = {}
    for name, weight in model.named_parameters():
        if isinstance(loading, Structure):
            values[name] = None
        elif isinstance(loading, FirstRank):
            values[name] = weight.detach()
        elif isinstance(weight, Placeholder):
            values[name] = weight.part
        else:  # created here, such as an adapter's
            values[name] = _part(weight.detach(), *_share(mesh))
    _replace_parameters(model, _on_meta)
    if dtype is None:
        return values
    adapters = {model.hf.get_parameter(name) for name in model.adapter_weights}
    _replace_parameters(model, lambda weight: _cast(weight, torch.float32 if weight in adapters else dtype))
    return {
        name: value if value is None else value.to(model.get_parameter(name).dtype) for name, value in values.items()
    }


def _cast(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype), weight.requires_grad)


@torch.no_grad()
def _load_values(model: nn.Module, values: dict[str, Tensor | None], device: torch.device, is_sent: bool) -> None:
    """Gives sharded weights on the meta device their values; all ranks have to call it.

    Args:
        model: The sharded model.
        values: What `_detach_values` returned; emptied, so that no weight is kept longer than needed.
        device: Where the parts belong.
        is_sent: Whether the first rank sends the parts of the others.
    """
    for name, weight in list(model.named_parameters()):
        value = values.pop(name)
        sharded = cast("DTensor", weight)
        if is_sent:
            all_values = torch.empty(weight.shape, dtype=weight.dtype) if value is None else value
            filled = distribute_tensor(all_values.to(device), sharded.device_mesh, sharded.placements)
        else:
            assert value is not None
            filled = DTensor.from_local(
                value.to(device),
                *(sharded.device_mesh, sharded.placements),
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
        _set(model, name, nn.Parameter(filled, weight.requires_grad))


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replaces a weight in all modules that share it."""
    old = model.get_parameter(name)
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is old:
                setattr(module, key, parameter)
