"""What travels between the rooms of the package: rows become records, records examples, examples batches.

Shapes use `batch` (rows of a tensor), `seq` (tokens of a row) and `docs` (documents packed one after the other).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NotRequired, Required, TypedDict

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


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, the better one first.

    `chosen` and `rejected` are of the same kind and hold the same prompt: `prompt_messages` equal leading messages and
    the same `tools` in conversations, an equal `prompt` in texts. `margin` says by how much the chosen one is better
    (the difference of two scores, for example), where the row tells.
    """

    chosen: Conversation | Text
    rejected: Conversation | Text
    margin: float | None = None


Record = Conversation | Text | Preference
"""What a format makes of a row."""


@dataclass(frozen=True)
class Example:
    """One tokenized row.

    input_ids: `[seq]` int32. loss_mask: `[seq]` bool, True where the *token at that position* carries loss; position 0
    is always False, since nothing predicts it. cut: tokens were removed to fit. straddled: a token crosses a border
    between prompt and target, so that it holds characters of both. empty_answer: all there is to learn is to
    end at once.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    cut: bool = False
    straddled: bool = False
    empty_answer: bool = False

    @property
    def target_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class PreferenceExample(Example):
    """One tokenized pair: prompt, chosen response, rejected response, one after the other in `input_ids` `[seq]`.

    chosen_start: where the chosen response begins, i.e. the tokens of the prompt, at least 1. rejected_start: where the
    rejected response begins; it continues the prompt, not the chosen response. margin: NaN where the row tells none.
    """

    chosen_start: int = 0
    rejected_start: int = 0
    margin: float = float("nan")

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens of prompt, chosen and rejected response."""
        return self.chosen_start, self.rejected_start - self.chosen_start, len(self.input_ids) - self.rejected_start


class Segment(NamedTuple):
    """A run of tokens in a packed row; it starts anew, or continues the first tokens of another segment's path.

    A segment's path is the first `shared` tokens of its parent's path, followed by its own tokens, whose positions are
    `shared`, `shared + 1`, ... A document is a root. Responses to one prompt are a root, prompt and first response, and
    one more segment per other response, which shares the prompt.

    length: own tokens, at least 1. parent: index (in the row) of the segment that it continues, always an earlier one;
    -1 if none. shared: how many leading tokens of the parent's path (counted from the path's root) come before its own;
    0 for a root.
    """

    length: int
    parent: int = -1
    shared: int = 0


class Inputs(TypedDict):
    """What a model reads.

    Padded inputs have an `attention_mask`. Packed ones have one row (`batch` = 1), no `attention_mask`, and say where
    documents end, or where the prompt and the responses of each pair do.
    """

    input_ids: torch.Tensor  # [batch, seq] int64
    position_ids: torch.Tensor  # [batch, seq] int64, starting at 0 in each document
    attention_mask: NotRequired[torch.Tensor]  # [batch, seq] int64, 1 where a token is
    document_lengths: NotRequired[list[int]]  # [docs], sums to seq; on the host, so that no kernel waits for it
    pair_lengths: NotRequired[list[tuple[int, int, int]]]  # [pairs], as in `PreferenceBatch`, whose layout it then is


class Batch(Inputs):
    """One micro-batch as the model sees it.

    `labels[b, t]` is the token that position `t` has to predict, i.e. already shifted by one: nothing downstream
    shifts again.
    """

    labels: torch.Tensor  # [batch, seq] int64, IGNORE_INDEX where no loss
    sample_ids: NotRequired[list[int]]  # which examples these are, in order
    source: NotRequired[int]  # which source all rows of a held-out batch come from
    text_bytes: NotRequired[int]  # bytes of UTF-8 text that the targets of a held-out batch stand for


class PreferenceBatch(TypedDict):
    """One micro-batch of pairs: pair after pair in one row, each as prompt, chosen and rejected response.

    A target is a response token that carries loss. What predicts it is the position before it in its branch: for a
    response's first token that is the prompt's last one, in both branches. Branch `2 i` is the chosen response of pair
    `i`, branch `2 i + 1` the rejected one.
    """

    input_ids: torch.Tensor  # [1, seq] int64
    position_ids: torch.Tensor  # [1, seq] int64, from 0 in each prompt; both responses continue from the prompt's end
    pair_lengths: list[tuple[int, int, int]]  # [pairs]: tokens of prompt, chosen and rejected response; sum to seq
    targets: torch.Tensor  # [targets] int64, the token to predict
    predictors: torch.Tensor  # [targets] int64, the position in the row whose hidden state predicts it
    branches: torch.Tensor  # [targets] int64, ascending
    margins: torch.Tensor  # [pairs] float32, NaN where unknown
    sample_ids: list[int]  # [pairs]; empty for the stand-in of a rank that ran out of rows, which has one pair


