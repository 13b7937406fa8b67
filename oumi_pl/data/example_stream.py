"""Examples as a stream: rows are read, tokenized and shuffled while training, with a position that can be saved.

    rows -> records -> examples -> mixture -> packs -> shuffle buffer -> cut by update and rank -> batch

As in `row_stream.py`, the state between two updates holds how far each source was read, the examples that are in no row
yet, and the rows of the shuffle buffer. To resume, the rows before it are read again, but not tokenized.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from oumi_pl.data.loader import as_it_is
from oumi_pl.data.row_stream import RowStream, TokenMixture, arrays_from_state, arrays_to_state
from oumi_pl.data.stream_loader import StreamLoader
from oumi_pl.data.tokenize import Dropped
from oumi_pl.data.windows import Buffer
from oumi_pl.data.workers import Loader
from oumi_pl.errors import UserError
from oumi_pl.types import BadRow, Example, Record, Segment, Update

CHUNK = 64
"""Records that a process tokenizes at once."""


class ReadRow(NamedTuple):
    """What a record became, and the file and line of its row."""

    origin: str
    result: Example | Dropped | BadRow


Records = Callable[[], Iterator[tuple[str, Record | Dropped | BadRow]]]
EncodeAll = Callable[[list[Record]], Sequence[Example | Dropped | BadRow]]


class StreamedRecords:
    """The records of a source, in order, tokenized by loader processes in turn; see `StreamedDocuments`.

    Args:
        name: The source's name in messages.
        records: Iterates over the source's records from the start.
        encode: Turns records into examples, or into the reason why not.
        workers: Loader processes; with 0, this process tokenizes.
    """

    def __init__(self, name: str, records: Records, encode: EncodeAll, workers: int) -> None:
        self.name = name
        self.records = records
        self.encode = encode
        self.workers = workers

    def read(self, start: int) -> Iterator[ReadRow]:
        """Yields what each record became, from number `start` on.

        Raises:
            UserError: the source can't be read.
        """
        loader: DataLoader = Loader(
            _Chunks(self.records, self.encode, start),
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=self.workers,
            # a separate generator, so that the seeds of workers are not drawn from the one that dropout uses
            generator=torch.Generator().manual_seed(0),
        )
        for chunk in loader:
            if isinstance(chunk, UserError):
                raise chunk
            yield from chunk


class _Chunks(IterableDataset):
    def __init__(self, records: Records, encode: EncodeAll, start: int) -> None:
        self.records, self.encode, self.start = records, encode, start

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        turn, turns = (info.id, info.num_workers) if info else (0, 1)
        if info:  # the tokenizer's threads don't survive a fork, and each process has its own core
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            records = itertools.islice(self.records(), self.start, None)
            for number in itertools.count():
                if not (chunk := list(itertools.islice(records, CHUNK))):
                    return
                if number % turns == turn:
                    yield self._encoded(chunk)
        except UserError as error:  # yielded, since an exception across processes gets a traceback into its message
            yield error

    def _encoded(self, chunk: list[tuple[str, Record | Dropped | BadRow]]) -> list[ReadRow]:
        encoded = iter(self.encode([record for _, record in chunk if isinstance(record, Record)]))
        return [ReadRow(origin, next(encoded) if isinstance(r, Record) else r) for origin, r in chunk]


Units = Callable[[Example], float]
Counts = dict[int, dict[str, int]]
"""Number of the source -> reason -> rows that were left out."""


class ExampleRow(NamedTuple):
    """A row of the stream: examples, several if they are packed, and their numbers in the pass."""

    numbers: list[int]
    examples: list[Example]


class Rows:
    """Makes rows of examples: each its own, or packed by best fit within a buffer.

    Args:
        capacity: Tokens of a pack; None without packing.
        bad_rows: Whether a row that can't be used is an `error`, or left out (`drop`).
    """

    max_length = 0  # `RowStream` asks for it, to say how far a long document was read

    def __init__(self, capacity: int | None, bad_rows: str) -> None:
        self.capacity = capacity
        self.bad_rows = bad_rows
        self._buffer = Buffer(capacity or 1)
        self._number = 0
        self._left_out: Counter[tuple[int, str]] = Counter()

    def rows(self, row: ReadRow, source: int) -> Iterator[ExampleRow]:
        """Adds what a record became and yields the rows that are full. Has to be exhausted.

        Raises:
            UserError: the row can't be used, and that is an error.
        """
        if isinstance(row.result, BadRow):
            if self.bad_rows == "error":
                raise UserError(f"{row.origin}: {row.result.reason}")
            self._left_out[source, row.result.reason] += 1
            return
        if isinstance(row.result, Dropped):
            self._left_out[source, row.result.reason] += 1
            return
        item, size = (self._number, row.result), len(row.result.input_ids)
        self._number += 1
        if self.capacity is None or size > self.capacity:
            yield ExampleRow([item[0]], [item[1]])
        else:
            yield from map(_joined, self._buffer.add(item, size))

    def finish(self) -> Iterator[ExampleRow]:
        """Yields the remaining rows after the last record."""
        if self._buffer.items:
            yield from map(_joined, self._buffer.flush(everything=True))

    def state(self) -> tuple[list[Any], tuple[int, int, Counter[tuple[int, str]]]]:
        """The examples that are in no row yet; how many, the number of the next example, and what was left out."""
        return self._buffer.items, (len(self._buffer.items), self._number, self._left_out.copy())

    def restore(self, items: list[tuple[int, Example]], number: int, left_out: Counter[tuple[int, str]]) -> None:
        """Continues from a state."""
        self._buffer.restore(items, [len(example.input_ids) for _, example in items])
        self._number, self._left_out = number, left_out


def _joined(items: Sequence[tuple[int, Example]]) -> ExampleRow:
    return ExampleRow([number for number, _ in items], [example for _, example in items])


class ExampleStream(RowStream):
    """Rows of examples of one pass, in an order that depends only on sources, seed and epoch.

    Args:
        sources: The records of each source.
        weights: Relative share of each source; all None to read one source after the other. With weights, the pass has
            no end: a source that ends begins again.
        units: What the shares are of: an example's tokens, for instance.
        rows: Makes rows of examples.
        shuffle_buffer: Size, in rows, of the buffer that rows are drawn from; 0 keeps their order.
        seed: Seed of the draws.
        epoch: Counted from 0; each has other draws.
    """

    def __init__(
        self,
        sources: Sequence[StreamedRecords],
        weights: Sequence[float | None],
        units: Units,
        rows: Rows,
        *,
        shuffle_buffer: int,
        seed: int,
        epoch: int,
    ) -> None:
        def measure(row: ReadRow) -> float:
            return units(row.result) if isinstance(row.result, Example) else 0

        is_endless = any(weight is not None for weight in weights)
        mixture: Any = TokenMixture(sources, weights, "restart" if is_endless else "stop", measure)  # type: ignore[arg-type]
        super().__init__(mixture, rows, shuffle_buffer, seed, epoch)  # type: ignore[arg-type]

    def _rows(self, item: Any) -> Iterator[Any]:
        rows: Any = self.windows
        return rows.rows(item, self.mixture.source)

    def as_state(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        """Converts a snapshot to plain numbers and tensors for a checkpoint."""
        items, (length, number, left_out) = snapshot["carried"]
        return snapshot | {
            "running": None,
            "carried": _to_state([_joined([item]) for item in items[:length]]),
            "number": number,
            "left_out": [[source, reason, count] for (source, reason), count in left_out.items()],
            "buffer": _to_state(snapshot["buffer"]),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            UserError: it has another number of sources.
        """
        self.mixture.restore(state["mixture"])
        carried = [(row.numbers[0], row.examples[0]) for row in _from_state(state["carried"])]
        rows: Any = self.windows
        left_out = Counter({(source, reason): count for source, reason, count in state["left_out"]})
        rows.restore(carried, state["number"], left_out)
        self._out, self._drawn = state["out"], state["drawn"]
        buffer: Any = _from_state(state["buffer"])
        self._buffer = buffer
        self._before = self.mixture.state(), rows.state()


