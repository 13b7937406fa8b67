"""Divides a model over the ranks of a run: how it is built without being whole anywhere, and how FSDP2 shards it.

`oumi_pl.models.tensor_parallel` divides layers over a group of ranks before, if the strategy says so.

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
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from oumi_pl.errors import UserError
from oumi_pl.models import tensor_parallel
from oumi_pl.models.lm import LM
from oumi_pl.models.recomputation import is_recomputed
from oumi_pl.models.tensor_parallel import DataRanks, Share, Style

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
    """Divides the weights, gradients and optimizer states over devices: FSDP2, HSDP with replicas, tensor parallelism.

    `strategy: fsdp2` divides them over all devices. Otherwise `devices x num_nodes` has to be
    `shards x replicas x tensor`.

    Args:
        shards: Devices over which each weight is divided; those that `replicas` leaves if it is left out.
        replicas: Groups of devices that hold all weights each. Weights are gathered within a group, which should be a
            node, and only gradients are summed between groups (HSDP).
        tensor: Devices that compute each layer together, on the same rows (tensor parallelism): neighbours, which
            should be of one node, since they exchange activations in each layer. It has to divide the model's heads.
        offload: Keep parts in host memory between uses: weights, gradients and optimizer states, which are updated
            there. It saves GPU memory, and takes longer.
        save_distributed_checkpoint: Write a folder with a file for each rank, instead of one file through rank 0.
        process_group_backend: `nccl` or `gloo`; that of the device when left out.
        timeout: After which a rank that waits for another gives up; 30 minutes when left out.
    """

    def __init__(
        self,
        shards: int | None = None,
        replicas: int = 1,
        tensor: int = 1,
        *,
        offload: bool = False,
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
        self.tensor = tensor
        self.offload = offload
        self._data_group: dist.ProcessGroup | None = None

    def setup_environment(self) -> None:
        """Starts the process group, and arranges the ranks in a mesh `replicas x shards x tensor`.

        Raises:
            UserError: a size is below 1, or they don't multiply to the number of devices.
        """
        # not in the constructor: the parser would take it for a value of another type
        for name, size in (("shards", self.shards), ("replicas", self.replicas), ("tensor", self.tensor)):
            if size is not None and size < 1:
                raise UserError(f"trainer.strategy.{name} is {size}, but has to be at least 1")
        world = self.num_processes * self.num_nodes
        shards = self.shards or max(1, world // (self.replicas * self.tensor))
        if shards * self.replicas * self.tensor != world:
            sizes = {"replicas": self.replicas, "tensor": self.tensor}
            given = [f"shards {self.shards}"] * (self.shards is not None)
            left = " x ".join(given + [f"{name} {size}" for name, size in sizes.items() if size > 1])
            raise UserError(
                f"trainer.strategy: {left} does not divide {world} devices; shards x replicas x tensor has to be their "
                "number"
            )
        # the base class checks its two sizes against the devices, and makes a mesh of them, which is replaced
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        if self.offload and self._process_group_backend is None and self.root_device.type == "cuda":
            # the norm of gradients in host memory, and the files of a checkpoint, are communicated from there
            self._process_group_backend = "cpu:gloo,cuda:nccl"
        super().setup_environment()
        if self.replicas > 1 or self.tensor > 1:
            sizes = {"replicate": self.replicas, "shard": shards, "tensor": self.tensor}
            sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
            mesh = init_device_mesh(self.root_device.type, (*sizes.values(),), mesh_dim_names=(*sizes,))
            self._device_mesh = mesh
            cast("Any", self.lightning_module)._device_mesh = mesh
        if self.tensor > 1:
            data = _data_mesh(self.device_mesh)
            self._data_group = (data._flatten("data") if data.ndim > 1 else data).get_group()
            # so that DTensor reduces the norm of gradients at once, not over one dimension after the other
            self.device_mesh["shard", "tensor"]._flatten()

    @property
    def data_ranks(self) -> DataRanks:
        """The ranks that read rows of their own."""
        # neighbours in the mesh compute on the same rows
        number = max(1, self.world_size // self.tensor)
        return DataRanks(number, self.global_rank // self.tensor, self._data_group)

    def model_to_device(self) -> None:
        """Moves the module to the device of the rank; of a model that is offloaded, what FSDP2 does not hold."""
        if not self.offload:
            super().model_to_device()
            return
        module, device = cast("Any", self.lightning_module), self.root_device
        for child in module.children():
            if not is_sharded(child):  # FSDP2 has moved the buffers of the others
                child.to(device)
        module._apply(lambda tensor: tensor.to(device), recurse=False)
        module._device = device  # which `to` would set, and `module.device` returns

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which rows this rank reads, for loaders."""
        return {"num_replicas": self.data_ranks.number, "rank": self.data_ranks.index}


