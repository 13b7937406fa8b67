"""Rows of pretraining: what one holds, how rows become a batch, and how they are kept in a checkpoint."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from oumi_pl.data.collate import no_targets
from oumi_pl.types import IGNORE_INDEX, Batch


class Row(NamedTuple):
    """A row of tokens. Arrays are never changed once they are in a row.

    input_ids: `[seq]` int32. labels: `[seq]` int32, what each position has to predict, IGNORE_INDEX where nothing.
    lengths: `[docs]` int32, tokens of the documents that are kept apart; sums to `seq`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


def batch_of(rows: Sequence[Row], numbers: Sequence[int], pad_id: int, *, isolate: bool, width: int = 0) -> Batch:
    """Makes a micro-batch of rows.

    Isolated documents are laid out one after the other without padding, `[1, tokens]`, with `document_lengths`. Other
    rows are padded on the right to the longest, and to at least `width`, `[batch, seq]`; an `attention_mask` is there
    only if there is padding. Without rows, the batch is a stand-in that has no targets.

    Args:
        rows: What it holds.
        numbers: Of the rows, for `sample_ids`.
        pad_id: What padding holds.
        isolate: Whether documents are kept apart.
        width: Tokens of a padded row, at least.
    """
    if not rows:
        return no_targets(pad_id) | ({"document_lengths": [2]} if isolate else {})  # type: ignore[return-value]
    if isolate:
        lengths = np.concatenate([row.lengths for row in rows]).tolist()
        return {
            "input_ids": _tensor(np.concatenate([row.input_ids for row in rows])).unsqueeze(0),
            "position_ids": _tensor(np.concatenate([np.arange(n) for n in lengths])).unsqueeze(0),
            "labels": _tensor(np.concatenate([row.labels for row in rows])).unsqueeze(0),
            "document_lengths": lengths,
            "sample_ids": list(numbers),
        }
    shape = len(rows), max(width, *(len(row.input_ids) for row in rows))
    input_ids, labels = (np.full(shape, value, dtype=np.int64) for value in (pad_id, IGNORE_INDEX))
    for i, row in enumerate(rows):
        input_ids[i, : len(row.input_ids)] = row.input_ids
        labels[i, : len(row.labels)] = row.labels
    batch: Batch = {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.arange(shape[1]).expand(shape).contiguous(),
        "labels": torch.from_numpy(labels),
        "sample_ids": list(numbers),
    }
    if any(len(row.input_ids) < shape[1] for row in rows):
        ends = torch.tensor([[len(row.input_ids)] for row in rows])
        batch["attention_mask"] = (torch.arange(shape[1]) < ends).long()
    return batch


def arrays_to_state(arrays: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Integer arrays of any lengths as two tensors: their values one after the other, int32, and how many of each."""
    flat = np.concatenate([np.empty(0, dtype=np.int32), *arrays]).astype(np.int32)
    return {"values": torch.from_numpy(flat), "counts": torch.tensor([len(a) for a in arrays], dtype=torch.int64)}


def arrays_from_state(state: dict[str, Any]) -> list[np.ndarray]:
    """The arrays that `arrays_to_state` put away, int32."""
    borders = np.cumsum(state["counts"].numpy())[:-1] if len(state["counts"]) else None
    return [] if borders is None else np.split(state["values"].numpy(), borders)


def rows_to_state(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as tensors, for a checkpoint."""
    return {name: arrays_to_state([getattr(row, name) for row in rows]) for name in Row._fields}


def rows_from_state(state: dict[str, Any]) -> list[Row]:
    """The rows that `rows_to_state` put away."""
    columns = [arrays_from_state(state[name]) for name in Row._fields]
    return [Row(*fields) for fields in zip(*columns, strict=True)]


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))
