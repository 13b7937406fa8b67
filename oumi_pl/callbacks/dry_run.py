"""`fit --dry_run`: runs the first updates on the largest micro-batch, and prints a table of time and memory.

Module, data, trainer, strategy, precision, loader and optimizer are those of the run. The run is only shorter: one
batch of validation, then a few updates of at most two micro-batches each. Two updates of two micro-batches reach the
memory of the whole run: the second update has an optimizer state, and its second micro-batch is computed while the
gradients of the first are held. By then one-time costs (compilation, first allocations) are over as well. Then the run
ends, and nothing of it is kept.
"""

import math
import shutil
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler, WeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from torch.optim import Optimizer

from oumi_pl.callbacks import find, find_all
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.memory import Memory, available, gigabytes, size_in_words, size_of, state_size
from oumi_pl.callbacks.run_folder import RunFolder, nothing_left
from oumi_pl.callbacks.start import data_lines, labelled
from oumi_pl.callbacks.throughput import peak_memory
from oumi_pl.data.distill import DistillData
from oumi_pl.data.examples import ExampleData
from oumi_pl.data.plan import Layout, Plan
from oumi_pl.data.reference import ReferenceLogps
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.modules.update import COUNTS, recounted
from oumi_pl.optim.schedules import in_steps
from oumi_pl.rollouts.sampling import Completion, Engine
from oumi_pl.runs import folders
from oumi_pl.runs.folders import refuse_unwritable
from oumi_pl.terminal.text import visible
from oumi_pl.types import RunData, RunModule

NO_TOKEN = 2**31 - 1
"""A token id that no vocabulary has, so it never ends a completion."""
UPDATES = 2
"""Fewest updates: from the second on there is an optimizer state, and memory no longer grows."""
UPDATES_OF_BOTH_KINDS = 4
"""The same, if some updates train on sampled completions and others on answers."""
MOST_UPDATES = 6
SECONDS = 2.0
"""Fast updates are repeated, up to `MOST_UPDATES`, until this time is spent: their times vary."""
MICRO_BATCHES = 2
"""Most micro-batches per update: from the second on, memory no longer grows."""


def dry_run(trainer: Any, module: Any, data: Any, ckpt_path: str | None = None) -> None:
    """Runs the first updates and prints a table. Keeps nothing but tokenized rows in the cache.

    Args:
        trainer: The trainer of the run. It can't be used for the run afterwards.
        module: The module of the run.
        data: The data module of the run.
        ckpt_path: Checkpoint that the run will be resumed from.

    Raises:
        UserError: for every mistake that would stop the run.
    """
    folder = find(trainer, RunFolder)
    assert folder is not None
    refuse_unwritable(folder.resume or folder.root)
    attempt = DryRun(data, trainer.callbacks)
    trainer.callbacks = [*(c for c in trainer.callbacks if _takes_part(c)), Memory(), attempt]
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]  # for users' callbacks that log
    trainer.profiler = PassThroughProfiler()
    trainer.limit_val_batches = min(1, trainer.limit_val_batches)
    trainer.num_sanity_val_steps = 1
    if isinstance(data, ExampleData):  # the whole cache of the reference would take too long
        data.reference_logps = attempt.reference_logps  # type: ignore[method-assign]
    if isinstance(data, RolloutData):
        data.engine = _FullLength(data.engine)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)


def _takes_part(callback: L.Callback) -> bool:
    """Whether a callback takes part. Users' callbacks may be part of a step; of ours only a weight average is.

    `Checkpoints` stays too, because a resumed run restores its state. Without a run folder it writes nothing.
    """
    ours = type(callback).__module__.startswith("oumi_pl.")
    return isinstance(callback, WeightAveraging | Checkpoints) or not (ours or isinstance(callback, Checkpoint))


