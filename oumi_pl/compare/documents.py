"""What an update trains on, whatever layout an engine reads it in: documents, and what each token has to predict."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from oumi_pl.types import IGNORE_INDEX

Document = tuple[np.ndarray, np.ndarray]
"""Token ids `[seq]`, and the target of each position `[seq]`, IGNORE_INDEX where there is none."""


def digest(documents: Iterable[Document]) -> str:
    """A hash of an update's documents, in whatever order and micro-batches they come.

    Tokens behind a document's last target, and documents without any, count for nothing: no loss depends on them.
    """
    lines = []
    for ids, targets in documents:
        (at,) = np.nonzero(targets != IGNORE_INDEX)
        if len(at):
            lines.append(np.stack([ids[: at[-1] + 1], targets[: at[-1] + 1]]).astype("<i8").tobytes())
    whole = hashlib.sha256()
    for line in sorted(lines):
        whole.update(len(line).to_bytes(8, "little") + line)
    return whole.hexdigest()[:16]


def documents_of(batch: Mapping[str, Any]) -> Iterator[Document]:
    """The documents of a batch of ours, or of one as transformers and TRL read it.

    Ours hold targets that are shifted already, and are told by `position_ids` with `labels` or `targets` beside
    `sample_ids`; theirs hold `labels`, or a `completion_mask`, at the tokens' own positions.
    """
    if "pair_lengths" in batch:
        yield from _pairs(batch)
    elif "sample_ids" in batch:
        yield from _split(batch, _array(batch["labels"]))
    elif "shift_labels" in batch:  # by which transformers counts and averages, where they are given
        yield from _split(batch, _array(batch["shift_labels"]))
    else:
        labels = _array(batch["labels"]) if "labels" in batch else _completions(batch)
        shifted = np.full_like(labels, IGNORE_INDEX)
        shifted[:, :-1] = labels[:, 1:]
        yield from _split(batch, shifted)


def _completions(batch: Mapping[str, Any]) -> np.ndarray:
    return np.where(_array(batch["completion_mask"]) == 1, _array(batch["input_ids"]), IGNORE_INDEX)


def _pairs(batch: Mapping[str, Any]) -> Iterator[Document]:
    """Both branches of each pair, each with its prompt."""
    ids, targets = _array(batch["input_ids"])[0], _array(batch["targets"])
    predictors, branches = _array(batch["predictors"]), _array(batch["branches"])
    start = 0
    for i, (prompt, chosen, rejected) in enumerate(batch["pair_lengths"]):
        for branch, skipped, length in ((2 * i, 0, chosen), (2 * i + 1, chosen, rejected)):
            own = np.r_[0:prompt, prompt + skipped : prompt + skipped + length] + start
            wanted = np.full(len(ids), IGNORE_INDEX)
            wanted[predictors[branches == branch]] = targets[branches == branch]
            yield ids[own], wanted[own]
        start += prompt + chosen + rejected


def _split(batch: Mapping[str, Any], targets: np.ndarray) -> Iterator[Document]:
    """Rows without their padding, cut where documents begin."""
    ids = _array(batch["input_ids"])
    mask = _array(batch["attention_mask"]).astype(bool) if "attention_mask" in batch else np.ones_like(ids, dtype=bool)
    for row, (tokens, wanted) in enumerate(zip(ids, targets, strict=True)):
        keep = mask[row]
        # a packed row says by its positions where a document begins; padded ones may count their padding
        borders = [0]
        if "position_ids" in batch and "attention_mask" not in batch:
            borders = np.flatnonzero(_array(batch["position_ids"])[row] == 0).tolist() or [0]
        for start, end in zip(borders, [*borders[1:], len(tokens)], strict=True):
            yield tokens[start:end][keep[start:end]], wanted[start:end][keep[start:end]]


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
