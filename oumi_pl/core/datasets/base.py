"""Data sets whose rows are in memory, as a pandas table."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


class BaseMapDataset(ABC):
    """Rows of a file, of a folder of `save_to_disk` or of the hub; a subclass says what `transform` makes of one.

    Args:
        dataset_name: Id on the hub; `default_dataset` of the class when left out.
        dataset_path: A .jsonl, .json or .parquet file, or a folder of `save_to_disk`; wins over the name.
        subset: Configuration of a hub data set; `default_subset` of the class when left out.
        split: Split of a hub data set.
        trust_remote_code: Kept for subclasses; `datasets` runs no remote code.
        transform_num_workers: Kept for subclasses; rows are transformed in this process.
        kwargs: `dataset_kwargs` that no class in between reads.
    """

    default_dataset: str | None = None
    default_subset: str | None = None

    def __init__(
        self,
        *,
        dataset_name: str | None = None,
        dataset_path: str | None = None,
        subset: str | None = None,
        split: str | None = None,
        trust_remote_code: bool = False,
        transform_num_workers: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        name = dataset_name or self.default_dataset
        if name is None:
            raise UserError(f"{type(self).__name__}: name a data set, or set default_dataset in the class")
        self.dataset_name = name
        self.dataset_path = dataset_path
        self.dataset_subset = subset or self.default_subset
        self.split = split
        self.trust_remote_code = trust_remote_code
        self.transform_num_workers = transform_num_workers
        self._data: pd.DataFrame

    @abstractmethod
    def transform(self, sample: Any) -> dict[str, Any]:
        """What training gets of a row."""

    def __getitem__(self, idx: int) -> dict[str, Any]:
        return self.transform(self.raw(idx))

    def __len__(self) -> int:
        return len(self._data)

    @property
    def data(self) -> "pd.DataFrame":
        """All rows."""
        return self._data

    def raw(self, idx: int) -> Any:
        """A row as it is in the table."""
        return self._data.iloc[idx]

    def as_generator(self) -> Iterator[dict[str, Any]]:
        """All rows, transformed."""
        for number in range(len(self)):
            yield self[number]

    def _load_data(self) -> "pd.DataFrame":
        """Reads the rows; subclasses may read them from anywhere else."""
        if self.dataset_path:
            return self._load_local_dataset(self.dataset_path)
        return self._load_hf_hub_dataset()

    def _load_local_dataset(self, path: str) -> "pd.DataFrame":
        """Reads a file or a saved folder; values are those of the file, unlike with pandas' guesses."""
        import datasets
        import pandas as pd

        place = Path(path).expanduser()
        if not place.exists():
            raise UserError(f"{type(self).__name__}: no file {path!r}")
        if place.suffix == ".jsonl":
            lines = place.read_text(encoding="utf-8").splitlines()
            return pd.DataFrame([json.loads(line) for line in lines if line.strip()])
        if place.suffix == ".json":
            return pd.DataFrame(json.loads(place.read_text(encoding="utf-8")))
        if place.suffix == ".parquet":
            return pd.read_parquet(place)
        if (place / "dataset_info.json").is_file():
            return _table(datasets.load_from_disk(str(place)))
        raise UserError(
            f"{type(self).__name__}: {path!r} is no .jsonl, .json or .parquet, and no folder of save_to_disk"
        )

    def _load_hf_hub_dataset(self) -> "pd.DataFrame":
        """Reads a data set of the hub, or a folder of data files by its path."""
        import datasets

        loaded = datasets.load_dataset(self.dataset_name, self.dataset_subset, split=self.split)
        if isinstance(loaded, dict):
            if len(loaded) > 1:
                raise UserError(f"{self.dataset_name}: there are several splits ({', '.join(loaded)}); name one")
            loaded = next(iter(loaded.values()))
        return _table(loaded)


def _table(dataset: Any) -> "pd.DataFrame":
    return dataset.with_format(None).to_pandas()
