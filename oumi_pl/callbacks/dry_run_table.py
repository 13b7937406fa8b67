"""The table of a dry run: counted for the whole run, or measured on its first updates."""

import shutil
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.memory import available, gigabytes, size_of, state_size
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.callbacks.start import data_lines, labelled
from oumi_pl.optim.schedules import in_steps
from oumi_pl.runs import folders
from oumi_pl.types import RunData, RunModule

SECTION, NAME = 11, 17
"""Widths of columns."""
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
    """What a dry run has counted and measured so far."""

    def __init__(self) -> None:
        self.size = ""
        """Rows and tokens of the micro-batches that were trained on."""
        self.updates: list[tuple[float, dict[str, float]]] = []
        """Seconds of each update, and its sums."""
        self.validated = ""
        """Rows and tokens of the batch of validation."""
        self.peak = 0
        """Peak memory in bytes, on the rank that needs most."""
        self.rows_without_reference = 0
        """Rows whose log-probabilities under the reference are not in the cache."""
        self.step = self.total = self.micro_batches = self.rows_per_update = self.tokens = 0
        """Of the run: steps done and in total, micro-batches and rows of an update, tokens in total."""
        self.ranks = 1
        self.alike = False
        """Whether all micro-batches have one size."""
        self.report: dict[str, Any] = {}

    def begin(self, trainer: Any, module: RunModule) -> None:
        """Counts what the run would do, before it is cut short."""
        data: RunData = trainer.datamodule
        self.step, self.total = trainer.global_step, module.total_steps()
        self.micro_batches, self.ranks = data.layout.micro_batches, data.layout.ranks
        self.rows_per_update = data.layout.rows_per_update
        self.tokens, self.report = data.tokens(self.total), data.report()


def show(table: dict[str, Lines]) -> None:
    """Prints a table, wrapped to the width of a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    width = max(50, console.width) if console.is_terminal else 10_000
    for section, lines in table.items():
        title = section
        for name, value in lines:
            wrapped = textwrap.wrap(value, width - SECTION - NAME, break_long_words=False) or [""]
            for label, line in zip([name, *[""] * len(wrapped)], wrapped, strict=False):
                console.print(Text.assemble((f"{title:{SECTION}}", "bold"), f"{label:{NAME}}", line))
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
        kinds["trainable" if p.requires_grad else "frozen", _name(p.dtype)] += p.numel()
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
        if label == "reference" and measured.rows_without_reference:
            of = f"of {measured.rows_without_reference:,} rows are to be computed before the first update, once"
            yield label, f"log-probabilities {of} (here: of those tried)"
        else:
            yield label, note


def _optimizer(optimizer: Optimizer, module: RunModule, trainer: Any, total: int) -> Lines:
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.numel() > 1]
    dtypes = ", ".join(sorted({_name(tensor.dtype) for tensor in tensors})) or "none"
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
    per_pass = measured.report.get("train", {}).get("updates_per_epoch")
    if per_pass:
        yield "epochs", f"{measured.total / per_pass:.3g}, of {per_pass:,} steps each"
    tokens, positions = (sum(sums[name] for _, sums in measured.updates) for name in ("tokens", "positions"))
    padding = 1 - tokens / max(1.0, positions)
    padded = f" (and {padding:.1%} of padding where it was measured)" if padding > 0.0005 else ""
    yield "tokens per step", f"{measured.tokens / measured.total:,.0f} on average{padded}"
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
    validated = f"; validation on {measured.validated}" if measured.validated else ""
    yield "measured on", f"micro-batches of {measured.size}, {which}{validated}"


def _time(measured: Measured) -> Lines:
    updates = measured.updates[1:] or measured.updates
    per_token = statistics.median(seconds / max(1.0, sums["tokens"]) for seconds, sums in updates)
    each = per_token * measured.tokens / measured.total
    yield (
        "one update",
        f"about {roughly(each)}: median of {len(updates)}, with {min(measured.micro_batches, 2)} of "
        f"{measured.micro_batches} micro-batches, after a first that took {roughly(measured.updates[0][0])}",
    )
    what = "what is left" if measured.step else "whole run"
    left = roughly((measured.total - measured.step) * each)
    yield what, f"about {left}, in proportion to the tokens; validation, saving and samples are not counted"


def _output(folder: RunFolder, checkpoints: Checkpoints, module: RunModule, optimizer: Optimizer) -> Lines:
    yield "folder", str(folder.resume or folders.free(folder.root, folder.name))
    saved = {v.data_ptr(): v for v in module.state_dict().values() if isinstance(v, torch.Tensor)}  # tied ones once
    size = size_of(saved.values()) + state_size(optimizer)
    existing = next(p for p in (folder.root.absolute(), *folder.root.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    yield (
        "checkpoints",
        f"every {checkpoints.every:,} steps, {checkpoints.keep} kept, about {gigabytes(size)} each; "
        f"{gigabytes(free)} are free",
    )


def roughly(seconds: float) -> str:
    """A time in about two digits: it is an estimate."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h" if minutes < 100 * 60 else f"{minutes / 60 / 24:.1f} days"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
