"""Data for supervised fine-tuning: conversations and completions, with loss on the answers."""

from functools import cached_property
from typing import Any, Literal

from oumi_pl.data.examples import ChatData
from oumi_pl.data.rendering import Turns
from oumi_pl.data.tokenize import Tokenize


class SFTData(ChatData):
    """Turns rows into conversations, renders them with a chat template, and marks the answers to carry loss.

    Args:
        args: See `TextData`.
        train_on: Which tokens carry loss. When left out: the completion if the row has one, all assistant turns of a
            conversation, all of a plain text. `completion_or_all`: the completion if the row has one, else all of it.
        turns: Whether the trained turns of a conversation share one text. `together`: they do. `apart`: each has a
            branch of its own, after the history as the template writes it for this turn. `auto`: together where that is
            the same, else apart (templates that remove the reasoning of earlier turns, for example).
        kwargs: See `ChatData`.
    """

    def __init__(
        self,
        *args: Any,
        train_on: Literal["completion", "assistant", "last_turn", "all", "completion_or_all"] | None = None,
        turns: Turns = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.train_on = train_on
        self.turns: Turns = turns

    @property
    def branching(self) -> bool:  # type: ignore[override]
        """Whether a conversation has a branch for each turn. Known once the splits are opened (`setup`)."""
        return self.has_branches

    @cached_property
    def tokenize(self) -> Tokenize:
        """Turns records into examples."""
        return Tokenize(
            self.tokenizer,
            self.max_length,
            self.train_on,
            self.overflow,
            turns=self.turns,
            lost=self.lost,
            renderer=self.renderer,
        )

    def encoding_key(self) -> list[Any]:
        """`train_on`, and what `ChatData` returns."""
        return [self.train_on, *super().encoding_key()]

    def report(self) -> dict[str, Any]:
        """Adds the rows whose turns are trained apart, and the tokens that this costs; see `ChatData`."""
        report = super().report()
        for split, described in report.items():
            stores = self.stores(split)
            if rows := sum(store.branched for store in stores):
                described["turns_apart"] = rows
                described["turns_apart_tokens"] = sum(store.beyond_longest for store in stores)
        return report
