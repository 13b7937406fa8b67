"""Data sets whose rows are in memory, as a pandas table."""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.data.files import kind_of, read_file
from oumi_pl.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


class BaseMapDataset(ABC):
    """Rows of a file, of a folder of `save_to_disk` or of the hub; `transform` of a subclass converts them.

    A row is a Series of pandas, as in Oumi, but its values are those of the file: integers stay integers, dates in JSON
    stay text, and what is missing is None. In Parquet and data sets of the hub, a list is an array of NumPy as in Oumi,
    in which a missing float is NaN.

    Args:
        dataset_name: Id on the hub; `default_dataset` of the class when left out.
        dataset_path: A .jsonl, .json or .parquet file, or a folder of `save_to_disk`; wins over the name.
        subset: Configuration of a hub data set; `default_subset` of the class when left out.
        split: Split of a hub data set.
        trust_remote_code: Kept for subclasses; `datasets` runs no remote code.
        transform_num_workers: Kept for subclasses; rows are transformed in this process.
        tokenizer: Kept for subclasses.
        kwargs: Arguments that no class names; see `refuse_unknown`.
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
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown(type(self), kwargs)
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
        """Converts a row to what training reads."""

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
        row = self._data.iloc[idx]
        if row.dtype == object:
            return row
        return self._data.iloc[[idx]].astype(object).iloc[0]  # else an integer beside a float would become one

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
        """Reads a file or a saved folder.

        Raises:
            UserError: there is none, or it can't be read; names file and line.
        """
        import datasets

        place = Path(path).expanduser()
        if not place.exists():
            raise UserError(f"{type(self).__name__}: no file {path!r}")
        if kind_of(place) in ("jsonl", "json"):
            return _frame([row for _, row in read_file(place, path) if isinstance(row, dict)])
        if kind_of(place) == "parquet":
            return _read_parquet(place, path)
        if (place / "dataset_info.json").is_file():
            return _table(datasets.load_from_disk(str(place)))
        raise UserError(
            f"{type(self).__name__}: {path!r} is no .jsonl, .json or .parquet, and no folder of save_to_disk"
        )

    def _load_hf_hub_dataset(self) -> "pd.DataFrame":
        """Reads a data set of the hub, or a folder of data files by its path."""
        return _table(self._hub_split())

    def _hub_split(self, *, streaming: bool = False) -> Any:
        """The split of the hub, or its only one."""
        import datasets

        loaded = datasets.load_dataset(self.dataset_name, self.dataset_subset, split=self.split, streaming=streaming)
        if isinstance(loaded, dict):
            if len(loaded) > 1:
                raise UserError(f"{self.dataset_name}: there are several splits ({', '.join(loaded)}); name one")
            loaded = next(iter(loaded.values()))
        return loaded


def refuse_unknown(cls: type, names: Iterable[str]) -> None:
    """Refuses arguments that no class names; warns if a class of the user's takes `**kwargs`, since it may read them.

    Args:
        cls: A class of data sets.
        names: Names of the arguments.

    Raises:
        UserError: names the first unknown argument, and the nearest known one.
    """
    parameters = {
        parent: inspect.signature(vars(parent)["__init__"]).parameters.values()
        for parent in cls.__mro__
        if "__init__" in vars(parent) and parent not in (object, ABC)
    }
    every = [(parent, p) for parent, each in parameters.items() for p in each if p.name != "self"]
    known = [p.name for _, p in every if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    takes_any = any(p.kind is p.VAR_KEYWORD and not _is_ours(parent) for parent, p in every)
    for name in names:
        if name in known:
            continue
        message = f"{cls.__name__} has no argument {name!r}{nearest(name, known)}"
        if not takes_any:
            raise UserError(message)
        warnings.warn(f"{message}; it has an effect only if its **kwargs are read", stacklevel=3)


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith(f"{__package__}.")


def _frame(rows: Sequence[Mapping[str, Any]]) -> "pd.DataFrame":
    """Rows as a table whose values are as they are; a column that a row doesn't have is None."""
    import pandas as pd

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in names}
    return pd.DataFrame(columns, index=range(len(rows)))


def _read_parquet(path: Path, name: str) -> "pd.DataFrame":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{name}: damaged, or not a file of this kind: {error}") from error
    return _exact(table.to_pandas(), table)


def _table(dataset: Any) -> "pd.DataFrame":
    """A data set of the library `datasets` as a table."""
    return _exact(dataset.with_format(None).to_pandas(), dataset.with_format("arrow")[:])


def _exact(frame: "pd.DataFrame", table: "pa.Table") -> "pd.DataFrame":
    """The columns of a table as objects: pandas makes floats of integers beside a null, and NaN of nulls.

    Args:
        frame: The table as pandas converts it.
        table: The table.
    """
    import pandas as pd

    columns = {}
    for name in frame.columns:
        values = frame[name]
        column = table.column(name) if name in table.column_names else None
        # types that `datasets` adds, such as JSON, are decoded in the frame alone
        if column is not None and "extension<" not in str(column.type):
            values = column.to_pandas(integer_object_nulls=True)
        values = values.to_numpy(dtype=object, copy=True)
        if column is not None and column.null_count:
            values[column.is_null().to_numpy()] = None
        columns[name] = pd.Series(values, index=frame.index, dtype=object)
    return pd.DataFrame(columns, index=frame.index)
