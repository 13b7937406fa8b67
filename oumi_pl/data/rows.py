"""Rows of pretraining: what one holds, how rows become a batch, and how they are kept in a checkpoint."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from oumi_pl.data.collate import stand_in
from oumi_pl.types import IGNORE_INDEX, Batch, Segment


class Row(NamedTuple):
    """A row of tokens. Arrays are never changed once they are in a row.

    input_ids: `[seq]` int32. labels: `[seq]` int32, what each position has to predict, IGNORE_INDEX where nothing.
    lengths: `[docs]` int32, tokens of the documents that are kept apart; sums to `seq`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


def batch_of(rows: Sequence[Row], numbers: Sequence[int], pad_id: int) -> Batch:
    """Makes a micro-batch of rows. Without rows, it is a stand-in that has no targets.

    Args:
        rows: What it holds.
        numbers: Of the rows, for `sample_ids`.
        pad_id: What the stand-in holds.
    """
    if not rows:
        return stand_in(pad_id)
    labels = np.concatenate([row.labels for row in rows])
    lengths = np.concatenate([row.lengths for row in rows])
    predictors = np.flatnonzero(labels != IGNORE_INDEX)
    return {
        "input_ids": _tensor(np.concatenate([row.input_ids for row in rows])).unsqueeze(0),
        "position_ids": _tensor(np.concatenate([np.arange(n) for n in lengths])).unsqueeze(0),
        "segments": [Segment(length) for length in lengths.tolist()],
        "targets": _tensor(labels[predictors]),
        "predictors": _tensor(predictors),
        "target_segments": _tensor(np.searchsorted(np.cumsum(lengths), predictors, side="right")),
        "fields": {},
        "sample_ids": list(numbers),
    }


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
