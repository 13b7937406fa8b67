"""Parquet and Arrow files, a batch of rows in memory at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oumi_pl.data.files import kind_of
from oumi_pl.errors import UserError
from oumi_pl.types import Row

_BATCH = 1000  # rows in memory


def table_rows(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    """Rows of a Parquet or Arrow file, each with its origin for messages; `name` is what these call the file."""
    import datasets

    number = 0
    for batch in table_batches(path, name):
        decode = datasets.Features.from_arrow_schema(batch.schema).decode_example  # else JSON columns stay text
        for row in batch.to_pylist():
            number += 1
            yield f"{name} row {number}", decode(row)


def table_batches(path: Path, name: str) -> Iterator[Any]:
    """Record batches of a Parquet or Arrow file.

    Raises:
        UserError: the file is damaged, or of another kind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind_of(path) == "parquet":
            yield from pq.ParquetFile(path).iter_batches(_BATCH)
            return
        mapped = pa.memory_map(str(path))
        try:
            batches = iter(pa.ipc.open_stream(mapped))
        except pa.ArrowInvalid:  # the other layout of such files, which can be read from any place
            file = pa.ipc.open_file(mapped)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        yield from batches
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{name}: damaged, or not a file of this kind: {error}") from error
