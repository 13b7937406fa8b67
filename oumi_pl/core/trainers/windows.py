"""Training data, one window at a time: the micro-batches of one optimizer update, and the place in the data after it.

A window is `rows_per_update` rows: micro-batches of `per_device_train_batch_size` rows, dealt to the ranks in turn. The
order of a map-style dataset is a permutation drawn from `data_seed + epoch`. An iterable dataset is read by every rank,
which keeps its own micro-batches: nothing has to be sharded by the dataset. No row is left out or repeated; the last
window of an epoch may be short.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from oumi_pl.errors import UserError

Collator = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Layout:
    """How many rows go where: rows of a micro-batch, micro-batches of an update on one rank, ranks, and which it is."""

    batch_size: int
    micro_batches: int
    ranks: int = 1
    rank: int = 0

    @property
    def rows_per_update(self) -> int:
        """Rows of one update, on all ranks."""
        return self.batch_size * self.micro_batches * self.ranks

    def share(self, rows: Sequence[Any]) -> list[list[Any]]:
        """The rank's own micro-batches of a window; none if the last window of an epoch is too short for it."""
        every = [list(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]
        return every[self.rank :: self.ranks]


class Window:
    """What an update reads on one rank.

    Args:
        batches: The micro-batches.
        epoch: Which epoch it belongs to.
        number: How many windows of the epoch have been read with it.
        last: Whether the epoch ends with it.
        stands_in: Whether this rank had no rows left, and reads others' without learning from them.
        dataset_state: Where the dataset itself says it is, after this window.
    """

    def __init__(
        self, batches: list[Any], *, epoch: int, number: int, last: bool, stands_in: bool, dataset_state: Any = None
    ) -> None:
        self.batches = batches
        self.epoch = epoch
        self.number = number
        self.last = last
        self.stands_in = stands_in
        self.dataset_state = dataset_state

    def to(self, device: torch.device, **kwargs: Any) -> "Window":
        """Moves the micro-batches; Lightning calls this."""
        from lightning.fabric.utilities import move_data_to_device

        self.batches = move_data_to_device(self.batches, device)
        return self


@dataclass
class Position:
    """Between which two updates a run stands: the epoch, its windows that were trained on, the dataset's own state."""

    epoch: int = 0
    windows: int = 0
    dataset_state: Any = None


class Windows:
    """The windows of one epoch after the other, from a position on.

    The position moves when an update is done (`done`), not when a window is handed out: what Lightning or workers
    fetched ahead of a checkpoint is fetched again after it.

    Args:
        dataset: Map-style or iterable; its `set_epoch` is called, and `state_dict` and `load_state_dict` are used,
            if it has them. Streams of `datasets` are read again from the start of the epoch instead, since their
            state loses what is in shuffle buffers.
        collate: Rows to a batch.
        layout: How rows are cut.
        seed: The order of epoch `e` is drawn from `seed + e`.
        workers: Processes that read ahead; of an iterable dataset, at most one, which keeps the order.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collator,
        layout: Layout,
        seed: int,
        *,
        workers: int = 0,
        prefetch: int | None = None,
        persistent: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.layout = layout
        self.position = Position()
        self.on_first_fetch: Callable[[], None] | None = None
        """Called once, right before the first row is read."""
        self.rows = None if is_iterable(dataset) else len(dataset)
        if self.rows == 0:
            raise UserError("train_dataset: it has no rows")
        self._seed = seed
        workers = workers if self.rows is not None else min(workers, 1)
        self._source: Any = (
            _Reader(dataset, layout, self.position, workers == 0) if self.rows is None else _Rows(dataset, layout)
        )
        self._loader = DataLoader(
            self._source,
            batch_size=None,
            sampler=None if self.rows is None else _Order(self.rows, layout, self.position, seed),
            collate_fn=cast("Any", _Collate(collate)),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=persistent and workers > 0 and self.rows is not None,
            pin_memory=pin_memory,
            # its own generator: the seeds of workers must not be drawn from the stream that dropout uses
            generator=torch.Generator(),
        )

    @property
    def updates_per_epoch(self) -> int | None:
        """Windows of a whole epoch; None where the length is not known."""
        return None if self.rows is None else -(-self.rows // self.layout.rows_per_update)

    def __iter__(self) -> Iterator[Window]:
        if self.on_first_fetch is not None:
            self.on_first_fetch()
            self.on_first_fetch = None
        epoch, number = self.position.epoch, self.position.windows
        if self.rows is not None and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self._loader.generator.manual_seed(self._seed + epoch)
        read = iter(self._loader)
        ahead = next(read, None)
        if ahead is None and number == 0:
            raise UserError("train_dataset: it gave no rows")
        while ahead is not None:
            (batches, stands_in, state), number = ahead, number + 1
            # whether this is the last has to be known with it; a map-style dataset tells without reading on
            if self.updates_per_epoch is None:
                ahead = next(read, None)
                last = ahead is None
            else:
                last = number == self.updates_per_epoch
            yield Window(batches, epoch=epoch, number=number, last=last, stands_in=stands_in, dataset_state=state)
            if self.updates_per_epoch is not None:
                ahead = next(read, None)

    def done(self, window: Window) -> None:
        """Moves the position behind a window that was trained on."""
        at = (window.epoch + 1, 0, None) if window.last else (window.epoch, window.number, window.dataset_state)
        self.position.epoch, self.position.windows, self.position.dataset_state = at

    def end_epoch(self) -> None:
        """Moves the position to the next epoch, if this one has begun."""
        if self.position.windows:
            self.position.epoch, self.position.windows, self.position.dataset_state = self.position.epoch + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        """The position, and with how many rows per update it was reached."""
        return asdict(self.position) | {"rows_per_update": self.layout.rows_per_update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position.

        Raises:
            UserError: if an update has another number of rows than when it was saved.
        """
        if state["rows_per_update"] != self.layout.rows_per_update:
            raise UserError(
                f"the checkpoint was made with {state['rows_per_update']} rows per update, this run has "
                f"{self.layout.rows_per_update} (per_device_train_batch_size {self.layout.batch_size} x "
                f"gradient_accumulation_steps {self.layout.micro_batches} x {self.layout.ranks} processes)"
            )
        self.position.epoch, self.position.windows = state["epoch"], state["windows"]
        self.position.dataset_state = state["dataset_state"]


class SizedWindows(Windows):
    """Windows of a map-style dataset, which tell how many there are. Lightning then fetches none too early."""

    def __len__(self) -> int:
        updates = self.updates_per_epoch
        assert updates is not None
        return updates


def is_iterable(dataset: Any) -> bool:
    """Whether rows can only be read one after the other."""
    return isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))


