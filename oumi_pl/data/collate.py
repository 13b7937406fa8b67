"""Collates examples into a batch: one row with all segments, the targets, and the positions that predict them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from oumi_pl.attention.segments import path_positions, position_ids, segment_starts
from oumi_pl.types import Batch, Example, Segment

FetchedRow = tuple[list[int], list[Example]]
"""The ids of the examples in a row of the plan, and the examples."""


def collate(rows: Sequence[FetchedRow], pad_id: int) -> Batch:
    """Joins the examples of all rows. Without rows, returns a stand-in, since every rank needs a batch.

    Args:
        rows: Rows of the plan: one example each, or several packed together.
        pad_id: Token id of the stand-in.
    """
    examples = [example for _, row in rows for example in row]
    if not examples:
        return stand_in(pad_id)
    segments: list[Segment] = []
    targets: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    start = 0
    for example in examples:
        first = len(segments)
        at, before, owner = _targets(example)
        targets.append(example.input_ids[at])
        predictors.append(start + before)
        owners.append(first + owner)
        segments += [s if s.parent < 0 else s._replace(parent=s.parent + first) for s in example.segments]
        start += len(example.input_ids)
    batch: Batch = {
        "input_ids": _tensor([example.input_ids for example in examples]).unsqueeze(0),
        "position_ids": torch.from_numpy(position_ids(segments)).unsqueeze(0),
        "segments": segments,
        "targets": _tensor(targets),
        "predictors": _tensor(predictors),
        "target_segments": _tensor(owners),
        "fields": _fields([example.fields for example in examples]),
        "sample_ids": [i for ids, _ in rows for i in ids],
    }
    if any(example.weights is not None for example in examples):
        weights = np.concatenate([_weights(example) for example in examples])
        if (weights != 1).any():
            batch["weights"] = torch.from_numpy(weights)
            batch["weight"] = float(weights.sum(dtype=np.float64))
    return batch


def full_document(tokens: int, fields: Sequence[str] = ()) -> Example:
    """An example of one document, whose tokens carry loss, with any token ids; the fields are 1."""
    return Example(np.zeros(tokens, np.int32), np.arange(tokens) > 0, fields=dict.fromkeys(fields, 1.0))


def full_tree(prompt: int, responses: Sequence[int], fields: Sequence[str] = ()) -> Example:
    """An example of a prompt with responses of these lengths, which carry loss, with any token ids."""
    first, *others = responses
    segments = [Segment(prompt + first), *(Segment(n, parent=0, shared=prompt) for n in others)]
    tokens = prompt + sum(responses)
    ids, mask = np.zeros(tokens, np.int32), np.arange(tokens) >= prompt
    return Example(ids, mask, tuple(segments), fields=dict.fromkeys(fields, 1.0))


def stand_in(pad_id: int) -> Batch:
    """A micro-batch of two tokens without targets, for ranks that ran out of rows."""
    nothing = torch.empty(0, dtype=torch.long)
    return {
        "input_ids": torch.full((1, 2), pad_id),
        "position_ids": torch.arange(2).unsqueeze(0),
        "segments": [Segment(2)],
        "targets": nothing,
        "predictors": nothing,
        "target_segments": nothing,
        "fields": {},
        "sample_ids": [],
    }


def _targets(example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of the targets, of the tokens before them in their paths, and their segments, `[targets]` each."""
    if example.path_masks is None:
        at = np.flatnonzero(example.loss_mask)
        starts = np.array(segment_starts(example.segments)[:-1])
        return at, _predictors(example, at, starts), np.searchsorted(starts, at, side="right") - 1
    # each path has targets of its own, also among the tokens that it shares
    paths = [path_positions(example.segments, i) for i in range(len(example.segments))]
    places = [np.flatnonzero(mask) for mask in example.path_masks]
    return (
        np.concatenate([path[at] for path, at in zip(paths, places, strict=True)]),
        np.concatenate([path[at - 1] for path, at in zip(paths, places, strict=True)]),
        np.repeat(np.arange(len(paths)), [len(at) for at in places]),
    )


def _predictors(example: Example, at: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Positions that predict the tokens at `at`, `[targets]`: those before them in their paths."""
    before = at - 1
    for i, segment in enumerate(example.segments):
        if segment.shared:  # its first token is predicted at the last token of the shared prefix
            before[at == starts[i]] = path_positions(example.segments, i)[segment.shared - 1]
    return before


def _weights(example: Example) -> np.ndarray:
    """The weights of an example's targets, `[targets]` float32."""
    if example.weights is None:
        return np.ones(example.target_tokens, dtype=np.float32)
    return example.weights[example.loss_mask]


def _fields(rows: Sequence[Mapping[str, float]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in rows[0]}


def _tensor(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
