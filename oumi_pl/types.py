"""What travels between the rooms of the package: rows become records, records examples, examples batches.

Shapes use `batch` (rows of a tensor), `seq` (tokens of a row), `targets` (tokens that carry loss), `rows` (examples).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, NotRequired, Protocol, Required, TypedDict

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


class Record:
    """What a format makes of a row. Subclass it for a kind of data that the package does not have."""


@dataclass(frozen=True)
class Conversation(Record):
    """Turns that a chat template renders.

    `prompt_messages` is the number of leading messages that are the prompt, for rows that come as prompt and
    completion; None where the row is a conversation without such a border.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    prompt_messages: int | None = None


@dataclass(frozen=True)
class Text(Record):
    """Text that no chat template touches: a document, or the completion of a `prompt`."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Preference(Record):
    """Two responses to one prompt, the better one first.

    `chosen` and `rejected` are of the same kind and hold the same prompt: `prompt_messages` equal leading messages and
    the same `tools` in conversations, an equal `prompt` in texts. `margin` says by how much the chosen one is better
    (the difference of two scores, for example), where the row has one.
    """

    chosen: Conversation | Text
    rejected: Conversation | Text
    margin: float | None = None


class Segment(NamedTuple):
    """A run of tokens that starts anew, or continues the first tokens of an earlier segment's path.

    The path of a segment is the first `shared` tokens of its parent's path, followed by its own tokens: what its last
    token sees. A document is a segment without a parent. A preference pair is two: the prompt with the chosen response,
    and the rejected response, which continues the prompt. A conversation may have one for each answer. Tokens that
    several paths share are stored and computed once.
    """

    length: int
    """Own tokens, at least 1."""
    parent: int = -1
    """Index of the segment whose path it continues, an earlier one; -1 if it starts anew."""
    shared: int = 0
    """Tokens of the parent's path, counted from its beginning, that come before its own; 0 if it starts anew."""


@dataclass(frozen=True)
class Example:
    """One tokenized row: a tree of segments, one after the other in `input_ids`.

    input_ids: `[tokens]` int32. loss_mask: `[tokens]` bool, True where the *token at that position* carries loss; False
    where a path begins, since nothing predicts its first token. segments: they add up to `tokens`, and only the first
    starts anew; one for all of it when left out. fields: numbers that belong to the row (a margin, a label, a score),
    NaN where it has none; all examples of a data set have the same names. cut: tokens were removed to fit. straddled:
    a token crosses a border between prompt and target, so that it holds characters of both. empty_answer: all there is
    to learn is to end at once.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    segments: tuple[Segment, ...] = ()
    fields: Mapping[str, float] = field(default_factory=dict)
    cut: bool = False
    straddled: bool = False
    empty_answer: bool = False

    def __post_init__(self) -> None:
        if not self.segments:
            object.__setattr__(self, "segments", (Segment(len(self.input_ids)),))

    @property
    def target_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return int(self.loss_mask.sum())


class Inputs(TypedDict):
    """What a model reads.

    Padded inputs have an `attention_mask`. Packed ones have one row (`batch` = 1), no `attention_mask`, and `segments`.
    Rows of equal length, each a document, need neither.
    """

    input_ids: torch.Tensor  # [batch, seq] int64
    position_ids: torch.Tensor  # [batch, seq] int64, the place of each token in its path
    attention_mask: NotRequired[torch.Tensor]  # [batch, seq] int64, 1 where a token is
    segments: NotRequired[list[Segment]]  # of the row; on the host, so that no kernel waits for them


class Update(NamedTuple):
    """What the optimizer update that a micro-batch belongs to comes to, over all its micro-batches and ranks."""

    targets: int
    """Tokens that carry loss."""
    rows: int
    """Examples."""
    parts: int
    """Micro-batches, over all ranks: Lightning averages their gradients."""


class Batch(TypedDict):
    """One micro-batch: a row of segments without padding, and the targets in it.

    A target is a token that carries loss. What predicts it is the token before it in its path, which for the first
    token of a segment lies in the segment that it continues. `oumi_pl.models.layouts` makes of this what a model reads.
    """

    input_ids: torch.Tensor  # [1, seq] int64
    position_ids: torch.Tensor  # [1, seq] int64, the place of each token in its path
    segments: list[Segment]  # they add up to seq; each example begins with one that starts anew
    targets: torch.Tensor  # [targets] int64, the token to predict
    predictors: torch.Tensor  # [targets] int64, the position in the row whose hidden state predicts it
    target_segments: torch.Tensor  # [targets] int64, ascending: the segment that holds it
    fields: dict[str, torch.Tensor]  # [rows] float32 each: the numbers of the examples
    sample_ids: list[int]  # [rows], which examples these are; empty for the stand-in of a rank that ran out of rows
    update: NotRequired[Update]  # in training
    source: NotRequired[int]  # which source all rows of a held-out batch come from
    text_bytes: NotRequired[int]  # bytes of UTF-8 text that the targets of a held-out batch stand for


Sums = dict[str, torch.Tensor]
"""Sums over the targets or rows of a batch by name, scalars each."""


class Cut(Protocol):
    """How an optimizer update is cut: `ranks` x `micro_batches` x `batch_size` rows."""

    batch_size: int
    micro_batches: int
    ranks: int
    rank: int

    @property
    def rows_per_update(self) -> int:
        """Rows of one update, over all ranks and micro-batches."""


class RunData(Protocol):
    """What modules, callbacks, preview, dry run, adapters and exports need of a data module."""

    added_tokens: list[int]
    """Ids that were added to the tokenizer's vocabulary."""
    batch_size: int
    branching: bool
    """Whether examples may have segments that continue others."""
    eval_batch_size: int
    max_length: int
    own_pad: str | None
    """The pad token that the tokenizer came with; None if it has none."""
    own_template: Any
    """The chat template that the tokenizer came with; None if it has none."""
    packing: bool
    """Whether a row of the plan holds several examples that must not see each other."""
    sources: dict[str, Any]
    """`train`, `validation`, `test`, `predict` -> what the recipe says; None for a split that it leaves out."""
    streaming: bool
    """Whether training rows are known only once they are read."""
    template: Any
    """The chat template in force, an `oumi_pl.data.template.ChatTemplate`; None where rows have no turns."""
    tokenizer_spec: Any
    train_loader: Any
    """The training loader, once it is made."""
    workers: int
    """Loader processes per device."""

    @property
    def layout(self) -> Cut:
        """How an update is cut."""

    @property
    def row_name(self) -> str:
        """What `batch_size` counts: `row`, `pack` or `pair`."""

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end a completion besides EOS."""

    @property
    def streamed(self) -> list[str]:
        """Names of the training sources of which nothing is known before they are read."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when first asked for."""

    def consumed(self) -> list[dict[str, Any]]:
        """What was read of each source in the running pass, where that is not the plan's."""

    def largest_micro_batch(self) -> list[np.ndarray] | None:
        """Rows of the largest micro-batch of the first epoch, over all ranks; None if all are alike."""

    def longest_path(self, splits: Iterable[str]) -> tuple[int, int] | None:
        """Positions that the longest path of these splits needs surely, and at most; None for `max_length`."""

    def needed(self, stage: str) -> Iterator[str]:
        """The splits that a stage reads."""

    def prompts(self, split: str) -> Iterator[tuple[list[int], str]]:
        """Prompt ids of each row of a split, and the reference answer that follows."""

    def report(self) -> dict[str, Any]:
        """What became of the rows, per split."""

    def source_names(self, split: str) -> list[str]:
        """Names of the sources that have held-out metrics of their own; a single name if there are none."""

    def tokens(self, updates: int) -> int:
        """Tokens that the first so many updates train on; an estimate beyond the first few epochs."""

    def train_dataloader(self) -> Any:
        """The training loader."""

    def updates(self, epochs: int) -> int:
        """Optimizer updates in so many epochs."""

    def val_dataloader(self) -> Any:
        """The loader of held-out rows."""