StrategyRegistry.register(FSDP2, Sharded, description="Weights divided over all devices (FSDP2)", override=True)


def data_ranks(trainer: Any) -> DataRanks:
    """The ranks of a run that read rows of their own: what sums over rows, and shares of work on rows, go by."""
    if trainer.world_size > 1 and isinstance(trainer.strategy, Sharded):
        return trainer.strategy.data_ranks
    return DataRanks(trainer.world_size, trainer.global_rank)


def is_to_be_sharded(module: L.LightningModule) -> bool:
    """Whether the strategy of the run is one for which `shard` shards."""
    return isinstance(module.trainer.strategy, ModelParallelStrategy)


def is_to_be_divided(module: L.LightningModule) -> bool:
    """Whether layers will be divided over groups of ranks (tensor parallelism)."""
    strategy = module.trainer.strategy
    return isinstance(strategy, Sharded) and strategy.tensor > 1


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


def compile_layers(model: LM) -> None:
    """Compiles the transformer blocks, or all of the body if the architecture does not say which they are.

    Blocks alike share what is compiled, which takes no longer for many of them. Compiled for sizes that vary, because
    the rows of nearly every batch have another length.

    Of a block that is recomputed in the backward pass, the parts are compiled: attention to documents is left out, and
    torch compiles no recomputation from which something is left out.
    """
    for block in decoder_layers(model) or [model.body]:
        for module in block.children() if is_recomputed(model.base, block) else (block,):
            module.compile(dynamic=True)


# ---- building


class Loading:
    """How a rank gets the weights of a model that is built: all of them."""

    tensor = Share()
    """Which part of each divided layer will be this rank's."""

    def check(self, config: Any) -> None:
        """Refuses the config of a model that can't be divided, before its weights are loaded or drawn."""
        if self.tensor.number > 1:
            tensor_parallel.refuse_undividable(config, self.tensor.number)

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
        ranks: The number of parts that each weight is divided into.
        tensor: Which part of each divided layer is this rank's, of which it keeps its part.
    """

    def __init__(self, rank: int, ranks: int, tensor: Share | None = None) -> None:
        self.share, self.tensor = Share(rank, ranks), tensor or Share()

    def pretrained(self, load: Callable[[], T]) -> T:
        """Calls `load`. Weights are replaced as soon as they are set, so that only one is ever whole."""
        with tensor_parallel.noting_styles(self.tensor.number, self.share.number) as styles, _one_at_a_time():

            def part_of(weight: nn.Parameter, module: nn.Module, name: str) -> nn.Parameter:
                dim = tensor_parallel.divided_dim(styles.get(module, tensor_parallel.WHOLE), name)
                return _placeholder(weight, _part(weight.detach(), dim, self.share, self.tensor))

            with _replacing(part_of, _is_loaded):
                return load()


class Structure(Loading):
    """Builds a model with placeholders in place of its weights, which another rank holds."""

    def pretrained(self, load: Callable[[], T]) -> T:
        """Calls `load`, which reads the weights one at a time; none is kept."""
        with _replacing(lambda weight, *_: _placeholder(weight), _is_loaded), _one_at_a_time():
            return load()

    def random(self, build: "Callable[[], PreTrainedModel]") -> "PreTrainedModel":
        """Calls `build` without drawing any number. Buffers are computed, since no other rank sends them."""
        # on the meta device, since initialisation writes to the weights, and placeholders can't be written to
        with _replacing(lambda weight, *_: _on_meta(weight), lambda weight: weight.device.type != "meta"):
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
    if module._trainer is None or not is_to_be_sharded(module):
        return Loading()
    tensor = _tensor_share(module)
    if source == "parts":
        share = _share(_mesh(module))
        return Parts(share.index, share.number, tensor)
    loading = Loading()
    if source == "first rank":
        loading = FirstRank() if module.trainer.global_rank == 0 else Structure()
    loading.tensor = tensor
    return loading


@contextmanager
def _replacing(
    replace: Callable[[nn.Parameter, nn.Module, str], nn.Parameter], is_replaced: Callable[[nn.Parameter], bool]
) -> Iterator[None]:
    """Replaces parameters as modules get them, if `is_replaced`; `replace` gets the module and the name, too."""
    register = nn.Module.register_parameter

    def replaced(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and is_replaced(parameter):
            parameter = replace(parameter, module, name)
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "Placeholder":
        """A parameter's own method would leave out the part. PEFT copies layers to train them beside adapters."""
        memo[id(self)] = copy = _placeholder(self, None if self.part is None else self.part.clone())
        return copy


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


