"""Data for distillation that alternates between the rows' answers and completions that the student samples."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from oumi_pl.data.collate import collate
from oumi_pl.data.examples import ChatData, largest_micro_batch
from oumi_pl.data.formats import FORMATS, Formats
from oumi_pl.data.plan import Plan
from oumi_pl.data.prompts import Prompt
from oumi_pl.data.rollout_loader import RolloutLoader
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.tokenize import Dropped, Marked, Tokenize
from oumi_pl.errors import UserError
from oumi_pl.types import Batch, Conversation, Example, Record, Text, Update

KIND = 1
"""Appended to the seed, so that the choice of an update's kind has random numbers of its own."""


class DistillData(RolloutData):
    """Trains on completions that the student samples in a share `lmbda` of the updates, else on the rows' answers.

    The kind of each update is drawn as in GKD (Agarwal et al. 2023, arXiv:2306.13649, algorithm 1). It depends on
    the seed, the epoch and the update's number only, so ranks, micro-batches and resuming don't change it. The
    answer of a row is its completion or the last turn, which has to be the assistant's; the student completes the
    tokens before it. Held-out rows are evaluated on their answers. For answers alone use `SFTData`, for prompts
    without answers `RolloutData`.

    Args:
        args: As in `TextData`.
        lmbda: Probability from 0 to 1 that an update trains on sampled completions.
        completions: Completions sampled per prompt.
        kwargs: As in `RolloutData`, except those for rewards and for several updates per rollout.
    """

    formats: Formats = FORMATS
    prompt_formats = ChatData.prompt_formats

    def __init__(self, *args: Any, lmbda: float = 0.5, completions: int = 1, **kwargs: Any) -> None:
        super().__init__(
            *args,
            reward=None,
            completions=completions,
            steps_per_rollout=1,
            iterations=1,
            extra_rounds=0,
            mask_truncated=False,
            overlong_tokens=0,
            overlong_penalty=0.0,
            eval_completions=1,
            success=1.0,
            pass_at=None,
            metrics=None,
            **kwargs,
        )
        if not 0 <= lmbda <= 1:
            raise UserError(f"data.lmbda is {lmbda}, but has to be a probability, from 0 to 1")
        self.lmbda = lmbda
        self.most_prompt_tokens = self.room
        """Maximum number of tokens of a prompt."""
        self.__prompts: dict[str, list[Prompt]] = {}

    def is_sampled(self, epoch: int, update: int) -> bool:
        """Whether an update trains on sampled completions; it is the same for all ranks, layouts and resumes."""
        return bool(np.random.default_rng([self.run_seed, epoch, update, KIND]).random() < self.lmbda)

    # ---- rows are examples with an answer, as in SFTData

    report = ChatData.report
    made_from = ChatData.made_from
    plan = ChatData.plan
    column_values = ChatData.column_values
    held_out_rows = ChatData.held_out_rows
    row_texts = ChatData.row_texts
    validation_metrics = ChatData.validation_metrics
    lengths = ChatData.lengths
    make_eval_loader = ChatData.make_eval_loader

    def setup(self, stage: str) -> None:
        """See `ExampleData`.

        Raises:
            UserError: no row of a split is left, or weights are to be sharded.
        """
        self.refuse_sharded_weights()
        ChatData.setup(self, stage)

    @cached_property
    def tokenize(self) -> Tokenize:
        """Tokenizes prompts with their answers."""
        return TokenizeAnswers(
            self.tokenizer, self.max_length, "completion", self.overflow, lost=self.lost, renderer=self.renderer
        )

    def encode(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Turns records into examples whose targets are the answer.

        Raises:
            UserError: a record has no prompt, or does not end with an answer.
        """
        return [self.__fitting(example) for example in super().encode(records)]

    def encoding_key(self) -> list[Any]:
        """Most tokens of a prompt, and what `ChatData` returns."""
        return [self.most_prompt_tokens, *super().encoding_key()]

    def __fitting(self, example: Example | Dropped) -> Example | Dropped:
        if isinstance(example, Example) and int(example.loss_mask.argmax()) > self.most_prompt_tokens:
            return Dropped("prompt leaves no room for a completion")
        return example

    def all_prompts(self, split: str) -> list[Prompt]:
        """What the student completes: the tokens of each example before its first target. In memory."""
        if split not in self.__prompts:
            self.__prompts[split] = [
                Prompt(example.input_ids[: int(example.loss_mask.argmax())].tolist(), {}, f"{title}, example {i}")
                for title, store in zip(self.__titles(split), self.stores(split), strict=True)
                for i, example in enumerate(map(store.__getitem__, range(len(store))), 1)
            ]
        return self.__prompts[split]

    def __titles(self, split: str) -> list[str]:
        return [source.title for source in self.taken(split)[0]]

    # ---- updates

    def make_train_loader(self) -> "DistillLoader":  # type: ignore[override]
        """Creates the loader that samples if an update is due for it."""
        return DistillLoader(self, self.plan, self.layout)

    def answers(self, rows: Sequence[int], all_rows: Sequence[int], parts: int) -> Batch:
        """The micro-batch of some examples' answers.

        Args:
            rows: Examples of the micro-batch.
            all_rows: Those of its update.
            parts: Micro-batches of the update over all ranks.
        """
        examples = self.examples("train")
        batch: Any = collate([([i], [examples[i]]) for i in rows], self.pad_id)
        batch["update"] = Update(int(self.targets("train")[all_rows].sum()), len(all_rows), parts)
        return batch

    # ---- estimates

    def largest_micro_batch(self) -> list[np.ndarray]:
        """Rows of the first epoch's micro-batch with the most tokens, with answers or with the longest completions."""
        tokens = np.maximum(self.lengths("train"), self.__sampled_lengths())
        return largest_micro_batch(self.plan(0), tokens, self.batch_size)

    def tokens(self, updates: int) -> int:
        """Expected tokens in the first `updates` updates, if no completion ends early."""
        answers = super().tokens(updates)
        sampled = answers * self.__sampled_lengths().sum() / max(1, self.lengths("train").sum())
        return round(self.lmbda * sampled + (1 - self.lmbda) * answers)

    def sampled_updates(self, updates: int) -> int:
        """How many of the first `updates` updates train on sampled completions."""
        per_epoch = max(1, self.updates(1))
        return sum(self.is_sampled(*divmod(i, per_epoch)) for i in range(updates))

    def __sampled_lengths(self) -> np.ndarray:
        """Most tokens of each training prompt with its completions, `[examples]`."""
        return self.prompt_lengths("train") + self.completions * self.sampling.max_new_tokens


class DistillLoader(RolloutLoader):
    """Yields this rank's micro-batches of each update, of sampled completions or of answers."""

    data: DistillData

    def _batches(self, plan: Plan, update: int) -> Iterator[Batch]:
        data, layout = self.data, self.position.layout_now
        is_sampled = data.is_sampled(self.position.epoch, update)
        if is_sampled:
            batches = super()._batches(plan, update)
        else:
            self.trained = None  # no completions
            ids = plan.examples_of(update, layout, layout.within(data.limit, update, len(plan))).tolist()
            shares = layout.shares(len(ids))
            batches = (data.answers([ids[i] for i in share], ids, layout.parts) for share in shares)
        for batch in batches:
            sampled: Any = batch
            sampled["sampled"] = is_sampled
            yield batch


class TokenizeAnswers(Tokenize):
    """Tokenizes rows whose answer is their completion, if that is text, or their last turn."""

    def mark(self, record: Record) -> Marked | Dropped:
        """See `Tokenize`.

        Raises:
            UserError: a record has no prompt, or does not end with an answer.
        """
        if isinstance(record, Text) and not record.prompt:
            raise UserError("this row is a text without a prompt, so there is nothing to complete; use SFTData")
        return super().mark(record)

    def _turns(self, record: Conversation) -> list[int]:
        last = len(record.messages) - 1
        if record.messages[last]["role"] != "assistant":
            raise UserError(
                "this row does not end with a turn of the assistant, so it has no answer; RolloutData needs none"
            )
        return super()._turns(replace(record, prompt_messages=last))