class DryRun(L.Callback):
    """Lets the run train on its largest micro-batch, measures, and prints the table.

    Args:
        data: The data module of the run.
        callbacks: The callbacks of the run: the table shows what they would write.
    """

    def __init__(self, data: RunData, callbacks: list[Any]) -> None:
        self.data = data
        self.callbacks = callbacks
        self.measured = Measured()
        self._began = 0.0

    # ---- the largest micro-batch

    @cached_property
    def largest(self) -> list[np.ndarray] | None:
        """Rows of the largest micro-batch of the first epoch, over all ranks; None if all are alike."""
        return self.data.largest_micro_batch()

    def reference_logps(self, split: str, parts: dict[str, Any], width: int = 1) -> Any:
        """Replaces the data module's method: its cache if that is complete, else one of the tried examples alone."""
        data = self.data
        assert isinstance(data, ExampleData)
        cached = type(data).reference_logps(data, split, parts, width)
        if not data.trainer.strategy.broadcast(bool(cached.missing())):
            return cached
        self.measured.rows_without_reference += len(data.compared(split)[0])
        self.measured.bytes_without_reference += cached.bytes
        if split == "train":
            ids = np.concatenate(self.largest or [])
        else:
            plans, layout = data.eval_plans(split)
            ids = plans[0].examples_of(0, layout, micro_batches=1)
        return SomeLogps(data.compared_ids(split, ids.tolist()), data.layout.ranks, cached)

    # ---- the run

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Counts the steps and tokens of the whole run, then cuts the run short."""
        self.measured.begin(trainer, pl_module)
        trainer.limit_val_batches = 0
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step + UPDATES
        trainer.fit_loop.max_epochs = -1  # an epoch of few rows may be shorter than the dry run
        before = self.data.layout.micro_batches
        _lower_accumulation(trainer, before, min(MICRO_BATCHES, before))
        loader = trainer.train_dataloader
        loader.layout = self.data.layout  # follows the trainer's accumulation, which has just changed
        self.measured.alike = self.largest is None
        self.measured.sampled = self.data.sampling.max_new_tokens if isinstance(self.data, RolloutData) else 0
        if self.measured.has_both_kinds and isinstance(self.data, DistillData):
            # alternating, sampled ones first: the third is the first of them with an optimizer state
            self.data.is_sampled = lambda epoch, update: len(self.measured.updates) % 2 == 0
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step + UPDATES_OF_BOTH_KINDS
        if (rows := self.largest) is not None:
            plan = loader.position.plan
            loader.position.plan = lambda epoch: OneBatch(plan(epoch), rows)
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: RunModule, batch: Any, batch_idx: int) -> None:
        """Records the size of the micro-batch."""
        self.measured.size = size_in_words(pl_module.count(batch))

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Records the time and the sums of an update at its end."""
        if trainer.fit_loop._should_accumulate():
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # kernels run on after the call that starts them
        now = time.perf_counter()
        self.measured.updates.append((now - self._began, dict(pl_module.last_update)))
        if isinstance(self.data, RolloutData):
            self.measured.sampling.append(dict(self.data.seconds))
            self.data.seconds.clear()
        self._began = now
        done = len(self.measured.updates)
        has_time = sum(seconds for seconds, _ in self.measured.updates) < SECONDS
        least = UPDATES_OF_BOTH_KINDS if self.measured.has_both_kinds else UPDATES
        if done >= least and trainer.strategy.broadcast(has_time and done < MOST_UPDATES):
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step + 1

    def on_validation_batch_start(self, trainer: Any, pl_module: RunModule, batch: Any, *_: Any) -> None:
        """Records the size of the validation batch."""
        self.measured.validated = size_in_words(pl_module.count(batch))

    def on_train_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Prints the table."""
        device = pl_module.device
        peak = torch.tensor(float(peak_memory(device)), device=device, dtype=torch.float32)
        self.measured.peak = int(trainer.strategy.reduce(peak, reduce_op="max"))
        if trainer.is_global_zero:
            show(sections(trainer, pl_module, self.data, self.callbacks, self.measured))
            print("\nnothing of this dry run was kept; the same command without --dry_run trains")

    def on_fit_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Raises the error that the run would raise if it had nothing left to train.

        Raises:
            UserError: no update was made.
        """
        if not self.measured.updates:
            raise nothing_left(trainer.global_step)