def _part(value: Tensor, divided: int | None, share: Share, tensor: Share) -> Tensor:
    """A rank's part of a weight: of its part of the layer, what FSDP2 leaves it.

    Args:
        value: The whole weight.
        divided: The dimension along which the layer is divided over a tensor group, if it is.
        share: Of this rank among those over which FSDP2 divides.
        tensor: Of this rank in its tensor group.
    """
    part = share.of(tensor.of(value, divided), tensor_parallel.sharded_dim(divided, value.shape, share.number))
    # a copy, so that the whole is freed
    return part.clone(memory_format=torch.contiguous_format)


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
        UserError: the model can't be divided over a tensor group, or a copy of a quantized model is needed.
    """
    from torch.distributed.fsdp import fully_shard

    mesh, device = _mesh(module), module.trainer.strategy.root_device
    kwargs = _settings(module, mesh)
    # heads beside the model, a reward head for example, are sharded and reduced like it
    heads = [child for child in module.children() if child is not model and any(True for _ in child.parameters())]
    is_quantized = bool(quantized_layers(model))
    if is_quantized and copy:
        raise UserError(
            "model.reference: a quantized model can't be copied while it is sharded; set reference: initial"
        )
    tensor = _tensor_mesh(module)
    styles = {} if tensor is None else tensor_parallel.checked_styles(model.base, tensor.size(), _share(mesh).number)
    # quantized weights are of a class of their own, and can't be cut here
    values = {} if is_quantized else _detach_values(model, mesh, loading, dtype, styles)
    for layer in quantized_layers(model).values():
        _store_as_floats(layer)
    second = deepcopy(model) if copy else None  # on the meta device, so without memory
    if tensor is not None:
        for module_with_weights in (model, *heads):
            tensor_parallel.divide(module_with_weights, styles, tensor)
        if second is not None:
            tensor_parallel.divide(second, tensor_parallel.styles_of(second.base, tensor.size()), tensor)
    for layer in [*decoder_layers(model), *heads]:
        fully_shard(layer, **kwargs)
    of_root = _settings_of_root(kwargs)
    fully_shard(model, **of_root)
    is_offloaded = "offload_policy" in kwargs
    if values:
        is_sent = isinstance(loading, FirstRank | Structure)
        _load_values(model, values, device, is_sent=is_sent, is_offloaded=is_offloaded)
    if second is not None:
        # the root, too, is divided again after a call: no backward pass follows that would need it
        for layer in decoder_layers(second):
            fully_shard(layer, **kwargs, reshard_after_forward=True)
        fully_shard(second, **of_root, reshard_after_forward=True)
        values = {n: cast("DTensor", p).to_local().clone() for n, p in model.named_parameters()}
        _load_values(second, values, device, is_sent=False, is_offloaded=is_offloaded)
    return second


def _settings(module: L.LightningModule, mesh: DeviceMesh) -> dict[str, Any]:
    """The arguments of `fully_shard`: where weights are divided, offloaded, and converted."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    strategy = module.trainer.strategy
    settings: dict[str, Any] = {"mesh": mesh, "shard_placement_fn": partial(_placement, _share(mesh).number)}
    if isinstance(strategy, Sharded) and strategy.offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=strategy.root_device.type == "cuda")
    if module.trainer.precision == "bf16-mixed":
        # gather and multiply in bfloat16; keep weights, and sum gradients over ranks, in float32
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return settings


