"""Measures the memory of each step, so that an out-of-memory error can say how much was needed and what would fit."""

import contextlib
import os
import re
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from oumi_pl.callbacks import find
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.throughput import peak_memory
from oumi_pl.errors import is_out_of_memory
from oumi_pl.runs.folders import saved_steps
from oumi_pl.types import RunData, RunModule

USABLE = 0.95
"""Share of the free memory that advice counts on: an allocator can't use the last fragments of it."""
UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
LENGTH_STEP = 64
"""Suggested lengths are multiples of this."""


@dataclass(frozen=True)
class Shortage:
    """What is known of a micro-batch that did not fit. Sizes are bytes.

    total: memory for this process. held: in use before the micro-batch. to_come: what will be in use besides
    from the second micro-batch on: gradients, and the optimizer state if there is none yet. taken: what the micro-batch
    needs on top of these.
    measured: whether `taken` comes from a complete micro-batch; else it is a lower bound. batch_size, accumulate,
    max_length: the settings of the recipe.
    """

    total: int
    held: int
    to_come: int
    taken: int
    measured: bool
    batch_size: int
    accumulate: int
    max_length: int

    @property
    def room(self) -> float:
        """Bytes that a micro-batch may take."""
        return USABLE * (self.total - self.held - self.to_come)

    @property
    def rows(self) -> float:
        """Rows that fit, as a fraction. Without a measured micro-batch, at most half of the rows that did not fit."""
        rows = self.batch_size * self.room / max(1, self.taken)
        return rows if self.measured else min(rows, self.batch_size / 2)


