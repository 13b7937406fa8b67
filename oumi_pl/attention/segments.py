"""Where the tokens of each segment's path lie in a packed row. `oumi_pl.types.Segment` defines what a path is."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from oumi_pl.types import Segment


def segment_starts(segments: Sequence[Segment]) -> list[int]:
    """Position in the row of each segment's first own token, and the row's length, `[segments + 1]`."""
    return list(accumulate((segment.length for segment in segments), initial=0))


def position_ids(segments: Sequence[Segment]) -> np.ndarray:
    """Position of each token of the row in the path of its own segment, `[seq]` int64."""
    ranges = [np.arange(s.shared, s.shared + s.length, dtype=np.int64) for s in segments]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


def earlier_pieces(segments: Sequence[Segment], index: int) -> tuple[tuple[int, int], ...]:
    """The part of a segment's path that lies in earlier segments: its first `shared` tokens, from the root on.

    Returns:
        Pairs (index of a segment, number of its own tokens); a piece is always made of a segment's first own tokens.
    """
    pieces = []
    _, ancestor, wanted = segments[index]
    while wanted:
        _, parent, shared = segments[ancestor]
        # the ancestor's own tokens begin after `shared` tokens; what is wanted may end before that
        if wanted > shared:
            pieces.append((ancestor, wanted - shared))
            wanted = shared
        ancestor = parent
    return tuple(reversed(pieces))


def path_positions(segments: Sequence[Segment], index: int) -> np.ndarray:
    """Positions in the row of all tokens of a segment's path, in the path's order, `[shared + length]` int64."""
    starts = segment_starts(segments[: index + 1])
    pieces = [*earlier_pieces(segments, index), (index, segments[index].length)]
    return np.concatenate([np.arange(starts[i], starts[i] + length, dtype=np.int64) for i, length in pieces])


def check_segments(segments: Sequence[Segment]) -> None:
    """Checks that each segment has tokens, and continues an earlier one by no more tokens than its path has.

    Raises:
        ValueError: names the first segment that does not.
    """
    for index, (length, parent, shared) in enumerate(segments):
        available = segments[parent].shared + segments[parent].length if 0 <= parent < index else 0
        if length < 1 or not -1 <= parent < index or not 0 <= shared <= available:
            raise ValueError(
                f"segment {index} of {length} token(s) shares {shared} with segment {parent}: it needs a token of its "
                f"own, a parent before it in the row (-1 for none), and can share {available} tokens at most"
            )
