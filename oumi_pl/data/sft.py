"""Data for supervised fine-tuning: conversations and completions, with the tokens to train on marked."""

from functools import cached_property
from typing import Any, Literal

from oumi_pl.data.base import Sources
from oumi_pl.data.chat import ChatData
from oumi_pl.data.tokenize import Overflow, Tokenize
from oumi_pl.data.tokenizers import TokenizerFactory


class SFTData(ChatData):
    """Rows become conversations, are rendered by a chat template, and carry loss on what the model should learn to say.

    Args:
        train: Where the training rows come from: a hub id, a file, directory or glob, `bundled/NAME`, or a list of
            these (a mixture).
        validation: A source, or the fraction of the training rows to hold out (chosen by a hash of the row).
        test: Source for `test`.
        predict: Source of prompts for `predict`; the test or validation rows when left out.
        tokenizer: Hub id or directory, or a class that makes one; the model's own when left out.
        template: Chat template: `chatml`, `llama3` or `plain`, or a `.jinja` file; the tokenizer's own when left out.
        train_on: Which tokens carry loss. When left out: the completion where there is one, all assistant turns of a
            conversation, all of a plain text.
        overflow: What becomes of rows longer than `max_length`: `truncate` keeps the answer where it can, `keep_start`
            cuts the row's end; the row is dropped; or the run stops.
        max_length: Longest example in tokens, and the size of a pack.
        packing: Put several examples into one row, isolated from each other.
        batch_size: Rows per micro-batch and device (packs, when packing).
        eval_batch_size: The same for validation and test; `batch_size` when left out.
        group_by_length: Without packing, put examples of similar length into the same update.
        workers: Loader processes per device.
        seed: Of the order; the run's `seed_everything` when left out.
        trust_remote_code: Let the tokenizer run code that came with it.
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: float | Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        *,
        tokenizer: str | TokenizerFactory | None = None,
        template: str | None = None,
        train_on: Literal["completion", "assistant", "last_turn", "all"] | None = None,
        overflow: Overflow = "truncate",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            train, validation, test, predict, tokenizer=tokenizer, template=template, overflow=overflow, **kwargs
        )
        self.train_on = train_on

    @cached_property
    def tokenize(self) -> Tokenize:
        """Turns records into examples: by template, offsets and `train_on`."""
        return Tokenize(self.tokenizer, self.max_length, self.train_on, self.overflow)

    def encoding_key(self) -> list[Any]:
        """Which tokens are trained, and what happens to long rows."""
        return [self.train_on, self.overflow]
