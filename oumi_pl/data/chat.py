"""What data that go through a chat template share: the template, prompts for generation, and where answers end."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from oumi_pl.data.examples import ExampleData
from oumi_pl.data.template import ChatTemplate, apply_template, load_template
from oumi_pl.data.tokenize import Dropped, Overflow, Tokenize
from oumi_pl.types import Example, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatData(ExampleData):
    """Rows become conversations or texts, and are tokenized with the characters that carry loss known.

    Args:
        args: As of `TextData`.
        template: Chat template: `chatml`, `llama3` or `plain`, or a `.jinja` file; the tokenizer's own when left out.
        overflow: What becomes of rows longer than `max_length`: `truncate` keeps the answer where it can, `keep_start`
            cuts the row's end; the row is dropped; or the run stops.
        kwargs: As of `ExampleData`.
    """

    def __init__(self, *args: Any, template: str | None = None, overflow: Overflow = "truncate", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.template_spec = template
        self.overflow = overflow
        self.template: ChatTemplate | None = None
        self.own_template: Any = None
        self.own_pad: Any = None

    @cached_property
    @abstractmethod
    def tokenize(self) -> Tokenize:
        """Turns records into examples."""

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Puts the chat template in force and adds the special tokens that it needs."""
        before = set(tokenizer.get_vocab().values())
        self.own_template, self.own_pad = tokenizer.chat_template, tokenizer.pad_token
        self.template = load_template(tokenizer, self.template_spec)
        apply_template(tokenizer, self.template)
        # what was in the vocabulary already, and only became special, has a trained row
        return sorted(set(tokenizer.get_vocab().values()) - before)

    def encoding_key(self) -> list[Any]:
        """What happens to long rows."""
        return [self.overflow]

    def encode(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Records to examples by template and offsets."""
        return self.tokenize(list(records))

    def prompts(self, split: str) -> Iterator[tuple[list[int], str]]:
        """Prompt ids and reference answer of each row of a split: what completions are sampled for."""
        for _, record in self.records(split):
            yield self.tokenize.prompt_ids(record)

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end an answer besides EOS: the template's end of turn."""
        end = self.template.end_of_turn if self.template else None
        return [self.tokenizer.convert_tokens_to_ids(end)] if end else []  # type: ignore[list-item]
