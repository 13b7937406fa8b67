"""Finds the row of the source that an example was made from.

Rows are read again; where some were dropped they are tokenized again too, to count which ones.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from oumi_pl.data.examples import ExampleData
from oumi_pl.data.store import source_records
from oumi_pl.terminal.progress import track
from oumi_pl.types import Example, Record

AT_ONCE = 256
"""Rows that are tokenized at once."""


class SourceRow(NamedTuple):
    """A row and what became of it.

    number: counted from 1 over all sources of the split. origin: file and line. example: its number in the split,
    counted from 0; None if the row was dropped, for `reason`.
    """

    number: int
    origin: str
    record: Record
    example: int | None
    reason: str = ""
    cut: bool = False
    straddled: bool = False


Wanted = Callable[[int, int | None], bool]
"""Whether a row is wanted, by its number and the number of its example."""


def row_count(data: ExampleData, split: str) -> int:
    """Rows of a split, the dropped ones included."""
    return sum(int(store.report["rows"]) for store in data.stores(split))


def numbered_alike(data: ExampleData, split: str) -> bool:
    """Whether example `i` is of row `i + 1`: no row was dropped."""
    return row_count(data, split) == sum(map(len, data.stores(split)))


def walk(data: ExampleData, split: str, wanted: Wanted) -> Iterator[SourceRow]:
    """The wanted rows of a split, in order. Lazy: a caller who has enough just stops."""
    sources, keep = data.taken(split)
    number = index = 0
    for source, store in zip(sources, data.stores(split), strict=True):
        drops = store.report["rows"] != len(store)
        records = track(source_records(source, keep, formats=data.formats), f"looking for rows in {source.path}")
        while batch := list(itertools.islice(records, AT_ONCE)):
            rows = [(number + i, origin, record) for i, (origin, record) in enumerate(batch, 1)]
            if not drops:  # each row is the next example, so only the wanted ones have to be tokenized
                places: list[int | None] = list(range(index, index + len(rows)))
                chosen = [(row, place) for row, place in zip(rows, places, strict=True) if wanted(row[0], place)]
                encoded = data.encode([record for (_, _, record), _ in chosen]) if chosen else []
            else:
                encoded = data.encode([record for _, _, record in rows])
                kept = itertools.count(index)
                places = [next(kept) if isinstance(example, Example) else None for example in encoded]
                chosen = list(zip(rows, places, strict=True))
            for ((row, origin, record), place), example in zip(chosen, encoded, strict=True):
                if not wanted(row, place):
                    continue
                if isinstance(example, Example):
                    yield SourceRow(row, origin, record, place, "", example.cut, example.straddled)
                else:
                    yield SourceRow(row, origin, record, None, example.reason)
            number += len(rows)
            index += sum(place is not None for place in places)
