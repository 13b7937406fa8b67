"""Data for pretraining: documents as one stream of rows, from shards on the disk or tokenized as they are read."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal, get_args

from torch.utils.data import DataLoader

from oumi_pl.data.base import TextData
from oumi_pl.data.corpus import Part, shards_of
from oumi_pl.data.documents import Documents, TokenizeDocuments
from oumi_pl.data.held_out import HeldOut, held_out_loader, sliding_windows
from oumi_pl.data.plan import Layout, mixture_counts
from oumi_pl.data.report import describe_consumed, describe_documents
from oumi_pl.data.row_stream import Exhausted, RowStream, TokenMixture, batch_of
from oumi_pl.data.shards import Lengths, Shards
from oumi_pl.data.sources import as_sources, is_held_out, is_not_held_out, is_on_hub
from oumi_pl.data.stream_loader import StreamLoader
from oumi_pl.data.streamed import StreamedDocuments
from oumi_pl.data.trained_bpe import TrainedBPE, first_bytes
from oumi_pl.data.unchanged import identities, refuse_changed
from oumi_pl.data.windows import BestFit, Concat, Windows
from oumi_pl.errors import UserError, nearest

Packing = Literal["concat", "best_fit"]

PROMPT_TOKENS = 32
"""Tokens of a held-out document that a completion is sampled for."""


class PretrainData(TextData):
    """Documents become rows of exactly `max_length` tokens, every token a target, in one long reproducible stream.

    Documents are text files, rows with a column `text`, or a folder that `prepare` made. The weights of sources are
    shares in the tokens. `TrainedBPE` learns a tokenizer from the training documents.

    Args:
        args: As of `TextData`.
        packing: Join the documents and cut every `max_length` tokens, or pack whole documents by best fit and cut only
            those that are longer than a row.
        isolate: Keep the documents of a row apart: attention doesn't cross their borders, positions start anew.
        streaming: Tokenize while training. Without, documents are tokenized once, before the run, into shards.
        shuffle_buffer: Rows of which each next one is drawn; 0 leaves them in the order of the documents.
        exhausted: At the end of a source, `stop`: the pass (an epoch) is over; or `restart` that source: the stream has
            no end, and `trainer.max_steps` says when the run has.
        eval_stride: Tokens by which the window moves on over a held-out document. Less than `max_length`, which it is
            when left out, gives each token more context, and takes more time.
        kwargs: As of `TextData`. `workers` are processes per source that tokenize, when streaming; else, processes that
            load held-out documents.
    """

    def __init__(
        self,
        *args: Any,
        packing: Packing = "concat",
        isolate: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1024,
        exhausted: Exhausted = "stop",
        eval_stride: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, value, known in (("packing", packing, Packing), ("exhausted", exhausted, Exhausted)):
            if value not in get_args(known):
                raise UserError(f"data.{name}: unknown {value!r}{nearest(str(value), get_args(known))}")
        if shuffle_buffer < 0:
            raise UserError(f"data.shuffle_buffer is {shuffle_buffer}, but has to be at least 0")
        if eval_stride is not None and not 1 <= eval_stride <= self.max_length:
            between = f"between 1 and max_length, {self.max_length}"
            raise UserError(f"data.eval_stride is {eval_stride}, but has to lie {between}")
        if self.sources["train"] is not None:
            mixture_counts([1] * len(self.weights), self.weights)  # refuses what adds up to nothing
        self.packing = isolate
        self.isolate = isolate
        self.method: Packing = packing
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.exhausted: Exhausted = exhausted
        self.eval_stride = eval_stride or self.max_length
        self.__shards: dict[str, list[Shards]] = {}
        if isinstance(self.tokenizer_spec, TrainedBPE):
            self.tokenizer_spec.corpus = self.__corpus

    # ---- sources

    @property
    def weights(self) -> list[float | None]:
        """Shares of the training sources in the tokens; all None for one after the other."""
        return [source.weight for source in as_sources(self.sources["train"])]  # type: ignore[arg-type]

    def parts(self, split: str) -> list[Part]:
        """What a split takes of which sources."""
        held_out, value = self.sources["validation"], self.sources[split]
        if not isinstance(held_out, float) or split not in ("train", "validation"):
            return [Part(source) for source in as_sources(value)]  # type: ignore[arg-type]
        keep = partial(is_not_held_out if split == "train" else is_held_out, fraction=held_out)
        parts = [Part(s, keep, f"{split} {held_out}") for s in as_sources(self.sources["train"])]  # type: ignore[arg-type]
        for part in parts:
            if self.streaming and part.prepared is None and is_on_hub(part.source):
                raise UserError(
                    f"data.validation: to hold out a fraction of {part.source.path} means to download all of it, and "
                    "it is streamed; name a source for validation"
                )
        return parts

    def longest_path(self, splits: Iterable[str]) -> tuple[int, int] | None:
        """Positions that the longest document needs surely, and at most; None where rows go from end to end.

        The two differ where documents are streamed, of which nothing is known but that rows end at `max_length`, and
        where they are joined and cut, so that a row may begin within one.
        """
        if not self.isolate:
            return None
        sources = [s for split in splits for s in (self.documents if split == "train" else self.shards(split))]
        known = [source for source in sources if isinstance(source, Shards)]
        lengths = [int(source.lengths.max()) for source in known if len(source)]
        # a document's last token is a label, and among the inputs only where the next document is joined to it
        surely = min(self.max_length, max(lengths, default=1) - 1)
        at_most = min(self.max_length, surely + (self.method == "concat"))
        return surely, at_most if len(known) == len(sources) else self.max_length

    def source_names(self, split: str) -> list[str]:
        """Names of a split's sources, each once: what `source` in a held-out batch counts."""
        names = [part.name for part in self.parts(split)]
        if split in self.__shards:
            names = [shards.name for shards in self.__shards[split]]
        return [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]

    def shards(self, split: str) -> list[Shards]:
        """A split's documents on the disk: prepared, from the cache, or made now."""
        if split not in self.__shards:
            self.__shards[split] = [shards_of(part, self.tokenizer) for part in self.parts(split)]
        return self.__shards[split]

    @cached_property
    def documents(self) -> Sequence[Documents]:
        """The training documents of each source, tokenized on the fly if they are streamed."""
        if not self.streaming:
            return self.shards("train")
        tokenize = TokenizeDocuments(self.tokenizer)
        return [
            shards_of(part, self.tokenizer)
            if part.prepared is not None
            else StreamedDocuments(part.name, partial(part.texts, streaming=True), tokenize, self.workers)
            for part in self.parts("train")
        ]

    @property
    def streamed(self) -> list[str]:
        """Names of the training sources of which nothing is known before they are read."""
        names = zip(self.source_names("train"), self.documents, strict=True)
        return [name for name, documents in names if not isinstance(documents, Shards)]

    def __corpus(self) -> tuple[Any, Iterator[str]]:
        """What `TrainedBPE` learns from."""
        if self.sources["train"] is None:
            raise UserError("data.tokenizer: TrainedBPE learns from data.train, and the recipe names no source there")
        parts = self.parts("train")
        for part in parts:
            if part.prepared is not None:
                raise UserError(
                    f"data.tokenizer: TrainedBPE learns from texts, and {part.source.path} holds tokens; name the "
                    "tokenizer that they were made with"
                )
        assert isinstance(self.tokenizer_spec, TrainedBPE)
        most = max(1, self.tokenizer_spec.max_bytes // len(parts))
        texts = chain.from_iterable(first_bytes(part.texts(streaming=self.streaming), most) for part in parts)
        return [part.made_from(self.streaming) for part in parts], texts

    # ---- stages

    def make(self, split: str) -> None:
        """Tokenizes a split into shards, unless it is streamed; trains the tokenizer, if that is to be."""
        if split == "train" and self.streaming:
            _ = self.tokenizer
        else:
            self.shards(split)

    def setup(self, stage: str) -> None:
        """Opens what the stage needs, and stops before any weight is loaded if a source has no documents.

        Raises:
            UserError: one has none.
        """
        for split in self.needed(stage):
            if split == "train" and self.streaming:
                for part in self.parts("train"):
                    _ = part.prepared or is_on_hub(part.source)  # told now if nothing is there
                continue
            shards = self.shards(split)
            empty = [s for s in shards if not len(s)]
            if empty and (split == "train" or len(empty) == len(shards) or self.parts(split)[0].keep is None):
                rows = empty[0].manifest["report"]
                why = f"{rows['rows']} rows, {rows['empty']} of them empty"
                if not rows["rows"] and self.parts(split)[0].keep is not None:
                    why = "a fraction holds out whole documents; a text file is one unless `documents` divides it"
                raise UserError(f"data.{split}: {empty[0].name}: there are no documents in it ({why})")

    # ---- the stream

    def windows(self) -> Windows:
        """What makes rows of documents."""
        return (Concat if self.method == "concat" else BestFit)(self.max_length, self.isolate)

    def stream(self, epoch: int) -> RowStream:
        """The rows of an epoch, from its beginning: a function of documents, seed and epoch alone."""
        mixture = TokenMixture(self.documents, self.weights, self.exhausted)
        return RowStream(mixture, self.windows(), self.shuffle_buffer, self.run_seed, epoch)

    @property
    def rows_per_pass(self) -> int | None:
        """Rows of one pass; None if there is no end to it, or if it isn't known before everything was read."""
        return None if self.exhausted == "restart" else self.rows_till_exhausted

    @cached_property
    def rows_till_exhausted(self) -> int | None:
        """Rows until the first source is at its end (without weights, the last one); None for streamed ones.

        Where it takes more than an addition, the lengths of all documents are gone through.
        """
        shards = [d for d in self.documents if isinstance(d, Shards)]
        if len(shards) < len(self.documents):
            return None
        if self.weights[0] is None and self.method == "concat":
            return self.windows().count([s.tokens for s in shards])
        mixture = TokenMixture([Lengths(s) for s in shards], self.weights, "stop")
        return self.windows().count(map(len, mixture))

    def updates(self, epochs: int) -> int:
        """Optimizer updates in so many epochs.

        Raises:
            UserError: a pass has no end, or its length isn't known.
        """
        if self.rows_per_pass is None:
            why = "has no end" if self.exhausted == "restart" else "has a length that isn't known while it is streamed"
            raise UserError(
                f"a pass through the documents {why}; say how long to train by trainer.max_steps or max_tokens"
            )
        return math.ceil(self.rows_per_pass / self.layout.rows_per_update) * epochs

    def tokens(self, updates: int) -> int:
        """Tokens that the first so many updates train on: rows of `max_length`, the unfilled part of a last row too."""
        per_pass, per_update = self.rows_per_pass, self.layout.rows_per_update
        rows = updates * per_update
        if per_pass is not None:
            passes, rest = divmod(updates, math.ceil(per_pass / per_update))
            rows = passes * per_pass + min(rest * per_update, per_pass)
        return rows * self.max_length

    def make_train_loader(self) -> StreamLoader:
        """A loader that reads the stream."""
        trainer = self.trainer
        return StreamLoader(
            self.stream,
            self.layout,
            partial(batch_of, pad_id=self.pad_id),
            updates=None if self.rows_per_pass is None else self.updates(1),
            trained=None if trainer is None else lambda: trainer.global_step,
            limit=self.limit,
            pin_memory=self.fetching["pin_memory"],
        )

    def made_from(self) -> list[dict[str, Any]]:
        """What tells the documents from others, as far as that can be known without reading them."""
        return identities(self.parts("train"), self.documents)

    def refuse_changed(self, before: list[Any] | None, now: list[Any]) -> None:
        """Refuses to resume on other documents; says which.

        Raises:
            UserError: they are others.
        """
        refuse_changed(before or [], now, self.parts("train"))

    # ---- held-out documents

    def make_eval_loader(self, split: str) -> DataLoader:
        """Every document of a split once."""
        layout = Layout(self.eval_batch_size, 1, self.layout.ranks, self.layout.rank)
        held_out = HeldOut(self.shards(split), self.max_length, self.eval_stride, self.pad_id)
        return held_out_loader(held_out, layout, **self.fetching)

    def prompts(self, split: str) -> Iterator[tuple[list[int], str]]:
        """The beginning of each document of a split, and as much of how it goes on; of `predict`, whole texts."""
        if split == "predict":
            tokenize = TokenizeDocuments(self.tokenizer)
            for text in chain.from_iterable(part.texts() for part in self.parts(split)):
                yield tokenize.prompt(text), ""
            return
        for shards in self.shards(split):
            for ids in shards.read(0):
                tokens = min(PROMPT_TOKENS, max(1, len(ids) // 2))
                rest = ids[tokens : 2 * tokens].tolist()
                yield ids[:tokens].tolist(), str(self.tokenizer.decode(rest, skip_special_tokens=True))

    # ---- report

    def report(self) -> dict[str, Any]:
        """What became of the rows, per split whose documents are on the disk: see `describe_documents`."""
        return {
            split: self.__split_report(split) for split in ("train", "validation", "test") if split in self.__shards
        }

    def __split_report(self, split: str) -> dict[str, Any]:
        shards = self.shards(split)
        if split != "train":
            windows = [sliding_windows(s.lengths, self.max_length, self.eval_stride) for s in shards]
            return describe_documents(shards) | {"windows": sum(map(len, windows))}
        report = describe_documents(shards, across=self.method == "concat" and not self.isolate)
        inputs = report["tokens"] - 1
        if self.method == "best_fit":
            inputs = report["target_tokens"] if self.isolate else report["tokens"]
            report["split"] = sum(int((s.lengths > self.max_length + 1).sum()) for s in shards)
        report["fill"] = round(min(1.0, inputs / max(1, (self.rows_till_exhausted or 0) * self.max_length)), 6)
        if self.rows_per_pass is not None:
            report |= {"rows_planned": self.rows_per_pass, "updates_per_epoch": self.updates(1)}
        return report

    def consumed(self) -> list[dict[str, Any]]:
        """What was read in the running pass, per source: see `describe_consumed`."""
        position = self.train_loader.position() if self.train_loader is not None else {}
        if not position:
            return []
        return describe_consumed(position["stream"]["mixture"], self.source_names("train"), self.weights)