def _lower_accumulation(trainer: Any, before: int, micro_batches: int) -> None:
    """Sets the micro-batches per update, and converts Lightning's counts of them, by which updates end."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    for name in COUNTS:
        setattr(progress, name, recounted(getattr(progress, name), before, micro_batches))
    trainer.accumulate_grad_batches = micro_batches
    for scheduler in find_all(trainer, GradientAccumulationScheduler):  # sets the trainer's accumulation in each epoch
        scheduler.scheduling, scheduler.epochs = {0: micro_batches}, [0]


class OneBatch(Plan):
    """A plan with the updates of another, but the same rows in every micro-batch of every rank."""

    def __init__(self, plan: Plan, rows: list[np.ndarray]) -> None:
        super().__init__(plan.example_ids, plan.row_starts, plan.rows_per_update)
        self._rows = rows

    def micro_batches(self, update: int, layout: Layout) -> Any:
        """The rows, once per micro-batch."""
        return iter([self._rows] * layout.micro_batches)

    @property
    def rows(self) -> int:
        """Number of rows in the epoch; the last update is as long as the others."""
        return len(self) * self.rows_per_update

    def __len__(self) -> int:
        """Number of updates."""
        return math.ceil(super().rows / self.rows_per_update)

    def row(self, index: int) -> np.ndarray:
        """The rows, repeated."""
        return self._rows[index % len(self._rows)]

    def examples_of(self, update: int, layout: Layout, micro_batches: int) -> np.ndarray:
        """Ids of the examples of an update, repeated for each rank and micro-batch, `[n]`."""
        return np.tile(np.concatenate(self._rows), micro_batches * layout.ranks)


class _FullLength(Engine):
    """Samples completions of `max_new_tokens` with another engine: those that need the most time and memory."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_exact = engine.is_exact

    def synchronise(self, policy: Any) -> None:
        """Does what the other engine does."""
        self.engine.synchronise(policy)

    def sample(self, *args: Any, **kwargs: Any) -> list[Completion]:
        """Samples as the other engine does, but nothing ends a completion."""
        # not an empty list: `generate` would then use the end tokens of the model's config
        unlimited = {"sampling": replace(kwargs["sampling"], stop=()), "ends": [NO_TOKEN]}
        return self.engine.sample(*args, **kwargs | unlimited)


