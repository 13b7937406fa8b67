"""Examples become tensors. Pads or flattens, and shifts the labels: the one place where a label meets its position."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from oumi_pl.types import IGNORE_INDEX, Batch, Example, PreferenceBatch, PreferenceExample

FetchedRow = tuple[list[int], list[Example]]


def shifted_labels(example: Example) -> np.ndarray:
    """What each position has to predict: the next token where that token carries loss, else IGNORE_INDEX. `[seq]`."""
    labels = np.full(len(example.input_ids), IGNORE_INDEX, dtype=np.int64)
    labels[:-1] = np.where(example.loss_mask[1:], example.input_ids[1:], IGNORE_INDEX)
    return labels


def pad_rows(rows: list[FetchedRow], pad_id: int) -> Batch:
    """Pads one example per row on the right to the longest: `[batch, longest]`."""
    if not rows:
        return no_targets(pad_id) | {"attention_mask": torch.ones(1, 2, dtype=torch.long)}  # type: ignore[return-value]
    examples = [examples[0] for _, examples in rows]
    shape = len(examples), max(len(e.input_ids) for e in examples)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for i, example in enumerate(examples):
        n = len(example.input_ids)
        input_ids[i, :n] = example.input_ids
        labels[i, :n] = shifted_labels(example)
        attention_mask[i, :n] = 1
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.arange(shape[1]).expand(shape).contiguous(),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(attention_mask),
        "sample_ids": [i for ids, _ in rows for i in ids],
    }


def flatten_rows(rows: list[FetchedRow], pad_id: int) -> Batch:
    """Joins the documents of all packed rows into one row without padding: `[1, tokens]`."""
    if not rows:
        return no_targets(pad_id) | {"document_lengths": [2]}  # type: ignore[return-value]
    examples = [example for _, row in rows for example in row]
    return {
        "input_ids": _joined([e.input_ids.astype(np.int64) for e in examples]),
        "position_ids": _joined([np.arange(len(e.input_ids)) for e in examples]),
        "labels": _joined([shifted_labels(e) for e in examples]),
        "document_lengths": [len(e.input_ids) for e in examples],
        "sample_ids": [i for ids, _ in rows for i in ids],
    }


def flatten_pairs(rows: list[FetchedRow], pad_id: int) -> PreferenceBatch:
    """Joins the pairs of all rows into one row without padding, each as prompt, chosen and rejected: `[1, tokens]`.

    Without rows the batch holds one pair of three pad tokens, since every rank has to take part, and no targets.
    """
    pairs = [cast(PreferenceExample, example) for _, row in rows for example in row]
    if not pairs:
        pairs = [PreferenceExample(np.full(3, pad_id), np.zeros(3, dtype=bool), chosen_start=1, rejected_start=2)]
    targets, predictors, branches, start = [], [], [], 0
    for i, pair in enumerate(pairs):
        at = np.flatnonzero(pair.loss_mask)
        # the first token of either response is predicted at the prompt's end
        before = np.where(at == pair.rejected_start, pair.chosen_start, at) - 1
        targets.append(pair.input_ids[at].astype(np.int64))
        predictors.append(start + before)
        branches.append(2 * i + (at >= pair.rejected_start))
        start += len(pair.input_ids)
    return {
        "input_ids": _joined([pair.input_ids.astype(np.int64) for pair in pairs]),
        "position_ids": _joined([_branched_positions(pair) for pair in pairs]),
        "pair_lengths": [pair.lengths for pair in pairs],
        "targets": torch.from_numpy(np.concatenate(targets)),
        "predictors": torch.from_numpy(np.concatenate(predictors)),
        "branches": torch.from_numpy(np.concatenate(branches)),
        "margins": torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        "sample_ids": [i for ids, _ in rows for i in ids],
    }


def _branched_positions(pair: PreferenceExample) -> np.ndarray:
    """Both responses continue from the prompt's end. `[seq]`."""
    prompt, chosen, rejected = pair.lengths
    return np.concatenate([np.arange(prompt + chosen), np.arange(prompt, prompt + rejected)])


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts)).unsqueeze(0)


def no_targets(pad_id: int) -> dict[str, Any]:
    """A micro-batch without targets, for ranks that ran out of rows: two tokens, for every rank has to take part."""
    return {
        "input_ids": torch.full((1, 2), pad_id),
        "position_ids": torch.arange(2).unsqueeze(0),
        "labels": torch.full((1, 2), IGNORE_INDEX),
        "sample_ids": [],
    }


Collate = Callable[[list[FetchedRow], int], Batch | PreferenceBatch]
