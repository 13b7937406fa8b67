"""`fit --dry_run`: the run's own way up to the first updates, on its largest micro-batch, and what was found.

Everything is the run's: module, data, trainer, strategy, precision, loader, optimizer. Only the course differs. One
batch of validation, then a few updates of at most two micro-batches each, in the place of all: after the first there is
an optimizer state, in the next its micro-batches meet gradients that wait, so that memory is what it will be, and
what is slow once (compilation, first allocations) is over. Then the run ends, and nothing of it is kept.
"""

import time
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.dry_run_table import Measured, sections, show
from oumi_pl.callbacks.memory import Memory, shape_of
from oumi_pl.callbacks.run_folder import RunFolder, nothing_left
from oumi_pl.callbacks.throughput import peak_memory
from oumi_pl.data.plan import Layout, Plan, plan_in_order
from oumi_pl.runs.folders import refuse_unwritable

UPDATES = 2
"""At least so many: there is an optimizer state from the second on, and no memory is new."""
MOST_UPDATES = 6
SECONDS = 2.0
"""Updates beyond the second are tried for so long, for times vary."""
MICRO_BATCHES = 2
"""At most so many per update: from the second on, memory is the same."""


def dry_run(trainer: Any, module: Any, data: Any, ckpt_path: str | None = None) -> None:
    """Tries a run out, leaves nothing behind but what the cache keeps of the rows, and prints what it found.

    Args:
        trainer: The run's. It can't be used for the run afterwards.
        module: The run's.
        data: The run's.
        ckpt_path: Checkpoint that the run goes on from.

    Raises:
        UserError: whatever would stop the run.
    """
    folder = next(c for c in trainer.callbacks if isinstance(c, RunFolder))
    refuse_unwritable(folder.resume or folder.root)
    attempt = DryRun(data, trainer.callbacks)
    trainer.callbacks = [*(c for c in trainer.callbacks if _takes_part(c)), Memory(), attempt]
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]  # nothing is kept, and callbacks of the user's log
    trainer.profiler = PassThroughProfiler()
    trainer.limit_val_batches = min(1, trainer.limit_val_batches)
    trainer.num_sanity_val_steps = 1
    if data.gives == "pairs":
        data.reference_logps = attempt.reference_logps
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)


def _takes_part(callback: L.Callback) -> bool:
    """Whether a callback is part of a step: those of the user's may be; ours, but for an average, watch or write.

    Our checkpoints are not written without a folder; a run that is resumed has their state.
    """
    ours = type(callback).__module__.startswith("oumi_pl.")
    return isinstance(callback, WeightAveraging | Checkpoints) or not (ours or isinstance(callback, Checkpoint))