class SomeLogps:
    """The reference's log-probabilities of some examples, in memory; used like `oumi_pl.data.reference.ReferenceLogps`.

    A chunk holds one example, and there is one chunk for each rank, so that every rank computes all of them.
    """

    def __init__(self, ids: list[int], ranks: int, whole: ReferenceLogps) -> None:
        self.ids = sorted(set(ids))
        self.ranks = ranks
        self.bytes = whole.bytes
        self.width = whole.width
        self.directory = "memory"
        self._logps: dict[int, np.ndarray] = {}

    def examples(self, chunk: int) -> range:
        """The example of a chunk."""
        example = self.ids[chunk // self.ranks]
        return range(example, example + 1)

    def missing(self) -> list[int]:
        """All chunks until each has been written, then none."""
        return [] if len(self._logps) == len(self.ids) else list(range(len(self.ids) * self.ranks))

    def write(self, chunk: int, logps: np.ndarray) -> None:
        """Stores the log-probabilities of a chunk's targets."""
        self._logps[self.ids[chunk // self.ranks]] = logps

    def logps(self, examples: list[int]) -> np.ndarray:
        """See `ReferenceLogps`."""
        parts = [self._logps[example] for example in examples]
        empty = np.empty((0, self.width) if self.width > 1 else 0, dtype=np.float32)
        return np.concatenate(parts) if parts else empty


# ---- the table: counted for the whole run, or measured on its first updates


SECTION, NAME = 11, 17
"""Widths of the first two columns."""
COMPUTE = {
    "32-true": "float32",
    "64-true": "float64",
    "bf16-true": "bfloat16",
    "16-true": "float16",
    "bf16-mixed": "bfloat16 where it is safe (autocast)",
    "16-mixed": "float16 where it is safe (autocast)",
}
Lines = Iterator[tuple[str, str]]


class Measured:
    """What a dry run counted for the whole run, and measured on its first updates."""

    def __init__(self) -> None:
        self.size = ""
        """Rows and tokens of a micro-batch, in words."""
        self.updates: list[tuple[float, dict[str, float]]] = []
        """Seconds and sums of each update."""
        self.validated = ""
        """Rows and tokens of the validation batch, in words; empty without one."""
        self.peak = 0
        """Peak memory in bytes on the rank that needs most."""
        self.rows_without_reference = 0
        """Rows whose reference log-probabilities, or teacher's distributions, are not in the cache yet."""
        self.bytes_without_reference = 0
        """Size of these values on disk."""
        self.step = self.total = self.micro_batches = self.rows_per_update = self.tokens = 0
        """Of the whole run: steps done and in total, micro-batches and rows per update, tokens in total."""
        self.ranks = 1
        self.alike = False
        """Whether all micro-batches have one size."""
        self.sampled = 0
        """Tokens of each sampled completion; 0 without sampling."""
        self.sampling: list[dict[str, float]] = []
        """Seconds of generating and rewarding in each update."""
        self.sampled_share = 1.0
        """Share of the updates of the whole run that train on sampled completions, if completions are sampled."""
        self.report: dict[str, Any] = {}

    def begin(self, trainer: Any, module: RunModule) -> None:
        """Counts what the whole run would do, before it is cut short."""
        data: RunData = trainer.datamodule
        self.step, self.total = trainer.global_step, module.total_steps()
        self.micro_batches, self.ranks = data.layout.micro_batches, data.layout.ranks
        self.rows_per_update = data.layout.rows_per_update
        self.tokens, self.report = data.tokens(self.total), data.report()
        if isinstance(data, DistillData):
            self.sampled_share = data.sampled_updates(self.total) / max(1, self.total)

    @property
    def has_both_kinds(self) -> bool:
        """Whether some updates of the whole run train on sampled completions, and others on answers."""
        return 0 < self.sampled_share < 1

    def weights(self, updates: list[tuple[float, dict[str, float]]]) -> list[float]:
        """How often the whole run has an update like each of these, `[updates]`, up to a factor."""
        kinds = [bool(sums.get("sampled", 1)) for _, sums in updates]
        shares = {True: self.sampled_share, False: 1 - self.sampled_share}
        return [shares[kind] / kinds.count(kind) if self.has_both_kinds else 1.0 for kind in kinds]

    def seconds_per_token(self) -> float:
        """Of an update, from those after the first, which includes one-time costs."""
        updates = self.updates[1:] or self.updates
        if not self.has_both_kinds:
            return statistics.median(seconds / max(1.0, sums["tokens"]) for seconds, sums in updates)
        weights = self.weights(updates)
        seconds, tokens = (
            sum(weight * value for weight, value in zip(weights, values, strict=True))
            for values in ([seconds for seconds, _ in updates], [sums["tokens"] for _, sums in updates])
        )
        return seconds / max(1.0, tokens)


def show(table: dict[str, Lines]) -> None:
    """Prints a table, wrapped to the width of a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    width = max(50, console.width) if console.is_terminal else 10_000
    for section, lines in table.items():
        title = section
        for name, value in lines:
            wrapped = textwrap.wrap(visible(value), width - SECTION - NAME, break_long_words=False) or [""]
            for label, line in zip([name, *[""] * len(wrapped)], wrapped, strict=False):
                console.print(Text.assemble((f"{title:{SECTION}}", "bold"), f"{label:{NAME - 1}} ", line))
                title = ""


def sections(
    trainer: Any, module: RunModule, data: RunData, callbacks: list[Any], measured: Measured
) -> dict[str, Lines]:
    """The table: section -> names and values."""
    folder = next(c for c in callbacks if isinstance(c, RunFolder))
    checkpoints = next(c for c in callbacks if isinstance(c, Checkpoints))
    optimizer = trainer.optimizers[0]
    return {
        "model": _model(trainer, module),
        "data": _data(data, module, measured),
        "optimizer": _optimizer(optimizer, module, trainer, measured.total),
        "steps": _steps(measured),
        "memory": _memory(module, optimizer, measured),
        "time": _time(measured),
        "output": _output(folder, checkpoints, module, optimizer),
    }


def _model(trainer: Any, module: RunModule) -> Lines:
    base = module.causal_lm.base
    yield "trainer", f"{type(module).__name__} of {type(base).__name__}, {module.model_name or 'from random weights'}"
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    share = "all" if trainable == total else f"{trainable / total:.2%}"
    yield "parameters", f"{trainable:,} trainable of {total:,} ({share})"
    kinds: Counter[tuple[str, str]] = Counter()
    for p in module.parameters():
        kinds["trainable" if p.requires_grad else "frozen", _dtype_name(p.dtype)] += p.numel()
    one = len(kinds) == 1
    yield "weights", ", ".join(dtype if one else f"{dtype} ({n:,} {kind})" for (kind, dtype), n in kinds.items())
    yield "compute", f"{COMPUTE.get(str(trainer.precision), str(trainer.precision))} (precision {trainer.precision})"
    if module.loss is not None:
        yield "loss", type(module.loss).__name__
    strategy = f", {type(trainer.strategy).__name__}" if trainer.world_size > 1 else ""
    device = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else module.device.type
    yield "devices", f"{trainer.world_size} x {device}{strategy}"


def _data(data: RunData, module: RunModule, measured: Measured) -> Lines:
    yield from data_lines(data, measured.report)
    yield (
        f"{data.row_name}s per update",
        f"{measured.rows_per_update}: {data.batch_size} x {measured.micro_batches} x {measured.ranks} "
        "(batch_size x accumulate_grad_batches x devices)",
    )
    for label, note in map(labelled, module.notes):
        if label in ("reference", "teacher") and measured.rows_without_reference:
            what = "log-probabilities"
            if label == "teacher":
                what = f"distributions, {measured.bytes_without_reference / 1e9:.2g} GB on disk,"
            missing = f"of {measured.rows_without_reference:,} rows will be computed once, before the first update"
            yield label, f"{what} {missing} (the dry run computed those of its own rows)"
        else:
            yield label, note


def _optimizer(optimizer: Optimizer, module: RunModule, trainer: Any, total: int) -> Lines:
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    dtypes = ", ".join(sorted({_dtype_name(tensor.dtype) for tensor in tensors})) or "none"
    yield "class", f"{type(optimizer).__name__}, state in {dtypes}"
    for group in optimizer.param_groups:
        numel = sum(p.numel() for p in group["params"])
        yield (
            group.get("name", "all"),
            f"{len(group['params'])} tensor{'s' * (len(group['params']) > 1)}, {numel:,} values, "
            f"lr {group['initial_lr']:g}, weight decay {group.get('weight_decay', 0):g}",
        )
    schedule = module.schedule
    settings = {k: v for k, v in vars(schedule).items() if not k.startswith("_") and k != "warmup"}
    others = "".join(f", {name} {value}" for name, value in settings.items())
    yield "schedule", f"{type(schedule).__name__}, {in_steps(schedule.warmup, total):,} steps of warm-up{others}"
    clip = trainer.gradient_clip_val
    yield "clipping", f"{trainer.gradient_clip_algorithm or 'norm'} {clip:g}" if clip else "none"


def _steps(measured: Measured) -> Lines:
    yield "optimizer steps", f"{measured.total:,}" + (f", of which {measured.step:,} are done" if measured.step else "")
    if measured.has_both_kinds:
        sampled = round(measured.sampled_share * measured.total)
        yield "sampled", f"{sampled:,} of them train on completions that the model samples, the others on answers"
    per_pass = measured.report.get("train", {}).get("updates_per_epoch")
    if per_pass:
        yield "epochs", f"{measured.total / per_pass:.3g}, of {per_pass:,} steps each"
    tokens, positions = (sum(sums[name] for _, sums in measured.updates) for name in ("tokens", "positions"))
    padding = 1 - tokens / max(1.0, positions)
    padded = f" (and {padding:.1%} of padding where it was measured)" if padding > 0.0005 else ""
    on_average = "on average, if no completion ends early" if measured.sampled else "on average"
    yield "tokens per step", f"{measured.tokens / measured.total:,.0f} {on_average}{padded}"
    yield "tokens in all", f"{measured.tokens:,}"


def _memory(module: RunModule, optimizer: Optimizer, measured: Measured) -> Lines:
    weights = size_of(module.parameters())
    gradients = size_of(p for p in module.parameters() if p.requires_grad)
    yield "weights", gigabytes(weights)
    yield "gradients", gigabytes(gradients)
    state = state_size(optimizer)
    yield "optimizer state", gigabytes(state)
    kind = "allocated" if module.device.type == "cuda" else "of the whole process"
    if module.device.type == "cuda":
        rest = max(0, measured.peak - weights - gradients - state)
        yield "activations", f"{gigabytes(rest)}, with whatever else there is at the peak"
    total = available(module.device)
    yield "peak", f"{gigabytes(measured.peak)} {kind}, of {gigabytes(total)} ({measured.peak / total:.0%})"
    which = "as all of them are" if measured.alike else "the largest of the first epoch"
    which += f", with completions of {measured.sampled:,} tokens, the most" if measured.sampled else ""
    validated = f"; validation on {measured.validated}" if measured.validated else ""
    yield "measured on", f"micro-batches of {measured.size}, {which}{validated}"


def _time(measured: Measured) -> Lines:
    each = measured.seconds_per_token() * measured.tokens / measured.total
    kind = "mean of both kinds, by their shares," if measured.has_both_kinds else "median"
    yield (
        "one update",
        f"about {roughly(each)}: {kind} of {len(measured.updates[1:] or measured.updates)}, with "
        f"{min(measured.micro_batches, 2)} of {measured.micro_batches} micro-batches, after a first that took "
        f"{roughly(measured.updates[0][0])}",
    )
    if measured.sampling:
        weights = measured.weights(measured.updates)
        whole = sum(weight * seconds for weight, (seconds, _) in zip(weights, measured.updates, strict=True))
        spent = {
            name: sum(weight * of.get(name, 0.0) for weight, of in zip(weights, measured.sampling, strict=True))
            for name in ("generating", "rewarding")
        }
        yield "of which", ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in spent.items())
    what = "what is left" if measured.step else "whole run"
    left = roughly((measured.total - measured.step) * each)
    yield what, f"about {left}, in proportion to the tokens; validation, saving and samples are not counted"


def _output(folder: RunFolder, checkpoints: Checkpoints, module: RunModule, optimizer: Optimizer) -> Lines:
    yield "folder", str(folder.resume or folders.free(folder.root, folder.name))
    saved = {v.data_ptr(): v for v in module.state_dict().values() if isinstance(v, torch.Tensor)}  # tied: once
    size = size_of(saved.values()) + state_size(optimizer)
    existing = next(p for p in (folder.root.absolute(), *folder.root.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if not checkpoints.enabled:
        yield "checkpoints", "none: checkpoint.enabled or trainer.enable_checkpointing is false"
        return
    yield (
        "checkpoints",
        f"every {checkpoints.every:,} steps, {checkpoints.keep} kept, about {gigabytes(size)} each; "
        f"{gigabytes(free)} are free",
    )


def roughly(seconds: float) -> str:
    """A time to about two digits, since it is an estimate."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h" if minutes < 100 * 60 else f"{minutes / 60 / 24:.1f} days"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
