"""Base classes of data whose rows each become an example, and of such data with chat templates."""

import copy
import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from datetime import date as Date
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from torch.utils.data import ConcatDataset, DataLoader

from oumi_pl.data import report as reports
from oumi_pl.data.base import TextData
from oumi_pl.data.code import code_of, settings_of
from oumi_pl.data.collate import collate, full_document
from oumi_pl.data.draws import Draws, SampleBy, drawn
from oumi_pl.data.duplicates import Duplicates
from oumi_pl.data.formats import FORMATS, Formats
from oumi_pl.data.loader import PlanLoader, eval_loader
from oumi_pl.data.plan import Layout, Plan, mixture_counts, mixture_epoch, plan_epoch, plan_in_order
from oumi_pl.data.prompts import PROMPT_FORMATS, PromptsWithRows, RecordsWithRows, RecordWithRow
from oumi_pl.data.records import OnBadRows
from oumi_pl.data.reference import ReferenceLogps
from oumi_pl.data.rendering import ChatRenderer, Turns
from oumi_pl.data.sources import Source, as_sources, by_line, titles
from oumi_pl.data.splitting import Side
from oumi_pl.data.store import ExampleStore, example_store
from oumi_pl.data.template import apply_template, check_variables, load_template
from oumi_pl.data.template_date import template_date
from oumi_pl.data.tokenize import Dropped, Lost, Overflow, Tokenize
from oumi_pl.data.tokenizers import tokenizer_fingerprint
from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Batch, Example, Record, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from oumi_pl.data.near_duplicates import RowTexts

EXACT_EPOCHS = 10
"""Epochs whose tokens are counted exactly; later ones are estimated from these."""
WeightBy = Literal["rows", "tokens", "targets"]
REMEDIES = {
    "max_length": "; raise data.max_length, which is {}, or set data.overflow: truncate",
    "once cut": "; raise data.max_length, which is {}",
    "no target tokens": "; a row needs an answer, which is a turn of the assistant, to learn from",
}
"""Part of a reason for dropping rows -> advice if no row is left."""


