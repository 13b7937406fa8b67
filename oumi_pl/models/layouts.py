"""Three layouts of a batch for a model; all give the same hidden states.

`forest` computes shared tokens once, and needs the attention of `oumi_pl.attention`. `documents` makes every path a
document of one packed row, for models that keep documents apart but can't branch. `padded` makes every path a padded
row, which any causal model can read. Segments of equal length that share nothing become plain rows in all three.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from oumi_pl.attention.segments import path_positions
from oumi_pl.types import Batch, Inputs, Segment


class Arranged(NamedTuple):
    """The inputs of a model for a batch, and where to find its tokens in the output."""

    inputs: Inputs
    places: Tensor | None
    """`[seq]` int64, for each token of the batch's row the index of its hidden state in the model's flattened output
    `[batch x seq]`; None if that is its position in the row. A token repeated by several paths has one place."""

    def at(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Hidden states `[n, hidden]` at positions `[n]` of the batch's row, from the output `[batch, seq, hidden]`."""
        return hidden.flatten(0, 1)[positions if self.places is None else self.places[positions]]


Layout = Callable[[Batch], Arranged]


def forest(batch: Batch) -> Arranged:
    """The batch's row itself, each token once."""
    if rectangle := _rectangle(batch):
        return rectangle
    inputs: Inputs = {name: batch[name] for name in ("input_ids", "position_ids", "segments")}  # type: ignore[assignment]
    return Arranged(inputs, None)


def documents(batch: Batch) -> Arranged:
    """One row of documents, one for each path: shared tokens are repeated."""
    segments = batch["segments"]
    if not any(segment.shared for segment in segments):
        return forest(batch)
    paths = [path_positions(segments, i) for i in range(len(segments))]
    lengths = [len(path) for path in paths]
    starts = np.cumsum([0, *lengths[:-1]])
    taken, device = _tensor(np.concatenate(paths), batch), batch["input_ids"].device
    inputs: Inputs = {
        "input_ids": batch["input_ids"][:, taken],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        "segments": [Segment(n) for n in lengths],
    }
    return Arranged(inputs, _tensor(_own_places(segments, starts), batch))


def padded(batch: Batch) -> Arranged:
    """A padded row for each path: shared tokens are repeated."""
    if rectangle := _rectangle(batch):
        return rectangle
    segments = batch["segments"]
    paths = [path_positions(segments, i) for i in range(len(segments))]
    width = max(map(len, paths))
    taken = np.zeros((len(paths), width), dtype=np.int64)  # padding repeats the row's first token; the mask hides it
    mask = np.zeros_like(taken)
    for i, path in enumerate(paths):
        taken[i, : len(path)], mask[i, : len(path)] = path, 1
    device = batch["input_ids"].device
    inputs: Inputs = {
        "input_ids": batch["input_ids"][0, _tensor(taken, batch)],
        "position_ids": torch.arange(width, device=device).expand(len(paths), width).contiguous(),
        "attention_mask": _tensor(mask, batch),
    }
    return Arranged(inputs, _tensor(_own_places(segments, width * np.arange(len(segments))), batch))


def positions(batch: Batch, layout: Layout) -> int:
    """Positions that a model computes for a batch, padding and repeated tokens included."""
    segments = batch["segments"]
    tokens = sum(segment.length for segment in segments)
    if layout is forest or (layout is padded and _is_rectangular(segments)):
        return tokens
    lengths = [segment.shared + segment.length for segment in segments]
    return len(lengths) * max(lengths) if layout is padded else sum(lengths)


def _own_places(segments: Sequence[Segment], starts: np.ndarray) -> np.ndarray:
    """Index of each token of the row in the concatenated paths, if the path of segment `i` begins at `starts[i]`."""
    return np.concatenate(
        [np.arange(start + s.shared, start + s.shared + s.length) for start, s in zip(starts, segments, strict=True)]
    )


def _is_rectangular(segments: Sequence[Segment]) -> bool:
    return all(segment.shared == 0 and segment.length == segments[0].length for segment in segments)


def _rectangle(batch: Batch) -> Arranged | None:
    """Documents of equal length as rows without padding or mask; None if lengths differ or tokens are shared."""
    segments = batch["segments"]
    if not _is_rectangular(segments):
        return None
    shape = len(segments), segments[0].length
    return Arranged(
        {"input_ids": batch["input_ids"].view(shape), "position_ids": batch["position_ids"].view(shape)}, None
    )


def _tensor(values: np.ndarray, batch: Batch) -> Tensor:
    return torch.from_numpy(values).to(batch["input_ids"].device)