class TokenLoss(ABC):
    """A loss per token. Subclass it and name the class by `class_path` to train with it."""

    @abstractmethod
    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Maps float32 `logits` `[n, vocab]` and `targets` `[n]` to losses `[n]`, token by token."""


@dataclass(frozen=True)
class Pairs:
    """The log-probabilities of pairs of responses: what preference losses are made of.

    logps: `[targets]`, of each target token under the policy, float32, differentiable.
    ref_logps: `[targets]`, the same under the reference; zeros where a loss needs none.
    branches: `[targets]`, ascending: `2 i` for tokens of pair `i`'s chosen response, `2 i + 1` for its rejected one's.
    count: number of pairs.
    margins: `[pairs]`, how much better the chosen response is, NaN where unknown.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor
    branches: torch.Tensor
    count: int
    margins: torch.Tensor

    def sums(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of `values` `[targets]` over the chosen and over the rejected responses, each `[pairs]`."""
        sums = values.new_zeros(2 * self.count).index_add(0, self.branches, values)
        return sums[0::2], sums[1::2]

    @cached_property
    def chosen_logps(self) -> torch.Tensor:
        """Log-probabilities of the chosen responses under the policy, `[pairs]`."""
        return self.sums(self.logps)[0]

    @cached_property
    def rejected_logps(self) -> torch.Tensor:
        """Log-probabilities of the rejected responses under the policy, `[pairs]`."""
        return self.sums(self.logps)[1]

    @cached_property
    def ref_chosen_logps(self) -> torch.Tensor:
        """Log-probabilities of the chosen responses under the reference, `[pairs]`."""
        return self.sums(self.ref_logps)[0]

    @cached_property
    def ref_rejected_logps(self) -> torch.Tensor:
        """Log-probabilities of the rejected responses under the reference, `[pairs]`."""
        return self.sums(self.ref_logps)[1]

    @cached_property
    def chosen_logratios(self) -> torch.Tensor:
        """`log(policy / reference)` of the chosen responses, `[pairs]`."""
        return self.sums(self.logps - self.ref_logps)[0]

    @cached_property
    def rejected_logratios(self) -> torch.Tensor:
        """`log(policy / reference)` of the rejected responses, `[pairs]`."""
        return self.sums(self.logps - self.ref_logps)[1]

    @cached_property
    def chosen_tokens(self) -> torch.Tensor:
        """Target tokens of the chosen responses, `[pairs]`, at least 1."""
        return self.sums(torch.ones_like(self.logps))[0].clamp(min=1)

    @cached_property
    def rejected_tokens(self) -> torch.Tensor:
        """Target tokens of the rejected responses, `[pairs]`, at least 1."""
        return self.sums(torch.ones_like(self.logps))[1].clamp(min=1)


class PreferenceLoss(ABC):
    """A loss on pairs of responses. Subclass it and name the class by `class_path` to train with it.

    A loss that keeps state from batch to batch (a running mean) is an `nn.Module` as well and keeps it in buffers, so
    that checkpoints hold it.
    """

    beta: float = 1.0
    """What log-ratios are multiplied by to be called rewards."""
    needs_reference: bool = True
    """Whether the loss looks at the reference; without, no reference is made."""
    loss_at_start: float | None = None
    """The loss of any pair as long as policy and reference are equal, for losses where that is one number."""

    @abstractmethod
    def __call__(self, pairs: Pairs) -> torch.Tensor:
        """Maps pairs to their losses, `[pairs]`; the gradient of an update is that of their mean."""

    def rewards(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Implicit rewards of the chosen and the rejected responses, `[pairs]` each, for the metrics.

        `beta log(policy / reference)` as in DPO (Rafailov et al. 2023, arXiv:2305.18290), and `beta log policy` for a
        loss without reference.
        """
        return self.beta * pairs.chosen_logratios, self.beta * pairs.rejected_logratios
