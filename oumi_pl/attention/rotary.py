"""Rotary positions whose frequencies depend on the length of the sequence, for each document of a batch by itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from oumi_pl.attention.segments import current_blocks
from oumi_pl.errors import UserError

_current_lengths: ContextVar[Sequence[int] | None] = ContextVar("lengths", default=None)
"""Tokens of each row of the batch that is being computed, without padding; None outside of `rows_of`."""


def depends_on_length(module: nn.Module) -> bool:
    """Whether a rotary embedding has other frequencies for longer sequences (LongRoPE, dynamic NTK).

    transformers then takes the longest sequence of a call for the length of all, so that documents of one batch change
    each other. Dynamic NTK also remembers the longest one of earlier calls.
    """
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind) for kind in kinds)


def separate_frequencies(model: nn.Module) -> None:
    """Makes such rotary embeddings of a model compute each document by itself, within `packed` and `rows_of`."""
    for module in model.modules():
        if depends_on_length(module):
            # a subclass instead of another `forward` of the instance, which copies of the model would share
            cast("Any", module).__class__ = _by_document(cast("Any", type(module)))


@contextmanager
def rows_of(lengths: Sequence[int]) -> Iterator[None]:
    """Declares the lengths of the rows of a batch, without padding, for forward passes within it."""
    token = _current_lengths.set(lengths)
    try:
        yield
    finally:
        _current_lengths.reset(token)


@cache
def _by_document(kind: Any) -> Any:
    return kind if issubclass(kind, _ByDocument) else type(kind.__name__, (_ByDocument, kind), {})


class _ByDocument(nn.Module):
    """Mixed into a rotary embedding: calls it for each document."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        def one(positions: Tensor) -> tuple[Tensor, Tensor]:
            self._forget()
            return super(_ByDocument, self).forward(x, positions, *args, **kwargs)

        blocks, lengths = current_blocks.get(), _current_lengths.get()
        if blocks is not None:
            if any(block.prefix for block in blocks):
                raise UserError("the frequencies of its positions depend on the length of each response")
            pieces = [one(positions) for positions in position_ids.split([block.length for block in blocks], dim=1)]
            cos, sin = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
            return cos, sin
        if lengths is None or len(set(lengths)) == 1:
            return super().forward(x, position_ids, *args, **kwargs) if lengths is None else one(position_ids)
        # padding gets the last position of its row, so that it does not count as length
        rows = zip(position_ids.expand(len(lengths), -1).split(1), lengths, strict=True)
        pieces = [one(positions.clamp(max=length - 1)) for positions, length in rows]
        cos, sin = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return cos, sin

    def _forget(self) -> None:
        """Resets what dynamic NTK remembers of earlier calls."""
        for name, original in list(self.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                prefix = name.removesuffix("original_inv_freq")
                self.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
                if hasattr(self, f"{prefix}max_seq_len_cached"):
                    setattr(self, f"{prefix}max_seq_len_cached", self.original_max_seq_len)
