"""The base class of all data modules: sources, tokenizer, layout of updates, loaders, prompts, resuming."""

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from oumi_pl.data.collate import collate, full_document
from oumi_pl.data.loader import PlanLoader
from oumi_pl.data.plan import Layout, limited
from oumi_pl.data.rollout_loader import RolloutLoader
from oumi_pl.data.sources import Place, Source, as_sources
from oumi_pl.data.splitting import Side
from oumi_pl.data.stream_loader import StreamLoader
from oumi_pl.data.template import ChatTemplate
from oumi_pl.data.tokenizers import TokenizerFactory, load_tokenizer
from oumi_pl.data.where import NoColumnError
from oumi_pl.errors import UserError
from oumi_pl.types import SPLITS, Batch, Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    OneSource = Place | Source
    Sources = OneSource | Sequence[OneSource] | Mapping[str, OneSource]
else:  # the types of a recipe
    Sources = str | Source | list[str | Source]


class TextData(L.LightningDataModule):
    """Reads and tokenizes text and yields it update by update. Subclasses define what a row becomes.

    Args:
        train: The source of the training rows: a hub id, a file, directory or glob, `bundled/NAME`, or a list of
            these (a mixture). From Python also rows in memory (a list of dicts, a `datasets.Dataset`, a pandas
            DataFrame), or a dict of sources by name.
        validation: A source, or the fraction of the training rows to hold out. A hash of each prompt chooses them, so
            that rows with the same prompt are on the same side.
        test: Source for `test`.
        predict: Source of prompts for `predict`; the test or validation rows when left out.
        group: Column whose value, instead of the prompt, keeps rows on one side of the split.
        tokenizer: Hub id or directory, or a class that builds one; the model's own when left out.
        tokens: New tokens, such as `<ticket>`, wherever the text has them. The model's embeddings (and its head) grow
            by their rows, which start as the mean of the trained ones. They are trained, with LoRA too, and exported
            with the tokenizer.
        pad_token: Token that the exported tokenizer fills rows with, added if it is new; its own when left out, or EOS.
        max_length: Tokens of the longest row.
        batch_size: Rows per micro-batch and device.
        eval_batch_size: The same for validation and test; `batch_size` when left out.
        workers: Loader processes per device.
        seed: Seed of the order of rows; the run's `seed_everything` when left out.
        trust_remote_code: Let the tokenizer run code from its repository.
    """

    packing: bool = False
    """Whether a row of the plan may hold several examples, kept apart by the attention."""
    branching: bool = False
    """Whether examples may have segments that continue others."""
    streaming: bool = False
    """Whether training rows are tokenized while training, so that their number is unknown beforehand."""
    samples: bool = False
    """Whether the policy samples the training rows while training."""
    template: ChatTemplate | None = None
    """The chat template in use; None if rows have no turns."""
    micro_batches: int = 1
    """Micro-batches per update without a trainer."""

    def __init__(
        self,
        train: Sources | None = None,
        validation: float | Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        *,
        group: str | None = None,
        tokenizer: str | TokenizerFactory | None = None,
        tokens: list[str] | None = None,
        pad_token: str | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        workers: int = 0,
        seed: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {
            "max_length": max_length,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
        }.items():
            least = 2 if name == "max_length" else 1  # a token and its target
            if value is not None and value < least:
                raise UserError(f"data.{name} is {value}, but has to be at least {least}")
        for name, value in {"workers": workers, "seed": seed}.items():
            if value is not None and value < 0:
                raise UserError(f"data.{name} is {value}, but can't be negative")
        if isinstance(validation, float) and not 0 < validation < 1:
            raise UserError(f"data.validation is {validation}, but a held-out fraction is between 0 and 1")
        self.sources: dict[str, Any] = {"train": train, "validation": validation, "test": test, "predict": predict}
        for name, value in self.sources.items():
            if value is not None and not (name == "validation" and isinstance(value, float)):
                as_sources(value, f"data.{name}")  # refuses what is no source
        if group is not None and not isinstance(validation, float):
            raise UserError("data.group keeps rows together when a fraction is held out; set data.validation to one")
        self.group = group
        self.tokenizer_spec = tokenizer
        self.new_tokens = _checked_tokens(tokens or [])
        self.pad_token = pad_token
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.workers = workers
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        self.added_tokens: list[int] = []
        self.own_template: Any = None
        self.own_pad: str | None = None
        self.train_loader: Any = None
        """The training loader; None until it is created."""
        self.position: dict[str, Any] | None = None
        """Where the resumed run stopped; None for a new run."""
        self.__made_from: list[Any] = []

    # ---- what a subclass defines

    @abstractmethod
    def make(self, split: str) -> None:
        """Writes what a split needs to the cache, unless it is there."""

    @abstractmethod
    def make_train_loader(self) -> Any:
        """Creates the loader of this rank's micro-batches, at the first update. It needs a `state_dict`."""

    @abstractmethod
    def make_eval_loader(self, split: str) -> DataLoader:
        """Creates the loader of this rank's share of a held-out split, with each row once."""

    @abstractmethod
    def made_from(self) -> list[Any]:
        """Identifies the training rows, by plain values that a checkpoint can hold."""

    def refuse_changed(self, before: list[Any] | None, now: list[Any]) -> None:
        """Refuses to resume on other training rows than the checkpoint's.

        Args:
            before: `made_from` in the checkpoint.
            now: `made_from` of this run.

        Raises:
            UserError: they differ.
        """
        if before is not None and before != now:
            raise UserError(
                "data.train: the rows, how they are tokenized, or their shares have changed since the checkpoint was "
                "written, so the run can't resume; undo the change, or start a new run from its model"
            )

    @abstractmethod
    def updates(self, epochs: int) -> int:
        """Number of optimizer updates in `epochs` epochs."""

    @abstractmethod
    def prompts(self, split: str) -> Iterator[tuple[list[int], str]]:
        """Prompt ids and reference answer of each row of a split, for sampling completions."""

    def prompts_by_source(self, split: str) -> list[Iterator[tuple[list[int], str]]]:
        """As `prompts`, for each source of a split; one iterator for all of them if they can't be separated."""
        return [self.prompts(split)]

    def prompts_with_rows(self, split: str) -> Iterator[tuple[list[int], str, Row]]:
        """As `prompts`, each with the columns of its row, which `predict` writes beside the completion."""
        return ((ids, reference, {}) for ids, reference in self.prompts(split))

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Counts per split: rows read, kept, dropped and cut, tokens, lengths."""

    @abstractmethod
    def longest_path(self, splits: Iterable[str]) -> tuple[int, int] | None:
        """Bounds on the positions of the longest path in these splits: (least, most); None for `max_length`."""

    @abstractmethod
    def tokens(self, updates: int) -> int:
        """Tokens in the first `updates` updates; estimated beyond the first few epochs."""

    def reference_logps(self, split: str, parts: dict[str, Any], width: int = 1) -> Any:
        """The cache for values of a reference at each target; only data with a plan have one.

        Raises:
            UserError: these are not such data.
        """
        raise UserError(
            f"data: the rows of {type(self).__name__} are a stream, and a cache belongs to examples: run the reference "
            "beside the model (`model.reference: online`; with Distill leave out `model.top_k`)"
        )

    def full_row(self) -> list[Example]:
        """The examples of the largest row that the settings allow, with any token ids, for planning without data."""
        return [full_document(self.max_length)]

    def full_batch(self, rows: int) -> Batch:
        """A micro-batch of the largest rows that the settings allow, with any token ids."""
        examples = self.full_row()
        return collate([([row] * len(examples), examples) for row in range(rows)], 0)

    def largest_micro_batch(self) -> list[np.ndarray] | None:
        """Rows of the largest micro-batch of the first epoch, over all ranks; None if all are the same size."""
        return None

    def consumed(self) -> list[dict[str, Any]]:
        """What the current pass has read from each source; empty for data that follow a plan."""
        return []

    def held_out_rows(self) -> Iterator[tuple[str, str]]:
        """Source and origin (file and line) of each row that is held out, if a fraction of the rows is."""
        return iter(())

    def source_names(self, split: str) -> list[str]:
        """Names of the sources that get separate held-out metrics; a single name if there are no separate ones."""
        return ["all"]

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Adapts the tokenizer (template, special tokens) and returns the ids that were added to its vocabulary."""
        return []

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end a completion besides EOS."""
        return []

    @property
    def row_name(self) -> str:
        """The unit of `batch_size`: `row`, `pack` or `pair`."""
        return "row"

    @property
    def streamed(self) -> list[str]:
        """Names of the training sources that are tokenized while training."""
        return []

    # ---- tokenizer

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, loaded on first use."""
        spec: Any = self.tokenizer_spec
        if spec is None and self.trainer is not None:
            spec = getattr(self.trainer.lightning_module, "tokenizer_name", None)
        if spec is None:
            raise UserError("data.tokenizer: no tokenizer is named, and a model with random weights has none")
        tokenizer = load_tokenizer(spec, self.trust_remote_code)
        self.own_template, self.own_pad = tokenizer.chat_template, tokenizer.pad_token
        if self.pad_token is not None:  # no added token, since its row in the model is never trained
            tokenizer.add_special_tokens({"pad_token": self.pad_token})
        added = self.__add_tokens(tokenizer)
        self.added_tokens = [*added, *self.prepare_tokenizer(tokenizer)]
        return tokenizer

    def __add_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Adds the recipe's new tokens, and returns the ids of those that the vocabulary did not have."""
        from tokenizers import AddedToken

        known = tokenizer.get_vocab()
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.new_tokens])
        ids = tokenizer.get_vocab()
        # a model that was exported with them has rows for them already
        return [ids[token] for token in self.new_tokens if token not in known]

    @property
    def pad_id(self) -> int:
        """The id of the tokenizer's pad token; 0 if it has none, since masks never depend on ids."""
        pad_id = self.tokenizer.pad_token_id
        return pad_id if isinstance(pad_id, int) else 0

    # ---- sources

    def taken(self, split: str) -> tuple[list[Source], Side | None]:
        """The sources of a split, and which side of them it uses; None for all rows."""
        value, held_out = self.sources[split], self.sources["validation"]
        keep: Side | None = None
        if isinstance(held_out, float) and split in ("train", "validation"):
            value = self.sources["train"]
            keep = Side(held_out, split == "validation", self.group)
        return as_sources(value, f"data.{split}"), keep

    # ---- stages

    def prepare_data(self) -> None:
        """Writes what the stage needs to the cache. Lightning calls it on one rank per node, before `setup`."""
        stage = self.trainer.state.fn.value if self.trainer is not None and self.trainer.state.fn else "fit"
        for split in SPLITS.get(str(stage), ()):
            if self.sources[split] is not None:
                try:
                    self.make(split)
                except NoColumnError as error:
                    raise UserError(f"data.{split}: {error}") from error

    def needed(self, stage: str) -> Iterator[str]:
        """The splits that a stage reads.

        Raises:
            UserError: the recipe has no source for one; only validation during `fit` is optional.
        """
        for split in SPLITS.get(stage, ()):
            if self.sources[split] is not None:
                yield split
            elif not (split == "validation" and stage == "fit"):
                raise UserError(f"data.{split}: `{stage}` needs a source here, and the recipe names none")

    # ---- layout of updates, loaders, position

    @property
    def run_seed(self) -> int:
        """The seed of the order of rows."""
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))

    @property
    def policy(self) -> Any:
        """The module of the run."""
        return self.trainer.lightning_module  # type: ignore[union-attr]

    @property
    def layout(self) -> Layout:
        """How the rows of an update are divided in the current epoch, according to the trainer; `at(epoch)` in others.

        A `GradientAccumulationScheduler` among its callbacks says how many micro-batches an update has in which epoch.
        """
        trainer: Any = self.trainer
        if trainer is None:
            return Layout(self.batch_size, self.micro_batches)
        ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        schedules = [c.scheduling for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
        schedule = tuple(sorted(schedules[0].items())) if schedules else ()
        layout = Layout(
            self.batch_size, trainer.accumulate_grad_batches, ranks["num_replicas"], ranks["rank"], schedule
        )
        return layout.at(trainer.current_epoch)

    @property
    def overfits(self) -> bool:
        """Lightning's `overfit_batches`: every epoch has the same rows, those that come first in the sources."""
        trainer: Any = self.trainer
        return trainer is not None and trainer.overfit_batches > 0

    @property
    def limit(self) -> int | float:
        """Lightning's `limit_train_batches`: a number of micro-batches, or a share of the epoch."""
        return 1.0 if self.trainer is None else self.trainer.limit_train_batches

    @property
    def fetching(self) -> dict[str, Any]:
        """Arguments of loaders: `workers` and `pin_memory`."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {"workers": self.workers, "pin_memory": on_gpu}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As in Lightning, but without the lists: its recursion into segments takes 10 ms for 300 of them.

        The lists remain the same objects: an update is recognised by its `update_ids`.
        """
        if not isinstance(batch, dict) or "segments" not in batch:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        lists = {name: value for name, value in batch.items() if isinstance(value, list)}
        rest = {name: value for name, value in batch.items() if name not in lists}
        return super().transfer_batch_to_device(rest, device, dataloader_idx) | lists

    def train_dataloader(self) -> Any:
        """The training loader, at the position where a resumed run stopped."""
        if self.trainer is not None:
            # our loaders divide the rows among ranks already; Lightning would insert another sampler
            self.trainer._accelerator_connector.use_distributed_sampler = False
        loader = self.make_train_loader()
        made_from = self.made_from()  # now, since files may change while they are read
        if self.position is not None:
            self.refuse_changed(self.position.get("made_from"), made_from)
            loader.load_state_dict(self.position)
        self.train_loader, self.__made_from = loader, made_from
        if self.trainer is not None and isinstance(loader, PlanLoader | StreamLoader | RolloutLoader):
            loader.on_epoch = self.__begin_epoch
        return loader

    def __begin_epoch(self, epoch: int) -> None:
        """Tells Lightning how many batches this epoch has, and how many of them an update has.

        Lightning reads the length of a loader once, in the first epoch, but a mixture is drawn again in each and may
        pack into fewer or more rows. And if a run resumes within an epoch, nothing else sets the accumulation.
        """
        trainer: Any = self.trainer
        loop, loader = trainer.fit_loop, self.train_loader
        layout = loader.layout.at(epoch)
        if layout.schedule:
            trainer.accumulate_grad_batches = layout.micro_batches
        if trainer.train_dataloader is not loader:
            return
        try:
            whole = len(loader)
        except TypeError:  # a stream of unknown length
            return
        loop.max_batches = limited(whole, self.limit)
        loop._combined_loader.limits = [loop.max_batches]

    def val_dataloader(self) -> DataLoader | list:
        """Every held-out row once; an empty list without `validation`."""
        return self.make_eval_loader("validation") if self.sources["validation"] is not None else []

    def test_dataloader(self) -> DataLoader:
        """Every test row once."""
        return self.make_eval_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, `{epoch, update, ...}`, the same on every rank, and `made_from`."""
        position = {} if self.train_loader is None else self.train_loader.state_dict()
        return position and position | {"made_from": self.__made_from}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a position, at which the training loader will start."""
        self.position = state_dict or None

    # ---- predict

    def predict_dataloader(self) -> DataLoader:
        """Batches of this rank's share of the `predict` rows' prompts (else test, else validation), in row order."""
        split = next((s for s in ("predict", "test", "validation") if self.sources[s] is not None), None)
        if split is None:
            raise UserError("data.predict: `predict` needs a source of prompts here, and the recipe names none")
        rows = [(number, *prompt) for number, prompt in enumerate(self.prompts_with_rows(split), 1)]
        layout = self.layout
        share = rows[layout.rank :: layout.ranks]
        return DataLoader(share, batch_size=self.eval_batch_size, collate_fn=_prompt_batch)  # type: ignore[arg-type]


def _checked_tokens(tokens: list[str]) -> list[str]:
    """Checks the recipe's new tokens.

    Raises:
        UserError: one is blank, is not a string, or occurs twice.
    """
    if isinstance(tokens, str):
        raise UserError(f"data.tokens is the string {tokens!r}; it has to be a list: [{tokens!r}]")
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise UserError(f"data.tokens: {token!r} can't be a token; name a string that isn't blank")
        if tokens.count(token) > 1:
            raise UserError(f"data.tokens: {token!r} occurs twice")
    return list(tokens)


def _prompt_batch(rows: list[tuple[int, list[int], str, Row]]) -> dict[str, list[Any]]:
    return dict(zip(("rows", "prompts", "references", "columns"), map(list, zip(*rows, strict=True)), strict=True))
