"""What memory a step takes, noted as it goes: running out of it is then told with numbers, and with what would fit."""

import contextlib
import os
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils._pytree import tree_leaves

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.throughput import peak_memory
from oumi_pl.errors import is_out_of_memory
from oumi_pl.runs.checkpoint_files import saved_steps

USABLE = 0.95
"""Share of what is free that is planned with: an allocator can't use the last pieces of it."""
UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
LENGTHS = 64
"""What a proposed length is a multiple of."""


@dataclass(frozen=True)
class Shortage:
    """What is known of a micro-batch that did not fit. Sizes are bytes.

    total: what there is for this process. held: what it held before the micro-batch. to_come: what it will hold besides
    from the second micro-batch on: gradients, and the optimizer's state if there is none yet. taken: what the
    micro-batch takes beyond that. measured: `taken` comes from a whole micro-batch; else it is at least so much.
    batch_size, accumulate, max_length: as the recipe says.
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
        """Rows that fit, as a fraction; at most half of what did not, as long as no whole micro-batch was measured."""
        rows = self.batch_size * self.room / max(1, self.taken)
        return rows if self.measured else min(rows, self.batch_size / 2)


def smaller(shortage: Shortage) -> tuple[int, int] | None:
    """The largest `batch_size` that fits, and the `accumulate_grad_batches` that leaves the updates as they are.

    None if a single row is too much.
    """
    product = shortage.batch_size * shortage.accumulate
    fit = [n for n in range(1, shortage.batch_size) if product % n == 0 and n <= shortage.rows]
    return (fit[-1], product // fit[-1]) if fit else None


def shorter(shortage: Shortage) -> int | None:
    """The greatest `max_length` of which a single row fits, if memory grows with the tokens; None if there is none."""
    length = int(shortage.max_length * min(shortage.rows, 0.99)) // LENGTHS * LENGTHS
    return length if length > 0 else None


def tried(error: BaseException) -> int:
    """Bytes that an allocator says it could not give; 0 if it doesn't say."""
    found = re.search(r"tried to allocate ([\d.]+) ?(bytes|B|[KMG]iB)", str(error), re.IGNORECASE)
    return int(float(found.group(1)) * UNITS[found.group(2)]) if found else 0


def gigabytes(size: float) -> str:
    """A size as people read it."""
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def used(device: torch.device) -> int:
    """Bytes in use: allocated on a CUDA device, elsewhere resident on the host, or mapped, if that is what is limited.

    At most what there has been, where the system doesn't tell what there is.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, ValueError):
        mapped, resident = Path("/proc/self/statm").read_text().split()[:2]
        return int(mapped if _address_space() else resident) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory(device)


def there(device: torch.device) -> int:
    """Bytes that this process may use in all: what other processes hold of a GPU is left out."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _address_space()]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # `max`: no limit
            limits.append(int(Path(file).read_text()))
    return min(limit for limit in limits if limit)


def _address_space() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return 0 if soft == resource.RLIM_INFINITY else soft


def size_of(tensors: Any) -> int:
    """Bytes of tensors on this rank."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def state_size(optimizer: Any) -> int:
    """Bytes of an optimizer's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return size_of(value for value in values if isinstance(value, torch.Tensor))


