"""What is trained and evaluated on."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from oumi_pl.core.configs.params.base_params import (
    MISSING,
    SPEED,
    BaseParams,
    harmless,
    honoured,
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

    def get_literal_value(self) -> str:
        """The name of the strategy in `datasets`."""
        return self.value


class TrainTarget(StrEnum):
    """Which turns of a conversation carry loss."""

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
    split: str = honoured("split", "train")
    """Split of the dataset, slices such as `train[:512]` included."""
    dataset_kwargs: dict[str, Any] = honoured("format and columns", {})
    sample_count: int | None = honoured("sample", None)
    """Exactly this many rows, taken or repeated; null: all as they are."""
    mixture_proportion: float | None = honoured("weight", None)
    """Share of this dataset in the mixture, from 0 to 1; given for all datasets or for none."""
    shuffle: bool = honoured("sample_seed, or the order that the run draws for each epoch", False)
    """Whether rows are shuffled before any is taken."""
    seed: int | None = honoured("sample_seed, or the seed of the run", None)
    """Seed of that shuffle; null: another order in each run."""
    shuffle_buffer_size: int = harmless("only torchdata's pipelines read it, which are not used", 1000)
    trust_remote_code: bool = harmless("only processors of images read it", False)
    transform_num_workers: str | int | None = harmless(SPEED, None)

    def _problems(self) -> Iterator[str]:
        yield from self._below(0, "sample_count")
        yield from self._no_share("mixture_proportion")
        workers = self.transform_num_workers
        if workers is not None and workers != "auto" and not (isinstance(workers, int) and workers > 0):
            yield f"transform_num_workers: {workers!r} is not a positive int or 'auto'"
        yield from self._too_deep("dataset_kwargs")

    def _final_problems(self) -> Iterator[str]:
        if self.dataset_path and not Path(self.dataset_path).expanduser().exists():
            yield f"dataset_path: there is no {self.dataset_path!r}"


@dataclass
class DatasetSplitParams(BaseParams):
    """The datasets of a split, and how they are combined."""

    datasets: list[DatasetParams] = honoured("a source each", [])
    """One after the other, or mixed when each has a `mixture_proportion`."""
    collator_name: str | None = honoured("data.train_on", None)
    collator_kwargs: dict[str, Any] = honoured("data.train_on", {})
    train_target: TrainTarget | None = honoured("data.train_on", None)
    """Which assistant turns carry loss; null: all tokens, or what the collator's templates say."""
    pack: bool = honoured("data.class_path, PackedChatData", False)
    """Whether rows are joined into windows of the full length."""
    stream: bool = honoured("data.streaming, for documents; other rows are read before training", False)
    target_col: str | None = harmless("Oumi reads it no more", None)
    mixture_strategy: str = honoured("data.exhausted, or the length of an epoch", MixtureStrategy.FIRST_EXHAUSTED.value)
    """A mixture ends when the first dataset does (`first_exhausted`), or the last (`all_exhausted`)."""
    seed: int | None = harmless("a mixture is redrawn for each epoch, with the seed of the run", None)
    use_torchdata: bool | None = harmless("rows are read without torchdata; true is refused", None)

    def _problems(self) -> Iterator[str]:
        yield from self._none_of("collator_name", COLLATORS)
        if self.train_target is not None and self.collator_name != COMPLETIONS_COLLATOR:
            yield f"train_target: needs collator_name: {COMPLETIONS_COLLATOR} beside it"
        shares = [dataset.mixture_proportion for dataset in self.datasets]
        given = [share for share in shares if share is not None]
        if given and len(given) < len(shares):
            yield f"datasets[{shares.index(None)}].mixture_proportion: missing; give it to all datasets or to none"
        if given and not math.isclose(sum(given), 1.0):
            yield f"datasets: the mixture_proportion of all sum to {sum(given):g}, but have to sum to 1"
        yield from self._none_of("mixture_strategy", [strategy.value for strategy in MixtureStrategy])

    def _settle(self) -> None:
        if self.target_col is not None:
            warnings.warn("target_col does nothing and will go", DeprecationWarning, stacklevel=2)


@dataclass
class DataParams(BaseParams):
    """The data of a run, split by split."""

    train: DatasetSplitParams = field(default_factory=DatasetSplitParams)
    test: DatasetSplitParams = harmless("Oumi's training never reads it", DatasetSplitParams())
    validation: DatasetSplitParams = field(default_factory=DatasetSplitParams)

    def get_split(self, split: DatasetSplit) -> DatasetSplitParams:
        """The parameters of a split."""
        return {"train": self.train, "test": self.test, "validation": self.validation}[split.value]

    def _final_problems(self) -> Iterator[str]:
        if not self.train.datasets:
            yield "train.datasets: empty, but there has to be a dataset to train on"
        train = self.train.collator_name
        for name, split in (("validation", self.validation), ("test", self.test)):
            if split.collator_name and split.collator_name != train:
                differs = f"{split.collator_name!r} differs from train.collator_name, {shown(train)}"
                yield f"{name}.collator_name: {differs}; all splits share that of train"
