"""Packed rows of segments: positions of the tokens of a path, and which tokens each segment attends to."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from oumi_pl.types import Segment


def segment_starts(segments: Sequence[Segment]) -> list[int]:
    """Position in the row of each segment's first own token, and the row's length, `[segments + 1]`."""
    return list(accumulate((segment.length for segment in segments), initial=0))


def position_ids(segments: Sequence[Segment]) -> np.ndarray:
    """Position of each token of the row in the path of its own segment, `[seq]` int64."""
    ranges = [np.arange(s.shared, s.shared + s.length, dtype=np.int64) for s in segments]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


def earlier_pieces(segments: Sequence[Segment], index: int) -> tuple[tuple[int, int], ...]:
    """The part of a segment's path that is in earlier segments: its first `shared` tokens, root first.

    Returns:
        Pairs (index of a segment, number of tokens): a piece is that many of the segment's own tokens, from its start.
    """
    pieces = []
    _, ancestor, wanted = segments[index]
    while wanted:
        _, parent, shared = segments[ancestor]
        # the ancestor's own tokens begin at `shared` in the path; the wanted prefix may end before them
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
    """Checks that each segment has tokens, and shares no more tokens with an earlier one than that one's path has.

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


@dataclass(frozen=True)
class Block:
    """A segment for the attention: its own tokens are the queries, all tokens of its path are the keys.

    start, length: of its own tokens in the row. earlier: the pieces of its path in earlier segments, as
    `earlier_pieces` returns them; empty for a root.
    """

    start: int
    length: int
    earlier: tuple[tuple[int, int], ...] = ()

    @cached_property
    def prefix(self) -> int:
        """Number of tokens of its path in earlier segments."""
        return sum(length for _, length in self.earlier)

    @property
    def keys(self) -> int:
        """Number of tokens that its last token sees."""
        return self.prefix + self.length


def blocks_of(segments: Sequence[Segment]) -> tuple[Block, ...]:
    """One block per segment, `[segments]`."""
    starts = segment_starts(segments)
    return tuple(Block(starts[i], s.length, earlier_pieces(segments, i)) for i, s in enumerate(segments))


current_blocks: ContextVar[tuple[Block, ...] | None] = ContextVar("blocks", default=None)
"""The blocks of the packed row that is being computed; None outside of `packed`."""


@contextmanager
def packed(segments: Sequence[Segment] | None) -> Iterator[None]:
    """Declares that forward passes within it compute one packed row; does nothing for None (padded batches).

    The model is called with `input_ids` `[1, seq]`, `position_ids` that count from 0 along each path (see
    `oumi_pl.attention.position_ids`), `use_cache=False` and no attention mask. The backward pass may run outside.

    Args:
        segments: `[segments]` of the row, in order; their lengths sum to `seq`.

    Raises:
        ValueError: a segment is empty, or continues one that is not earlier, or more tokens than its path has.
    """
    if segments is not None:
        check_segments(segments)
    token = current_blocks.set(None if segments is None else blocks_of(segments))
    try:
        yield
    finally:
        current_blocks.reset(token)


class Blocks:
    """Takes the place of the mask in transformers' models: says which tokens see each other.

    Not a dataclass on purpose: FSDP2 copies those for each layer, which would compute the cached properties again.

    Args:
        blocks: Of the whole row, in order.
        causal: Whether a token sees all earlier ones of its path.
        window: Width of the window or chunk of this type of layer; None if it has none.
        mask_of: The mask of a block.
        device: Of the model.
    """

    def __init__(
        self,
        blocks: tuple[Block, ...],
        causal: bool,
        window: int | None,
        mask_of: Callable[[Block], Tensor | None],
        device: torch.device | str,
    ) -> None:
        self.blocks = blocks
        self.causal = causal
        self.window = window
        self.mask_of = mask_of
        self.device = device

    @cached_property
    def lengths(self) -> list[int]:
        """Own tokens of each block, `[segments]`."""
        return [block.length for block in self.blocks]

    @cached_property
    def continued(self) -> bool:
        """Whether any block continues another."""
        return any(block.earlier for block in self.blocks)

    @cached_property
    def masks(self) -> tuple[Tensor | None, ...]:
        """Per block: None if attention is plainly causal, else `[1, 1, length, keys]` bool, True where seen."""
        return tuple(map(self.mask_of, self.blocks))

    @cached_property
    def cumulative(self) -> tuple[Tensor, Tensor]:
        """Start of each block's queries and keys when all are concatenated, `[segments + 1]` int32 each."""
        counts = torch.tensor([[0, 0], *([block.length, block.keys] for block in self.blocks)])
        both = counts.cumsum(0).T.contiguous().to(self.device, torch.int32, non_blocking=True)
        return both[0], both[1]

    @cached_property
    def key_positions(self) -> Tensor | None:
        """Positions in the row of the keys of all blocks, concatenated, `[keys]`; None if that is the row itself."""
        if not self.continued:
            return None
        starts = [block.start for block in self.blocks]
        pieces = [piece for i, b in enumerate(self.blocks) for piece in (*b.earlier, (i, b.length))]
        positions = np.concatenate([np.arange(starts[i], starts[i] + length) for i, length in pieces])
        return torch.from_numpy(positions).to(self.device, non_blocking=True)