class ExampleData(TextData):
    """Reads, tokenizes, caches, plans and loads examples. Subclasses define how a record becomes an example.

    Args:
        args: See `TextData`.
        packing: Put several examples into one row, isolated from each other.
        group_by_length: Without packing, put examples of similar length into the same update, which saves padding for
            models that need it.
        bad_rows: What happens if rows can't be used (a damaged line, an unknown role, turns that the chat template
            refuses): `error` stops the run and lists all kinds of them, `drop` leaves them out and counts them.
        duplicates: What happens to training rows that repeat an earlier one word for word: `keep` uses them, `drop`
            leaves them out. The data report counts them in both cases.
        near_duplicates: Also count rows that are nearly the same: those of a split for which an earlier row has at
            least half of the runs of 13 words that either of both has (a word that is changed changes 13 runs, so rows
            of about 50 words or more), and held-out rows that share one with training. They are counted and
            never left out, not even with `duplicates: drop`: two questions about one long text are near, too. Takes
            seconds per 10,000 rows, once.
        weight_by: What the weights of sources are shares of: `rows`, `tokens`, or `targets` (tokens that carry loss, by
            their weight). With long and short answers these differ; the data report shows all three.
        sample_by: How often training rows are drawn, by a column. A column with numbers, such as `quality`, draws rows
            in proportion to them. `{lang: {en: 0.7, de: 0.3}}` gives classes these shares of the rows of an epoch, and
            `{lang: balanced}` gives all classes equal ones. The data report counts what is drawn.
        order_by: Column whose value orders the training rows of each epoch, instead of a shuffle: the smallest first,
            or the largest with `-` before the name. Rows with equal values are shuffled among themselves. Packs are
            filled in this order.
        fields: Columns with numbers that a batch has by name in `batch["fields"]`, one number per row: NaN where a row
            has `null`.
        processes: Processes that tokenize rows, with the same result for any number. They call `encode`; files are read
            and formats are called in the main process.
        kwargs: See `TextData`.
    """

    def __init__(
        self,
        *args: Any,
        packing: bool = False,
        group_by_length: bool = True,
        bad_rows: OnBadRows = "error",
        duplicates: Duplicates = "keep",
        near_duplicates: bool = False,
        weight_by: WeightBy = "rows",
        sample_by: SampleBy | None = None,
        order_by: str | None = None,
        fields: Sequence[str] = (),
        processes: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if processes < 1:
            raise UserError(f"data.processes is {processes}, but has to be at least 1")
        self.processes = processes
        for name, value, known in (
            ("bad_rows", bad_rows, OnBadRows),
            ("duplicates", duplicates, Duplicates),
            ("weight_by", weight_by, WeightBy),
        ):
            if value not in get_args(known):
                raise UserError(f"data.{name}: unknown {value!r}{nearest(str(value), get_args(known))}")
        self.bad_rows: OnBadRows = bad_rows
        self.duplicates: Duplicates = duplicates
        self.near_duplicates = near_duplicates
        self.weight_by: WeightBy = weight_by
        self.draws = Draws(sample_by, order_by)
        self.fields = list(fields)
        self.packing = packing
        self.group_by_length = group_by_length
        self.__stores: dict[str, list[ExampleStore]] = {}
        self.__same: dict[str, dict[str, Any]] = {}
        self.__drawn_by: tuple[np.ndarray, np.ndarray] | None = None

    # ---- what a subclass defines

    @abstractmethod
    def encode(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Turns records into examples, or into the reason why not."""

    def encoding_key(self) -> list[Any]:
        """Settings that `encode` depends on, as part of the cache's key.

        Tokenizer, `max_length`, the code of the class and of all that it uses, and the attributes that its own methods
        read are in the key anyway.
        """
        return []

    formats: Formats = FORMATS
    """The formats that rows may have."""
    prompt_formats: Formats = PROMPT_FORMATS
    """The same for the rows of `predict`, of which only the prompt is read."""

    segment_names: Sequence[str] = ()
    """Names of an example's segments, in order, if it has several."""

    def uncut(self, record: Record) -> tuple[Example, list[np.ndarray]] | None:
        """A record's example before it is cut, and which tokens are kept, for the preview.

        Returns:
            The whole example, and for each segment the indices of its own tokens that are kept, ascending. None if the
            record is dropped, or if the class does not implement this.
        """
        return None

    @property
    def row_name(self) -> str:
        """The unit of `batch_size`."""
        return "pack" if self.packing else "row"

    @property
    def capacity(self) -> int | None:
        """Tokens that a pack holds; None without packing."""
        return self.max_length if self.packing else None

    def capacity_for(self, split: str) -> int | None:
        """As `capacity`, but at least the tokens of the longest example, whose branches may add up to more."""
        return None if self.capacity is None else max(self.capacity, int(self.lengths(split).max(initial=0)))

    def full_row(self) -> list[Example]:
        """See `TextData`; a pack holds two documents, of two thirds and of one third of its tokens."""
        if self.capacity is None:
            return [full_document(self.max_length, self.fields)]
        short = max(2, self.capacity // 3)
        return [full_document(n, self.fields) for n in (max(2, self.capacity - short), short)]

    @property
    def has_branches(self) -> bool:
        """Whether an example of the splits that were opened so far has several segments."""
        return any(store.branched for stores in self.__stores.values() for store in stores)

    # ---- stages

    def make(self, split: str) -> None:
        """Tokenizes a split, unless it is in the cache."""
        if split == "train":
            self.refuse_missing_weights()
        self.stores(split)
        if self.near_duplicates:
            self.__repeated(split)

    def refuse_missing_weights(self) -> None:
        """Refuses `weight_by` without weights.

        Raises:
            UserError: no training source has one.
        """
        if self.weight_by != "rows" and all(weight is None for weight in self.source_weights):
            raise UserError(f"data.weight_by: {self.weight_by} needs weights, and no source of data.train has one")

    def setup(self, stage: str) -> None:
        """Opens the stores of a stage, and stops before weights are loaded if there is nothing to train on.

        Raises:
            UserError: no row of a split is left, or all answers are empty.
        """
        for split in self.needed(stage):
            self.check_split(split)

    def check_split(self, split: str) -> None:
        """Opens the stores of a split.

        Raises:
            UserError: no row is left, or all answers are empty.
        """
        total = reports.merged([store.report for store in self.stores(split)])
        if not total["kept"]:
            if not total["rows"]:
                held_out = self.sources["validation"]
                raise UserError(
                    f"data.validation: {held_out} of the rows of data.train, chosen by a hash of the prompt, "
                    f"leaves none for {split}; name a source for validation, another fraction, or a data.group"
                )
            reasons = ", ".join(f"{n} {reason}" for reason, n in total["dropped"].items())
            advice = next((advice for part, advice in REMEDIES.items() if part in reasons), "")
            raise UserError(
                f"data.{split}: none of {total['rows']} rows is left ({reasons}){advice.format(self.max_length)}"
            )
        if split == "train" and total["empty_answers"] == total["kept"]:
            which = "all" if total["kept"] == total["rows"] else "the"
            raise UserError(
                f"data.{split}: the answers of {which} {total['kept']} rows are empty; the model would only learn "
                "to end at once"
            )

    # ---- examples

    def stores(self, split: str) -> list[ExampleStore]:
        """The tokenized sources of a split, from the cache or written now."""
        if split not in self.__stores:
            sources, keep = self.taken(split)
            stores: list[ExampleStore] = []
            for source in sources:
                before = stores if self.drops_repeated(split) else None
                stores.append(self.__store(source, keep, before, self.kept_columns(split)))
            names = [sorted(store.fields) for store in stores if len(store)]
            if names != names[:1] * len(names):
                raise UserError(f"data.{split}: the examples of its sources have different fields: {names}")
            self.__stores[split] = stores
        return self.__stores[split]

    def drops_repeated(self, split: str) -> bool:
        """Whether rows that repeat an earlier one are left out: rows of training, and those that are held out of it."""
        is_held_out = split == "validation" and isinstance(self.sources["validation"], float)
        return self.duplicates == "drop" and (split == "train" or is_held_out)

    def held_out_rows(self) -> Iterator[tuple[str, str]]:
        """Source and origin (file and line) of each row that is held out, if a fraction of the rows is."""
        if isinstance(self.sources["validation"], float):
            for store in self.stores("validation"):
                # a row may have several examples
                yield from ((store.report["source"], origin) for origin in dict.fromkeys(store.origins))

    def examples(self, split: str) -> Any:
        """All examples of a split as one map-style dataset."""
        return ConcatDataset(self.stores(split))  # type: ignore[arg-type]

    def lengths(self, split: str) -> np.ndarray:
        """Tokens of every example of a split, `[examples]`."""
        return np.concatenate([store.lengths for store in self.stores(split)])

    def targets(self, split: str) -> np.ndarray:
        """Tokens that carry loss, of every example of a split, `[examples]`."""
        return np.concatenate([store.targets for store in self.stores(split)])

    def target_weights(self, split: str) -> np.ndarray | None:
        """The sum of these tokens' weights, of every example of a split, `[examples]`; None if all are 1."""
        stores = self.stores(split)
        if all(store.target_weights is None for store in stores):
            return None
        return np.concatenate([s.targets if s.target_weights is None else s.target_weights for s in stores])

    def longest_path(self, splits: Iterable[str]) -> tuple[int, int] | None:
        """The positions of the longest path, if rows hold several examples; None for `max_length`."""
        if not self.packing:
            return None
        longest = max((store.longest for split in splits for store in self.stores(split)), default=0)
        return longest, longest

    def records(self, split: str) -> Iterator[tuple[str, Record]]:
        """The records of a split with their origin, not tokenized, for `predict` and samples."""
        for origin, record in self.records_with_rows(split):
            yield origin, record.record

    @property
    def line_column(self) -> str:
        """The column of a line of a text file, in the rows of `predict`."""
        return "text"

    def records_with_rows(self, split: str) -> Iterator[tuple[str, RecordWithRow]]:
        """As `records`, each with its row."""
        return itertools.chain.from_iterable(self.records_by_source(split))

    def records_by_source(self, split: str) -> list[Iterator[tuple[str, RecordWithRow]]]:
        """As `records_with_rows`, for each source."""
        sources, keep = self.taken(split)
        formats, reader = self.formats, RecordsWithRows
        if split == "predict":
            formats, reader = self.prompt_formats, PromptsWithRows
            sources = [by_line(source, self.line_column) for source in sources]
        strict = self.bad_rows == "error"
        return [_usable(reader(source, formats).records(keep, strict=strict)) for source in sources]

    def kept_columns(self, split: str) -> list[str]:
        """Columns that rows of a split are drawn or ordered by."""
        return self.draws.columns if split == "train" else []

    def column_values(self, name: str) -> Sequence[Any]:
        """The values of one of these columns, of each training example."""
        return [value for store in self.stores("train") for value in store.columns.get(name, ())]

    def __store(
        self, source: Source, keep: Side | None, before: Sequence[ExampleStore] | None, kept: Sequence[str]
    ) -> ExampleStore:
        key = [str(keep), tokenizer_fingerprint(self.tokenizer), self.max_length, self.encoding_key()]
        code = code_of(type(self), *(function for function, _ in self.formats))
        return example_store(
            source,
            [*key, code, settings_of(self)],
            self.encode if self.processes == 1 else self.alone().encode,
            keep,
            self.formats,
            bad_rows=self.bad_rows,
            columns=self.fields,
            kept=kept,
            processes=self.processes,
            before=before,
        )

    def alone(self) -> "ExampleData":
        """A copy that can be sent to other processes: without the trainer, which can't."""
        alone = copy.copy(self)
        alone.trainer = None
        alone.__stores = {}
        return alone

    def batch(self, split: str, ids: Sequence[int]) -> Batch:
        """A batch of some examples of a split, by id."""
        examples = self.examples(split)
        return collate([([i], [examples[i]]) for i in ids], self.pad_id)

    def in_batches(self, split: str, ids: Sequence[int]) -> list[list[int]]:
        """Groups ids into batches with at most as many tokens as a validation micro-batch may have, longest first."""
        lengths = self.compared(split)[0][np.asarray(ids, dtype=np.int64)]
        budget = self.eval_batch_size * (self.capacity_for(split) or int(lengths.max(initial=0)))
        batches: list[list[int]] = []
        tokens = budget
        for i in np.argsort(-lengths, kind="stable").tolist():
            tokens += int(lengths[i])
            if tokens > budget:
                batches.append([])
                tokens = int(lengths[i])
            batches[-1].append(int(ids[i]))
        return batches

    def compared(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and tokens that carry loss, of all examples that a reference may be asked about, `[examples]` each.

        A data set may have more of them than rows to train on; their ids follow those of the rows.
        """
        return self.lengths(split), self.targets(split)

    def compared_ids(self, split: str, ids: Sequence[int]) -> list[int]:
        """The examples that a reference is asked about when a batch of `ids` is trained on."""
        return list(ids)

    def reference_logps(self, split: str, parts: dict[str, Any], width: int = 1) -> ReferenceLogps:
        """The store for reference log-probabilities of a split's targets.

        Args:
            split: `train`, `validation` or `test`.
            parts: Everything that they depend on besides the examples: the reference model, its precision.
            width: Values per target.
        """
        names = [store.directory.name for store in self.stores(split)]
        return ReferenceLogps(parts | {"examples": names}, self.compared(split)[1], width)

    # ---- plans and loaders

    def plan(self, epoch: int) -> Plan:
        """The training plan of one epoch, a pure function of data, seed and epoch.

        Override it for a curriculum beyond `order_by`. `lengths`, `targets` and `examples` describe examples by id, and
        `Plan(example_ids, np.arange(len(example_ids) + 1), self.layout.rows_per_update)` trains on them in this order,
        one per row. A resumed run calls it again: it has to return the same plan for the same epoch.
        """
        ids = self.drawn([len(store) for store in self.stores("train")], 0 if self.overfits else epoch)
        is_ordered = self.draws.ordered is not None and not self.overfits
        return plan_epoch(
            self.lengths("train"),
            np.sort(ids) if self.overfits else ids,
            self.layout.at(epoch).rows_per_update,
            seed=self.run_seed,
            epoch=epoch,
            capacity=self.capacity_for("train"),
            group_by_length=self.group_by_length,
            shuffle=not self.overfits and not is_ordered,
            keep_order=is_ordered,
        )

    def drawn(self, sizes: Sequence[int], epoch: int) -> np.ndarray:
        """The training rows of an epoch by the weights of sources and `sample_by`, shuffled, or as `order_by` says.

        Args:
            sizes: Rows that each source has.
            epoch: Counted from 0.
        """
        weights = self.row_weights
        if self.draws.sampled is None:
            ids = mixture_epoch(sizes, weights, self.run_seed, epoch)
        else:
            together = all(weight is None for weight in weights)
            counts = mixture_counts(sizes, weights)
            ids = drawn(sizes, counts, self.__weights_of_rows(sizes), self.run_seed, epoch, together=together)
        return ids if self.draws.ordered is None else ids[np.argsort(self.__places[ids], kind="stable")]

    def __weights_of_rows(self, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        if self.__drawn_by is None:
            apart = any(weight is not None for weight in self.source_weights)
            self.__drawn_by = self.draws.weights(self.column_values(self.draws.sampled or ""), sizes, apart)
        return self.__drawn_by

    @cached_property
    def __places(self) -> np.ndarray:
        """The place of each training row in the order of `order_by`."""
        return self.draws.ranks(self.column_values(self.draws.ordered or ""))

    @property
    def source_weights(self) -> list[float | None]:
        """The weights of the training sources."""
        train = self.sources["train"]
        return [] if train is None else [source.weight for source in as_sources(train)]

    @property
    def row_weights(self) -> list[float | None]:
        """The shares of the training sources in the rows that give them their shares in what `weight_by` names."""
        weights = self.source_weights
        if self.weight_by == "rows":
            return weights
        per_row = [self.__per_row(store) for store in self.stores("train")]
        return [None if w is None else w / units for w, units in zip(weights, per_row, strict=True)]

    def __per_row(self, store: ExampleStore) -> float:
        """Mean number of tokens, or of targets by weight, of an example."""
        if self.weight_by == "tokens":
            return store.mean_length
        return store.mean_target_weight or 1.0  # no source trains on nothing

    def __shares(self, ids: np.ndarray) -> list[dict[str, float]]:
        """The share of each training source in the rows, tokens and targets of some examples."""
        stores = self.stores("train")
        places = np.searchsorted(np.cumsum([len(store) for store in stores]), ids, side="right")
        weights = self.target_weights("train")
        units = {
            "rows": np.ones(len(ids)),
            "tokens": self.lengths("train")[ids],
            "targets": (self.targets("train") if weights is None else weights)[ids],
        }
        sums = {name: np.bincount(places, values, minlength=len(stores)) for name, values in units.items()}
        return [
            {f"share_of_{name}": round(float(own[i] / max(own.sum(), 1e-9)), 6) for name, own in sums.items()}
            for i in range(len(stores))
        ]

    def largest_micro_batch(self) -> list[np.ndarray]:
        """Rows of the first epoch's micro-batch with the most tokens, over all ranks."""
        return largest_micro_batch(self.plan(0), self.lengths("train"), self.batch_size)

    def tokens(self, updates: int) -> int:
        """Tokens in the first `updates` updates: counted over `EXACT_EPOCHS`, extrapolated beyond."""
        lengths = self.lengths("train")
        tokens, left, epochs = 0, updates, 0
        while left > 0 and epochs < EXACT_EPOCHS:
            plan = self.plan(epochs)
            within = self.layout.at(epochs).updates(plan.rows, self.limit)
            rows = min(min(left, within) * plan.rows_per_update, plan.rows)
            tokens += int(lengths[plan.example_ids[: plan.row_starts[rows]]].sum())
            left -= math.ceil(rows / plan.rows_per_update)
            epochs += 1
        return round(tokens * updates / (updates - left))

    def updates(self, epochs: int) -> int:
        """Number of optimizer updates in `epochs` epochs, within `limit_train_batches`."""
        weighted = any(weight is not None for weight in self.source_weights)
        varies = weighted or bool(self.draws.columns) or type(self).plan is not ExampleData.plan  # a curriculum
        first, layout, updates = self.plan(0).rows, self.layout, 0
        for epoch in range(epochs):
            # with weights each epoch draws other rows, which may need another number of packs
            rows = self.plan(epoch).rows if varies and epoch else first
            updates += layout.at(epoch).updates(rows, self.limit)
        return updates

    def make_train_loader(self) -> PlanLoader:
        """Creates the loader that follows the plan."""
        return PlanLoader(
            self.examples("train"),
            self.targets("train"),
            self.plan,
            self.layout,
            partial(collate, pad_id=self.pad_id),
            limit=self.limit,
            weights=self.target_weights("train"),
            **self.fetching,
        )

    def eval_plans(self, split: str) -> tuple[list[Plan], Layout]:
        """The plans of a pass over held-out examples, one for each source that has any, and their layout."""
        layout = Layout(self.eval_batch_size, 1, self.layout.ranks, self.layout.rank)
        plans, start = [], 0
        for store in self.stores(split):
            plan = plan_in_order(store.lengths, layout.rows_per_update, capacity=self.capacity_for(split))
            if len(store):
                plans.append(Plan(plan.example_ids + start, plan.row_starts, layout.rows_per_update))
            start += len(store)
        return plans, layout

    def make_eval_loader(self, split: str) -> DataLoader:
        """Creates a loader with each example of a split once: source by source, each with the longest first.

        A batch has the number of its `source`, if there are several.
        """
        names = self.source_names(split)
        ends = np.cumsum([len(store) for store in self.stores(split)]) if len(names) > 1 else None
        collated = partial(_of_source, pad_id=self.pad_id, ends=ends)
        return eval_loader(self.examples(split), *self.eval_plans(split), collated, **self.fetching)

    def source_names(self, split: str) -> list[str]:
        """Unique names of a split's sources, indexed by `source` of a held-out batch."""
        names = [Path(source.title).stem for source in self.taken(split)[0]]
        return [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]

    @property
    def validation_metrics(self) -> list[str]:
        """Names of metrics that validation logs because of its sources: the loss of each, if there are several."""
        names = self.source_names("validation") if self.sources["validation"] is not None else []
        return [f"val/loss/{name}" for name in names] if len(names) > 1 else []

    def made_from(self) -> list[str]:
        """Names of the stores, which are hashes of all that the examples depend on, and the weights of a mixture."""
        names = [store.directory.name for store in self.stores("train")]
        weights = [weight for weight in self.source_weights if weight is not None]
        shares = [f"{weight / sum(weights):.6f} of the {self.weight_by}" for weight in weights]
        return [*names, *(shares if len(names) > 1 else []), *self.draws.identity]

    # ---- report

    def report(self) -> dict[str, Any]:
        """Counts per split: rows read, kept, dropped and cut, tokens, lengths, fill of the packs."""
        splits = [s for s in ("train", "validation", "test") if s in self.__stores]
        return {split: self.__split_report(split) for split in splits}

    def __split_report(self, split: str) -> dict[str, Any]:
        stores = self.stores(split)
        plan = self.plan(0) if split == "train" else None
        capacity = self.capacity_for(split)
        if plan is None:  # as on one device, whatever runs it
            plan = plan_in_order(self.lengths(split), self.eval_batch_size, capacity=capacity)
        report = reports.describe(stores, self.lengths(split), plan, capacity) | self.__repeated(split)
        if split == "train" and "sources" in report:
            shared = zip(report["sources"], self.__shares(plan.example_ids), strict=True)
            report["sources"] = [source | shares for source, shares in shared]
        if split == "train":
            report |= self.report_of_draws(plan.example_ids)
        if self.branching:
            spared = sum(store.shared for store in stores)
            report["saved_by_sharing"] = round(spared / max(1, spared + report["tokens"]), 6)
        return report

    def report_of_draws(self, ids: np.ndarray) -> dict[str, Any]:
        """The part of a report about the rows that an epoch draws; empty without `sample_by` and `order_by`."""
        return self.draws.report({name: self.column_values(name) for name in self.draws.columns}, ids)

    def __repeated(self, split: str) -> dict[str, Any]:
        """The part of a report about rows that repeat others, counted once."""
        if split not in self.__same:
            training = self.__stores.get("train") if split != "train" else None
            stores = self.stores(split)
            of_sources = [store.report for store in stores]
            described = reports.describe_repeated(stores, of_sources, training)
            if self.near_duplicates:
                described = self.with_near_duplicates(split, described, of_sources, training is not None)
            self.__same[split] = described
        return self.__same[split]

    def with_near_duplicates(
        self, split: str, described: dict[str, Any], of_sources: Sequence[dict[str, Any]], with_training: bool
    ) -> dict[str, Any]:
        """Adds near duplicates to the part of a report about repeated rows; see `oumi_pl.data.near_duplicates`."""
        from oumi_pl.data.near_duplicates import with_near_duplicates

        training = self.row_texts("train") if with_training else None
        return with_near_duplicates(described, of_sources, self.row_texts(split), training)

    def row_texts(self, split: str) -> "list[RowTexts]":
        """The texts of the rows that are used, of each source of a split, to find near duplicates."""
        from oumi_pl.data.near_duplicates import RowTexts

        def texts(number: int, store: ExampleStore) -> Iterator[tuple[int, str]]:
            return _texts(store.origins, self.records_by_source(split)[number])

        return [
            RowTexts(store.directory.name, store, partial(texts, number, store), store.report["source"])
            for number, store in enumerate(self.stores(split))
        ]


def _usable(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, RecordWithRow]]:
    return ((origin, record) for origin, record in records if isinstance(record, RecordWithRow))


def _texts(origins: Sequence[str], records: Iterable[tuple[str, RecordWithRow]]) -> Iterator[tuple[int, str]]:
    """The number of the first example, and the text, of each row that has one."""
    numbers: dict[str, int] = {}
    for number, origin in enumerate(origins):
        numbers.setdefault(origin, number)
    for origin, of_row in itertools.groupby(records, key=lambda pair: pair[0].replace("\n", " ")):
        if (number := numbers.pop(origin, -1)) >= 0:
            yield number, "\n".join(record.record.full_text() for _, record in of_row)


def _of_source(rows: Any, pad_id: int, ends: np.ndarray | None) -> Batch:
    """A held-out micro-batch, with the number of its source if `ends`, the last examples of sources, are known."""
    batch = collate(rows, pad_id)
    if ends is not None and batch["sample_ids"]:
        batch["source"] = int(np.searchsorted(ends, batch["sample_ids"][0], side="right"))
    return batch


def largest_micro_batch(plan: Plan, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows of the micro-batch with the most tokens.

    Args:
        plan: The plan of an epoch.
        lengths: Tokens of each example, `[examples]`.
        size: Rows of a micro-batch.
    """
    tokens = np.add.reduceat(lengths[plan.example_ids], plan.row_starts[:-1])
    first = int(np.add.reduceat(tokens, np.arange(0, len(tokens), size)).argmax()) * size
    return [plan.row(i) for i in range(first, min(first + size, plan.rows))]


class ChatData(ExampleData):
    """Turns rows into conversations or texts, and tokenizes them with the characters that carry loss marked.

    Args:
        args: See `TextData`.
        template: Chat template: `chatml`, `llama3` or `plain`, `trl/NAME` for a training template of TRL, one of the
            tokenizer's own if it has several, or a `.jinja` file; the tokenizer's own when left out.
        overflow: What happens to rows longer than `max_length`: `truncate` cuts the prompt first, `keep_start` the end
            of the row, `drop` leaves the row out, `error` stops the run.
        template_variables: Values for variables that the template reads (`enable_thinking`, for example). `date` is
            today's date for templates that write one; the day on which the data were first prepared when left out.
        lost: What happens if the template doesn't write something that is to be trained (a tool call, reasoning):
            `error` stops the run, `drop` leaves the row out, `keep` trains the rest of it.
        add_eos: End turns with the tokenizer's EOS if the template writes nothing at their end.
        kwargs: See `ExampleData`.
    """

    turns: Turns = "auto"
    """Whether the trained turns of a conversation share one text; see `oumi_pl.data.rendering`."""

    def __init__(
        self,
        *args: Any,
        template: str | None = None,
        overflow: Overflow = "truncate",
        template_variables: dict[str, Any] | None = None,
        lost: Lost = "error",
        add_eos: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.template_spec = template
        self.overflow = overflow
        self.template_variables = template_variables or {}
        self.lost: Lost = lost
        self.add_eos = add_eos

    @property
    @abstractmethod
    def tokenize(self) -> Tokenize:
        """Turns records into examples."""

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Sets the chat template and adds the special tokens that it needs."""
        self.template = load_template(tokenizer, self.template_spec)
        added = apply_template(tokenizer, self.template)
        check_variables(tokenizer.chat_template, self.template_variables)
        return added

    @cached_property
    def template_date(self) -> Date | None:
        """The day that the template gets as today; None if it doesn't ask for it."""
        return template_date(self.tokenizer.chat_template, self.template_variables, titles(self.sources["train"]))

    @cached_property
    def renderer(self) -> ChatRenderer:
        """Renders conversations."""
        return ChatRenderer(
            self.tokenizer, self.template_variables, self.turns, add_eos=self.add_eos, date=self.template_date
        )

    def encoding_key(self) -> list[Any]:
        """Everything that rendering and cutting depend on, besides the tokenizer."""
        date = str(self.template_date)
        return [self.overflow, self.lost, self.turns, self.add_eos, self.template_variables, date]

    def report(self) -> dict[str, Any]:
        """Adds the date that the template writes; see `ExampleData`."""
        report = super().report()
        for described in report.values():
            if self.template_date is not None:
                described["template_date"] = str(self.template_date)
        return report

    def encode(self, records: Sequence[Record]) -> list[Example | Dropped]:
        """Turns records into examples, or into the reason why not."""
        return self.tokenize(list(records))

    def uncut(self, record: Record) -> tuple[Example, list[np.ndarray]] | None:
        """See `ExampleData`."""
        return self.tokenize.uncut(record)

    @property
    def line_column(self) -> str:
        """See `ExampleData`: a line is a user's turn for a chat model, and else a text."""
        return "prompt" if self.tokenizer.chat_template else "text"

    def prompt_of(self, record: Record) -> tuple[list[int], str] | None:
        """Prompt ids and reference answer of a record; None for one whose prompt isn't to be completed."""
        return self.tokenize.prompt_ids(record)

    def prompts(self, split: str) -> Iterator[tuple[list[int], str]]:
        """Prompt ids and reference answer of each row of a split, for sampling completions."""
        return ((ids, reference) for ids, reference, _ in self.__prompts_with_rows(split))

    def prompts_with_rows(self, split: str) -> Iterator[tuple[list[int], str, Row]]:
        """As `prompts`, each with its row; without, if a subclass has prompts of its own."""
        if type(self).prompts is not ChatData.prompts:
            return super().prompts_with_rows(split)
        return self.__prompts_with_rows(split)

    def __prompts_with_rows(self, split: str) -> Iterator[tuple[list[int], str, Row]]:
        return self.__prompts_of(self.records_with_rows(split))

    def __prompts_of(self, records: Iterable[tuple[str, RecordWithRow]]) -> Iterator[tuple[list[int], str, Row]]:
        for _, record in records:
            if (prompt := self.prompt_of(record.record)) is not None:
                yield *prompt, record.row

    def prompts_by_source(self, split: str) -> list[Iterator[tuple[list[int], str]]]:
        """See `TextData`."""
        if type(self).prompts is not ChatData.prompts:
            return super().prompts_by_source(split)
        sources = map(self.__prompts_of, self.records_by_source(split))
        return [((ids, reference) for ids, reference, _ in prompts) for prompts in sources]

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end an answer besides EOS: the template's end of turn."""
        end = self.template.end_of_turn if self.template else None
        return [self.tokenizer.convert_tokens_to_ids(end)] if end else []  # type: ignore[list-item]