class RunModule(Protocol):
    """What callbacks, the dry run, references, adapters and exports need of a module."""

    compile_layers: bool
    details: ClassVar[tuple[str, ...]]
    """Metrics that are logged, and not shown in the terminal after each validation."""
    dtype_name: Any
    generates: ClassVar[bool]
    """Whether the model completes prompts, so that samples and predictions make sense."""
    generation_settings: dict[str, Any]
    """How `predict` completes prompts: arguments of `oumi_pl.models.generation.complete`."""
    gradient_checkpointing: bool
    last_update: dict[str, float]
    """Sums of the last update over all micro-batches and ranks."""
    lora: dict[str, Any] | None
    loss: Any
    """What computes the loss of a token or pair; None where that is not a part of its own."""
    model_name: str | None
    quantization: Any
    reference: Any
    """What the policy is compared with, an `oumi_pl.modules.reference.Reference`; None for trainer types without."""
    run_config: str
    """The recipe as YAML, for checkpoints."""
    schedule: Any
    """The learning rate over optimizer steps, an `oumi_pl.optim.Schedule`."""
    tokens_seen: dict[str, int]
    trainer: Any
    trust_remote_code: bool
    unit: ClassVar[str]
    """The sum that an update is divided by: `targets` or `rows`."""

    @property
    def causal_lm(self) -> Any:
        """The model, an `oumi_pl.models.lm.LM`."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def notes(self) -> list[str]:
        """What the run says about the model before the first update."""

    def build(self, tokenizer: Any, added_tokens: Sequence[int] = (), *, branching: bool | None = False) -> Any:
        """The model that the arguments describe, for a tokenizer; see `oumi_pl.modules.base.LanguageModule.build`."""

    def count(self, batch: Any) -> dict[str, int]:
        """What a batch comes to: `rows`, `targets`, `tokens`, and `positions`, which are tokens with padding."""

    def load_weights(self, saved_state: dict[str, Any]) -> None:
        """Loads the weights of a checkpoint."""

    def log(self, name: str, value: Any, *, rank_zero_only: bool = False, sync_dist: bool = False) -> None:
        """Logs a metric, as in Lightning."""

    def log_dict(self, dictionary: Any, *, batch_size: int | None = None) -> None:
        """Logs metrics, as in Lightning."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All weights, with those of heads."""

    def save(self, directory: Any, **settings: Any) -> None:
        """Writes what a user gets: the model with every head that it trained."""

    def state_dict(self) -> dict[str, Any]:
        """The weights that a checkpoint holds."""

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""


SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
"""Stage -> the splits that it reads; `predict` reads prompts."""


class TokenLoss(ABC):
    """A loss per token. Subclass it and name the class by `class_path` to train with it."""

    @abstractmethod
    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Maps float32 `logits` `[n, vocab]` and `targets` `[n]` to losses `[n]`, token by token."""


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of pairs of responses: the input of preference losses.

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