def shape_of(batch: Any) -> tuple[str, int]:
    """The shape of a batch in words, and how many positions it has; its largest tensor counts if it has no tokens."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, torch.Tensor):
        return f"{' x '.join(map(str, ids.shape))} tokens", ids.numel()
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    largest = max(tensors, key=torch.numel, default=torch.empty(0))
    return f"{' x '.join(map(str, largest.shape))} values", largest.numel()


class Memory(L.Callback):
    """Notes what each micro-batch takes. When memory runs out, the error gets a note: where, and what would fit."""

    def __init__(self) -> None:
        self._phase = "loading"
        self._accumulate = 1
        self._shape = ""
        self._before = 0
        self._peak = 0
        self._per_position = 0.0
        self._positions = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Model and optimizer stand."""
        self._phase = "start"
        self._accumulate = trainer.accumulate_grad_batches  # what a dry run changes

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes what is held, and how large the micro-batch is."""
        self._phase = "step"
        self._note_shape(batch)
        self._before, self._peak = used(pl_module.device), peak_memory(pl_module.device)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The backward pass is done."""
        self._measure(pl_module)
        self._phase = "optimizer"

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Takes note of the micro-batch, if it was the largest so far."""
        if self._phase == "step":
            self._measure(pl_module)
        self._phase = "between"

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        """Notes how large the batch is."""
        self._phase = "validation"
        self._note_shape(batch)
        self._before, self._peak = used(pl_module.device), peak_memory(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training goes on."""
        self._phase = "between"

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Adds the note."""
        if is_out_of_memory(exception):
            with contextlib.suppress(Exception):  # a note that fails must not hide what happened
                exception.add_note(self._told(trainer, pl_module, exception))

    def _note_shape(self, batch: Any) -> None:
        self._shape, self._positions = shape_of(batch)

    def _measure(self, pl_module: Any) -> None:
        peak = peak_memory(pl_module.device)
        if peak > self._peak:  # else it was less than an earlier one
            self._per_position = max(self._per_position, (peak - self._before) / max(1, self._positions))

    def _told(self, trainer: Any, module: Any, error: BaseException) -> str:
        device = module.device
        total, now = there(device), used(device)
        head = f"out of memory on {device}"
        if self._phase == "loading":
            lines = [f"{head} while the model was made: {gigabytes(total)} are there, {gigabytes(now)} were in use"]
            return _joined([*lines, *_less_to_hold(module, trainer)])
        if self._phase in ("validation", "start"):
            rows = trainer.datamodule.eval_batch_size
            what = f"validation, in a batch of {self._shape}" if self._phase == "validation" else "preparation"
            lines = [f"{head} in {what}; {gigabytes(total)} are there"]
            halved = f"--data.eval_batch_size {max(1, rows // 2)} (now {rows}; metrics stay the same)"
            return _joined([*lines, halved if rows > 1 else "a shorter data.max_length helps", *_going_on(trainer)])
        step = trainer.global_step + 1
        if self._phase != "step":
            lines = [f"{head} at the end of step {step}: {gigabytes(total)} are there, {gigabytes(now)} were in use"]
            return _joined(
                [*lines, *_held_apart(trainer, module), *_less_to_hold(module, trainer), *_going_on(trainer)]
            )
        shortage = self._shortage(trainer, module, error, total)
        atleast = "" if shortage.measured else "at least "
        lines = [
            f"{head} in step {step}, in a micro-batch of {self._shape}",
            f"{gigabytes(total)} are there; {gigabytes(shortage.held)} were held before it, and it takes "
            f"{atleast}{gigabytes(shortage.taken)} more",
        ]
        return _joined([*lines, *advice(shortage, module, trainer)])

    def _shortage(self, trainer: Any, module: Any, error: BaseException, total: int) -> Shortage:
        peak = peak_memory(module.device)
        reached = max(used(module.device), peak if peak > self._peak else 0) + tried(error)
        taken = max(int(self._per_position * self._positions), reached - self._before)
        trained = size_of(p for p in module.parameters() if p.requires_grad)
        begun = size_of(p.grad for p in module.parameters() if p.grad is not None)
        return Shortage(
            total=total,
            held=self._before,
            to_come=trained - min(begun, trained) + _state_to_come(trainer.optimizers[0]),
            taken=taken,
            measured=self._per_position > 0,
            batch_size=trainer.datamodule.batch_size,
            accumulate=self._accumulate,
            max_length=trainer.datamodule.max_length,
        )


def _state_to_come(optimizer: Any) -> int:
    """Bytes of state that an optimizer of Adam's or SGD's kind has after its first step, and not before."""
    if optimizer.state:
        return 0
    copies = [2 if "betas" in group else int(bool(group.get("momentum"))) for group in optimizer.param_groups]
    return sum(n * size_of(group["params"]) for n, group in zip(copies, optimizer.param_groups, strict=True))


def advice(shortage: Shortage, module: Any, trainer: Any) -> list[str]:
    """What to turn, and by how much, for a micro-batch that did not fit: the least change first."""
    if smaller(shortage) is None and shorter(shortage) is None:
        return [
            "smaller micro-batches don't help: what is held all the time leaves no room for any",
            *_held_apart(trainer, module),
            *_less_to_hold(module, trainer),
        ]
    options = f"--data.max_length {shorter(shortage)}"
    if shortage.batch_size > 1:
        product = shortage.batch_size * shortage.accumulate
        options += f" --data.batch_size 1 --trainer.accumulate_grad_batches {product}"
    out = [f"a single row is too much; what may fit: {options}"]
    if found := smaller(shortage):
        options = f"--data.batch_size {found[0]} --trainer.accumulate_grad_batches {found[1]}"
        out = [f"what {'fits' if shortage.measured else 'may fit'}: {options} (the same updates)"]
    if shortage.rows >= shortage.batch_size and module.device.type == "cuda":  # it should have fitted
        out.append("or PYTORCH_ALLOC_CONF=expandable_segments:True in the environment: the free memory lies in pieces")
    elif not module.gradient_checkpointing:
        out.append("or --model.gradient_checkpointing true: activations are computed again, which takes time instead")
    elif str(trainer.precision) == "32-true":
        out.append("or --trainer.precision bf16-mixed: activations take half")
    return [*out, *_going_on(trainer, options if found else "")]


def _held_apart(trainer: Any, module: Any) -> list[str]:
    """What is held all the time, by what it is."""
    weights = size_of(module.parameters())
    gradients = size_of(p for p in module.parameters() if p.requires_grad)
    state = sum(state_size(optimizer) + _state_to_come(optimizer) for optimizer in trainer.optimizers)
    return [f"weights {gigabytes(weights)}, gradients {gigabytes(gradients)}, optimizer state {gigabytes(state)}"]


def _less_to_hold(module: Any, trainer: Any) -> list[str]:
    """What makes weights, gradients and optimizer state smaller: one line."""
    ways = []
    if getattr(getattr(module, "reference", None), "kind", "") == "online":
        ways.append("model.reference: initial (no second model in memory)")
    if module.lora is None:
        ways.append("--model.lora.r 16 (only adapters have gradients and optimizer state)")
    elif module.quantization is None and module.model_name is not None:
        ways.append("--model.quantization nf4 (frozen weights in 4 bits; needs a GPU)")
    if str(trainer.precision) == "32-true":
        ways.append("--trainer.precision bf16-true (all of it in half)")
    ways.append("shards on several GPUs, as the recipe sft/llama3.1_8b_fsdp2 has them")
    return ["what helps: " + ", or ".join(ways)]


def _going_on(trainer: Any, options: str = "") -> list[str]:
    """How to go on, if there is a checkpoint to go on from."""
    folders = [c.directory for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints) and c.directory]
    if folders and saved_steps(folders[0]):
        return [f"go on from the last checkpoint: oumi_pl fit --resume {folders[0].parent} {options}".rstrip()]
    return []


def _joined(lines: list[str]) -> str:
    return "\n  ".join(lines)
