"""What a dry run found, as a table: counted for the whole run, or measured on its first updates."""

import math
import shutil
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.memory import gigabytes, size_of, state_size, there
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.callbacks.start import summary, unit
from oumi_pl.data.plan import Layout
from oumi_pl.optim.schedules import in_steps
from oumi_pl.runs import folders

SECTION, NAME = 11, 17
"""Widths of columns."""
EXACT_EPOCHS = 10
"""Epochs whose tokens are counted one by one; what goes beyond is reckoned from these."""
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
    """What a dry run has found so far."""

    def __init__(self) -> None:
        self.shape = ""
        """Rows and tokens of the micro-batches that were trained on."""
        self.updates: list[tuple[float, dict[str, float]]] = []
        """Seconds of each update, and its sums."""
        self.validated = ""
        """The same of the batch of validation."""
        self.peak = 0
        """Bytes at the most, on the rank that needs most."""
        self.pairs_without_reference = 0
        self.alike = False
        """Whether all micro-batches have one size."""
        self.step = self.total = self.micro_batches = self.tokens = self.positions = 0
        self.layout = Layout(1)
        self.report: dict[str, Any] = {}

    def begin(self, trainer: Any, module: Any) -> None:
        """Takes note of what the run would do, before it is cut short."""
        self.step, self.total = trainer.global_step, module.total_steps()
        self.micro_batches = trainer.accumulate_grad_batches
        self.layout, self.report = trainer.datamodule.layout, trainer.datamodule.report()
        self.tokens, self.positions = tokens_of_run(trainer.datamodule, module, self.total)
        self.alike = not hasattr(trainer.datamodule, "plan")


def show(table: dict[str, Lines]) -> None:
    """Prints a table, wrapped to the terminal if it goes to one."""
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


def sections(trainer: Any, module: Any, data: Any, callbacks: list[Any], measured: Measured) -> dict[str, Lines]:
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


def _model(trainer: Any, module: Any) -> Lines:
    base = module.causal_lm.base
    yield "trainer", f"{type(module).__name__} of {type(base).__name__}, {module.model_name or 'from random weights'}"
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in module.parameters())
    share = "all" if trainable == everything else f"{trainable / everything:.2%}"
    yield "parameters", f"{trainable:,} trainable of {everything:,} ({share})"
    kinds: Counter[tuple[str, str]] = Counter()
    for p in module.parameters():
        kinds["trainable" if p.requires_grad else "frozen", _name(p.dtype)] += p.numel()
    one = len(kinds) == 1
    yield "weights", ", ".join(dtype if one else f"{dtype} ({n:,} {kind})" for (kind, dtype), n in kinds.items())
    yield "compute", f"{COMPUTE.get(str(trainer.precision), str(trainer.precision))} (precision {trainer.precision})"
    yield "loss", type(getattr(module, "loss", None)).__name__
    strategy = f", {type(trainer.strategy).__name__}" if trainer.world_size > 1 else ""
    device = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else module.device.type
    yield "devices", f"{trainer.world_size} x {device}{strategy}"


def _data(data: Any, module: Any, measured: Measured) -> Lines:
    for split, report in measured.report.items():
        yield split, summary(report)
    for name in getattr(data, "streamed", ()):
        yield "train", f"{name}, tokenized while it is streamed"
    layout = measured.layout
    yield (
        f"{unit(data)}s per update",
        f"{layout.batch_size * measured.micro_batches * layout.ranks}: {layout.batch_size} x "
        f"{measured.micro_batches} x {layout.ranks} (batch_size x accumulate_grad_batches x devices)",
    )
    if measured.pairs_without_reference:
        of = f"of {measured.pairs_without_reference:,} pairs are to be computed before the first update, once"
        yield "reference", f"log-probabilities {of} (here: of those tried)"
    elif getattr(module, "notes", ()):
        yield "reference", module.notes[0].removeprefix("reference: ")


def _optimizer(optimizer: Any, module: Any, trainer: Any, total: int) -> Lines:
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
    said = "".join(f", {name} {value}" for name, value in settings.items())
    yield "schedule", f"{type(schedule).__name__}, {in_steps(schedule.warmup, total):,} steps of warm-up{said}"
    clip = trainer.gradient_clip_val
    yield "clipping", f"{trainer.gradient_clip_algorithm or 'norm'} {clip:g}" if clip else "none"