def smaller(shortage: Shortage) -> tuple[int, int] | None:
    """The largest `batch_size` that fits, with the `accumulate_grad_batches` that keeps the size of an update.

    None if a single row does not fit.
    """
    product = shortage.batch_size * shortage.accumulate
    fit = [n for n in range(1, shortage.batch_size) if product % n == 0 and n <= shortage.rows]
    return (fit[-1], product // fit[-1]) if fit else None


def shorter(shortage: Shortage) -> int | None:
    """The largest `max_length` with which one row fits if memory is proportional to tokens; None if none does."""
    length = int(shortage.max_length * min(shortage.rows, 0.99)) // LENGTH_STEP * LENGTH_STEP
    return length if length > 0 else None


def tried(error: BaseException) -> int:
    """Bytes that an allocator reports it could not provide; 0 if the message has no size."""
    size = re.search(r"tried to allocate ([\d.]+) ?(bytes|B|[KMG]iB)", str(error), re.IGNORECASE)
    return int(float(size.group(1)) * UNITS[size.group(2)]) if size else 0


def gigabytes(size: float) -> str:
    """A size with its unit: `5 kB`, `12.3 GB`."""
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def used(device: torch.device) -> int:
    """Bytes in use: allocated on a CUDA device; else resident on the host, or mapped if the address space is limited.

    Falls back to the peak so far on systems without `/proc`.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, ValueError):
        mapped, resident = Path("/proc/self/statm").read_text().split()[:2]
        return int(mapped if _address_space() else resident) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory(device)


def available(device: torch.device) -> int:
    """Bytes that this process may use in total. On a GPU, memory held by other processes is subtracted."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _address_space()]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or `max`, which is no limit
            limits.append(int(Path(file).read_text()))
    return min(limit for limit in limits if limit)


def _address_space() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return 0 if soft == resource.RLIM_INFINITY else soft


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors on this rank."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def state_size(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return size_of(value for value in values if isinstance(value, Tensor))


def size_in_words(counts: dict[str, int]) -> str:
    """The size of a batch, from the counts of `RunModule.count`."""
    rows, tokens, positions = counts["rows"], counts["tokens"], counts["positions"]
    padded = f", {positions:,} with padding" if positions > tokens else ""
    return f"{rows:,} row{'s' if rows != 1 else ''}, {tokens:,} tokens{padded}"


class Memory(L.Callback):
    """Measures the memory of micro-batches. To an out-of-memory error it adds where it happened and what fits."""

    def __init__(self) -> None:
        self._phase = "loading"
        self._accumulate = 1
        self._size = ""
        self._before = 0
        self._peak = 0
        self._per_position = 0.0
        self._positions = 0

    def on_fit_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Ends the phase of loading the model."""
        self._phase = "start"
        self._accumulate = trainer.accumulate_grad_batches  # read now, because a dry run changes it later

    def on_train_batch_start(self, trainer: Any, pl_module: RunModule, batch: Any, batch_idx: int) -> None:
        """Records the memory in use, and the size of the micro-batch."""
        self._phase = "step"
        self._begin(pl_module, batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: RunModule, optimizer: Any) -> None:
        """Measures after the backward pass."""
        self._measure(pl_module)
        self._phase = "optimizer"

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Measures the micro-batch."""
        if self._phase == "step":
            self._measure(pl_module)
        self._phase = "between"

    def on_validation_batch_start(self, trainer: Any, pl_module: RunModule, batch: Any, *_: Any) -> None:
        """Records the memory in use, and the size of the batch."""
        self._phase = "validation"
        self._begin(pl_module, batch)

    def on_validation_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Ends the phase of validation."""
        self._phase = "between"

    def on_exception(self, trainer: Any, pl_module: RunModule, exception: BaseException) -> None:
        """Adds the note to an out-of-memory error."""
        if is_out_of_memory(exception):
            with contextlib.suppress(Exception):  # an error in here must not hide the one being reported
                exception.add_note("\n  ".join(self._note(trainer, pl_module, exception)))

    def _begin(self, pl_module: RunModule, batch: Any) -> None:
        counts = pl_module.count(batch)
        self._size, self._positions = size_in_words(counts), counts["positions"]
        self._before, self._peak = used(pl_module.device), peak_memory(pl_module.device)

    def _measure(self, pl_module: RunModule) -> None:
        peak = peak_memory(pl_module.device)
        # without a new peak an earlier micro-batch took more; without positions this is a rank that ran out of rows
        if peak > self._peak and self._positions:
            self._per_position = max(self._per_position, (peak - self._before) / self._positions)

    def _note(self, trainer: Any, module: RunModule, error: BaseException) -> list[str]:
        device, data = module.device, trainer.datamodule
        total, now = available(device), used(device)
        head = f"out of memory on {device}"
        if self._phase == "loading":
            lines = [f"{head} while the model was loaded: {gigabytes(total)} in total, {gigabytes(now)} were in use"]
            return [*lines, *_less_to_hold(module, trainer)]
        if self._phase in ("validation", "start"):
            rows = data.eval_batch_size
            what = f"validation, in a batch of {self._size}" if self._phase == "validation" else "preparation"
            lines = [f"{head} in {what}; {gigabytes(total)} in total"]
            halved = f"--data.eval_batch_size {max(1, rows // 2)} (now {rows}; metrics stay the same)"
            return [*lines, halved if rows > 1 else "a shorter data.max_length helps", *_resuming(trainer)]
        step = trainer.global_step + 1
        if self._phase != "step":
            lines = [f"{head} at the end of step {step}: {gigabytes(total)} in total, {gigabytes(now)} were in use"]
            return [*lines, *_always_held(trainer, module), *_less_to_hold(module, trainer), *_resuming(trainer)]
        shortage = self._shortage(trainer, module, error, total)
        at_least = "" if shortage.measured else "at least "
        lines = [
            f"{head} in step {step}, in a micro-batch of {self._size}",
            f"{gigabytes(total)} in total; {gigabytes(shortage.held)} were in use before it, and it takes "
            f"{at_least}{gigabytes(shortage.taken)} more",
        ]
        return [*lines, *advice(shortage, module, trainer)]

    def _shortage(self, trainer: Any, module: RunModule, error: BaseException, total: int) -> Shortage:
        data: RunData = trainer.datamodule
        peak = peak_memory(module.device)
        reached = max(used(module.device), peak if peak > self._peak else 0) + tried(error)
        taken = max(int(self._per_position * self._positions), reached - self._before)
        trained = size_of(p for p in module.parameters() if p.requires_grad)
        present = size_of(p.grad for p in module.parameters() if p.grad is not None)
        return Shortage(
            total=total,
            held=self._before,
            to_come=trained - min(present, trained) + _state_to_come(trainer.optimizers[0]),
            taken=taken,
            measured=self._per_position > 0,
            batch_size=data.batch_size,
            accumulate=self._accumulate,
            max_length=data.max_length,
        )


def _state_to_come(optimizer: Optimizer) -> int:
    """Bytes of state that an optimizer like Adam or SGD will allocate in its first step; 0 after it."""
    if optimizer.state:
        return 0
    copies = [2 if "betas" in group else int(bool(group.get("momentum"))) for group in optimizer.param_groups]
    return sum(n * size_of(group["params"]) for n, group in zip(copies, optimizer.param_groups, strict=True))


def advice(shortage: Shortage, module: RunModule, trainer: Any) -> list[str]:
    """Which settings to change, and to what, for a micro-batch that did not fit; the least intrusive first."""
    if smaller(shortage) is None and shorter(shortage) is None:
        return [
            "smaller micro-batches don't help: what is always in memory leaves no room for one",
            *_always_held(trainer, module),
            *_less_to_hold(module, trainer),
        ]
    options = f"--data.max_length {shorter(shortage)}"
    if shortage.batch_size > 1:
        product = shortage.batch_size * shortage.accumulate
        options += f" --data.batch_size 1 --trainer.accumulate_grad_batches {product}"
    lines = [f"a single row is too much; what may fit: {options}"]
    if fitting := smaller(shortage):
        options = f"--data.batch_size {fitting[0]} --trainer.accumulate_grad_batches {fitting[1]}"
        lines = [f"what {'fits' if shortage.measured else 'may fit'}: {options} (the same updates)"]
    if shortage.rows >= shortage.batch_size and module.device.type == "cuda":  # enough, but in fragments
        lines.append("or PYTORCH_ALLOC_CONF=expandable_segments:True in the environment: free memory is fragmented")
    elif not module.gradient_checkpointing:
        lines.append("or --model.gradient_checkpointing true: recomputes activations, which takes time instead")
    elif str(trainer.precision) == "32-true":
        lines.append("or --trainer.precision bf16-mixed: activations take half")
    return [*lines, *_resuming(trainer, options if fitting else "")]


def _always_held(trainer: Any, module: RunModule) -> list[str]:
    """The memory that is always in use, by kind, as one line."""
    weights = size_of(module.parameters())
    gradients = size_of(p for p in module.parameters() if p.requires_grad)
    state = sum(state_size(optimizer) + _state_to_come(optimizer) for optimizer in trainer.optimizers)
    return [f"weights {gigabytes(weights)}, gradients {gigabytes(gradients)}, optimizer state {gigabytes(state)}"]


def _less_to_hold(module: RunModule, trainer: Any) -> list[str]:
    """Settings that make weights, gradients and optimizer state smaller, as one line."""
    ways = []
    if module.reference is not None and module.reference.kind == "online":
        ways.append("model.reference: initial (no second model in memory)")
    if module.lora is None:
        ways.append("--model.lora.r 16 (only adapters have gradients and optimizer state)")
    elif module.quantization is None and module.model_name is not None:
        ways.append("--model.quantization nf4 (frozen weights in 4 bits)")
    if str(trainer.precision) == "32-true":
        ways.append("--trainer.precision bf16-true (all of it in half)")
    ways.append("sharding over several GPUs, as in the recipe sft/llama3.1_8b_fsdp2")
    return ["what helps: " + ", or ".join(ways)]


def _resuming(trainer: Any, options: str = "") -> list[str]:
    """How to resume, if there is a checkpoint to resume from."""
    checkpoints = find(trainer, Checkpoints)
    directory = None if checkpoints is None else checkpoints.directory
    if directory is not None and saved_steps(directory):
        return [f"resume from the last checkpoint: oumi_pl fit --resume {directory.parent} {options}".rstrip()]
    return []
