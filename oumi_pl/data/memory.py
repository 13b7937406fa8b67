"""Rows that Python passes instead of naming a file: a list of dicts, a `datasets.Dataset`, a pandas DataFrame."""

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from oumi_pl.errors import UserError
from oumi_pl.types import Row

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

Table = Union[Sequence[Row], "Dataset", "pd.DataFrame"]


class Rows:
    """Rows in memory. Equal rows have the same fingerprint, whatever holds them.

    Args:
        values: A list of dicts, a `datasets.Dataset` or a pandas DataFrame, whose empty cells (NaN) become None.
        where: What they were given as, for messages.

    Raises:
        UserError: it is something else.
    """

    def __init__(self, values: Table, where: str = "data") -> None:
        self.kind = _kind(values, where)
        self.values: Any = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Row]:
        if self.kind == "DataFrame":
            yield from _rows_of_frame(self.values)
            return
        for number, row in enumerate(self.values, 1):
            if not isinstance(row, Mapping):
                raise UserError(f"{self} row {number} is a {type(row).__name__} instead of a dict of columns")
            yield dict(row)

    def __str__(self) -> str:
        return f"{self.kind} in memory"

    def fingerprint(self) -> str:
        """Hash of the rows and their order: 32 hex digits.

        Raises:
            UserError: a row holds an object whose content can't be hashed.
        """
        digest = hashlib.blake2b(digest_size=16)
        for number, row in enumerate(self, 1):
            try:
                digest.update(json.dumps(row, default=_as_json).encode(errors="surrogatepass") + b"\n")
            except (TypeError, ValueError, pickle.PicklingError, AttributeError) as error:
                raise UserError(f"{self} row {number}: a column holds no plain value: {error}") from error
        return digest.hexdigest()


def _kind(values: Any, where: str) -> str:
    """`list`, `Dataset` or `DataFrame`."""
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return "list"
    import datasets

    if isinstance(values, datasets.Dataset):
        return "Dataset"
    if isinstance(values, datasets.IterableDataset):
        raise UserError(f"{where}: an IterableDataset can't be counted or hashed; name its files or its id on the hub")
    import pandas as pd

    if isinstance(values, pd.DataFrame):
        return "DataFrame"
    raise UserError(
        f"{where} is a {type(values).__name__}; name a file, a directory or a hub id, or pass rows: a list of dicts, "
        "a datasets.Dataset or a pandas DataFrame"
    )


def _rows_of_frame(frame: Any) -> Iterator[Row]:
    columns = list(map(str, frame.columns))
    empty = frame.isna().to_numpy()
    for values, missing in zip(frame.itertuples(index=False, name=None), empty, strict=True):
        cells = zip(columns, values, missing, strict=True)
        yield {column: None if none else _plain(value) for column, value, none in cells}


def _plain(value: Any) -> Any:
    """A cell without numpy's types: tables that were read from files hold lists as arrays."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _as_json(value: Any) -> Any:
    """A stand-in for a value that JSON has no type for, with all of its content."""
    return [type(value).__qualname__, pickle.dumps(value).hex()]