def _steps(measured: Measured) -> Lines:
    yield "optimizer steps", f"{measured.total:,}" + (f", of which {measured.step:,} are done" if measured.step else "")
    per_pass = measured.report.get("train", {}).get("updates_per_epoch")
    if per_pass:
        yield "epochs", f"{measured.total / per_pass:.3g}, of {per_pass:,} steps each"
    padding = 1 - measured.tokens / max(1, measured.positions)
    padded = f" (and {padding:.1%} of padding)" if padding > 0.0005 else ""
    yield "tokens per step", f"{measured.tokens / measured.total:,.0f} on average{padded}"
    yield "tokens in all", f"{measured.tokens:,}"


def _memory(module: Any, optimizer: Any, measured: Measured) -> Lines:
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
    total = there(module.device)
    yield "peak", f"{gigabytes(measured.peak)} {kind}, of {gigabytes(total)} ({measured.peak / total:.0%})"
    which = "as all of them are" if measured.alike else "the largest of the first epoch"
    validated = f"; validation on {measured.validated}" if measured.validated else ""
    yield "measured on", f"micro-batches of {measured.shape}, {which}{validated}"


def _time(measured: Measured) -> Lines:
    updates = measured.updates[1:] or measured.updates
    per_position = statistics.median(seconds / max(1.0, counts["positions"]) for seconds, counts in updates)
    each = per_position * measured.positions / measured.total
    yield (
        "one update",
        f"about {roughly(each)}: median of {len(updates)}, with {min(measured.micro_batches, 2)} of "
        f"{measured.micro_batches} micro-batches, after a first that took {roughly(measured.updates[0][0])}",
    )
    what = "what is left" if measured.step else "whole run"
    left = roughly((measured.total - measured.step) * each)
    yield what, f"about {left}, reckoned by tokens from that; validation, saving and samples are not counted"


def _output(folder: RunFolder, checkpoints: Checkpoints, module: Any, optimizer: Any) -> Lines:
    place = folder.resume or folders.free(folder.root, folder.name)
    yield "folder", str(place)
    saved = {v.data_ptr(): v for v in module.state_dict().values() if isinstance(v, torch.Tensor)}  # tied ones once
    size = size_of(saved.values()) + state_size(optimizer)
    there_is = next(p for p in (folder.root.absolute(), *folder.root.absolute().parents) if p.exists())
    free = shutil.disk_usage(there_is).free
    yield (
        "checkpoints",
        f"every {checkpoints.every:,} steps, {checkpoints.keep} kept, about {gigabytes(size)} each; "
        f"{gigabytes(free)} are free",
    )


def tokens_of_run(data: Any, module: Any, steps: int) -> tuple[int, int]:
    """Tokens that so many updates train on, without padding, and positions, with it.

    Exact where the rows are known, up to `EXACT_EPOCHS`; in rows of one length that are made of documents, these are
    equal: what is missing in a last row counts.
    """
    if not hasattr(data, "plan"):
        per_pass, per_update = data.rows_per_pass, data.layout.rows_per_update
        rows = steps * per_update
        if per_pass is not None:
            passes, rest = divmod(steps, math.ceil(per_pass / per_update))
            rows = passes * per_pass + min(rest * per_update, per_pass)
        return rows * data.max_length, rows * data.max_length
    lengths = _lengths(data, module)
    tokens, epoch, left = 0, 0, steps
    while left > 0 and epoch < EXACT_EPOCHS:
        plan = data.plan(epoch)
        rows = min(left * plan.rows_per_update, plan.rows)
        tokens += int(lengths[plan.example_ids[: plan.row_starts[rows]]].sum())
        left -= math.ceil(rows / plan.rows_per_update)
        epoch += 1
    tokens = round(tokens * steps / (steps - max(0, left)))
    padding = data.report()["train"].get("padding", 0.0)
    return tokens, round(tokens / (1 - padding))


def _lengths(data: Any, module: Any) -> np.ndarray:
    """Tokens of each example as the model reads it: where a prompt isn't shared by its responses, it counts twice."""
    lengths = data.lengths("train")
    if data.gives == "pairs" and module.policy.layout.__name__ != "shared":
        lengths = lengths + np.concatenate([store.added["chosen_start"] for store in data.stores("train")])
    return lengths


def roughly(seconds: float) -> str:
    """A time to two digits or so, as people say it: it is an estimate."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h" if minutes < 100 * 60 else f"{minutes / 60 / 24:.1f} days"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