def _settings_of_root(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `fully_shard` for the whole model, whose input is a batch: its numbers are not rounded."""
    policy = settings.get("mp_policy")
    return settings if policy is None else settings | {"mp_policy": replace(policy, cast_forward_inputs=False)}


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weights bitsandbytes has quantized to 4 bits, by name. They hold the scales of their weights."""
    return {n: m for n, m in model.named_modules() if getattr(m, "quant_state", None) is not None}


def _store_as_floats(layer: Any) -> None:
    """Lets the bytes of a quantized weight pass for bfloat16, in which they are gathered: before torch 2.13, FSDP2
    divides floating-point weights alone.
    """
    weight = layer.weight
    weight.data = weight.data.view(-1).view(torch.bfloat16).view(-1, 1)
    weight.quant_storage = layer.quant_storage = torch.bfloat16


def reshard(model: nn.Module) -> None:
    """Divides weights that are gathered since a call without a backward pass, before an optimizer looks at them."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _mesh(module: L.LightningModule) -> DeviceMesh:
    """The ranks that FSDP2 divides weights over: `[shard]`, or `[replicate, shard]`.

    Raises:
        UserError: Lightning's own strategy has a tensor dimension.
    """
    mesh: Any = module.device_mesh
    if "tensor_parallel" not in mesh.mesh_dim_names:
        return _data_mesh(mesh)
    if mesh["tensor_parallel"].size() > 1:
        raise UserError(
            "trainer.strategy: tensor_parallel_size has to be 1; take {class_path: Sharded, init_args: {tensor: 2}}"
        )
    return mesh["data_parallel"]


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The part of a mesh whose ranks read rows of their own."""
    names = cast("tuple[str, ...]", mesh.mesh_dim_names)
    data = tuple(name for name in names if name != "tensor")
    return mesh if data == names else mesh[data]


def _tensor_mesh(module: L.LightningModule) -> DeviceMesh | None:
    """The ranks that compute each layer together with this one; None if it does so alone."""
    mesh: Any = module.device_mesh
    return mesh["tensor"] if "tensor" in mesh.mesh_dim_names else None


def _tensor_share(module: L.LightningModule) -> Share:
    mesh = _tensor_mesh(module)
    return Share() if mesh is None else Share(mesh.get_local_rank(), mesh.size())


def _share(mesh: DeviceMesh) -> Share:
    """Which part of a weight FSDP2 leaves this rank."""
    sharding = mesh["shard"] if mesh.ndim > 1 else mesh
    return Share(sharding.get_local_rank(), sharding.size())


def _placement(shards: int, weight: nn.Parameter) -> Shard | None:
    """The dimension along which FSDP2 divides a weight; None: the first."""
    divided = weight.placements[0] if isinstance(weight, DTensor) else None
    if not isinstance(divided, Shard):
        return None
    return Shard(tensor_parallel.sharded_dim(divided.dim, weight.shape, shards))


def _detach_values(
    model: LM, mesh: DeviceMesh, loading: Loading, dtype: torch.dtype | None, styles: dict[nn.Module, Style]
) -> dict[str, Tensor | None]:
    """Takes the values out of a model, and leaves its weights on the meta device, in their dtypes.

    Args:
        model: The model.
        mesh: The ranks that FSDP2 divides weights over.
        loading: How this rank got the weights.
        dtype: See `shard`.
        styles: How modules are divided over a tensor group.

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
            module = model.get_submodule(name.rpartition(".")[0])
            style = styles.get(module, tensor_parallel.WHOLE)
            dim = tensor_parallel.divided_dim(style, name.rpartition(".")[2])
            values[name] = _part(weight.detach(), dim, _share(mesh), loading.tensor)
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
def _load_values(
    model: nn.Module, values: dict[str, Tensor | None], device: torch.device, *, is_sent: bool, is_offloaded: bool
) -> None:
    """Gives sharded weights on the meta device their values; all ranks have to call it.

    Args:
        model: The sharded model.
        values: What `_detach_values` returned; emptied, so that no weight is kept longer than needed.
        device: That of the rank.
        is_sent: Whether the first rank sends the parts of the others.
        is_offloaded: Whether the parts belong into host memory, and not on the device.
    """
    for name, weight in list(model.named_parameters()):
        value = values.pop(name)
        sharded = cast("DTensor", weight)
        if is_sent:
            all_values = torch.empty(weight.shape, dtype=weight.dtype) if value is None else value
            filled = distribute_tensor(all_values.to(device), sharded.device_mesh, sharded.placements)
        elif value is not None and value.shape != sharded.to_local().shape:
            raise RuntimeError(f"{name}: a rank has {[*value.shape]} of it, but needs {[*sharded.to_local().shape]}")
        else:
            assert value is not None
            filled = DTensor.from_local(
                value.to(device),
                *(sharded.device_mesh, sharded.placements),
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
        if is_offloaded:  # `from_local` moves what it is given to the device
            filled = cast("DTensor", filled.cpu())
        _set(model, name, nn.Parameter(filled, weight.requires_grad))


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replaces a weight in all modules that share it."""
    old = model.get_parameter(name)
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is old:
                setattr(module, key, parameter)
