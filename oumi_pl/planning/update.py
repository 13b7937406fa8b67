"""Runs updates of a recipe on fake tensors: the module, batch, optimizer, strategy and precision of the run.

Fake tensors (`torch._subclasses.FakeTensorMode`) have shapes and dtypes but no values, and a fake process group answers
collectives for any number of ranks. So a model of any size runs for an update on a laptop, in seconds. An update of at
most two micro-batches, after a step with gradients of zeros, reaches the peak of the whole run.

What a run reads from values is replaced: batches have the largest rows that the settings allow (or are the largest of
the data), cached values of a reference are zeros, the layout for packed rows is assumed to be exact.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map_only

from oumi_pl.attention import NAME
from oumi_pl.callbacks.memory import size_of, state_size
from oumi_pl.errors import UserError
from oumi_pl.losses import devices
from oumi_pl.models import recomputation, tensor_parallel
from oumi_pl.models.build import build_model
from oumi_pl.models.lm import LM, disable_dropout, documents, forest
from oumi_pl.models.recomputation import OnHost
from oumi_pl.models.sharding import Sharded, data_ranks
from oumi_pl.modules.distill import Teacher
from oumi_pl.modules.reference import FrozenModel, NoReference, Opened, Reference, WithoutAdapters
from oumi_pl.planning.cards import NODE
from oumi_pl.planning.parts import Parts, initial_config, launched, parts_of
from oumi_pl.planning.quantized import quantize
from oumi_pl.planning.tracker import Costs, Kind, Tracker
from oumi_pl.types import Batch, Update

HELD = (Kind.PARAMETERS, Kind.GRADIENTS, Kind.OPTIMIZER)
MICRO_BATCHES = 2
"""Most micro-batches of an update that are run: from the second on, memory no longer grows."""
STEPS = 1_000_000
"""Stands for the length of the run, on which only the schedule depends."""


@dataclass(frozen=True)
class Settings:
    """What to plan.

    configs: recipes; later ones win. overrides: options such as `--data.batch_size 4`. devices: number of ranks.
    devices_per_node: ranks of a node; messages to other nodes are slower. real_rows: take the largest micro-batch of
    the recipe's data, which are read and tokenized, instead of the largest rows that its settings allow. on_gpu:
    whether to plan for GPUs or for this machine's CPU, where head and attention compute in other ways.
    """

    configs: tuple[Path, ...]
    overrides: tuple[str, ...] = ()
    devices: int = 1
    devices_per_node: int = NODE
    real_rows: bool = False
    on_gpu: bool = True


@dataclass(frozen=True)
class Estimate:
    """An update of a rank.

    peak: bytes by kind when most memory is in use. held: bytes of parameters, gradients and optimizer state, which are
    there all the time. offloaded: whether those are in host memory, and not in the peak. costs: of one update. tokens,
    targets: of an update over all ranks. batch_size, micro_batches: rows of a micro-batch, and micro-batches of an
    update of a rank. data_ranks: those that read rows of their own. sharded: whether ranks hold parts of the weights.
    ways_to_hold_less: options of `fit` with which less would be held, each with what it does. left_out: see `Parts`.
    """

    peak: dict[Kind, int]
    held: dict[Kind, int]
    costs: Costs
    tokens: int
    targets: int
    batch_size: int
    micro_batches: int
    devices: int
    data_ranks: int
    sharded: bool
    gradient_checkpointing: bool
    strategy: str
    precision: str
    ways_to_hold_less: tuple[str, ...] = ()
    offloaded: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes of the peak."""
        return sum(self.peak.values())


