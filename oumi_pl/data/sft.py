"""Data for supervised fine-tuning: conversations and completions, with loss on the answers."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from oumi_pl.data.code import code_of, settings_of
from oumi_pl.data.collate import collate
from oumi_pl.data.duplicates import Repeats
from oumi_pl.data.example_stream import (
    ExampleLoader,
    ExampleStream,
    Records,
    Rows,
    StreamedRecords,
    Units,
    left_out,
)
from oumi_pl.data.examples import ChatData
from oumi_pl.data.formats import format_name
from oumi_pl.data.plan import mixture_counts
from oumi_pl.data.records import record_reader
from oumi_pl.data.rendering import Turns
from oumi_pl.data.report import describe_consumed
from oumi_pl.data.sources import Source, find_files, is_on_hub
from oumi_pl.data.splitting import Side
from oumi_pl.data.store import cache_key, encode_all, with_fields
from oumi_pl.data.tokenize import Dropped, Tokenize
from oumi_pl.data.tokenizers import tokenizer_fingerprint
from oumi_pl.errors import UserError
from oumi_pl.types import BadRow, Example, Record

LOOKED_AT = 200
"""Rows of each streamed source that are tokenized before training, to see whether any can be used."""


class SFTData(ChatData):
    """Turns rows into conversations, renders them with a chat template, and marks the answers to carry loss.

    Args:
        args: See `TextData`.
        train_on: Which tokens carry loss. When left out: the completion if the row has one, all assistant turns of a
            conversation, all of a plain text. `completion_or_all`: the completion if the row has one, else all of it.
        turns: Whether the trained turns of a conversation share one text. `together`: they do. `apart`: each has a
            branch of its own, after the history as the template writes it for this turn. `auto`: together where that is
            the same, else apart (templates that remove the reasoning of earlier turns, for example).
        streaming: Read and tokenize training rows while training, instead of all of them before; `trainer.max_steps`
            then sets the length of the run. `workers` are tokenizing processes per source. Sources with weights are
            mixed and begin again at their end; without weights they follow each other.
        shuffle_buffer: Size, in rows (packs), of the buffer that streamed rows are drawn from; 0 keeps their order.
        kwargs: See `ChatData`.
    """

    def __init__(
        self,
        *args: Any,
        train_on: Literal["completion", "assistant", "last_turn", "all", "completion_or_all"] | None = None,
        turns: Turns = "auto",
        streaming: bool = False,
        shuffle_buffer: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.train_on = train_on
        self.turns: Turns = turns
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.__first: list[Example] = []
        if shuffle_buffer < 0:
            raise UserError(f"data.shuffle_buffer is {shuffle_buffer}, but has to be at least 0")
        if streaming:
            self.__refuse_what_needs_all_rows()

    @property
    def branching(self) -> bool:  # type: ignore[override]
        """Whether a conversation has a branch for each turn. Known once the splits are opened (`setup`)."""
        return self.has_branches or any(len(example.segments) > 1 for example in self.__first)

    @cached_property
    def tokenize(self) -> Tokenize:
        """Turns records into examples."""
        return Tokenize(
            self.tokenizer,
            self.max_length,
            self.train_on,
            self.overflow,
            turns=self.turns,
            lost=self.lost,
            renderer=self.renderer,
        )

    def encoding_key(self) -> list[Any]:
        """`train_on`, and what `ChatData` returns."""
        return [self.train_on, *super().encoding_key()]

    def report(self) -> dict[str, Any]:
        """Adds the rows whose turns are trained apart, and the tokens that this costs; see `ChatData`."""
        report = super().report()
        for split, described in report.items():
            stores = self.stores(split)
            if rows := sum(store.branched for store in stores):
                described["turns_apart"] = rows
                described["turns_apart_tokens"] = sum(store.beyond_longest for store in stores)
        return report

    # ---- streaming

    def __refuse_what_needs_all_rows(self) -> None:
        """Refuses settings that a stream can't honour."""
        needs_all = {"order_by": self.draws.ordered, "sample_by": self.draws.sampled}
        for key, value in (needs_all | {"near_duplicates": self.near_duplicates or None}).items():
            if value is not None:
                raise UserError(f"data.{key} needs all rows before training; leave out data.streaming")
        if self.sources["train"] is not None:
            mixture_counts([1] * len(self.source_weights), self.source_weights)  # refuses invalid weights
            if self.duplicates == "drop" and len(self.source_weights) > 1:
                raise UserError(
                    "data.duplicates: of several sources, repeated rows are only dropped before training, since each "
                    "stream would have to read the sources before it; leave out data.streaming"
                )

    def __is_streamed(self, split: str) -> bool:
        return self.streaming and split == "train"

    @property
    def streamed(self) -> list[str]:
        """Names of the training sources that are tokenized while training."""
        return [source.title for source in self.taken("train")[0]] if self.streaming else []

    def make(self, split: str) -> None:
        """Tokenizes a split, unless it is in the cache or streamed."""
        if not self.__is_streamed(split):
            super().make(split)
            return
        self.refuse_missing_weights()
        _ = self.tokenizer

    def check_split(self, split: str) -> None:
        """Opens the stores of a split, or reads the first rows of each streamed source.

        Raises:
            UserError: no row can be used.
        """
        if not self.__is_streamed(split):
            super().check_split(split)
            return
        self.__first = []
        for records in self.__records(workers=0):
            rows = list(itertools.islice(records.read(0), LOOKED_AT))
            for row in rows:
                if isinstance(row.result, BadRow) and self.bad_rows == "error":
                    raise UserError(f"{row.origin}: {row.result.reason}")
            examples = [row.result for row in rows if isinstance(row.result, Example)]
            if not examples:
                reasons = {row.result.reason for row in rows if isinstance(row.result, Dropped | BadRow)}
                raise UserError(
                    f"data.train: {records.name}: none of the first {len(rows)} rows can be used "
                    f"({', '.join(sorted(reasons)) or 'there are none'})"
                )
            self.__first += examples

    def __records(self, workers: int) -> list[StreamedRecords]:
        """The records of each training source."""
        sources, keep = self.taken("train")
        encode = self.alone().encode
        encode_batch = partial(encode_all, partial(with_fields, encode) if self.fields else encode)
        for source in sources:
            if keep is not None and is_on_hub(source):
                raise UserError(
                    f"data.validation: holding out a fraction of {source.title} would download all of it, but it is "
                    "streamed; name a source for validation"
                )
        return [StreamedRecords(source.title, self.__read(source, keep), encode_batch, workers) for source in sources]

    def __read(self, source: Source, keep: Side | None) -> Records:
        formats, fields, drops = self.formats, self.fields, self.duplicates == "drop"

        def read() -> Iterator[tuple[str, Record | Dropped | BadRow]]:
            records = record_reader(source, formats, fields).records(keep, strict=False, streaming=True)
            return Repeats(()).leave_out(records) if drops else records

        return read

    def stream(self, epoch: int) -> ExampleStream:
        """The rows of an epoch, from its start; depends only on sources, seed and epoch."""
        return ExampleStream(
            self.__records(self.workers),
            self.source_weights,
            UNITS[self.weight_by],
            Rows(self.capacity, self.bad_rows),
            shuffle_buffer=0 if self.overfits else self.shuffle_buffer,
            seed=self.run_seed,
            epoch=epoch,
        )

    def make_train_loader(self) -> Any:
        """Creates the loader that follows the plan, or that of the stream."""
        if not self.streaming:
            return super().make_train_loader()
        trainer = self.trainer
        return ExampleLoader(
            self.stream,
            self.layout,
            partial(_collated, pad_id=self.pad_id),
            trained=None if trainer is None else lambda: trainer.global_step,
            limit=self.limit,
            pin_memory=self.fetching["pin_memory"],
        )

    def updates(self, epochs: int) -> int:
        """Number of optimizer updates in `epochs` epochs.

        Raises:
            UserError: it is unknown, since rows are streamed.
        """
        if not self.streaming:
            return super().updates(epochs)
        raise UserError("a pass through the rows has an unknown length while streaming; set trainer.max_steps")

    def tokens(self, updates: int) -> int:
        """Tokens in the first `updates` updates; of streamed rows, as if all were as long as the first ones."""
        if not self.streaming:
            return super().tokens(updates)
        mean = np.mean([len(example.input_ids) for example in self.__first])
        return round(updates * self.layout.rows_per_update * float(self.capacity or mean))

    def longest_path(self, splits: Iterable[str]) -> tuple[int, int] | None:
        """See `ExampleData`; None for `max_length`, if rows are streamed."""
        return None if self.streaming else super().longest_path(splits)

    def largest_micro_batch(self) -> Any:
        """See `ExampleData`; None if rows are streamed."""
        return None if self.streaming else super().largest_micro_batch()

    def made_from(self) -> list[Any]:
        """See `ExampleData`. Streamed local files are identified by their size."""
        if not self.streaming:
            return super().made_from()
        sources, keep = self.taken("train")
        tokenizer, code = tokenizer_fingerprint(self.tokenizer), code_of(type(self), *(f for f, _ in self.formats))
        encoding = [tokenizer, self.max_length, self.encoding_key(), self.fields, self.bad_rows, self.duplicates]
        rows = [_identity(source) for source in sources], str(keep), self.source_weights, self.weight_by
        return ["streamed", cache_key(*rows, encoding, self.capacity, code, settings_of(self))]

    def consumed(self) -> list[dict[str, Any]]:
        """What the current pass has read from each streamed source, and why rows were dropped."""
        position = self.train_loader.position() if self.streaming and self.train_loader is not None else {}
        if not position:
            return []
        snapshot, dropped = position["stream"], left_out(position["stream"])
        sources = describe_consumed(snapshot["mixture"], self.streamed, self.source_weights)
        renamed = ({"rows" if key == "documents" else key: value for key, value in s.items()} for s in sources)
        return [source | {"dropped": dropped.get(i, {})} for i, source in enumerate(renamed)]


def _targets(example: Example) -> float:
    return example.target_weight


def _tokens(example: Example) -> float:
    return len(example.input_ids)


def _one(example: Example) -> float:
    return 1


UNITS: dict[str, Units] = {"rows": _one, "tokens": _tokens, "targets": _targets}
"""What `weight_by` measures of an example."""


def _collated(rows: Sequence[Any], numbers: Sequence[int], pad_id: int) -> Any:
    """A micro-batch; the numbers of examples are those in the pass, not those of their rows."""
    return collate([(row.numbers, row.examples) for row in rows], pad_id)


def _identity(source: Source) -> list[Any]:
    """What determines the rows of a streamed source, as far as possible without reading them."""
    condition = source.condition
    how: list[Any] = [source.config, source.split, source.revision, source.columns, source.ignore, source.label]
    how += [source.template_variables, source.documents, source.encoding, source.errors, source.sample]
    how += [source.sample_seed, source.format and format_name(source.format), condition and condition.key()]
    if source.rows is not None:
        return [*how, source.rows.fingerprint()]
    files = itertools.chain.from_iterable((find_files(source.address) or {}).values())
    sizes = [Path(file).stat().st_size for file in files]
    return [*how, sizes or source.address]
