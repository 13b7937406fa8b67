"""Extracts the documents and targets that an update trains on, from the batch layout of any engine."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from oumi_pl.attention import path_positions
from oumi_pl.types import IGNORE_INDEX

Document = tuple[np.ndarray, np.ndarray]
"""Token ids `[seq]` and the target of each position `[seq]`, or IGNORE_INDEX."""


def digest(documents: Iterable[Document]) -> str:
    """Hashes the documents of an update, independently of their order and their micro-batches.

    Tokens after the last target of a document, and documents without targets, are left out: no loss depends on them.
    """
    lines = []
    for ids, targets in documents:
        (at,) = np.nonzero(targets != IGNORE_INDEX)
        if len(at):
            lines.append(np.stack([ids[: at[-1] + 1], targets[: at[-1] + 1]]).astype("<i8").tobytes())
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(len(line).to_bytes(8, "little") + line)
    return digest.hexdigest()[:16]


def documents_of(batch: Mapping[str, Any]) -> Iterator[Document]:
    """Yields the documents of a `Batch`, or of a batch for transformers or TRL.

    In a `Batch` the path of each segment is a document, so a preference pair has two. Other batches have
    `shift_labels`, or `labels` or a `completion_mask` at the positions of the tokens themselves.
    """
    if "segments" in batch:
        yield from _paths(batch)
    elif "shift_labels" in batch:  # if present, transformers counts and averages by these
        yield from _rows(batch, _array(batch["shift_labels"]))
    else:
        labels = _array(batch["labels"]) if "labels" in batch else _completions(batch)
        shifted = np.full_like(labels, IGNORE_INDEX)
        shifted[:, :-1] = labels[:, 1:]
        yield from _rows(batch, shifted)


def _completions(batch: Mapping[str, Any]) -> np.ndarray:
    return np.where(_array(batch["completion_mask"]) == 1, _array(batch["input_ids"]), IGNORE_INDEX)


def _paths(batch: Mapping[str, Any]) -> Iterator[Document]:
    """The path of each segment. Does not use `models.layouts`, so that a bug there shows up as a difference."""
    ids, targets = _array(batch["input_ids"])[0], _array(batch["targets"])
    predictors, owners = _array(batch["predictors"]), _array(batch["target_segments"])
    for i in range(len(batch["segments"])):
        path = path_positions(batch["segments"], i)
        targets_of_path = np.full(len(path), IGNORE_INDEX)
        targets_of_path[np.searchsorted(path, predictors[owners == i])] = targets[owners == i]
        yield ids[path], targets_of_path


def _rows(batch: Mapping[str, Any], targets: np.ndarray) -> Iterator[Document]:
    """Splits rows into documents, without padding."""
    ids = _array(batch["input_ids"])
    mask = _array(batch["attention_mask"]).astype(bool) if "attention_mask" in batch else np.ones_like(ids, dtype=bool)
    for row, (row_ids, row_targets) in enumerate(zip(ids, targets, strict=True)):
        keep = mask[row]
        # in packed rows, positions restart with each document; in padded rows they may count padding
        starts = [0]
        if "position_ids" in batch and "attention_mask" not in batch:
            starts = np.flatnonzero(_array(batch["position_ids"])[row] == 0).tolist() or [0]
        for start, end in zip(starts, [*starts[1:], len(row_ids)], strict=True):
            yield row_ids[start:end][keep[start:end]], row_targets[start:end][keep[start:end]]


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