def estimate(settings: Settings) -> Estimate:
    """Plans an update.

    Raises:
        UserError: for a mistake in the recipe, and for parts that need values.
    """
    with uncollected(), launched(settings.devices), process_group(settings.devices), ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # PEFT compares pointers
        # transformers looks for several documents in rows without a mask, in which our batches have one each
        stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None))
        parts = parts_of(settings.configs, settings.overrides, settings.devices, with_tokenizer=settings.real_rows)
        if settings.on_gpu:
            stack.enter_context(patch.dict(devices.DEVICES, cpu=devices.GPU))
            # in half precision, a CPU computes the attention of whole rows in float32
            stack.enter_context(patch("oumi_pl.attention.interface._half_precision", lambda query: None))
        try:
            return _Run(parts, settings).estimate()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"plan: {type(parts.model).__name__} reads values while it trains ({error}), and a plan has none; "
                "`fit --dry_run` measures on the machine of the run"
            ) from error


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector from what is left of a plan, until the process ends.

    Collecting some plans (`reward/qwen3_0.6b_lora` on two devices) corrupted the heap, with torch 2.13, so that a later
    allocation ended the process. What is not in a cycle is freed all the same.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def process_group(ranks: int) -> Iterator[None]:
    """A process group of this many ranks, of which only rank 0 exists.

    Raises:
        UserError: this process is in a group already.
    """
    if dist.is_initialized():
        raise UserError("plan: this process is a rank of a run already; start it without torchrun")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Zeros(Opened):
    """Takes the place of the cached values of a reference.

    Args:
        width: Values per target; None for one log-probability.
    """

    def __init__(self, width: int | None = None) -> None:
        self.width = width

    def logps(self, batch: Batch, split: str, compute: Any = None) -> Tensor:
        """Zeros, `[targets]` or `[targets, width]`."""
        shape = (len(batch["targets"]),) + (() if self.width is None else (self.width,))
        return torch.zeros(shape, device=batch["targets"].device)


@contextmanager
def casts_of_fake_weights() -> Iterator[None]:
    """Makes casts of modules work: torch exchanges the contents of weights, which it can't do for fake ones.

    Here a weight of another dtype takes its place, in all modules that share it.
    """
    others: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # old weights too, which keeps their ids unique

    def apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(function)
        for name, weight in self._parameters.items():
            if weight is None:
                continue
            with torch.no_grad():
                result = function(weight)
            if result.dtype != weight.dtype:
                others.setdefault(id(weight), (weight, nn.Parameter(result, weight.requires_grad)))
                self._parameters[name] = others[id(weight)][1]
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else function(buffer)
        return self

    with patch.object(nn.Module, "_apply", apply):
        yield


@contextmanager
def gathered_weights(tracker: Tracker) -> Iterator[None]:
    """Counts weights that FSDP2 has gathered, and their gradients before these are reduced, as communication."""
    to_unsharded, hooked = FSDPParam.to_unsharded, set()

    def counted(part: FSDPParam) -> None:
        to_unsharded(part)
        for gathered in part.all_gather_outputs:
            tracker.mark(gathered, Kind.COMMUNICATION)
        weight = part._unsharded_param
        if weight.requires_grad and id(weight) not in hooked:
            hooked.add(id(weight))
            weight.register_post_accumulate_grad_hook(lambda p: tracker.mark(p.grad, Kind.COMMUNICATION))

    with patch.object(FSDPParam, "to_unsharded", counted):
        yield


@contextmanager
def divided_layers() -> Iterator[None]:
    """Lets tensor parallelism divide layers on fake tensors.

    Meshes of ranks are computed with real values. Ranks do not compare the inputs of a layer to find out whether they
    are parts: that needs values, and no memory depends on it.
    """
    concatenate = DeviceMesh._concatenate

    def concatenated(meshes: list[DeviceMesh]) -> DeviceMesh:
        with unset_fake_temporarily():
            return concatenate(meshes)

    with (
        patch.object(DeviceMesh, "_concatenate", staticmethod(concatenated)),
        patch.object(tensor_parallel, "_differ", lambda inputs, group: False),
    ):
        yield


