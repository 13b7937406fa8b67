"""What travels between the rooms of the package: rows become records, records examples, examples batches.

Shapes use `batch` (rows of a tensor), `seq` (tokens of a row) and `docs` (documents packed one after the other).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NotRequired, Required, TypedDict

import numpy as np
import torch

IGNORE_INDEX = -100
"""The label of a position that carries no loss. Never a token id, so no token can be mistaken for it."""

Row = dict[str, Any]
"""One row of a source, as it was read: column name -> value."""


class Message(TypedDict, total=False):
    """One turn of a conversation, in the shape that chat templates read."""

    role: Required[str]
    content: Required[str | None]
    name: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    reasoning_content: str


@dataclass(frozen=True)
class Conversation:
    """Turns that a chat template renders.

    `prompt_messages` is the number of leading messages that are the prompt, for rows that come as prompt and
    completion; None where the row is a conversation without such a border.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    prompt_messages: int | None = None


@dataclass(frozen=True)
class Text:
    """Text that no chat template touches: a document, or the completion of a `prompt`."""

    text: str
    prompt: str = ""


Record = Conversation | Text
"""What a format makes of a row."""


@dataclass(frozen=True)
class Example:
    """One tokenized row.

    input_ids: `[seq]` int32. loss_mask: `[seq]` bool, True where the *token at that position* carries loss; position 0
    is always False, since nothing predicts it. cut: tokens were removed to fit. straddled: a token crosses a border
    between prompt and target, so that it holds characters of both.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    cut: bool = False
    straddled: bool = False

    @property
    def target_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return int(self.loss_mask.sum())


class Batch(TypedDict):
    """One micro-batch as the model sees it.

    `labels[b, t]` is the token that position `t` has to predict, i.e. already shifted by one: nothing downstream
    shifts again. Packed batches have one row (`batch` = 1) of concatenated documents, no `attention_mask`, and say
    where documents end; padded batches have an `attention_mask` and no `document_lengths`.
    """

    input_ids: torch.Tensor  # [batch, seq] int64
    position_ids: torch.Tensor  # [batch, seq] int64, starting at 0 in each document
    labels: torch.Tensor  # [batch, seq] int64, IGNORE_INDEX where no loss
    attention_mask: NotRequired[torch.Tensor]  # [batch, seq] int64, 1 where a token is
    document_lengths: NotRequired[list[int]]  # [docs], sums to seq; on the host, so that no kernel waits for it
    sample_ids: NotRequired[list[int]]  # which examples these are, in order


class TokenLoss(ABC):
    """A loss per token. Subclass it and name the class by `class_path` to train with it."""

    @abstractmethod
    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Maps float32 `logits` `[n, vocab]` and `targets` `[n]` to losses `[n]`, token by token."""