def left_out(snapshot: dict[str, Any]) -> Counts:
    """The rows that were left out before a snapshot of an `ExampleStream`, by source and reason."""
    counts: Counts = {}
    for (source, reason), count in snapshot["carried"][1][2].items():
        counts.setdefault(source, {})[reason] = count
    return counts


class ExampleLoader(StreamLoader):
    """Yields the micro-batches of one rank from an `ExampleStream`; see `StreamLoader`."""

    no_rows = "data.train: no row is left to train on"

    def _totals(self, rows: Sequence[Any], update: int) -> Update:
        layout = self.layout_now
        within = layout.within(self.limit, update, self.updates) * layout.batch_size * layout.ranks
        examples = [example for row in rows[:within] for example in row.examples]
        is_weighted = any(example.weights is not None for example in examples)
        weight = sum(example.target_weight for example in examples) if is_weighted else None
        return Update(sum(example.target_tokens for example in examples), len(examples), layout.parts, weight)


# ---- examples in a checkpoint


def _to_state(rows: Sequence[ExampleRow]) -> dict[str, Any]:
    """Rows as tensors."""
    examples = [example for row in rows for example in row.examples]
    weights = [np.empty(0, np.float32) if e.weights is None else e.weights.astype(np.float32) for e in examples]
    flat = np.concatenate([np.empty(0, dtype=np.float32), *weights])
    fields = sorted(examples[0].fields) if examples else []
    return {
        "numbers": arrays_to_state([np.array(row.numbers) for row in rows]),
        "input_ids": arrays_to_state([example.input_ids for example in examples]),
        "loss_mask": torch.from_numpy(np.concatenate([np.empty(0, dtype=np.bool_), *(e.loss_mask for e in examples)])),
        "segments": arrays_to_state([np.array(example.segments).reshape(-1) for example in examples]),
        "fields": {name: torch.tensor([e.fields[name] for e in examples], dtype=torch.float64) for name in fields},
        "weights": torch.from_numpy(flat),
        "is_weighted": torch.tensor([example.weights is not None for example in examples]),
    }


def _from_state(state: dict[str, Any]) -> list[ExampleRow]:
    """The rows of a `_to_state`."""
    ids, segments = arrays_from_state(state["input_ids"]), arrays_from_state(state["segments"])
    ends = np.cumsum([len(x) for x in ids])[:-1].astype(np.int64)
    masks = np.split(state["loss_mask"].numpy(), ends)
    is_weighted = state["is_weighted"].tolist()
    sizes = [len(x) if weighted else 0 for x, weighted in zip(ids, is_weighted, strict=True)]
    weights = np.split(state["weights"].numpy(), np.cumsum(sizes)[:-1].astype(np.int64))
    examples = iter(
        Example(
            ids[i],
            masks[i],
            tuple(Segment(*values) for values in segments[i].reshape(-1, 3).tolist()),
            {name: float(values[i]) for name, values in state["fields"].items()},
            weights=weights[i] if is_weighted[i] else None,
        )
        for i in range(len(ids))
    )
    rows = (numbers.tolist() for numbers in arrays_from_state(state["numbers"]))
    return [ExampleRow(numbers, [next(examples) for _ in numbers]) for numbers in rows]
