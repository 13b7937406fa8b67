"""Attention within packed rows: segments that see their own path only, in transformers' models.

A packed batch is one row of segments (`oumi_pl.types.Segment`), one after the other: documents, or responses that
continue one prompt, to any depth. `register` teaches transformers the attention implementation `"documents"`; in a
model loaded with it and called within `packed(segments)`, each segment attends to its path as if the path were a
sequence of its own, so that tokens which several segments share are computed once. No mask of the row's length squared
is made. Outside of `packed` (padded batches, generation with a cache) it does what transformers' `"sdpa"` does.

How it works: transformers asks for a mask once per forward pass and hands what it gets to every layer. Ours is no
tensor but a `Blocks`, which says who sees whom. Because it travels as an argument, activation checkpointing finds it
again when it recomputes a layer in the backward pass, where `packed` is no longer in force.

On CPUs each segment is one `sdpa` call, on its own queries and the keys and values of its path; on GPUs one call of
the variable-length kernel covers the row, on gathered keys and values.

Not every architecture can do it: `why_not_isolating` and `why_not_shared` try a model and tell why not.
"""

from oumi_pl.attention.blocks import packed
from oumi_pl.attention.interface import NAME, register
from oumi_pl.attention.probe import refuse_unless_isolating, why_not_isolating, why_not_shared
from oumi_pl.attention.segments import path_positions, position_ids

__all__ = [
    "NAME",
    "packed",
    "path_positions",
    "position_ids",
    "refuse_unless_isolating",
    "register",
    "why_not_isolating",
    "why_not_shared",
]
