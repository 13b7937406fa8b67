"""`fit --dry_run`: the run itself up to its first updates, on its largest micro-batch, and a table of what it takes.

Module, data, trainer, strategy, precision, loader and optimizer are those of the run; only its course is shorter: one
batch of validation, then a few updates of at most two micro-batches each. From the second update on there is an
optimizer state, and its second micro-batch comes while gradients are held, so that memory is what it will be; and costs
that come once (compilation, first allocations) are over. Then the run ends, and nothing of it is kept.
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

from oumi_pl.callbacks import find
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.dry_run_table import Measured, sections, show
from oumi_pl.callbacks.memory import Memory, size_in_words
from oumi_pl.callbacks.run_folder import RunFolder, nothing_left
from oumi_pl.callbacks.throughput import peak_memory
from oumi_pl.data.examples import ExampleData
from oumi_pl.data.plan import Layout, Plan
from oumi_pl.modules.restorable import COUNTS, recounted
from oumi_pl.runs.folders import refuse_unwritable
from oumi_pl.types import RunData, RunModule

UPDATES = 2
"""At least so many: from the second on there is an optimizer state, and memory no longer grows."""
MOST_UPDATES = 6
SECONDS = 2.0
"""Further updates, up to `MOST_UPDATES`, are tried until so much time is spent: times vary."""
MICRO_BATCHES = 2
"""At most so many per update: from the second on, memory no longer grows."""


def dry_run(trainer: Any, module: Any, data: Any, ckpt_path: str | None = None) -> None:
    """Tries a run out and prints a table. Keeps nothing but tokenized rows in the cache.

    Args:
        trainer: The run's. It can't be used for the run afterwards.
        module: The run's.
        data: The run's.
        ckpt_path: Checkpoint that the run is to be resumed from.

    Raises:
        UserError: whatever would stop the run.
    """
    folder = find(trainer, RunFolder)
    assert folder is not None
    refuse_unwritable(folder.resume or folder.root)
    attempt = DryRun(data, trainer.callbacks)
    trainer.callbacks = [*(c for c in trainer.callbacks if _takes_part(c)), Memory(), attempt]
    trainer.loggers = [DummyLogger() for _ in trainer.loggers]  # keep nothing; callbacks of the user's may log to them
    trainer.profiler = PassThroughProfiler()
    trainer.limit_val_batches = min(1, trainer.limit_val_batches)
    trainer.num_sanity_val_steps = 1
    if isinstance(data, ExampleData):  # what a reference is computed for
        data.reference_logps = attempt.reference_logps  # type: ignore[method-assign]
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)


def _takes_part(callback: L.Callback) -> bool:
    """Whether a callback is part of a step. Those of the user's may be; of ours only a weight average is.

    Our checkpoints stay as well: a resumed run has their state. Without a folder they write nothing.
    """
    ours = type(callback).__module__.startswith("oumi_pl.")
    return isinstance(callback, WeightAveraging | Checkpoints) or not (ours or isinstance(callback, Checkpoint))


class DryRun(L.Callback):
    """Makes the run train on its largest micro-batch, measures, and prints the table.

    Args:
        data: The run's data.
        callbacks: The run's callbacks, for what they would do.
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

    def reference_logps(self, split: str, parts: dict[str, Any]) -> Any:
        """In place of the data's own: what the cache holds if it is complete, else that of the tried examples alone."""
        data = self.data
        assert isinstance(data, ExampleData)
        cached = type(data).reference_logps(data, split, parts)
        if not data.trainer.strategy.broadcast(bool(cached.missing())):
            return cached
        self.measured.rows_without_reference += len(data.lengths(split))
        if split == "train":
            ids = np.concatenate(self.largest or [])
        else:
            plan, layout = data.eval_plan(split)
            ids = plan.examples_of(0, layout, micro_batches=1)
        return SomeLogps(ids.tolist(), data.layout.ranks)

    # ---- the course

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Counts what the whole run would be, then cuts this one short."""
        self.measured.begin(trainer, pl_module)
        trainer.limit_val_batches = 0
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step + UPDATES
        trainer.fit_loop.max_epochs = -1
        _lower_accumulation(trainer, min(MICRO_BATCHES, trainer.accumulate_grad_batches))
        loader = trainer.train_dataloader
        loader.layout = self.data.layout  # which follows the trainer's accumulation
        self.measured.alike = self.largest is None
        if (rows := self.largest) is not None:
            plan = loader.position.plan
            loader.position.plan = lambda epoch: OneBatch(plan(epoch), rows)
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: RunModule, batch: Any, batch_idx: int) -> None:
        """Notes the size of what is trained on."""
        self.measured.size = size_in_words(pl_module.count(batch))

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """At the end of an update, notes how long it took and its sums."""
        if trainer.fit_loop._should_accumulate():
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self.measured.updates.append((now - self._began, dict(pl_module.last_update)))
        self._began = now
        done = len(self.measured.updates)
        has_time = sum(seconds for seconds, _ in self.measured.updates) < SECONDS
        if done >= UPDATES and trainer.strategy.broadcast(has_time and done < MOST_UPDATES):
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step + 1

    def on_validation_batch_start(self, trainer: Any, pl_module: RunModule, batch: Any, *_: Any) -> None:
        """Notes the size of what is validated on."""
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
        """Refuses a run without an update, as the run would.

        Raises:
            UserError: there was no update.
        """
        if not self.measured.updates:
            raise nothing_left(trainer.global_step)


def _lower_accumulation(trainer: Any, micro_batches: int) -> None:
    """Sets the micro-batches of an update, and Lightning's count of those that are done, which ends the updates."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    for name in COUNTS:
        setattr(progress, name, recounted(getattr(progress, name), trainer.accumulate_grad_batches, micro_batches))
    trainer.accumulate_grad_batches = micro_batches


class OneBatch(Plan):
    """A plan of as many updates as another, with the same rows in each micro-batch of each rank."""

    def __init__(self, plan: Plan, rows: list[np.ndarray]) -> None:
        super().__init__(plan.example_ids, plan.row_starts, plan.rows_per_update)
        self._rows = rows

    def micro_batches(self, update: int, layout: Layout) -> Any:
        """The rows, once per micro-batch."""
        return iter([self._rows] * layout.micro_batches)

    def examples_of(self, update: int, layout: Layout, micro_batches: int) -> np.ndarray:
        """Ids of the examples of an update, those of each rank and micro-batch anew. `[n]`."""
        return np.tile(np.concatenate(self._rows), micro_batches * layout.ranks)


class SomeLogps:
    """The reference's log-probabilities of some examples, in memory; used like `oumi_pl.data.reference.ReferenceLogps`.

    A chunk holds one example, and there is one chunk for each rank, so that every rank computes all of them.
    """

    def __init__(self, ids: list[int], ranks: int) -> None:
        self.ids = sorted(set(ids))
        self.ranks = ranks
        self.directory = "memory"
        self._logps: dict[int, np.ndarray] = {}

    def examples(self, chunk: int) -> range:
        """The example of a chunk."""
        example = self.ids[chunk // self.ranks]
        return range(example, example + 1)

    def missing(self) -> list[int]:
        """All chunks, or none."""
        return [] if len(self._logps) == len(self.ids) else list(range(len(self.ids) * self.ranks))

    def write(self, chunk: int, logps: np.ndarray) -> None:
        """Keeps the log-probabilities of a chunk's targets."""
        self._logps[self.ids[chunk // self.ranks]] = logps

    def logps(self, examples: list[int]) -> np.ndarray:
        """Log-probabilities of the targets of some examples, in their order, `[targets]` float32."""
        parts = [self._logps[example] for example in examples]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
