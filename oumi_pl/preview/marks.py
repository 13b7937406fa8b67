"""Which tokens of a batch carry loss: read from the batch itself, as the loader hands it out."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from oumi_pl.attention.segments import segment_starts
from oumi_pl.types import Batch


@dataclass(frozen=True)
class Tokens:
    """Tokens in a row, one after the other.

    ids: `[n]`. targets: `[n]` bool, which of them carry loss. positions: `[n]`, where the model sees them. label: what
    the last of them predicts besides, where that is no token of the row; else None.
    """

    ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    label: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> "Tokens":
        """Those from `start` to `stop`."""
        label = self.label if stop == len(self) else None
        return Tokens(self.ids[start:stop], self.targets[start:stop], self.positions[start:stop], label)


def segments_of(batch: Batch) -> list[Tokens]:
    """The own tokens of each segment of a batch, in their order."""
    borders = np.array(segment_starts(batch["segments"]))
    owners, predictors = batch["target_segments"].numpy(), batch["predictors"].numpy()
    starts, ends = borders[owners], borders[owners + 1]
    # a target follows its predictor, unless that is in an earlier segment: then it is the first token of its own
    at = np.where(predictors >= starts, predictors + 1, starts)
    targets = np.zeros(borders[-1], dtype=bool)
    targets[at[at < ends]] = True
    labels = dict(zip(owners[at == ends].tolist(), batch["targets"].numpy()[at == ends].tolist(), strict=True))
    ids, positions = batch["input_ids"][0].numpy(), batch["position_ids"][0].numpy()
    spans = [slice(start, stop) for start, stop in pairwise(borders)]
    return [Tokens(ids[span], targets[span], positions[span], labels.get(i)) for i, span in enumerate(spans)]
