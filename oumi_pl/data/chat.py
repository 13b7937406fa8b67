"""Base class of data with chat templates: template, tokenization, prompts for generation, stop tokens."""

import copy
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from oumi_pl.attention.segments import path_positions
from oumi_pl.data.examples import ExampleData
from oumi_pl.data.template import apply_template, load_template
from oumi_pl.data.tokenize import Dropped, Overflow, Tokenize
from oumi_pl.types import Example, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatData(ExampleData):
    """Turns rows into conversations or texts, and tokenizes them with the characters that carry loss marked.

    Args:
        args: As of `TextData`.
        template: Chat template: `chatml`, `llama3` or `plain`, or a `.jinja` file; the tokenizer's own when left out.
        overflow: What happens to rows longer than `max_length`: `truncate` cuts the prompt first, `keep_start` the end
            of the row, `drop` leaves the row out, `error` stops the run.
        kwargs: As of `ExampleData`.
    """

    def __init__(self, *args: Any, template: str | None = None, overflow: Overflow = "truncate", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.template_spec = template
        self.overflow = overflow

    @property
    @abstractmethod
    def tokenize(self) -> Tokenize:
        """Turns records into examples."""

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Sets the chat template and adds the special tokens that it needs."""
        self.template = load_template(tokenizer, self.template_spec)
        return apply_template(tokenizer, self.template)

    def encoding_key(self) -> list[Any]:
        """`overflow`."""
        return [self.overflow]

    def encode(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Turns records into examples, or into the reason why not."""
        return self.tokenize(list(records))

    def uncut(self, record: Record) -> tuple[Example, list[np.ndarray]] | None:
        """As of `ExampleData`: `Tokenize.kept` cuts the longest path, and other segments are cut to the same length."""
        tokenize = copy.copy(self.tokenize)
        tokenize.max_length = sys.maxsize
        (whole,) = tokenize([record])
        if isinstance(whole, Dropped):
            return None
        segments, border = whole.segments, int(whole.loss_mask.argmax())  # the context ends at the first target
        longest = max(range(len(segments)), key=lambda i: segments[i].shared + segments[i].length)
        kept = self.tokenize.kept(whole.input_ids[path_positions(segments, longest)], border)
        if isinstance(kept, Dropped):
            kept = np.arange(0)
        context = kept[kept < border]
        room = len(kept) - len(context)
        first = np.concatenate([context, np.arange(border, min(border + room, segments[0].length))])
        return whole, [first, *(np.arange(min(room, segment.length)) for segment in segments[1:])]

    def prompts(self, split: str) -> Iterator[tuple[list[int], str]]:
        """Prompt ids and reference answer of each row of a split, for sampling completions."""
        for _, record in self.records(split):
            yield self.tokenize.prompt_ids(record)

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end an answer besides EOS: the template's end of turn."""
        end = self.template.end_of_turn if self.template else None
        return [self.tokenizer.convert_tokens_to_ids(end)] if end else []  # type: ignore[list-item]
