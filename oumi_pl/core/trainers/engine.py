"""Lightning's Trainer as the parameters describe it, and the loader of the evaluation data."""

import datetime
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from torch.utils.data import DataLoader, IterableDataset

from oumi_pl.core.trainers.collate import Collator
from oumi_pl.core.trainers.loggers import loggers
from oumi_pl.core.trainers.windows import is_iterable
from oumi_pl.core.trainers.workers import workers

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams

NEVER = sys.maxsize


def lightning_trainer(params: "TrainingParams", total: int, callbacks: Sequence[L.Callback], ranks: int) -> L.Trainer:
    """Lightning's Trainer for so many updates, on the processes that were started.

    It validates never: the flow decides when. Its own checkpoints are written only if a callback does so.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    precision: Any = {"BF16": "bf16-mixed", "FP16": "16-mixed"}.get(params.mixed_precision_dtype.name)
    return L.Trainer(
        accelerator="auto",
        devices=local,
        num_nodes=max(1, ranks // local),
        strategy=_ddp(params) if ranks > 1 else "auto",
        precision=precision,
        max_steps=total,
        max_epochs=-1,
        check_val_every_n_epoch=NEVER,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        logger=loggers(params) or False,
        callbacks=list(callbacks),
        default_root_dir=params.output_dir,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=sys.stderr.isatty() or any(isinstance(c, ProgressBar) for c in callbacks),
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        deterministic=params.full_determinism or None,
    )


def _ddp(params: "TrainingParams") -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    minutes = params.nccl_default_timeout_minutes
    more: dict[str, Any] = {} if minutes is None else {"timeout": datetime.timedelta(minutes=minutes)}
    # buffers are the same everywhere; sending them would need as many forward passes on each rank
    return DDPStrategy(find_unused_parameters=bool(params.ddp_find_unused_parameters), broadcast_buffers=False, **more)


def eval_loader(rows: Any, collate: Collator, params: "TrainingParams", *, ranks: int, rank: int) -> DataLoader | None:
    """The rows of one process, each n-th; None if there are none to evaluate on."""
    if rows is None:
        return None
    number, sampler = workers(params.dataloader_num_workers), None
    if is_iterable(rows):
        rows, number = _Every(rows, ranks, rank), min(number, 1)
    else:
        sampler = range(rank, len(rows), ranks)
    # its own generator: evaluating must not change what training draws
    return DataLoader(
        rows,
        batch_size=params.per_device_eval_batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=number,
        generator=torch.Generator().manual_seed(0),
    )


class _Every(IterableDataset):
    """Each n-th row of an iterable dataset: one process's share."""

    def __init__(self, rows: Any, ranks: int, rank: int) -> None:
        self.rows = rows
        self.ranks = ranks
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        return (row for i, row in enumerate(self.rows) if i % self.ranks == self.rank)