class _Collate:
    """Collates each micro-batch of a window; a class, so that workers can be spawned with it."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, item: tuple[list[list[Any]], bool, Any]) -> tuple[list[Any], bool, Any]:
        micro_batches, stands_in, state = item
        return [self.collate(rows) for rows in micro_batches], stands_in, state


class _Order(Sampler[list[int]]):
    """The rows of each window of the epoch, from the position on."""

    def __init__(self, rows: int, layout: Layout, position: Position, seed: int) -> None:
        self.rows = rows
        self.layout = layout
        self.position = position
        self.seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.position.epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        size = self.layout.rows_per_update
        for start in range(self.position.windows * size, self.rows, size):
            yield order[start : start + size]


class _Rows(Dataset):
    """Looks up a window of a map-style dataset: this rank's micro-batches of rows."""

    def __init__(self, dataset: Any, layout: Layout) -> None:
        self.dataset = dataset
        self.layout = layout

    def __getitem__(self, window: list[int]) -> tuple[list[list[Any]], bool, None]:
        share = self.layout.share(window)
        stands_in = not share
        looked_up = [[self.dataset[i] for i in rows] for rows in share or [window[: self.layout.batch_size]]]
        return looked_up, stands_in, None


class _Reader(IterableDataset):
    """Reads windows of an iterable dataset, from the position on."""

    def __init__(self, dataset: Any, layout: Layout, position: Position, in_process: bool) -> None:
        self.dataset = dataset
        self.layout = layout
        self.position = position
        streams = type(dataset).__module__.startswith("datasets.")
        self.stateful = in_process and not streams and hasattr(dataset, "load_state_dict")
        self._start = copy.deepcopy(dataset.state_dict()) if self.stateful else None

    def __iter__(self) -> Iterator[tuple[list[list[Any]], bool, Any]]:
        size = self.layout.rows_per_update
        self._go_to_position()
        rows = iter(self.dataset)
        if not self.stateful:
            read = self.position.windows * size
            next(itertools.islice(rows, read, read), None)
        while window := list(itertools.islice(rows, size)):
            share = self.layout.share(window)
            state = copy.deepcopy(self.dataset.state_dict()) if self.stateful else None
            yield share or [window[: self.layout.batch_size]], not share, state

    def _go_to_position(self) -> None:
        """Puts the dataset back to its first state and announces the epoch; within an epoch, to where it was."""
        begins = self.position.windows == 0
        if self.stateful and begins:
            self.dataset.load_state_dict(copy.deepcopy(self._start))
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.position.epoch)
        if self.stateful and not begins:
            self.dataset.load_state_dict(copy.deepcopy(self.position.dataset_state))
