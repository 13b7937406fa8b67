"""Who sees whom in a packed row: blocks of tokens, each causal within itself.

Shapes: `seq` tokens of the row, `docs` documents, `pairs` pairs of responses.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

PairLengths = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Block:
    """A run of tokens that see those of the run up to themselves, and the first `prefix` tokens of the block before.

    start, length: where it lies in the row. prefix: tokens of the block before it that it continues, 0 if none.
    """

    start: int
    length: int
    previous: int = 0
    prefix: int = 0

    @property
    def keys(self) -> int:
        """Tokens that its last token sees."""
        return self.prefix + self.length

    def key_positions(self) -> Iterator[int]:
        """Where these lie in the row, in order."""
        return chain(range(self.previous, self.previous + self.prefix), range(self.start, self.start + self.length))


def document_blocks(lengths: Sequence[int]) -> tuple[Block, ...]:
    """One block per document, `[docs]`."""
    blocks, start = [], 0
    for length in lengths:
        blocks.append(Block(start, length))
        start += length
    return tuple(blocks)


def pair_blocks(lengths: PairLengths) -> tuple[Block, ...]:
    """Two blocks per pair, `[2 x pairs]`: prompt and chosen response, then the rejected one, which sees the prompt."""
    blocks, start = [], 0
    for prompt, chosen, rejected in lengths:
        blocks.append(Block(start, prompt + chosen))
        blocks.append(Block(start + prompt + chosen, rejected, previous=start, prefix=prompt))
        start += prompt + chosen + rejected
    return tuple(blocks)


in_force: ContextVar[tuple[Block, ...] | None] = ContextVar("blocks", default=None)
"""The blocks of the row that is being computed; None for rows that are not packed."""


@contextmanager
def packed(document_lengths: Sequence[int] | None = None, pair_lengths: PairLengths | None = None) -> Iterator[None]:
    """Says that forward passes within it are of one packed row. Without either, nothing changes: padded batches pass.

    The model is called with `input_ids` `[1, seq]`, `position_ids` that start at 0 in each document (in each prompt,
    with both responses continuing from its end), `use_cache=False` and no attention mask. The backward pass may run
    outside.

    Args:
        document_lengths: `[docs]`, in tokens, summing to `seq`.
        pair_lengths: `[pairs]`: tokens of prompt, chosen and rejected response, which follow each other in the row.
    """
    blocks = document_blocks(document_lengths) if document_lengths is not None else None
    if pair_lengths is not None:
        blocks = pair_blocks(pair_lengths)
    token = in_force.set(blocks)
    try:
        yield
    finally:
        in_force.reset(token)


@dataclass(frozen=True)
class Blocks:
    """Stands where transformers' models expect a mask, and tells the attention function who sees whom.

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
    def continued(self) -> bool:
        """Whether any block continues the one before."""
        return any(block.prefix for block in self.blocks)

    @cached_property
    def masks(self) -> tuple[Tensor | None, ...]:
        """Per block, None where attention is plainly causal, else `[1, 1, length, keys]` bool, True where seen."""
        return tuple(map(self.mask_of, self.blocks))

    @cached_property
    def cumulative(self) -> tuple[Tensor, Tensor]:
        """Where the blocks' queries and keys begin when laid end to end, `[blocks + 1]` int32 each."""
        counts = torch.tensor([[0, 0], *([block.length, block.keys] for block in self.blocks)])
        both = counts.cumsum(0).T.contiguous().to(self.device, torch.int32, non_blocking=True)
        return both[0], both[1]

    @cached_property
    def key_positions(self) -> Tensor | None:
        """The positions whose keys the blocks see, laid end to end, `[keys]`; None if these are the row as it is."""
        if not self.continued:
            return None
        positions = [p for block in self.blocks for p in block.key_positions()]
        return torch.tensor(positions).to(self.device, non_blocking=True)
