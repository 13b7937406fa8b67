"""Data for supervised fine-tuning: conversations and completions, with loss on the answers."""

from functools import cached_property
from typing import Any, Literal

from oumi_pl.data.examples import ChatData
from oumi_pl.data.tokenize import Tokenize


class SFTData(ChatData):
    """Turns rows into conversations, renders them with a chat template, and marks the answers to carry loss.

    Args:
        args: As of `TextData`.
        train_on: Which tokens carry loss. When left out: the completion if the row has one, all assistant turns of a
            conversation, all of a plain text.
        kwargs: As of `ChatData`.
    """

    def __init__(
        self,
        *args: Any,
        train_on: Literal["completion", "assistant", "last_turn", "all"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.train_on = train_on

    @cached_property
    def tokenize(self) -> Tokenize:
        """Turns records into examples."""
        return Tokenize(self.tokenizer, self.max_length, self.train_on, self.overflow)

    def encoding_key(self) -> list[Any]:
        """`train_on` and `overflow`."""
        return [self.train_on, *super().encoding_key()]
