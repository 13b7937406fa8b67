"""Data for pretraining: documents as one stream of rows, from shards on disk or tokenized while training."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Literal, get_args

from torch.utils.data import DataLoader

from oumi_pl.data.base import TextData
from oumi_pl.data.corpus import Part, shards_of
from oumi_pl.data.documents import Documents, TokenizeDocuments
from oumi_pl.data.duplicates import Duplicates
from oumi_pl.data.held_out import HeldOut, held_out_loader, sliding_windows
from oumi_pl.data.plan import Layout, mixture_counts
from oumi_pl.data.report import describe_consumed, describe_documents, describe_repeated, source_report
from oumi_pl.data.row_stream import Exhausted, RowStream, TokenMixture, batch_of
from oumi_pl.data.shards import Lengths, Shards
from oumi_pl.data.sources import as_sources, by_line, find_files, is_on_hub
from oumi_pl.data.stream_loader import StreamLoader
from oumi_pl.data.streamed import StreamedDocuments
from oumi_pl.data.trained_bpe import TrainedBPE, first_bytes
from oumi_pl.data.windows import BestFit, Concat, Windows
from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Row

Packing = Literal["concat", "best_fit"]

PROMPT_TOKENS = 32
"""Tokens of a held-out document that a completion is sampled for."""


class PretrainData(TextData):
    """Turns documents into one reproducible stream of rows of `max_length` tokens, with every token a target.

    Documents are text files, rows with a column `text`, or a folder that `prepare` made. The weights of sources are
    shares of the tokens. `TrainedBPE` trains a tokenizer on the training documents.

    Args:
        args: See `TextData`.
        packing: `concat` joins the documents and cuts every `max_length` tokens; `best_fit` packs whole documents and
            cuts only those that are longer than a row.
        isolate: Keep the documents of a row apart: attention doesn't cross their borders, positions restart at 0.
        streaming: Tokenize while training. Otherwise documents are tokenized into shards once, before the run.
        shuffle_buffer: Size, in rows, of the buffer that rows are drawn from; 0 keeps the order of the documents.
        duplicates: What happens to training documents that repeat an earlier one word for word: `keep` uses them,
            `drop` leaves them out, which takes about 300 bytes of memory per document. Unless they are streamed, the
            data report counts them, and held-out documents that are in training too.
        near_duplicates: Also count documents that are nearly the same: those of a split that share at least half of
            their runs of 13 words with an earlier one, and held-out documents that share one with training. They are
            counted and never left out, not even with `duplicates: drop`. Takes seconds per 10,000 documents, once, and
            8 bytes of disk per word meanwhile.
        exhausted: At the end of a source, `stop` ends the pass (an epoch); `restart` begins that source again, so that
            only `trainer.max_steps` ends the run.
        eval_stride: Tokens by which the window over a held-out document moves; `max_length` when left out. A smaller
            stride gives each token more context and takes more time.
        kwargs: See `TextData`. `workers` are tokenizing processes per source when streaming, else processes that load
            held-out documents.
    """

    def __init__(
        self,
        *args: Any,
        packing: Packing = "concat",
        isolate: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1024,
        duplicates: Duplicates = "keep",
        near_duplicates: bool = False,
        exhausted: Exhausted = "stop",
        eval_stride: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, value, known in (
            ("packing", packing, Packing),
            ("exhausted", exhausted, Exhausted),
            ("duplicates", duplicates, Duplicates),
        ):
            if value not in get_args(known):
                raise UserError(f"data.{name}: unknown {value!r}{nearest(str(value), get_args(known))}")
        if shuffle_buffer < 0:
            raise UserError(f"data.shuffle_buffer is {shuffle_buffer}, but has to be at least 0")
        if near_duplicates and streaming:
            raise UserError("data.near_duplicates needs all documents before training; leave out data.streaming")
        if eval_stride is not None and not 1 <= eval_stride <= self.max_length:
            between = f"between 1 and max_length, {self.max_length}"
            raise UserError(f"data.eval_stride is {eval_stride}, but has to be {between}")
        if self.sources["train"] is not None:
            mixture_counts([1] * len(self.weights), self.weights)  # refuses invalid weights
        self.packing = isolate
        self.isolate = isolate
        self.method: Packing = packing
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.duplicates: Duplicates = duplicates
        self.near_duplicates = near_duplicates
        self.exhausted: Exhausted = exhausted
        self.eval_stride = eval_stride or self.max_length
        self.__shards: dict[str, list[Shards]] = {}
        self.__same: dict[str, dict[str, Any]] = {}
        if isinstance(self.tokenizer_spec, TrainedBPE):
            self.tokenizer_spec.corpus = self.__corpus

    # ---- sources

    @property
    def weights(self) -> list[float | None]:
        """Shares of the training sources in the tokens; all None to read one after the other."""
        return [source.weight for source in as_sources(self.sources["train"])]

    def parts(self, split: str) -> list[Part]:
        """The parts of sources that a split uses."""
        sources, keep = self.taken(split)
        parts = [Part(source, keep) for source in sources]
        for part in parts:
            if keep and self.streaming and part.prepared is None and is_on_hub(part.source):
                raise UserError(
                    f"data.validation: holding out a fraction of {part.source.title} would download all of it, but it "
                    "is streamed; name a source for validation"
                )
        return parts

    def longest_path(self, splits: Iterable[str]) -> tuple[int, int] | None:
        """Bounds on the positions of the longest document; None without `isolate`, where all rows have `max_length`.

        The bounds differ for streamed documents, whose lengths are unknown, and for `concat`, where rows begin anywhere
        in a document.
        """
        if not self.isolate:
            return None
        sources = [s for split in splits for s in (self.documents if split == "train" else self.shards(split))]
        known = [source for source in sources if isinstance(source, Shards)]
        lengths = [int(source.lengths.max()) for source in known if len(source)]
        # a document's last token is only a label, except with `concat`, where the next document may follow in the row
        least = min(self.max_length, max(lengths, default=1) - 1)
        most = min(self.max_length, least + (self.method == "concat"))
        return least, most if len(known) == len(sources) else self.max_length

    def source_names(self, split: str) -> list[str]:
        """Unique names of a split's sources, indexed by `source` of a held-out batch."""
        names = [part.name for part in self.parts(split)]
        if split in self.__shards:
            names = [shards.name for shards in self.__shards[split]]
        return [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]

    def shards(self, split: str) -> list[Shards]:
        """A split's documents on disk: prepared, from the cache, or written now."""
        if split not in self.__shards:
            shards: list[Shards] = []
            for part in self.parts(split):
                shards.append(shards_of(self.without_repeated(split, part, shards), self.tokenizer))
            self.__shards[split] = shards
        return self.__shards[split]

    def without_repeated(self, split: str, part: Part, before: Sequence[Shards] = ()) -> Part:
        """The part, without documents that repeat one of `before` or an earlier one of its own, if they are dropped.

        Raises:
            UserError: they are to be dropped from shards that were prepared.
        """
        is_held_out = split == "validation" and isinstance(self.sources["validation"], float)
        if self.duplicates == "keep" or not (split == "train" or is_held_out):
            return part
        if part.prepared is not None:
            raise UserError(
                f"data.duplicates: {part.prepared} holds tokens; documents are dropped when they are prepared: set "
                "`duplicates: drop` there, and leave it out here"
            )
        return part._replace(before=tuple(before))

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
            for part in self.__streamed_parts()
        ]

    def __streamed_parts(self) -> list[Part]:
        parts = self.parts("train")
        if self.duplicates == "drop" and len(parts) > 1:
            raise UserError(
                "data.duplicates: of several sources, repeated documents are only dropped from shards, since each "
                "stream would have to read the sources before it; leave out data.streaming"
            )
        return [self.without_repeated("train", part) for part in parts]

    @property
    def streamed(self) -> list[str]:
        """Names of the training sources that are tokenized while training."""
        names = zip(self.source_names("train"), self.documents, strict=True)
        return [name for name, documents in names if not isinstance(documents, Shards)]

    def __corpus(self) -> tuple[Any, Iterator[str]]:
        """What the texts for `TrainedBPE` depend on, and the texts."""
        if self.sources["train"] is None:
            raise UserError("data.tokenizer: TrainedBPE learns from data.train, and the recipe names no source there")
        parts = self.parts("train")
        for part in parts:
            if part.prepared is not None:
                raise UserError(
                    f"data.tokenizer: TrainedBPE learns from texts, and {part.source.title} holds tokens; name the "
                    "tokenizer that they were made with"
                )
        assert isinstance(self.tokenizer_spec, TrainedBPE)
        most = max(1, self.tokenizer_spec.max_bytes // len(parts))
        texts = itertools.chain.from_iterable(first_bytes(part.texts(streaming=self.streaming), most) for part in parts)
        return [part.made_from(self.streaming) for part in parts], texts

    # ---- stages

    def make(self, split: str) -> None:
        """Tokenizes a split into shards, unless it is streamed; trains the tokenizer first, if it is a `TrainedBPE`."""
        if split == "train" and self.streaming:
            _ = self.tokenizer  # trained here, on one rank per node
        else:
            self.shards(split)
            if self.near_duplicates:
                self.__repeated(split)

    def setup(self, stage: str) -> None:
        """Opens the sources of a stage, and stops before weights are loaded if one has no documents.

        Raises:
            UserError: a source has no documents, or does not exist.
        """
        for split in self.needed(stage):
            if split == "train" and self.streaming:
                for part in self.parts("train"):
                    _ = part.prepared or is_on_hub(part.source)  # raises if the source does not exist
                continue
            shards = self.shards(split)
            empty = [s for s in shards if not len(s)]
            if empty and (split == "train" or len(empty) == len(shards) or self.parts(split)[0].keep is None):
                rows = empty[0].manifest["report"]
                why = f"{rows['rows']} rows, {rows['empty']} of them empty"
                if not rows["rows"] and self.parts(split)[0].keep is not None:
                    why = "a fraction holds out whole documents; a text file is one unless `documents` divides it"
                raise UserError(f"data.{split}: {empty[0].name}: there are no documents in it ({why})")

    # ---- training rows

    def windows(self) -> Windows:
        """Creates the `Windows` that make rows of documents."""
        return (Concat if self.method == "concat" else BestFit)(self.max_length, self.isolate)

    def stream(self, epoch: int) -> RowStream:
        """The rows of an epoch, from its start; depends only on documents, seed and epoch."""
        mixture = TokenMixture(self.documents, self.weights, self.exhausted)
        buffer = 0 if self.overfits else self.shuffle_buffer
        return RowStream(mixture, self.windows(), buffer, self.run_seed, epoch)

    @property
    def rows_per_pass(self) -> int | None:
        """Rows of one pass; None if it is endless, or unknown because of streaming."""
        return None if self.exhausted == "restart" else self.rows_till_exhausted

    @cached_property
    def rows_till_exhausted(self) -> int | None:
        """Rows until the first source (without weights, the last one) ends; None if a source is streamed.

        With weights or best fit, this simulates the mixture on the lengths of all documents.
        """
        shards = [d for d in self.documents if isinstance(d, Shards)]
        if len(shards) < len(self.documents):
            return None
        if self.weights[0] is None and self.method == "concat":
            return self.windows().count([s.tokens for s in shards])
        mixture = TokenMixture([Lengths(s) for s in shards], self.weights, "stop")
        return self.windows().count(map(len, mixture))

    def updates(self, epochs: int) -> int:
        """Number of optimizer updates in `epochs` epochs, within `limit_train_batches`.

        Raises:
            UserError: a pass is endless, or its length is unknown.
        """
        rows = self.rows_per_pass
        if rows is None and self.exhausted == "restart" and isinstance(self.limit, int):
            rows = self.limit * self.layout.batch_size * self.layout.ranks  # the limit ends the pass
        if rows is None:
            why = "has no end" if self.exhausted == "restart" else "has an unknown length while streaming"
            raise UserError(f"a pass through the documents {why}; set trainer.max_steps or max_tokens")
        return sum(self.layout.at(epoch).updates(rows, self.limit) for epoch in range(epochs))

    def tokens(self, updates: int) -> int:
        """Tokens in the first `updates` updates, as if every row had `max_length`."""
        per_pass, per_update = self.rows_per_pass, self.layout.rows_per_update
        rows = updates * per_update
        if per_pass is not None:
            passes, rest = divmod(updates, math.ceil(per_pass / per_update))
            rows = passes * per_pass + min(rest * per_update, per_pass)
        return rows * self.max_length

    def make_train_loader(self) -> StreamLoader:
        """Creates the loader of the stream."""
        trainer = self.trainer
        return StreamLoader(
            self.stream,
            self.layout,
            partial(batch_of, pad_id=self.pad_id),
            rows=self.rows_per_pass,
            trained=None if trainer is None else lambda: trainer.global_step,
            limit=self.limit,
            pin_memory=self.fetching["pin_memory"],
        )

    def made_from(self) -> list[dict[str, Any]]:
        """Identifies the documents of each source, as far as possible without reading them.

        Shards know what they were made from. Streamed local files are identified only by their size, since hashing a
        corpus takes as long as reading it, and streams from the hub not at all.
        """
        identities = []
        for part, documents in zip(self.parts("train"), self.documents, strict=True):
            if isinstance(documents, Shards):
                source = json.dumps(documents.manifest.get("source"), default=str)
                texts = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
                identities.append({"texts": texts, "tokens": documents.tokens})
            else:
                if part.source.rows is not None:
                    identities.append({"rows": part.source.rows.fingerprint()})
                    continue
                files = itertools.chain.from_iterable((find_files(part.source.address) or {}).values())
                sizes = [path.stat().st_size for path in files]
                identities.append({"bytes": sum(sizes)} if sizes else {})
        return identities

    def refuse_changed(self, before: list[Any] | None, now: list[Any]) -> None:
        """Refuses to resume on other documents; names the source that has changed.

        A streamed run may resume from shards and vice versa: only what both identify is compared.

        Raises:
            UserError: a source has changed.
        """
        for part, old, new in zip(self.parts("train"), before or [], now, strict=False):
            if any(old[key] != new[key] for key in old.keys() & new.keys()):
                raise UserError(
                    f"data.train: {part.source.title} has changed since the checkpoint was written, so the run can't "
                    "resume; undo the change, or start a new run from its model"
                )

    # ---- held-out documents and prompts

    def make_eval_loader(self, split: str) -> DataLoader:
        """Creates a loader with every document of a split once."""
        layout = Layout(self.eval_batch_size, 1, self.layout.ranks, self.layout.rank)
        held_out = HeldOut(self.shards(split), self.max_length, self.eval_stride, self.pad_id)
        return held_out_loader(held_out, layout, **self.fetching)

    def prompts(self, split: str) -> Iterator[tuple[list[int], str]]:
        """The beginning of each document of a split, and as much of its continuation; for `predict`, whole texts."""
        if split == "predict":
            yield from ((ids, reference) for ids, reference, _ in self.__texts_to_continue())
            return
        yield from itertools.chain.from_iterable(map(self.__beginnings, self.shards(split)))

    def prompts_by_source(self, split: str) -> list[Iterator[tuple[list[int], str]]]:
        """See `TextData`."""
        if split == "predict" or type(self).prompts is not PretrainData.prompts:
            return super().prompts_by_source(split)
        return list(map(self.__beginnings, self.shards(split)))

    def __beginnings(self, shards: Shards) -> Iterator[tuple[list[int], str]]:
        for ids in shards.read(0):
            tokens = min(PROMPT_TOKENS, max(1, len(ids) // 2))
            rest = ids[tokens : 2 * tokens].tolist()
            yield ids[:tokens].tolist(), str(self.tokenizer.decode(rest, skip_special_tokens=True))

    def prompts_with_rows(self, split: str) -> Iterator[tuple[list[int], str, Row]]:
        """As `prompts`; those of `predict` with their rows, unless a subclass has prompts of its own."""
        if split != "predict" or type(self).prompts is not PretrainData.prompts:
            return super().prompts_with_rows(split)
        return self.__texts_to_continue()

    def __texts_to_continue(self) -> Iterator[tuple[list[int], str, Row]]:
        """The texts of `predict`, of which a text file has one per line, with their rows."""
        tokenize = TokenizeDocuments(self.tokenizer)
        parts = [part._replace(source=by_line(part.source)) for part in self.parts("predict")]
        for text, row in itertools.chain.from_iterable(part.texts_with_rows() for part in parts):
            yield tokenize.prompt(text), "", row

    # ---- report

    def report(self) -> dict[str, Any]:
        """Counts per split whose documents are on disk: see `describe_documents`."""
        return {
            split: self.__split_report(split) for split in ("train", "validation", "test") if split in self.__shards
        }

    def __split_report(self, split: str) -> dict[str, Any]:
        shards = self.shards(split)
        if split != "train":
            windows = [sliding_windows(s.lengths, self.max_length, self.eval_stride) for s in shards]
            return describe_documents(shards) | self.__repeated(split) | {"windows": sum(map(len, windows))}
        report = describe_documents(shards, across=self.method == "concat" and not self.isolate)
        report |= self.__repeated(split)
        inputs = report["tokens"] - 1
        if self.method == "best_fit":
            inputs = report["target_tokens"] if self.isolate else report["tokens"]
            report["split"] = sum(int((s.lengths > self.max_length + 1).sum()) for s in shards)
        report["fill"] = round(min(1.0, inputs / max(1, (self.rows_till_exhausted or 0) * self.max_length)), 6)
        if self.rows_per_pass is not None:
            first = self.layout.at(0)
            report |= {"rows_planned": self.rows_per_pass, "updates_per_epoch": first.updates(self.rows_per_pass)}
        return report

    def __repeated(self, split: str) -> dict[str, Any]:
        """The part of a report about documents that repeat others, counted once."""
        if split not in self.__same:
            shards, training = self.shards(split), self.__shards.get("train") if split != "train" else None
            unknown = [s for s in (*shards, *(training or ())) if not s.has_keys]
            if unknown and self.near_duplicates:
                raise UserError(
                    f"data.near_duplicates: {unknown[0].directory} was prepared by an earlier version, which didn't "
                    "write where its documents are from; prepare it again, or leave out data.near_duplicates"
                )
            reports = [source_report(s) for s in shards]
            described = describe_repeated(shards, reports, training) if not unknown else {}
            if self.near_duplicates:
                described = self.__with_near_duplicates(described, reports, shards, training)
            self.__same[split] = described
        return self.__same[split]

    def __with_near_duplicates(
        self,
        described: dict[str, Any],
        reports: list[dict[str, Any]],
        shards: Sequence[Shards],
        training: Sequence[Shards] | None,
    ) -> dict[str, Any]:
        from oumi_pl.data.near_duplicates import RowTexts, name_of, with_near_duplicates

        def rows(documents: Shards) -> RowTexts:
            name = name_of(documents, documents.manifest["tokenizer"])
            return RowTexts(name, documents, partial(self.__texts, documents), documents.name)

        of_training = None if training is None else [*map(rows, training)]
        return with_near_duplicates(described, reports, [*map(rows, shards)], of_training)

    def __texts(self, shards: Shards) -> Iterator[tuple[int, str]]:
        """The number and the text of each document; of prepared shards, there are tokens alone."""
        for number, ids in enumerate(shards.read(0)):
            yield number, str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def held_out_rows(self) -> Iterator[tuple[str, str]]:
        """See `TextData`."""
        if isinstance(self.sources["validation"], float):
            for shards in self.shards("validation"):
                yield from ((shards.name, origin) for origin in shards.held_out)

    def consumed(self) -> list[dict[str, Any]]:
        """What the current pass has read from each source: see `describe_consumed`."""
        position = self.train_loader.position() if self.train_loader is not None else {}
        if not position:
            return []
        stream = position["stream"]
        return describe_consumed(stream["mixture"], self.source_names("train"), self.weights, stream["running"])
