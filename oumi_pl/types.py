"""The data types that all rooms share: a row becomes a record, a record an example, examples a batch.

Shapes use `batch` (rows of a tensor), `seq` (tokens of a row), `targets` (tokens that carry loss), `rows` (examples).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, NotRequired, Protocol, Required, TypedDict

import numpy as np
import torch

IGNORE_INDEX = -100
"""The label of a position that carries no loss. No token has this id, so no real label can be mistaken for it."""

Row = dict[str, Any]
"""One row of a source, as it was read: column name -> value."""


class Message(TypedDict, total=False):
    """One turn of a conversation, in the shape that chat templates read.

    `weight` and `spans` are not for the template: they say how much the turn counts in the loss.
    """

    role: Required[str]
    content: Required[str | None]
    """None if the turn has no text, but calls or reasoning."""
    name: str
    tool_calls: list[dict[str, Any]]
    """Each `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with an `id` if the row has one."""
    tool_call_id: str
    reasoning_content: str
    weight: float
    """Factor on the loss of each token of the turn; 0 takes the turn out of the loss. Missing: 1, if it is trained."""
    spans: list[tuple[int, int]]
    """The parts of `content` that carry loss, as (start, end) in characters; missing: all of the turn."""


TRAINING_KEYS = ("weight", "spans")
"""Keys of a `Message` that chat templates don't get."""


class Record:
    """What a format returns for a row. Subclass it for a kind of data that the package does not have."""

    def split_key(self) -> str:
        """Decides whether the row is held out, if a fraction of the rows is: the prompt, else all that it says."""
        return self.content_key()

    def content_key(self) -> str:
        """All that the record says: rows with the same are duplicates."""
        if type(self).__repr__ is not object.__repr__:
            return repr(self)
        return f"{type(self).__name__} {vars(self)}"  # the default representation has an address in memory

    def full_text(self) -> str:
        """The text whose words are compared to find near duplicates: all that the record says."""
        return self.content_key()


def beside(row: Row, values: Row) -> Row:
    """The columns of a row and `values`; columns of the row with a name of `values` are kept as `source_NAME`."""
    return {f"source_{name}" if name in values else name: value for name, value in row.items()} | values


@dataclass(frozen=True)
class Conversation(Record):
    """Turns that a chat template renders.

    `prompt_messages` is the number of leading messages that form the prompt, for rows that separate prompt and
    completion; None for a conversation that does not. `template_variables` are given to the chat template in addition.
    `weight` is a factor on the loss of each token.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    prompt_messages: int | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def split_key(self) -> str:
        """The turns before the last answer; all turns if there is none before it."""
        border = self.prompt_messages
        if border is None:
            border = len(self.messages) - (self.messages[-1]["role"] == "assistant")
        turns = self.messages[:border] or self.messages
        return "\n".join(f"{turn['role']}: {turn['content'] or turn}" for turn in turns)

    def full_text(self) -> str:
        """Contents, reasoning and calls of all turns but the system's, which many rows share."""
        texts: list[str | None] = []
        for turn in self.messages:
            if turn["role"] not in ("system", "developer"):
                calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else None
                texts += [turn.get("reasoning_content"), turn["content"], calls]
        return "\n".join(filter(None, texts))


@dataclass(frozen=True)
class Text(Record):
    """Text used without a chat template: a document, or the completion of a `prompt`.

    `weight` is a factor on the loss of each token.
    """

    text: str
    prompt: str = ""
    weight: float = 1.0

    def split_key(self) -> str:
        """The prompt; the text if there is none."""
        return self.prompt or self.text

    def full_text(self) -> str:
        """Prompt and text."""
        return self.prompt + self.text


@dataclass(frozen=True)
class Preference(Record):
    """Two responses to one prompt, the better one first.

    `chosen` and `rejected` have the same type and the same prompt: `prompt_messages` equal leading messages and the
    same `tools` and `template_variables` in conversations, the same `prompt` in texts. `margin` is how much better the
    chosen one is (for example the difference of two scores); None if the row does not say.
    """

    chosen: Conversation | Text
    rejected: Conversation | Text
    margin: float | None = None

    def split_key(self) -> str:
        """The prompt."""
        return self.chosen.split_key()

    def full_text(self) -> str:
        """Both responses, each with the prompt."""
        return f"{self.chosen.full_text()}\n{self.rejected.full_text()}"


@dataclass(frozen=True)
class BadRow:
    """Why a row can't be read or has no record."""

    reason: str


@dataclass(frozen=True)
class Feedback(Record):
    """One response to a prompt, and whether it is desirable.

    `response` separates prompt and response: a conversation with `prompt_messages`, or a text with a `prompt`. `label`
    is True or False; a score that is compared with a threshold; or None if the row does not say.
    """

    response: Conversation | Text
    label: bool | float | None

    def split_key(self) -> str:
        """The prompt."""
        return self.response.split_key()

    def full_text(self) -> str:
        """Prompt and response."""
        return self.response.full_text()


class Segment(NamedTuple):
    """A run of tokens: a root, or the continuation of the first tokens of an earlier segment's path.

    The path of a segment is all that its last token attends to: the first `shared` tokens of its parent's path, then
    its own tokens. A document is a root. A preference pair is a root (the prompt with the chosen response) and a
    continuation of it (the rejected response, after the prompt). A conversation may have one segment per answer. Tokens
    that several paths share are stored and computed once.
    """

    length: int
    """Number of its own tokens, at least 1."""
    parent: int = -1
    """Index of the earlier segment whose path it continues; -1 for a root."""
    shared: int = 0
    """How many leading tokens of the parent's path precede its own; 0 for a root."""


@dataclass(frozen=True)
class Example:
    """One tokenized row: a tree of segments, one after the other in `input_ids`.

    input_ids: `[tokens]` int32. loss_mask: `[tokens]` bool, True if the *token at that position* carries loss; False
    for the first token of a path, which nothing predicts. segments: their lengths add up to `tokens`, and only the
    first is a root; one segment with all tokens when left out. fields: numbers of the row (a margin, a label, a score),
    NaN if it has none; all examples of a data set have the same names. cut: tokens were removed to fit. straddled: a
    token holds characters of both the prompt and a target. empty_answer: the only target is the end of the answer.
    notes: what else the data report counts. weights: `[tokens]` float32, above 0 where `loss_mask` is True: factors on
    the losses of the tokens; None if all are 1. path_masks: for each segment, which tokens of its path carry loss,
    `[shared + length]` bool: a token that several paths share may carry loss in each of them, as completions that begin
    alike do; `loss_mask` is then not read. None: a token carries loss once.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    segments: tuple[Segment, ...] = ()
    fields: Mapping[str, float] = field(default_factory=dict)
    cut: bool = False
    straddled: bool = False
    empty_answer: bool = False
    notes: tuple[str, ...] = ()
    weights: np.ndarray | None = None
    path_masks: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        if not self.segments:
            object.__setattr__(self, "segments", (Segment(len(self.input_ids)),))

    @property
    def target_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return sum(int(mask.sum()) for mask in self.path_masks or (self.loss_mask,))

    @property
    def target_weight(self) -> float:
        """Sum of the weights of the tokens that carry loss."""
        if self.weights is None:
            return float(self.target_tokens)
        return float(self.weights[self.loss_mask].sum(dtype=np.float64))


class Inputs(TypedDict):
    """The inputs of a model.

    Padded inputs have an `attention_mask` and `lengths`. Packed ones have one row (`batch` = 1) and `segments`. Rows of
    equal length, one document each, need none of them. What is known on the host is kept there, since reading a GPU's
    tensor would wait for all work that is queued on it.
    """

    input_ids: torch.Tensor  # [batch, seq] int64
    position_ids: torch.Tensor  # [batch, seq] int64, the place of each token in its path
    attention_mask: NotRequired[torch.Tensor]  # [batch, seq] int64, 1 for a token, 0 for padding
    lengths: NotRequired[list[int]]  # [batch], tokens of each row without padding
    segments: NotRequired[list[Segment]]  # of the row


class Update(NamedTuple):
    """Totals of an optimizer update over all its micro-batches and ranks; each of its micro-batches carries them."""

    targets: int
    """Tokens that carry loss."""
    rows: int
    """Examples."""
    parts: int
    """Micro-batches over all ranks, whose gradients Lightning averages."""
    weight: float | None = None
    """Sum of the weights of the targets; None if all are 1."""

    def units(self, unit: str) -> float:
        """What the update is divided by: its `rows`, or its `targets` by weight."""
        return getattr(self, unit) if self.weight is None or unit != "targets" else self.weight


class Batch(TypedDict):
    """One micro-batch: a row of segments without padding, and its targets.

    A target is a token that carries loss. It is predicted at the token before it in its path; for the first token of a
    segment, that token is in the segment it continues. `oumi_pl.models.lm` turns a batch into model inputs.
    """

    input_ids: torch.Tensor  # [1, seq] int64
    position_ids: torch.Tensor  # [1, seq] int64, the place of each token in its path
    segments: list[Segment]  # their lengths add up to seq; each example begins with a root
    targets: torch.Tensor  # [targets] int64, the token to predict
    predictors: torch.Tensor  # [targets] int64, the position in the row whose hidden state predicts it
    target_segments: torch.Tensor  # [targets] int64, ascending: the segment that contains it, or whose path does
    fields: dict[str, torch.Tensor]  # [rows] float32 each: `Example.fields`
    sample_ids: list[int]  # [rows], ids of the examples; empty for the stand-in of a rank that ran out of rows
    weights: NotRequired[torch.Tensor]  # [targets] float32, factors on the losses; missing if all are 1
    weight: NotRequired[float]  # their sum, on the host; missing if all are 1
    update: NotRequired[Update]  # in training
    update_ids: NotRequired[list[int]]  # in training on a plan: ids of all examples of the update
    source: NotRequired[int]  # index of the source of all rows of a held-out batch
    text_bytes: NotRequired[int]  # UTF-8 bytes of the text of a held-out batch's targets


Sums = dict[str, torch.Tensor]
"""Sums over the targets or rows of a batch, by name; scalars."""


class UpdateLayout(Protocol):
    """How the rows of an update are divided: `ranks` x `micro_batches` x `batch_size`."""

    batch_size: int
    micro_batches: int
    ranks: int
    rank: int
    schedule: tuple[tuple[int, int], ...]
    """(first epoch, micro-batches per update from then on), if accumulation changes with the epoch."""

    @property
    def rows_per_update(self) -> int:
        """Rows of one update, over all ranks and micro-batches."""

    def at(self, epoch: int) -> "UpdateLayout":
        """The layout in an epoch: accumulation may change with it."""


class RunData(Protocol):
    """The part of a data module that modules, callbacks, preview, dry run, adapters and exports use."""

    added_tokens: list[int]
    """Ids that were added to the tokenizer's vocabulary."""
    batch_size: int
    branching: bool
    """Whether examples may have segments that continue others."""
    eval_batch_size: int
    max_length: int
    new_tokens: list[str]
    """Tokens that the recipe adds to the vocabulary."""
    own_pad: str | None
    """The pad token that the tokenizer came with; None if it has none."""
    own_template: Any
    """The chat template that the tokenizer came with; None if it has none."""
    packing: bool
    """Whether a row of the plan may hold several examples, kept apart by the attention."""
    samples: bool
    """Whether the policy samples the training rows while training."""
    sources: dict[str, Any]
    """`train`, `validation`, `test`, `predict` -> the recipe's value; None for a split that it leaves out."""
    streaming: bool
    """Whether training rows are tokenized while training, so that their number is unknown beforehand."""
    template: Any
    """The `oumi_pl.data.template.ChatTemplate` in use; None if rows have no turns."""
    tokenizer_spec: Any
    train_loader: Any
    """The training loader; None until it is created."""
    workers: int
    """Loader processes per device."""

    @property
    def layout(self) -> UpdateLayout:
        """How the rows of an update are divided over ranks and micro-batches."""

    @property
    def row_name(self) -> str:
        """The unit of `batch_size`: `row`, `pack` or `pair`."""

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end a completion besides EOS."""

    @property
    def streamed(self) -> list[str]:
        """Names of the training sources that are tokenized while training."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use."""

    def consumed(self) -> list[dict[str, Any]]:
        """What the current pass has read from each source; empty for data that follow a plan."""

    def held_out_rows(self) -> Iterator[tuple[str, str]]:
        """Source and origin (file and line) of each row that is held out, if a fraction of the rows is."""

    def largest_micro_batch(self) -> list[np.ndarray] | None:
        """Rows of the largest micro-batch of the first epoch, over all ranks; None if all are the same size."""

    def longest_path(self, splits: Iterable[str]) -> tuple[int, int] | None:
        """Bounds on the positions of the longest path in these splits: (least, most); None for `max_length`."""

    def needed(self, stage: str) -> Iterator[str]:
        """The splits that a stage reads; refuses a stage whose split has no source."""

    def prompts_by_source(self, split: str) -> list[Iterator[tuple[list[int], str]]]:
        """As `prompts`, for each source of a split."""

    def prompts(self, split: str) -> Iterator[tuple[list[int], str]]:
        """Prompt ids and reference answer of each row of a split."""

    def report(self) -> dict[str, Any]:
        """Counts per split: rows read, kept, dropped and cut, tokens, lengths."""

    def source_names(self, split: str) -> list[str]:
        """Names of the sources that get separate held-out metrics; a single name if there are no separate ones."""

    def tokens(self, updates: int) -> int:
        """Tokens in the first `updates` updates; estimated beyond the first few epochs."""

    def train_dataloader(self) -> Any:
        """The training loader."""

    def updates(self, epochs: int) -> int:
        """Number of optimizer updates in `epochs` epochs."""

    def val_dataloader(self) -> Any:
        """The loader of held-out rows."""


class RunModule(Protocol):
    """The part of a module that callbacks, the dry run, references, adapters and exports use."""

    compile_layers: bool
    details: ClassVar[tuple[str, ...]]
    """Metrics that are logged, but not shown in the terminal after a validation."""
    dtype_name: Any
    fp8: Any
    """Whether layers multiply in fp8; or `emulated`."""
    generates: ClassVar[bool]
    """Whether the model completes prompts, so that it can be sampled from."""
    generation_settings: dict[str, Any]
    """Arguments of `oumi_pl.models.generation.complete` for `predict`."""
    gradient_checkpointing: Any
    """False, True, or an `oumi_pl.models.recomputation.Recomputation`."""
    last_update: dict[str, float]
    """Sums of the last update over all micro-batches and ranks."""
    lora: dict[str, Any] | None
    loss: Any
    """The loss of a token or a pair, if it is an object that can be replaced; else None."""
    model_name: str | None
    quantization: Any
    reference: Any
    """The `oumi_pl.modules.reference.Reference`; None for trainer types without one."""
    run_config: str
    """The recipe as YAML, for checkpoints."""
    schedule: Any
    """The learning rate over optimizer steps, an `oumi_pl.optim.Schedule`."""
    tokens_seen: dict[str, int]
    trainer: Any
    trust_remote_code: bool

    @property
    def tokenizer_name(self) -> str | None:
        """The model whose tokenizer the data use unless they name one; None if there is none."""

    unit: ClassVar[str]
    """What an update is divided by: `targets` or `rows`."""

    @property
    def causal_lm(self) -> Any:
        """The model, an `oumi_pl.models.lm.LM`."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    @property
    def doubts(self) -> list[str]:
        """Advice on the settings for these data, which is given as warnings before the first update."""

    @property
    def notes(self) -> list[str]:
        """Lines about the model to print before the first update."""

    @property
    def weights_dtype(self) -> Any:
        """The dtype that the model is built in."""

    def build(self, tokenizer: Any, added_tokens: Sequence[int] = (), *, branching: bool | None = False) -> Any:
        """Builds the model for a tokenizer; see `oumi_pl.modules.base.LanguageModule.build`."""

    def count(self, batch: Any) -> dict[str, int]:
        """Counts of a batch: `rows`, `targets`, `tokens`, and `positions` (tokens and padding)."""

    def heads(self) -> dict[str, torch.Tensor]:
        """The weights beside the language model, by name."""

    def load_weights(self, saved_state: dict[str, Any]) -> None:
        """Loads the weights of a checkpoint."""

    def log(self, name: str, value: Any, *, rank_zero_only: bool = False, sync_dist: bool = False) -> None:
        """Logs a metric, as in Lightning."""

    def log_dict(self, dictionary: Any, *, batch_size: int | None = None) -> None:
        """Logs metrics, as in Lightning."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All weights, including those of heads."""

    def save(self, directory: Any, **settings: Any) -> None:
        """Writes a model folder: the language model and every head that was trained."""

    def state_dict(self) -> dict[str, Any]:
        """The weights that a checkpoint holds."""

    def units(self, sums: Mapping[str, Any]) -> Any:
        """What the sums of an update or a split are divided by: its targets by weight, or its rows."""

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    def apply_changed_settings(self) -> None:
        """Applies the optimizer settings that were changed since the checkpoint was written; once."""


SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
"""Stage -> the splits that it reads. `predict` is not listed: it reads prompts, not examples."""


class TokenLoss(ABC):
    """A loss per token. Subclass it and name the class by `class_path` to train with it.

    A loss with parameters of its own (a learned temperature) is an `nn.Module` as well: they are trained with the model
    and kept in checkpoints. Define `__call__` all the same, not `forward`.
    """

    @abstractmethod
    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Maps float32 `logits` `[n, vocab]` and `targets` `[n]` to losses `[n]`, token by token.

        It is called with a chunk of tokens at a time, and once for each token of a batch.
        """

    def metrics(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Metrics by name, `[n]` each, whose means over the targets are logged in training, validation and test.

        Called without gradients, on the same chunks as the loss. The names are the same for every chunk, also for one
        without tokens.
        """
        return {}


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of pairs of responses: the input of preference losses.

    logps: `[targets]`, of each target token under the policy, float32, differentiable.
    ref_logps: `[targets]`, the same under the reference; zeros if the loss uses none.
    branches: `[targets]`, ascending: `2 i` for tokens of pair `i`'s chosen response, `2 i + 1` for its rejected one.
    count: number of pairs.
    margins: `[pairs]`, how much better the chosen response is, NaN if unknown.
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
    """Factor from log-ratios to rewards."""
    needs_reference: bool = True
    """Whether the loss uses a reference. If not, none is created."""
    loss_at_start: float | None = None
    """The loss of any pair while policy and reference are equal; None if that depends on the pair."""

    @abstractmethod
    def __call__(self, pairs: Pairs) -> torch.Tensor:
        """Maps pairs to losses `[pairs]`; an update minimises their mean."""

    def metrics(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        """Metrics by name, `[pairs]` each, whose means are logged in training, validation and test.

        Called without gradients. The names are the same for every batch, also for one without pairs.
        """
        return {}

    def rewards(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Implicit rewards of the chosen and the rejected responses, `[pairs]` each, for the metrics.

        `beta log(policy / reference)` as in DPO (Rafailov et al. 2023, arXiv:2305.18290), and `beta log policy` for a
        loss without reference.
        """
        return self.beta * pairs.chosen_logratios, self.beta * pairs.rejected_logratios


@dataclass(frozen=True)
class Responses:
    """Log-probabilities of single responses, each desirable or not: the input of response losses.

    logps: `[targets]`, of each target token under the policy, float32, differentiable.
    ref_logps: `[targets]`, the same under the reference.
    rows: `[targets]`, ascending: the response of each target.
    desirable: `[rows]` bool.
    kl: scalar, the estimated KL divergence of the policy from the reference, at least 0, without gradient.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor
    rows: torch.Tensor
    desirable: torch.Tensor
    kl: torch.Tensor

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of `values` `[targets]` over each response, `[rows]`."""
        return values.new_zeros(len(self.desirable)).index_add(0, self.rows, values)

    @cached_property
    def logratios(self) -> torch.Tensor:
        """`log(policy / reference)` of each response, `[rows]`."""
        return self.sums(self.logps - self.ref_logps)


class ResponseLoss(ABC):
    """A loss on single responses. Subclass it and name the class by `class_path` to train with it."""

    beta: float = 1.0
    """Factor from log-ratios to rewards."""
    needs_kl: bool = True
    """Whether the loss reads `Responses.kl`. If not, it is not estimated, and 0."""
    loss_at_start: float | None = None
    """The loss of any response while policy and reference are equal; None if that depends on the response."""

    @abstractmethod
    def __call__(self, responses: Responses) -> torch.Tensor:
        """Maps responses to losses `[rows]`; an update minimises their weighted mean."""

    def rewards(self, responses: Responses) -> torch.Tensor:
        """Implicit rewards of the responses, `[rows]`, for the metrics: `beta log(policy / reference)`."""
        return self.beta * responses.logratios
