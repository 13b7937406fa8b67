"""Packed documents, and responses that share a prompt, kept apart in the attention of transformers' models.

A packed batch is one row of documents, one after the other. `register` teaches transformers the attention
implementation `"documents"`; a model loaded with it and called within `packed(document_lengths)` attends within each
document as if it were alone, without a mask of the row's length squared. Within `packed(pair_lengths=...)` a row holds
pairs, each as prompt, chosen and rejected response: the rejected response sees the prompt and itself, so that the
prompt is computed once for both. Outside of `packed` (padded batches, generation with a cache) it does what
transformers' `"sdpa"` does.

How it works: transformers asks for a mask once per forward pass and hands what it gets to every layer. Ours is no
tensor but a `Blocks`, which says who sees whom. Because it travels as an argument, activation checkpointing finds it
again when it recomputes a layer in the backward pass, where `packed` is no longer in force.
"""

from oumi_pl.attention.blocks import packed
from oumi_pl.attention.interface import NAME, register
from oumi_pl.attention.probe import refuse_unless_isolating, why_not_shared

__all__ = ["NAME", "packed", "refuse_unless_isolating", "register", "why_not_shared"]
