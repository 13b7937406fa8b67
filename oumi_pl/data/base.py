"""The DataModule that all trainer types share: sources, tokenizer, how updates are cut, prompts, the position."""

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from oumi_pl.data.plan import Layout
from oumi_pl.data.sources import Source
from oumi_pl.data.template import ChatTemplate
from oumi_pl.data.tokenizers import TokenizerFactory, load_tokenizer
from oumi_pl.errors import UserError
from oumi_pl.types import SPLITS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sources = str | Source | list[str | Source]


class TextData(L.LightningDataModule):
    """Reads and tokenizes text, and hands it out update by update. Subclasses say what becomes of a row.

    Args:
        train: Where the training rows come from: a hub id, a file, directory or glob, `bundled/NAME`, or a list of
            these (a mixture).
        validation: A source, or the fraction of the training rows to hold out (chosen by a hash of the row).
        test: Source for `test`.
        predict: Source of prompts for `predict`; the test or validation rows when left out.
        tokenizer: Hub id or directory, or a class that makes one; the model's own when left out.
        max_length: Tokens of the longest row.
        batch_size: Rows per micro-batch and device.
        eval_batch_size: The same for validation and test; `batch_size` when left out.
        workers: Loader processes per device.
        seed: Of the order; the run's `seed_everything` when left out.
        trust_remote_code: Let the tokenizer run code that came with it.
    """

    packing: bool = False
    """Whether a row of the plan holds several examples that must not see each other."""
    branching: bool = False
    """Whether examples may have segments that continue others."""
    streaming: bool = False
    """Whether training rows are known only once they are read."""
    template: ChatTemplate | None = None
    """The chat template in force; None where rows have no turns."""
    micro_batches: int = 1
    """Micro-batches per update where no trainer says how many."""

    def __init__(
        self,
        train: Sources | None = None,
        validation: float | Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        *,
        tokenizer: str | TokenizerFactory | None = None,
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
            least = 2 if name == "max_length" else 1  # a token, and one to predict
            if value is not None and value < least:
                raise UserError(f"data.{name} is {value}, but has to be at least {least}")
        for name, value in {"workers": workers, "seed": seed}.items():
            if value is not None and value < 0:
                raise UserError(f"data.{name} is {value}, but can't be negative")
        if isinstance(validation, float) and not 0 < validation < 1:
            raise UserError(f"data.validation is {validation}, but a held-out fraction lies between 0 and 1")
        self.sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.tokenizer_spec = tokenizer
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
        """The training loader, once it is made."""
        self.position: dict[str, Any] | None = None
        """Where the run that is resumed stopped."""
        self.__made_from: list[Any] = []

    # ---- what a subclass says

    @abstractmethod
    def make(self, split: str) -> None:
        """Makes what a split needs on the disk, or finds it there."""

    @abstractmethod
    def make_train_loader(self) -> Any:
        """A loader of this rank's micro-batches that has a `state_dict`, and begins at the first update."""

    @abstractmethod
    def make_eval_loader(self, split: str) -> DataLoader:
        """A loader of this rank's share of a held-out split, every row once."""

    @abstractmethod
    def made_from(self) -> list[Any]:
        """What tells the training rows from others, as plain values that a checkpoint can hold."""

    def refuse_changed(self, before: list[Any] | None, now: list[Any]) -> None:
        """Refuses to resume if the training rows are others than those that the checkpoint was made from.

        Raises:
            UserError: they are.
        """
        if before is not None and before != now:
            raise UserError(
                "data.train: the rows, or how they are tokenized, have changed since the checkpoint was written: "
                "the run can't go on where it was; undo the change, or start anew from its model"
            )

    @abstractmethod
    def updates(self, epochs: int) -> int:
        """Optimizer updates in so many epochs."""

    @abstractmethod
    def prompts(self, split: str) -> Iterator[tuple[list[int], str]]:
        """Prompt ids of each row of a split, and what the row goes on with: what completions are sampled for."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """What became of the rows, per split."""

    @abstractmethod
    def longest_path(self, splits: Iterable[str]) -> tuple[int, int] | None:
        """Positions that the longest path of these splits needs surely, and at most; None for `max_length`."""

    @abstractmethod
    def tokens(self, updates: int) -> int:
        """Tokens that the first so many updates train on; an estimate beyond the first few epochs."""

    def largest_micro_batch(self) -> list[np.ndarray] | None:
        """Rows of the largest micro-batch of the first epoch, over all ranks; None if all are alike."""
        return None

    def consumed(self) -> list[dict[str, Any]]:
        """What was read of each source in the running pass, where that is not the plan's."""
        return []

    def source_names(self, split: str) -> list[str]:
        """Names of the sources that have held-out metrics of their own; a single name if there are none."""
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
        """What `batch_size` counts: `row`, `pack` or `pair`."""
        return "row"

    @property
    def streamed(self) -> list[str]:
        """Names of the training sources of which nothing is known before they are read."""
        return []

    # ---- tokenizer

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, loaded when first asked for."""
        spec: Any = self.tokenizer_spec
        if spec is None and self.trainer is not None:
            spec = getattr(self.trainer.lightning_module, "model_name", None)
        if spec is None:
            raise UserError("data.tokenizer: no tokenizer is named, and the model (random weights) brings none")
        tokenizer = load_tokenizer(spec, self.trust_remote_code)
        self.own_template, self.own_pad = tokenizer.chat_template, tokenizer.pad_token
        self.added_tokens = self.prepare_tokenizer(tokenizer)
        return tokenizer

    @property
    def pad_id(self) -> int:
        """The tokenizer's pad token; any id will do where it has none."""
        pad_id = self.tokenizer.pad_token_id
        return pad_id if isinstance(pad_id, int) else 0

    # ---- stages

    def prepare_data(self) -> None:
        """Makes what the stage needs and the cache lacks: once per node, before the other ranks look."""
        stage = self.trainer.state.fn.value if self.trainer is not None and self.trainer.state.fn else "fit"
        for split in SPLITS.get(str(stage), ()):
            if self.sources[split] is not None:
                self.make(split)

    def needed(self, stage: str) -> Iterator[str]:
        """The splits that a stage reads.

        Raises:
            UserError: the recipe names no source for one; `fit` does without validation.
        """
        for split in SPLITS.get(stage, ()):
            if self.sources[split] is not None:
                yield split
            elif not (split == "validation" and stage == "fit"):
                raise UserError(f"data.{split}: `{stage}` needs a source here, and the recipe names none")

    # ---- how updates are cut, and where the data stand

    @property
    def run_seed(self) -> int:
        """The seed of the order."""
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))

    @property
    def layout(self) -> Layout:
        """How an update is cut, as the trainer says."""
        trainer = self.trainer
        if trainer is None:
            return Layout(self.batch_size, self.micro_batches)
        ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return Layout(self.batch_size, trainer.accumulate_grad_batches, ranks["num_replicas"], ranks["rank"])

    @property
    def limit(self) -> int | float:
        """Micro-batches of an epoch that will be trained on, or the share of them."""
        return 1.0 if self.trainer is None else self.trainer.limit_train_batches

    @property
    def fetching(self) -> dict[str, Any]:
        """How loaders fetch: `workers` and `pin_memory`."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {"workers": self.workers, "pin_memory": on_gpu}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As Lightning does, which would walk through every segment: 10 ms for 300 of them."""
        if not isinstance(batch, dict) or "segments" not in batch:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        rest = {name: value for name, value in batch.items() if name != "segments"}
        return super().transfer_batch_to_device(rest, device, dataloader_idx) | {"segments": batch["segments"]}

    def train_dataloader(self) -> Any:
        """The training loader, at the position where a resumed run stopped."""
        if self.trainer is not None and self.trainer._accelerator_connector.use_distributed_sampler:
            self.trainer._accelerator_connector.use_distributed_sampler = False  # the rows are cut by rank already
        loader = self.make_train_loader()
        made_from = self.made_from()  # of now: what is changed while it is read is not what was begun with
        if self.position is not None:
            self.refuse_changed(self.position.get("made_from"), made_from)
            loader.load_state_dict(self.position)
        self.train_loader, self.__made_from = loader, made_from
        return loader

    def val_dataloader(self) -> DataLoader | list:
        """Every held-out row once; an empty list without `validation`."""
        return self.make_eval_loader("validation") if self.sources["validation"] is not None else []

    def test_dataloader(self) -> DataLoader:
        """Every test row once."""
        return self.make_eval_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """Where the training data stand, `{epoch, update, ...}`, the same on every rank, and which these are."""
        position = {} if self.train_loader is None else self.train_loader.state_dict()
        return position and position | {"made_from": self.__made_from}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a position: the loader starts there when it is made."""
        self.position = state_dict or None

    # ---- predict

    def predict_dataloader(self) -> DataLoader:
        """Prompts of the `predict` rows (else test, else validation), each rank its share, in row order."""
        split = next((s for s in ("predict", "test", "validation") if self.sources[s] is not None), None)
        if split is None:
            raise UserError("data.predict: `predict` needs a source of prompts here, and the recipe names none")
        rows = [(row, ids, reference) for row, (ids, reference) in enumerate(self.prompts(split))]
        layout = self.layout
        share = rows[layout.rank :: layout.ranks]
        return DataLoader(share, batch_size=self.eval_batch_size, collate_fn=_prompt_batch)  # type: ignore[arg-type]


def _prompt_batch(rows: list[tuple[int, list[int], str]]) -> dict[str, list[Any]]:
    numbers, prompts, references = zip(*rows, strict=True)
    return {"rows": list(numbers), "prompts": list(prompts), "references": list(references)}
