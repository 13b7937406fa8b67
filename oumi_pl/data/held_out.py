"""Evaluates whole held-out documents: windows slide over them so that each token is a target once."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from oumi_pl.data.loader import as_it_is
from oumi_pl.data.plan import Layout, Plan
from oumi_pl.data.row_stream import batch_of
from oumi_pl.data.shards import Shards
from oumi_pl.data.windows import Row
from oumi_pl.data.workers import Loader
from oumi_pl.types import IGNORE_INDEX, Batch


def sliding_windows(lengths: np.ndarray, max_length: int, stride: int) -> np.ndarray:
    """Windows over documents so that every token but a document's first is a target in exactly one.

    Args:
        lengths: Tokens of every document, `[documents]`.
        max_length: Input tokens of a window, at most.
        stride: Targets of each window but a document's first, which has up to `max_length`. The smaller it is, the more
            context the targets have.

    Returns:
        `[windows, 4]` int64: document, first input, first target, end. The inputs are the tokens
        `first input : end - 1` of the document, the targets `first target : end`.
    """
    targets = np.maximum(0, lengths - 1)
    more = -(-np.maximum(0, targets - max_length) // stride)
    counts = np.where(targets > 0, 1 + more, 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    end = np.minimum(lengths[document], max_length + 1 + number * stride)
    first_target = np.where(number == 0, 1, max_length + 1 + (number - 1) * stride)
    return np.stack([document, np.maximum(0, end - 1 - max_length), first_target, end], axis=1)


class HeldOut(Dataset):
    """Micro-batches of windows, looked up by `(source, window numbers)`, with `text_bytes` and `source`.

    The bytes of a document are divided among its windows in proportion to targets, and add up exactly.
    """

    def __init__(self, sources: Sequence[Shards], max_length: int, stride: int, pad_id: int) -> None:
        self.sources = sources
        self.windows = [sliding_windows(source.lengths, max_length, stride) for source in sources]
        self.pad_id = pad_id

    def __getitem__(self, item: tuple[int, np.ndarray]) -> Batch:
        source, numbers = item
        rows, text_bytes = [], 0
        for document, start, first, end in self.windows[source][numbers].tolist():
            ids, _, total = self.sources[source][document]
            tokens = ids[start:end].astype(np.int32)
            labels = tokens[1:].copy()
            labels[: first - start - 1] = IGNORE_INDEX
            rows.append(Row(tokens[:-1], labels, np.array([len(labels)], dtype=np.int32)))
            targets = len(ids) - 1
            text_bytes += total * (end - 1) // targets - total * (first - 1) // targets
        batch = batch_of(rows, numbers.tolist(), self.pad_id)
        batch["source"], batch["text_bytes"] = source, text_bytes
        return batch

    def batches(self, layout: Layout) -> list[tuple[int, np.ndarray]]:
        """The micro-batches of one rank, equally many on each. Each has windows of similar length from one source."""
        batches = []
        for source, windows in enumerate(self.windows):
            longest_first = np.argsort(windows[:, 1] - windows[:, 3], kind="stable")
            plan = Plan(longest_first, np.arange(len(windows) + 1), layout.rows_per_update)
            for update in range(len(plan)):
                for rows in plan.micro_batches(update, layout):
                    batches.append((source, np.concatenate([np.empty(0, dtype=np.int64), *rows])))
        return batches


class InOrder(SequentialSampler):
    """Yields the given items. Its base class tells Lightning that `overfit_batches` has no shuffling to turn off."""

    def __iter__(self) -> Iterator[Any]:
        return iter(cast("Any", self.data_source))


def held_out_loader(held_out: HeldOut, layout: Layout, *, workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """Creates a loader that yields all windows once per pass."""
    return Loader(
        held_out,
        sampler=InOrder(held_out.batches(layout)),
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
