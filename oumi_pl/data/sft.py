"""Data for supervised fine-tuning: conversations and completions, with the tokens to train on marked."""

from functools import cached_property
from typing import Any, Literal

from oumi_pl.data.chat import ChatData
from oumi_pl.data.tokenize import Tokenize


class SFTData(ChatData):
    """Rows become conversations, are rendered by a chat template, and carry loss on what the model should learn to say.

    Args:
        args: As of `TextData`.
        train_on: Which tokens carry loss. When left out: the completion where there is one, all assistant turns of a
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
        """Turns records into examples: by template, offsets and `train_on`."""
        return Tokenize(self.tokenizer, self.max_length, self.train_on, self.overflow)

    def encoding_key(self) -> list[Any]:
        """Which tokens are trained, and what happens to long rows."""
        return [self.train_on, *super().encoding_key()]