class DryRun(L.Callback):
    """Sees to it that the largest micro-batch is trained on, measures, and tells.

    Args:
        data: The run's data.
        callbacks: The run's callbacks, for what they would do.
    """

    def __init__(self, data: Any, callbacks: list[Any]) -> None:
        self.data = data
        self.callbacks = callbacks
        self.measured = Measured()
        self._began = 0.0

    # ---- the largest micro-batch

    @cached_property
    def largest(self) -> list[np.ndarray] | None:
        """Rows of the largest micro-batch of the first epoch, over all ranks; None for a stream: all are alike."""
        return largest_micro_batch(self.data) if hasattr(self.data, "plan") else None

    def reference_logps(self, split: str, parts: dict[str, Any]) -> Any:
        """Where log-probabilities of the reference are: on the disk if all are there, else of the tried pairs alone."""
        whole = type(self.data).reference_logps(self.data, split, parts)
        if not self.data.trainer.strategy.broadcast(bool(whole.missing())):
            return whole
        self.measured.pairs_without_reference += len(self.data.lengths(split))
        rows = self.largest or []
        if split != "train":
            layout = Layout(self.data.eval_batch_size, 1, self.data.layout.ranks)
            plan = plan_in_order(self.data.lengths(split), layout.rows_per_update, capacity=self.data.capacity)
            rows = [plan.row(i) for i in range(min(layout.rows_per_update, plan.rows))]
        return SomeLogps([int(i) for row in rows for i in row], self.data.layout.ranks)

    # ---- the course

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Counts what the whole run would be, then cuts this one short."""
        self.measured.begin(trainer, pl_module)
        rows = self.largest
        trainer.limit_val_batches = 0
        trainer.accumulate_grad_batches = min(MICRO_BATCHES, trainer.accumulate_grad_batches)
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step + UPDATES
        trainer.fit_loop.max_epochs = -1
        if rows is not None:
            position, plan = trainer.train_dataloader.position, trainer.train_dataloader.position.plan
            position.plan = lambda epoch: OneBatch(plan(epoch), rows)
            position._planned = None
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes the shape of what is trained on."""
        self.measured.shape = shape_of(batch)[0]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """At the end of an update: how long it took, what it came to."""
        if trainer.fit_loop._should_accumulate():
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self.measured.updates.append((now - self._began, dict(pl_module.last_update)))
        self._began = now
        done = len(self.measured.updates)
        short = sum(seconds for seconds, _ in self.measured.updates) < SECONDS
        if done >= UPDATES and trainer.strategy.broadcast(short and done < MOST_UPDATES):
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step + 1

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        """Notes the shape of what is validated on."""
        self.measured.validated = shape_of(batch)[0]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Prints."""
        device = pl_module.device
        peak = torch.tensor(float(peak_memory(device)), device=device, dtype=torch.float32)
        self.measured.peak = int(trainer.strategy.reduce(peak, reduce_op="max"))
        if trainer.is_global_zero:
            show(sections(trainer, pl_module, self.data, self.callbacks, self.measured))
            print("\nnothing of this dry run was kept; the same command without --dry_run trains")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Says so if there was nothing to train, as the run would.

        Raises:
            UserError: if no update was due.
        """
        if not self.measured.updates:
            raise nothing_left(trainer.global_step)


class OneBatch(Plan):
    """A plan of as many updates as another, that has the same rows in each micro-batch."""

    def __init__(self, plan: Plan, rows: list[np.ndarray]) -> None:
        super().__init__(plan.example_ids, plan.row_starts, plan.rows_per_update)
        self._rows = rows

    def micro_batches(self, update: int, layout: Layout) -> Any:
        """The rows, as often as an update has micro-batches."""
        return iter([self._rows] * layout.micro_batches)


def largest_micro_batch(data: Any) -> list[np.ndarray]:
    """The rows of the micro-batch of the first epoch that makes the largest tensor."""
    plan, size = data.plan(0), data.batch_size
    lengths = np.add.reduceat(data.lengths("train")[plan.example_ids], plan.row_starts[:-1])
    blocks = -(-len(lengths) // size)
    padded = np.zeros(blocks * size, dtype=np.int64)
    padded[: len(lengths)] = lengths
    padded = padded.reshape(blocks, size)
    flat = data.packing or data.gives == "pairs"
    positions = padded.sum(1) if flat else padded.max(1) * (padded > 0).sum(1)
    first = int(positions.argmax()) * size
    return [plan.row(i) for i in range(first, min(first + size, plan.rows))]


class SomeLogps:
    """The reference's log-probabilities of some examples, in memory: as `oumi_pl.data.reference.ReferenceLogps`.

    Chunks hold an example each, and there is one for every rank, so that each computes them all for itself.
    """

    def __init__(self, ids: list[int], ranks: int) -> None:
        self.ids = sorted(set(ids))
        self.ranks = ranks
        self.directory = "memory"
        self._found: dict[int, np.ndarray] = {}

    def examples(self, chunk: int) -> range:
        """The example of a chunk."""
        example = self.ids[chunk // self.ranks]
        return range(example, example + 1)

    def missing(self) -> list[int]:
        """All chunks, or none."""
        return [] if len(self._found) == len(self.ids) else list(range(len(self.ids) * self.ranks))

    def write(self, chunk: int, logps: np.ndarray) -> None:
        """Keeps the log-probabilities of a chunk's targets."""
        self._found[self.ids[chunk // self.ranks]] = logps

    def logps(self, examples: list[int]) -> np.ndarray:
        """Log-probabilities of the targets of some examples, in their order, `[targets]` float32."""
        parts = [self._found[example] for example in examples]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
