"""Data for reward models: pairs of responses that share their prompt, and single responses with an outcome."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from oumi_pl.attention.segments import segment_starts
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.formats import FORMATS, Formats, find_format
from oumi_pl.data.pairs import EQUAL, TokenizePairs
from oumi_pl.data.preferences import PREFERENCE_FORMATS
from oumi_pl.data.rendering import ChatRenderer
from oumi_pl.data.store import ExampleStore
from oumi_pl.data.tokenize import Dropped, Lost, Overflow, Tokenize
from oumi_pl.data.turns import is_finite
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Example, Preference, Record, Row, Segment, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OUTCOMES = ("label", "score")
"""Columns that hold an outcome; the first one that a row has counts."""


@dataclass(frozen=True)
class Rated(Record):
    """A response with its prompt, and how good it is: 0 or 1, or a score."""

    response: Conversation | Text
    outcome: float

    def split_key(self) -> str:
        """The prompt."""
        return self.response.split_key()


def rated(row: Row) -> Rated:
    """Reads a conversation, or a prompt and its completion, in any format of SFT, and its `label` or `score`.

    Raises:
        UserError: the outcome is no number, nor true or false, or no format fits the other columns.
    """
    name = next((name for name in OUTCOMES if name in row), OUTCOMES[0])
    value = row.get(name)
    if not is_finite(value):
        raise UserError(f"column {name!r} holds {value!r:.40} instead of a number, true or false")
    rest = {column: content for column, content in row.items() if column not in OUTCOMES}
    response: Any = find_format(rest, FORMATS)(rest)
    return Rated(response, float(value))


RATED_FORMATS: Formats = tuple((rated, (name,)) for name in OUTCOMES)


class TokenizeResponses(TokenizePairs):
    """Turns pairs and rated responses into examples whose only targets are the tokens at which a score is read.

    transformers' sequence-classification models read the score of a row at its last token that is not the pad token. So
    pad tokens at the end of a response are removed, and its last token is the one that is scored. (A pad token at the
    end is rare: it takes a tokenizer that pads with the token that ends a text.)

    The fields are `margin`, NaN for a rated response, and `outcome`, NaN for a pair.

    Args:
        tokenizer: See `Tokenize`; it has to have a pad token.
        max_length: Longest prompt with one response, in tokens.
        overflow: See `TokenizePairs`.
        lost: See `Tokenize`.
        renderer: See `Tokenize`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        overflow: Overflow = "truncate",
        lost: Lost = "error",
        renderer: ChatRenderer | None = None,
    ) -> None:
        super().__init__(tokenizer, max_length, overflow, lost, renderer)
        self._pad = tokenizer.pad_token_id

    def __call__(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Tokenizes pairs (`Preference`) and rated responses (`Rated`), in order.

        Raises:
            UserError: a pair can't be tokenized (see `TokenizePairs`), or a record is neither.
        """
        for record in records:
            if not isinstance(record, Preference | Rated):
                raise UserError("this row is neither a pair of responses nor a response with a label or a score")
            if isinstance(record, Rated) and record.response.weight != 1:
                raise UserError("this row has a weight, and all rows of a reward model count alike; leave it out")
        pairs = iter(super().__call__([r for r in records if isinstance(r, Preference)]))
        single = iter(Tokenize.__call__(self, [r.response for r in records if isinstance(r, Rated)]))
        examples = []
        for record in records:
            if isinstance(record, Rated):
                examples.append(self._scored(next(single), {"margin": math.nan, "outcome": record.outcome}))
            else:
                example = next(pairs)
                fields = {} if isinstance(example, Dropped) else dict(example.fields)
                examples.append(self._scored(example, fields | {"outcome": math.nan}))
        return examples

    def _scored(self, example: Example | Dropped, fields: dict[str, float]) -> Example | Dropped:
        """Removes pad tokens from the ends of the responses, and marks their last tokens."""
        if isinstance(example, Dropped):
            return example
        starts = segment_starts(example.segments)
        own = [example.input_ids[a:b] for a, b in pairwise(starts)]
        prompt = max((segment.shared for segment in example.segments), default=0)
        kept = [_without_end(ids, self._pad) for ids in own]
        if len(kept[0]) <= prompt or not all(map(len, kept)):
            return Dropped("empty response")
        if len(kept) == 2 and np.array_equal(kept[0][prompt:], kept[1]):
            return Dropped(EQUAL)
        segments = tuple(s._replace(length=len(ids)) for s, ids in zip(example.segments, kept, strict=True))
        ids = np.concatenate(kept)
        mask = np.zeros(len(ids), dtype=bool)
        mask[np.cumsum([segment.length for segment in segments]) - 1] = True
        if mask[0]:
            return Dropped("a single token")
        return replace(
            example, input_ids=ids, loss_mask=mask, segments=segments, fields=fields, straddled=False, weights=None
        )


def response_ids(tokenize: Tokenize, response: Conversation | Text, pad: int | None) -> np.ndarray:
    """Ids `[tokens]` of a response with its prompt, cut as `tokenize` says, up to the token at which it is scored.

    Raises:
        UserError: it can't be rendered, or is too long.
    """
    marked = tokenize.mark(response)
    assert not isinstance(marked, Dropped), "lost: drop leaves nothing to score"
    (tokens,) = tokenize.tokens(marked.texts)
    kept = tokenize.kept(tokens.ids, int(tokens.mask.argmax()))
    assert not isinstance(kept, Dropped), "overflow: drop leaves nothing to score"
    return _without_end(tokens.ids[kept], pad)


def as_pair(chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, tuple[Segment, ...]]:
    """Joins the ids of two responses `[tokens]`: those that both begin with are stored once.

    Returns:
        Ids `[tokens]`, and two segments.
    """
    shorter = min(len(chosen), len(rejected))
    differs = chosen[:shorter] != rejected[:shorter]
    shared = min(int(differs.argmax()) if differs.any() else shorter, len(rejected) - 1)
    second = Segment(len(rejected) - shared, *((0, shared) if shared else ()))
    return np.concatenate([chosen, rejected[shared:]]), (Segment(len(chosen)), second)


def _without_end(ids: np.ndarray, pad: int | None) -> np.ndarray:
    """Removes pad tokens from the end."""
    (content,) = np.nonzero(ids != pad)
    return ids[: content[-1] + 1 if len(content) else 0]


class WithSource(Dataset):
    """Examples with the number of their source as a field."""

    def __init__(self, store: ExampleStore, source: int) -> None:
        self.store = store
        self.source = source

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Example:
        example = self.store[index]
        return replace(example, fields={**example.fields, "source": float(self.source)})


class RewardData(DPOData):
    """Turns rows into pairs of responses to one prompt, or into single responses with an outcome.

    A row is a pair as for `DPOData`, or has a response and a `label` (0 or 1, true or false) or a `score`. Sources of
    both kinds may be mixed. The score of a response is read at its last token.

    Args:
        args: See `TextData`.
        kwargs: See `DPOData`.
    """

    formats = (*PREFERENCE_FORMATS, *RATED_FORMATS)

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """See `ChatData`; pads with EOS if there is no pad token, as usual for reward models.

        Raises:
            UserError: there is neither.
        """
        added = super().prepare_tokenizer(tokenizer)
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise UserError(
                    "data.tokenizer: it has neither a pad token nor EOS, and exported reward models need one"
                )
            tokenizer.pad_token = tokenizer.eos_token
        return added

    @cached_property
    def tokenize(self) -> TokenizeResponses:
        """Turns pairs and rated responses into examples."""
        return TokenizeResponses(self.tokenizer, self.max_length, self.overflow, self.lost, self.renderer)

    def encoding_key(self) -> list[Any]:
        """`overflow`, and the pad token."""
        return [*super().encoding_key(), self.pad_id]

    def uncut(self, record: Record) -> None:
        """Returns None: examples don't say where the prompt of a rated response ends."""

    def prompt_of(self, record: Record) -> tuple[list[int], str]:
        """Prompt ids and the row's (chosen) response."""
        return self.tokenize.prompt_ids(record.response if isinstance(record, Rated) else record)

    # ---- sources

    def examples(self, split: str) -> Any:
        """See `ExampleData`; held-out rows of several sources have the field `source`."""
        if split == "train" or len(self.stores(split)) < 2:
            return super().examples(split)
        return ConcatDataset([WithSource(store, i) for i, store in enumerate(self.stores(split))])

    # ---- report

    def report(self) -> dict[str, Any]:
        """Adds the number of pairs, of pairs without a margin, and a summary of the outcomes; see `ExampleData`."""
        return {split: report | self.__kinds(split) for split, report in super().report().items()}

    def __kinds(self, split: str) -> dict[str, Any]:
        margins, outcomes = (
            np.concatenate([store.fields[name] for store in self.stores(split) if len(store)])
            for name in ("margin", "outcome")
        )
        is_rated = ~np.isnan(outcomes)
        kinds: dict[str, Any] = {
            "pairs": int((~is_rated).sum()),
            "pairs_without_margin": int((~is_rated & np.isnan(margins)).sum()),
        }
        if is_rated.any():
            values = outcomes[is_rated]
            kinds["outcomes"] = {
                "rows": len(values),
                **{name: round(float(getattr(values, name)()), 6) for name in ("min", "mean", "max")},
            }
        return kinds
