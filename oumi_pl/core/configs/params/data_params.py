"""What is trained and evaluated on."""

import math
import warnings
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from oumi_pl.core.configs.params.base_params import (
    MISSING,
    SPEED,
    BaseParams,
    OumiConfigError,
    harmless,
    hints,
    honoured,
    refused,
    shown,
)

COMPLETIONS_COLLATOR = "text_completions_only_with_padding"
COLLATORS = ("text_with_padding", COMPLETIONS_COLLATOR, "vision_language_with_padding", "vision_language_sft")


class DatasetSplit(Enum):
    """The splits of the data."""

    TRAIN = "train"
    TEST = "test"
    VALIDATION = "validation"


class MixtureStrategy(StrEnum):
    """When a mixture of datasets ends; a field takes the value, not the name."""

    FIRST_EXHAUSTED = "first_exhausted"
    ALL_EXHAUSTED = "all_exhausted"


class TrainTarget(StrEnum):
    """Which turns of a conversation are learnt."""

    ALL_ASSISTANT_TURNS = "all_assistant_turns"
    FINAL_ASSISTANT_TURN = "final_assistant_turn"


@dataclass
class DatasetParams(BaseParams):
    """A dataset of a split."""

    dataset_name: str = honoured("path", MISSING)
    """Name of the dataset: registered, or of the hub; required."""
    dataset_path: str | None = honoured("path", None)
    """Local file or folder that holds the rows."""
    subset: str | None = honoured("config", None)
    """Which configuration of a hub dataset."""
    split: str = honoured("split", "train")
    """Split of the dataset, slices such as `train[:512]` included."""
    dataset_kwargs: dict[str, Any] = honoured("format and columns", {})
    """Further arguments of the dataset's class."""
    sample_count: int | None = honoured("sample", None)
    """Exactly this many rows, taken or repeated; null: all as they are."""
    mixture_proportion: float | None = honoured("weight", None)
    """Share of this dataset in the mixture, from 0 to 1; given for all datasets or for none."""
    shuffle: bool = honoured("sample_seed, or the order that the run draws for each epoch", False)
    """Whether rows are shuffled before any is taken."""
    seed: int | None = honoured("sample_seed, or the seed of the run", None)
    """Seed of that shuffle; null: another order in each run."""
    shuffle_buffer_size: int = harmless("only torchdata's pipelines read it, which are not used", 1000)
    """Rows that are shuffled at a time when the dataset is a stream of torchdata."""
    trust_remote_code: bool = harmless("only processors of images read it", False)
    """Whether code that comes with the processor may run."""
    transform_num_workers: str | int | None = harmless(SPEED, None)
    """Processes that prepare rows: a number, or `auto`; null: one."""

    def _check(self) -> None:
        self._at_least(0, "sample_count")
        self._is_share("mixture_proportion")
        workers = self.transform_num_workers
        if workers is not None and workers != "auto" and not (isinstance(workers, int) and workers > 0):
            raise OumiConfigError(f"transform_num_workers: {workers!r} is not a positive int or 'auto'")
        for key in self.dataset_kwargs:
            if key in hints(DatasetParams):
                raise OumiConfigError(f"dataset_kwargs.{key}: belongs one level higher, beside dataset_kwargs")

    def _finalize(self) -> None:
        if self.dataset_path and not Path(self.dataset_path).expanduser().exists():
            raise OumiConfigError(f"dataset_path: there is no {self.dataset_path!r}")


@dataclass
class DatasetSplitParams(BaseParams):
    """The datasets of a split, and how they are put together."""

    datasets: list[DatasetParams] = honoured("a source each", [])
    """Datasets: one after the other, or mixed when each has a `mixture_proportion`."""
    collator_name: str | None = honoured("data.train_on", None)
    """What makes a batch of rows; null: what the trainer type does by itself."""
    collator_kwargs: dict[str, Any] = honoured("data.train_on", {})
    """Further arguments of the collator."""
    train_target: TrainTarget | None = honoured("data.train_on", None)
    """Which assistant turns are learnt; null: all tokens, or what the collator's templates say."""
    pack: bool = honoured("data.class_path, PackedChatData", False)
    """Whether rows are joined into windows of the full length."""
    stream: bool = honoured("data.streaming, for documents; other rows are read before training", False)
    """Whether rows are read while training, without a known number of them."""
    target_col: str | None = harmless("Oumi reads it no more", None)
    """Deprecated: does nothing."""
    mixture_strategy: str = honoured("data.exhausted, or the length of an epoch", MixtureStrategy.FIRST_EXHAUSTED.value)
    """A mixture ends when the first dataset does (`first_exhausted`), or the last (`all_exhausted`)."""
    seed: int | None = harmless("a mixture is drawn anew for each epoch, by the seed of the run", None)
    """Seed of the mixture; null: another order in each run."""
    use_torchdata: bool | None = refused("torchdata's pipelines are not used; leave it out", None)
    """Whether torchdata's pipelines read the rows; null: no."""

    def _check(self) -> None:
        self._one_of("collator_name", COLLATORS)
        if self.train_target is not None and self.collator_name != COMPLETIONS_COLLATOR:
            raise OumiConfigError(f"train_target: needs collator_name: {COMPLETIONS_COLLATOR} beside it")
        self._check_proportions()
        self._one_of("mixture_strategy", [strategy.value for strategy in MixtureStrategy])
        if self.target_col is not None:
            warnings.warn("target_col does nothing and will go", DeprecationWarning, stacklevel=2)

    def _check_proportions(self) -> None:
        shares = [dataset.mixture_proportion for dataset in self.datasets]
        given = [share for share in shares if share is not None]
        if not given:
            return
        if len(given) < len(shares):
            without = shares.index(None)
            raise OumiConfigError(
                f"datasets[{without}].mixture_proportion: missing; give it to all datasets or to none"
            )
        if not math.isclose(sum(given), 1.0):
            raise OumiConfigError(
                f"datasets: the mixture_proportion of all sum to {sum(given):g}, but have to sum to 1"
            )


@dataclass
class DataParams(BaseParams):
    """The data of a run, split by split."""

    train: DatasetSplitParams = field(default_factory=DatasetSplitParams)
    """What is trained on."""
    test: DatasetSplitParams = harmless("Oumi's training never reads it", DatasetSplitParams())
    """Kept for Oumi's files; training does not read it."""
    validation: DatasetSplitParams = field(default_factory=DatasetSplitParams)
    """What is evaluated on while training."""

    def get_split(self, split: DatasetSplit) -> DatasetSplitParams:
        """The parameters of a split."""
        return {"train": self.train, "test": self.test, "validation": self.validation}[split.value]

    def _finalize(self) -> None:
        if not self.train.datasets:
            raise OumiConfigError("train.datasets: empty, but there has to be a dataset to train on")
        for name, split in (("validation", self.validation), ("test", self.test)):
            if split.collator_name and split.collator_name != self.train.collator_name:
                raise OumiConfigError(
                    f"{name}.collator_name: {split.collator_name!r} differs from train.collator_name, "
                    f"{shown(self.train.collator_name)}; all splits share that of train"
                )
