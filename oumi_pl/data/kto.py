"""Data for KTO: single responses that are desirable or not, and mismatched ones that estimate the KL divergence."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from oumi_pl.data.examples import ChatData
from oumi_pl.data.feedback import FEEDBACK_FORMATS
from oumi_pl.data.reference import ReferenceLogps
from oumi_pl.data.tokenize import Dropped, Tokenize
from oumi_pl.errors import UserError
from oumi_pl.types import Example, Feedback, Record

DESIRABLE = "desirable"
"""The field of an example: 1 if its response is desirable, else 0."""
NO_LABEL = "no label"
"""Reason for dropping a row, as it is in reports."""
_SEED = 2402_01306
"""Of the order in which rows are mismatched. Fixed, so that runs with other seeds read the same cached reference."""


class TokenizeResponses(Tokenize):
    """Turns responses into examples of one text each, also if its turns would be generated in other contexts."""

    _as_one = True


class KTOData(ChatData):
    """Turns rows into single responses with the field `desirable`.

    Every row also has a *mismatched* row: its prompt with the response to another prompt, which the KL divergence of
    the policy from the reference is estimated on. Which one is fixed for a data set: the rows form a circle in a random
    order, and each takes the response of the next one that has another prompt. So the mismatched responses are those
    of the rows themselves, their reference log-probabilities are computed once, and validation does not depend on
    which rows share a batch.

    In `examples(split)`, the `n` rows of a split are followed by their mismatched rows, with the ids `n` to `2 n - 1`.
    Plans, loaders, reports and previews only use the rows.

    Args:
        args: See `TextData`. Rows have a prompt, a response and a label; pairs give two rows each.
        threshold: Lowest score of a desirable response, for labels that are scores. Without it, 1 is desirable, 0 and
            -1 are not, and other numbers are refused.
        group_by_length: Without packing, put rows of similar length into the same update, which saves padding for
            models that need it.
        kwargs: See `ChatData`.
    """

    formats = FEEDBACK_FORMATS
    mismatches: bool = True
    """Whether mismatched rows are used; set by a module that estimates no KL divergence."""

    def __init__(
        self, *args: Any, threshold: float | None = None, group_by_length: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, group_by_length=group_by_length, **kwargs)
        self.threshold = threshold
        self.__mismatched: dict[str, Mismatched] = {}

    # ---- rows

    @cached_property
    def tokenize(self) -> Tokenize:
        """Turns responses into examples, whose completion carries loss."""
        return TokenizeResponses(
            self.tokenizer, self.max_length, overflow=self.overflow, lost=self.lost, renderer=self.renderer
        )

    def encoding_key(self) -> list[Any]:
        """`overflow` and `threshold`."""
        return [*super().encoding_key(), self.threshold]

    def encode(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Turns feedback into examples with the field `desirable`.

        Raises:
            UserError: a record is no feedback, its label is a score and there is no threshold, or as for `Tokenize`.
        """
        rows = [_checked(record) for record in records]
        labels = [None if row.label is None else self.__is_desirable(row.label) for row in rows]
        examples = self.tokenize([row.response for row in rows])
        return [_labelled(*pair) for pair in zip(examples, labels, strict=True)]

    def __is_desirable(self, label: bool | float) -> bool:
        if isinstance(label, bool):
            return label
        if self.threshold is not None:
            return label >= self.threshold
        if label in (-1, 0, 1):
            return label == 1
        raise UserError(
            "the label is a number besides 1, 0 and -1, and so a score; set data.threshold to the lowest score of a "
            "desirable response"
        )

    def uncut(self, record: Record) -> tuple[Example, list[np.ndarray]] | None:
        """See `ChatData`."""
        return super().uncut(_checked(record).response)

    def full_row(self) -> list[Example]:
        """See `TextData`; the responses are desirable."""
        return [replace(example, fields={"desirable": 1.0} | dict(example.fields)) for example in super().full_row()]

    def prompt_of(self, record: Record) -> tuple[list[int], str] | None:
        """Prompt ids and answer if the response is desirable, and of rows without a label; None for others."""
        if not isinstance(record, Feedback):
            return self.tokenize.prompt_ids(record)
        if record.label is not None and self.__is_desirable(record.label):
            return self.tokenize.prompt_ids(record.response)
        return None

    def desirable(self, split: str) -> np.ndarray:
        """Whether each row of a split is desirable, `[rows]` bool."""
        return np.concatenate([store.fields.get(DESIRABLE, np.empty(0)) > 0.5 for store in self.stores(split)])

    def report(self) -> dict[str, Any]:
        """Adds the number of desirable rows; see `ExampleData`."""
        return {split: part | {DESIRABLE: int(self.desirable(split).sum())} for split, part in super().report().items()}

    # ---- mismatched rows

    def mismatched(self, split: str) -> "Mismatched":
        """The mismatched rows of a split."""
        if split not in self.__mismatched:
            self.__mismatched[split] = Mismatched(super().examples(split), self.max_length, f"data.{split}")
        return self.__mismatched[split]

    def mismatched_ids(self, split: str, ids: Sequence[int] | np.ndarray) -> list[int]:
        """The ids of the mismatched rows of some rows."""
        return (np.asarray(ids, dtype=np.int64) + len(self.lengths(split))).tolist()

    def evaluated_ids(self, split: str, batches: float) -> np.ndarray:
        """The rows in the first `batches` batches of every rank, in a pass over a held-out split."""
        plans, layout = self.eval_plans(split)
        passes = [(plan, i) for plan in plans for i in range(len(plan))]
        taken = passes[: int(min(batches, len(passes)))]
        return np.concatenate([np.empty(0, np.int64), *(plan.examples_of(i, layout, 1) for plan, i in taken)])

    def examples(self, split: str) -> Any:
        """The rows of a split, and after them their mismatched rows."""
        rows = super().examples(split)
        return WithMismatched(rows, self.mismatched(split)) if self.mismatches else rows

    def compared(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and tokens that carry loss of the rows and the mismatched rows, `[2 rows]` each."""
        lengths, targets = super().compared(split)
        if not self.mismatches:
            return lengths, targets
        more = self.mismatched(split)
        return np.concatenate([lengths, more.lengths]), np.concatenate([targets, more.targets])

    def compared_ids(self, split: str, ids: Sequence[int]) -> list[int]:
        """The rows and their mismatched rows."""
        return [*ids, *self.mismatched_ids(split, ids)] if self.mismatches else list(ids)

    def reference_logps(self, split: str, parts: dict[str, Any], width: int = 1) -> ReferenceLogps:
        """See `ExampleData`; they depend on the mismatched rows too."""
        return super().reference_logps(split, parts | {"mismatched": _SEED if self.mismatches else None}, width)

    def longest_path(self, splits: Iterable[str]) -> tuple[int, int] | None:
        """See `ExampleData`; a mismatched row may be longer than any row."""
        splits = list(splits)
        bounds = super().longest_path(splits)
        if bounds is None or not self.mismatches:
            return bounds
        longest = max((int(self.compared(split)[0].max(initial=0)) for split in splits), default=0)
        return longest, longest


class Mismatched(Dataset):
    """The mismatched rows of a data set: the prompt of each row with the response of another, cut to `max_length`.

    They are put together when they are asked for.

    Args:
        rows: The rows, each a single segment: a prompt, which ends at the first token that carries loss, and a
            response.
        max_length: Longest row in tokens; a longer one is cut at its end.
        place: Key of the rows, for messages.
    """

    def __init__(self, rows: Any, max_length: int, place: str) -> None:
        self.rows = rows
        self.max_length = max_length
        self.place = place

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        other = int(self.partners[index])
        row, partner = self.rows[index], self.rows[other]
        prompt, response = self.borders[index], self.borders[other]
        ids = np.concatenate([row.input_ids[:prompt], partner.input_ids[response:]])[: self.max_length]
        mask = np.concatenate([row.loss_mask[:prompt], partner.loss_mask[response:]])[: self.max_length]
        return Example(ids, mask, fields=row.fields)

    @cached_property
    def borders(self) -> np.ndarray:
        """Tokens of each row's prompt, `[rows]`."""
        return np.array([int(self.rows[i].loss_mask.argmax()) for i in range(len(self))], dtype=np.int64)

    @cached_property
    def partners(self) -> np.ndarray:
        """The row whose response each row's prompt is put together with, `[rows]`.

        Raises:
            UserError: all rows have the same prompt.
        """
        prompts = [self.rows[i].input_ids[:border].tobytes() for i, border in enumerate(self.borders.tolist())]
        if len(set(prompts)) < 2:
            raise UserError(
                f"{self.place}: all rows have the same prompt, so that there are no mismatched responses to estimate "
                "the KL divergence on; set model.kl: false"
            )
        return next_with_another_prompt(prompts)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each mismatched row, `[rows]`."""
        return np.minimum(self._whole, self.max_length)

    @cached_property
    def targets(self) -> np.ndarray:
        """Tokens that carry loss of each mismatched row, `[rows]`."""
        of_rows = np.array([self.rows[i].target_tokens for i in range(len(self))], dtype=np.int64)
        targets = of_rows[self.partners]
        for i in np.flatnonzero(self._whole > self.max_length).tolist():
            targets[i] = self[i].target_tokens
        return targets

    @cached_property
    def _whole(self) -> np.ndarray:
        """Tokens of each mismatched row before it is cut, `[rows]`."""
        responses = np.array([len(self.rows[i].input_ids) for i in range(len(self))], dtype=np.int64) - self.borders
        return self.borders + responses[self.partners]


class WithMismatched(Dataset):
    """The rows, and after them their mismatched rows."""

    def __init__(self, rows: Any, mismatched: Mismatched) -> None:
        self.rows = rows
        self.mismatched = mismatched

    def __len__(self) -> int:
        return len(self.rows) + len(self.mismatched)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index] if index < len(self.rows) else self.mismatched[index - len(self.rows)]


def next_with_another_prompt(prompts: Sequence[bytes]) -> np.ndarray:
    """For each row the next one in a random cyclic order whose prompt differs, `[rows]`; there are two prompts."""
    count = len(prompts)
    order = np.random.default_rng(_SEED).permutation(count).tolist()
    partners = np.empty(count, dtype=np.int64)
    following = 0  # place of the next row with another prompt; places from `count` on are a second round
    # backwards, so that rows with the same prompt in a row are walked over only once
    for place in range(2 * count - 2, -1, -1):
        row = order[place % count]
        if prompts[row] != prompts[order[(place + 1) % count]]:
            following = place + 1
        if place < count:
            partners[row] = order[following % count]
    return partners


def _checked(record: Record) -> Feedback:
    """Refuses records that are no feedback, as a user's format may return."""
    if not isinstance(record, Feedback):
        raise UserError(f"this row is a {type(record).__name__}; KTO needs a Feedback: a response and its label")
    return record


def _labelled(example: Example | Dropped, desirable: bool | None) -> Example | Dropped:
    if isinstance(example, Dropped):
        return example
    if example.weights is not None:
        raise UserError(
            "a turn or the row has a weight besides 0 and 1, and KTO counts whole responses; leave weights out, or set "
            "model.desirable_weight for all desirable rows"
        )
    return Dropped(NO_LABEL) if desirable is None else replace(example, fields={DESIRABLE: float(desirable)})
