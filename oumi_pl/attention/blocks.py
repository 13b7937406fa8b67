"""Which tokens of a packed row see each other: each segment of the row sees its own path, causally.

Shapes: `seq` tokens of the row, `segments` of the row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from oumi_pl.attention.segments import check_segments, earlier_pieces, segment_starts
from oumi_pl.types import Segment


@dataclass(frozen=True)
class Block:
    """A segment as the attention reads it: its own tokens ask, and all tokens of its path answer.

    start, length: of its own tokens in the row. earlier: the pieces of its path that lie in earlier segments, as
    `earlier_pieces` returns them; empty for a root.
    """

    start: int
    length: int
    earlier: tuple[tuple[int, int], ...] = ()

    @cached_property
    def prefix(self) -> int:
        """Tokens of its path that lie in earlier segments."""
        return sum(length for _, length in self.earlier)

    @property
    def keys(self) -> int:
        """Tokens that its last token sees."""
        return self.prefix + self.length


def blocks_of(segments: Sequence[Segment]) -> tuple[Block, ...]:
    """One block per segment, `[segments]`."""
    starts = segment_starts(segments)
    return tuple(Block(starts[i], s.length, earlier_pieces(segments, i)) for i, s in enumerate(segments))


in_force: ContextVar[tuple[Block, ...] | None] = ContextVar("blocks", default=None)
"""The blocks of the row that is being computed; None for rows that are not packed."""


@contextmanager
def packed(segments: Sequence[Segment] | None) -> Iterator[None]:
    """Forward passes within it are of one packed row. With None nothing changes: padded batches pass.

    The model is called with `input_ids` `[1, seq]`, `position_ids` that count from 0 along each path (see
    `oumi_pl.attention.position_ids`), `use_cache=False` and no attention mask. The backward pass may run outside.

    Args:
        segments: `[segments]` of the row, in order; their lengths sum to `seq`.

    Raises:
        ValueError: a segment is empty, or continues one that is not earlier, or more tokens than its path has.
    """
    if segments is not None:
        check_segments(segments)
    token = in_force.set(None if segments is None else blocks_of(segments))
    try:
        yield
    finally:
        in_force.reset(token)


@dataclass(frozen=True)
class Blocks:
    """Passed to transformers' models in place of a mask; tells the attention function which tokens see each other.

    blocks: of the row, in order, covering it. causal: nothing but causality restricts what a block sees. window: the
    width of the window that a layer of this kind looks at, None if it is no window. mask_of: the mask of a block.
    device: the model's.
    """

    blocks: tuple[Block, ...]
    causal: bool
    window: int | None
    mask_of: Callable[[Block], Tensor | None]
    device: torch.device | str

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
        """Per block, None where attention is plainly causal, else `[1, 1, length, keys]` bool, True where seen."""
        return tuple(map(self.mask_of, self.blocks))

    @cached_property
    def cumulative(self) -> tuple[Tensor, Tensor]:
        """Where the blocks' queries and keys begin when laid end to end, `[segments + 1]` int32 each."""
        counts = torch.tensor([[0, 0], *([block.length, block.keys] for block in self.blocks)])
        both = counts.cumsum(0).T.contiguous().to(self.device, torch.int32, non_blocking=True)
        return both[0], both[1]

    @cached_property
    def key_positions(self) -> Tensor | None:
        """The positions whose keys the blocks see, laid end to end, `[keys]`; None if these are the row as it is."""
        if not self.continued:
            return None
        starts = [block.start for block in self.blocks]
        pieces = [piece for i, b in enumerate(self.blocks) for piece in (*b.earlier, (i, b.length))]
        positions = np.concatenate([np.arange(starts[i], starts[i] + length) for i, length in pieces])
        return torch.from_numpy(positions).to(self.device, non_blocking=True)
