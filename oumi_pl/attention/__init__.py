"""Attention within packed rows: each segment sees only its own path, in transformers' models.

A packed batch is one row of segments (`oumi_pl.types.Segment`), one after the other: documents, or responses that
continue one prompt, to any depth. `register` adds the attention implementation `"documents"` to transformers. In a
model loaded with it and called within `packed(segments)`, each segment attends to its path as if the path were a
separate sequence, so tokens that several segments share are computed once. No mask of `seq x seq` is created. Outside
of `packed` (padded batches, generation with a cache) it is transformers' `"sdpa"`.

How it works: transformers creates a mask once per forward pass and passes it to every layer. Ours is not a tensor but a
`Blocks`, which says which tokens see each other. Because it is passed as an argument, activation checkpointing still
has it when it recomputes a layer in the backward pass, after `packed` has exited.

On CPUs each segment is one `sdpa` call, on its own queries and the keys and values of its path; on GPUs one call of
the variable-length kernel covers the row, on gathered keys and values.

Not every architecture can do it: `why_not_isolating` and `why_not_shared` run a model and return the reason.
"""

from oumi_pl.attention.interface import NAME, register
from oumi_pl.attention.probe import refuse_unless_isolating, why_not_isolating, why_not_shared
from oumi_pl.attention.rotary import separate_frequencies
from oumi_pl.attention.segments import packed, path_positions, position_ids

__all__ = [
    "NAME",
    "packed",
    "path_positions",
    "position_ids",
    "refuse_unless_isolating",
    "register",
    "separate_frequencies",
    "why_not_isolating",
    "why_not_shared",
]
