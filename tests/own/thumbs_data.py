"""The data of `thumbs.Thumbs`: rows of a prompt, an answer, and whether it is good."""

from dataclasses import dataclass, replace
from functools import cached_property

from oumi_pl.data.examples import ChatData
from oumi_pl.data.tokenize import Tokenize
from oumi_pl.types import Conversation, Example, Record


@dataclass(frozen=True)
class Rated(Record):
    conversation: Conversation
    good: bool


def rated(row):
    turns = ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]})
    return Rated(Conversation(turns, prompt_messages=1), row["good"])


class ThumbsData(ChatData):
    """Rows of `prompt`, `answer` and `good`."""

    formats = prompt_formats = ((rated, ("prompt", "answer", "good")),)

    @cached_property
    def tokenize(self):
        return Tokenize(self.tokenizer, self.max_length, overflow=self.overflow)

    def encode(self, records):
        examples = self.tokenize([record.conversation for record in records])
        goods = [{"good": float(record.good)} for record in records]
        return [replace(e, fields=g) if isinstance(e, Example) else e for e, g in zip(examples, goods, strict=True)]

    def prompt_of(self, record):
        return self.tokenize.prompt_ids(record.conversation)