class _Run:
    """The run of a recipe, on fake tensors.

    Args:
        parts: Trainer, module and data.
        settings: What to plan.
    """

    def __init__(self, parts: Parts, settings: Settings) -> None:
        self.trainer, self.module, self.data = parts.trainer, parts.model, parts.datamodule
        self.is_pretrained, self.left_out = parts.is_pretrained, parts.left_out
        self.settings = settings
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.micro_batches = min(MICRO_BATCHES, self.trainer.accumulate_grad_batches)
        self.is_offloaded = isinstance(self.trainer.strategy, Sharded) and self.trainer.strategy.offload
        self.copies = sum(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks)
        self.kept: list[Tensor] = []
        """What the run holds beside module and optimizer."""

    def estimate(self) -> Estimate:
        """Builds the model, and runs the updates."""
        self._connect()
        batch = self._batch()
        with self.mode, casts_of_fake_weights(), divided_layers():
            self._build()
        vocab = len(self.module.causal_lm.base.get_input_embeddings().weight)
        strategy = self.trainer.strategy
        columns, layer_ranks = {vocab}, []
        if isinstance(strategy, Sharded) and strategy.tensor > 1:
            columns.add(vocab // strategy.tensor)
            layer_ranks = dist.get_process_group_ranks(strategy.device_mesh.get_group("tensor"))
        offloaded = HELD if self.is_offloaded else ()
        tracker = Tracker(columns, self.settings.devices_per_node, offloaded, layer_ranks)
        with self.mode, tracker, gathered_weights(tracker), divided_layers(), self._offloaded_activations(tracker):
            batch = self._prepare(tracker, batch)
            phases = self._update(tracker, batch)
        return self._result(tracker, phases, batch)

    @property
    def _micro_batches_of_all(self) -> int:
        """Micro-batches of an update of all ranks. Those of a tensor group compute the same ones together."""
        return self.trainer.accumulate_grad_batches * data_ranks(self.trainer).number

    # ---- before the first update

    def _connect(self) -> None:
        """Connects trainer, module and data as `fit` does, and leaves out what moves or compares values."""
        trainer, strategy, data = self.trainer, self.trainer.strategy, self.data
        trainer.callbacks, trainer.state.fn, trainer.datamodule = [], TrainerFn.FITTING, data
        strategy.connect(self.module)
        self.module.trainer = data.trainer = trainer
        strategy.setup_environment()
        strategy.batch_to_device = lambda batch: batch
        if isinstance(strategy, DDPStrategy):
            strategy.configure_ddp = lambda: None  # type: ignore[method-assign]  # its reducer, in C++, reads values; see `_prepare`
        self.module.total_steps = lambda: STEPS

    def _batch(self) -> dict[str, Any]:
        """A micro-batch. Mismatched rows of KTO are taken to be as large, and as many as the rows of an update."""
        data = self.data
        if self.settings.real_rows and not data.samples:
            data.prepare_data()
            data.setup("fit")
            rows = data.largest_micro_batch()
            found = None if rows is None else [int(example) for row in rows for example in row]
            batch: Any = data.full_batch(data.batch_size) if found is None else data.batch("train", found)
        else:
            batch = data.full_batch(data.batch_size)
        parts = self._micro_batches_of_all
        data.report, data.longest_path = dict, lambda splits: None
        data.mismatched_ids = lambda split, ids: range(parts)
        data.in_batches = lambda split, ids: [[i] for i in ids]
        return batch

    def _build(self) -> None:
        module, reference = self.module, self.module.reference
        self._keep_adapters_in_float32()
        if module.quantization is not None:
            built = module.on_model_built

            def quantize_and_go_on() -> None:
                quantize(module.causal_lm, module.causal_lm.head, module.quantization, module.unquantized)
                built()

            module.on_model_built = quantize_and_go_on
        if reference is not None:
            reference.remember = lambda model: None  # it hashes the initial weights, which have no values
        call._call_configure_model(self.trainer)
        self.trainer.strategy.setup(self.trainer)
        if reference is not None:
            reference.opened = self._opened(reference)  # `open` would load weights, or a pass over the data

    def _keep_adapters_in_float32(self) -> None:
        """Casts the rank's parts of adapters too: `p.data = ...` on a DTensor changes its dtype, not its local part."""
        module = self.module
        keep = module.keep_adapters_in_float32

        def keep_parts() -> None:
            keep()
            changed = False
            for parameter in module.parameters():
                part = getattr(parameter, "_local_tensor", parameter)
                if part.dtype != parameter.dtype:
                    parameter._local_tensor = part.to(parameter.dtype)
                    changed = True
            if changed:
                module.causal_lm.to(module.device)  # FSDP2 keeps views of the parts, which it renews after a cast

        module.keep_adapters_in_float32 = keep_parts

    def _opened(self, reference: Reference) -> Opened:
        """The reference, with zeros in place of what would be read from the cache."""
        module = self.module
        width = None
        if isinstance(reference, Teacher) and reference.top_k is not None:
            width = 2 * min(reference.top_k, reference.vocab) + 1
        kinds: dict[str, Callable[[], Opened]] = {
            "none": NoReference,
            "adapters": lambda: WithoutAdapters(module.causal_lm),
            "online": lambda: FrozenModel(self._frozen(reference)),
            "precomputed": lambda: Zeros(width),
        }
        return kinds[reference.kind]()

    def _frozen(self, reference: Any) -> LM:
        """A copy of the initial model, or the other model that a reference names."""
        module, data = self.module, self.data
        if reference.sharded_copy is not None:
            self.kept += reference.sharded_copy.parameters()
            return reference.sharded_copy
        dtype = reference.dtype or module.weights_dtype
        if reference.is_initial:
            config, quantization = module.config, None
        else:
            config = initial_config(reference.name, f"model.{reference.role}", self.settings.devices)
            quantization = reference.quantization
            own = config.pop("dtype", "float32")
            dtype = own if dtype == "auto" else dtype
        hf = build_model(None, config=config, tokenizer=data.tokenizer, dtype=dtype, attn=NAME)
        model = LM(hf.requires_grad_(False), forest if data.branching else documents)
        if quantization is not None:
            quantize(model, model.head, quantization)
        disable_dropout(model)
        self.kept += [*model.parameters(), *model.buffers()]
        return model

    def _prepare(self, tracker: Tracker, batch: dict[str, Any]) -> dict[str, Any]:
        """Brings the run to the end of an update; returns the batch as fake tensors, with its update's totals.

        Then there is an optimizer state, and gradients that are released next.
        """
        module, strategy = self.module, self.trainer.strategy
        trained = [p for p in module.parameters() if p.requires_grad]
        with tracker.allocating(Kind.PARAMETERS):
            for _ in range(self.copies):
                self.kept += [torch.empty_like(p) for p in module.parameters()]
        for tensor in (*module.parameters(), *module.buffers(), *self.kept):
            tracker.mark(tensor, Kind.PARAMETERS)
        if self.is_offloaded:  # all but the buffers
            for tensor in module.buffers():
                tracker.mark(tensor, Kind.ACTIVATIONS)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.dtype)
            tracker.mark(parameter.grad, Kind.GRADIENTS)
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.mark(p.grad, Kind.GRADIENTS))
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("gradient_as_bucket_view"):
            with tracker.allocating(Kind.COMMUNICATION):  # the reducer copies gradients into buckets
                self.kept.append(torch.empty(size_of(trained), dtype=torch.uint8))
        counts, parts = module.count(batch), self._micro_batches_of_all
        batch["update_ids"] = [0]
        batch["update"] = Update(counts["targets"] * parts, counts["rows"] * parts, parts, batch.get("weight"))
        with tracker.allocating(Kind.OPTIMIZER):
            self.trainer.optimizers[0].step()
        faked = tree_map_only(Tensor, self.mode.from_tensor, batch)
        self.data.batch = lambda split, ids: faked
        for tensor in tree_leaves(faked):
            if isinstance(tensor, Tensor):
                tracker.mark(tensor, Kind.ACTIVATIONS)
        return faked

    # ---- updates

    def _update(self, tracker: Tracker, batch: dict[str, Any]) -> list[Costs]:
        """Runs an update as Lightning's loop does; returns the costs of its micro-batches, and of the step."""
        trainer, module, strategy = self.trainer, self.module, self.trainer.strategy
        (optimizer,) = trainer.optimizers
        phases = []
        optimizer.zero_grad()  # as after the last update, see `UpdateModule.optimizer_step`
        for micro_batch in range(self.micro_batches):
            tracker.costs = Costs()
            loss = strategy.training_step(batch, micro_batch)
            strategy.backward(loss / trainer.accumulate_grad_batches, optimizer)
            del loss
            phases.append(tracker.costs)
        tracker.costs = Costs()
        if isinstance(strategy, DDPStrategy):
            size = size_of(p.grad for p in module.parameters() if p.grad is not None)
            tracker.count_message("all_reduce", size, range(self.settings.devices))
        clip = trainer.gradient_clip_val
        if clip:
            module.configure_gradient_clipping(optimizer, clip, trainer.gradient_clip_algorithm)
        with tracker.allocating(Kind.OPTIMIZER):
            optimizer.step()
        return [*phases, tracker.costs]

    @contextmanager
    def _offloaded_activations(self, tracker: Tracker) -> Iterator[None]:
        """Leaves out activations that a GPU would move to host memory."""
        if not self.settings.on_gpu:
            yield
            return

        class Uncounted(OnHost):
            def __init__(self, tensor: Tensor) -> None:
                with tracker.paused():
                    self.copy = torch.empty_like(tensor)

            def to_device(self) -> Tensor:
                return torch.empty_like(self.copy)

        with patch.object(recomputation, "to_host", Uncounted):
            yield

    def _result(self, tracker: Tracker, phases: list[Costs], batch: dict[str, Any]) -> Estimate:
        trainer, module, data = self.trainer, self.module, self.data
        *micro_batches, step = phases
        costs = Costs()
        for phase, times in [
            (micro_batches[0], 1),
            (micro_batches[-1], trainer.accumulate_grad_batches - 1),
            (step, 1),
        ]:
            costs.add(phase, times)
        counts, parts = module.count(batch), self._micro_batches_of_all
        (optimizer,) = trainer.optimizers
        return Estimate(
            peak=tracker.peak,
            offloaded=self.is_offloaded,
            held={
                Kind.PARAMETERS: size_of((*module.parameters(), *module.buffers(), *self.kept)),
                Kind.GRADIENTS: size_of(p for p in module.parameters() if p.requires_grad),
                Kind.OPTIMIZER: state_size(optimizer),
            },
            costs=costs,
            tokens=counts["positions"] * parts,
            targets=counts["targets"] * parts,
            batch_size=data.batch_size,
            micro_batches=trainer.accumulate_grad_batches,
            devices=self.settings.devices,
            data_ranks=data_ranks(trainer).number,
            sharded=isinstance(trainer.strategy, ModelParallelStrategy),
            gradient_checkpointing=bool(module.gradient_checkpointing),
            strategy=type(trainer.strategy).__name__,
            precision=str(trainer.precision),
            ways_to_hold_less=tuple(self._ways_to_hold_less()),
            left_out=self.left_out,
        )

    def _ways_to_hold_less(self) -> Iterator[str]:
        module, is_sharded = self.module, isinstance(self.trainer.strategy, ModelParallelStrategy)
        # completions are not sampled from sharded weights, and weights in 8 bits are not sharded
        if not is_sharded and not self.data.samples and module.quantization != "int8":
            yield "--trainer.strategy fsdp2: sharding over several devices (FSDP2)"
        elif is_sharded and not self.is_offloaded and not self.data.samples:
            yield "--trainer.strategy Sharded --trainer.strategy.offload true: what is held is kept in host memory"
        if self.is_pretrained and module.lora is None:
            yield "--model.lora.r 16: only adapters have gradients and optimizer state"
        elif self.is_pretrained and module.quantization is None:
            yield "--model.quantization nf4: frozen weights in 4 bits"
