"""Data for preference training: pairs of responses that share their prompt."""

from functools import cached_property
from typing import Any

from oumi_pl.data.collate import full_tree
from oumi_pl.data.examples import ChatData
from oumi_pl.data.pairs import TokenizePairs
from oumi_pl.data.preferences import PREFERENCE_FORMATS
from oumi_pl.types import Example


class DPOData(ChatData):
    """Turns rows into pairs: a prompt, stored once, with a chosen and a rejected response.

    `max_length` counts the prompt and one response. A pack holds twice as many tokens, so that every pair fits. For
    longer pairs, `overflow: truncate` cuts the prompt's start first, then the ends of the responses.

    Args:
        args: See `TextData`.
        group_by_length: Without packing, put pairs of similar length into the same update, which saves padding for
            models that need it.
        kwargs: See `ChatData`.
    """

    branching = True
    segment_names = ("chosen", "rejected")
    formats = PREFERENCE_FORMATS

    def __init__(self, *args: Any, group_by_length: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, group_by_length=group_by_length, **kwargs)

    @cached_property
    def tokenize(self) -> TokenizePairs:
        """Turns preferences into pairs."""
        return TokenizePairs(self.tokenizer, self.max_length, self.overflow, lost=self.lost, renderer=self.renderer)

    @property
    def row_name(self) -> str:
        """The unit of `batch_size`."""
        return "pack" if self.packing else "pair"

    def full_row(self) -> list[Example]:
        """See `TextData`: a pair whose prompt is a single token, so that both responses have almost `max_length`."""
        return [full_tree(1, [self.max_length - 1] * 2, ["margin", *self.fields])]

    @property
    def capacity(self) -> int | None:
        """Tokens that a pack holds; None without packing."""
        return 2 * self.max_length if self.packing else None
