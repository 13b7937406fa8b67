"""Any dataset, update by update: the plan, the loaders and the positions of `oumi_pl.data`, for batches of any kind.

How many targets rows have is known only once they are collated. So the micro-batches of an update are collated ahead,
counted, and given the sum over all processes, before the first of them is trained on.
"""

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from oumi_pl.core.trainers.collate import Collator
from oumi_pl.core.trainers.kinds import HasEpochs, HasState, MapStyle
from oumi_pl.core.trainers.loss import Counter
from oumi_pl.data.loader import PlanLoader, as_it_is, eval_loader
from oumi_pl.data.plan import Layout, Plan
from oumi_pl.data.stream_loader import StreamLoader
from oumi_pl.data.workers import Loader
from oumi_pl.errors import UserError
from oumi_pl.types import Update

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams


class MicroBatch(TypedDict):
    """What one training step reads."""

    inputs: Any  # the output of the collator; None without rows
    counts: dict[str, int]  # its own targets, rows, tokens; zeros where a rank ran out of rows
    update: NotRequired[Update]  # in training


NOTHING = {"targets": 0, "rows": 0, "tokens": 0, "positions": 0}


class Collate:
    """Collates rows and counts what is in the batch; a class, so that workers can be spawned with it."""

    def __init__(self, collate: Collator, count: Counter) -> None:
        self.collate = collate
        self.count = count

    def __call__(self, rows: Sequence[Any]) -> MicroBatch:
        """The micro-batch of some rows."""
        if not rows:
            return MicroBatch(inputs=None, counts=NOTHING)
        inputs = self.collate(list(rows))
        return MicroBatch(inputs=inputs, counts=self.count(inputs))

    def planned(self, rows: Sequence[tuple[Any, list[Any]]]) -> MicroBatch:
        """The same of rows as `PlanLoader` looks them up: with their numbers."""
        return self([example for _, examples in rows for example in examples])


class MapLoader(PlanLoader):
    """The `PlanLoader` of a map-style dataset: it reads each update ahead.

    It hands out no micro-batch that no rank has rows for; the last update of an epoch may have fewer.
    """

    def __init__(self, data: "DatasetModule", **fetching: Any) -> None:
        super().__init__(data.train, np.empty(0), data.plan, data.layout, data.collate.planned, **fetching)
        self.data = data

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on one rank, whatever the position."""
        layout = self.position.layout
        full, rest = divmod(self.position.current.rows, layout.rows_per_update)
        return full * layout.micro_batches + layout.filled(rest)

    def __iter__(self) -> Iterator[MicroBatch]:  # type: ignore[override]
        position, layout, plan = self.position, self.position.layout, self.position.current
        self.data.begin(position.epoch)
        # workers are seeded by the epoch, so that a resumed run's are as well
        self.generator.manual_seed(self.data.params.data_seed + position.epoch)
        batches = DataLoader.__iter__(self)
        for update in range(position.update, len(plan)):
            first = update * layout.rows_per_update
            rows = range(first, min(first + layout.rows_per_update, plan.rows))
            own = list(itertools.islice(batches, layout.micro_batches))
            stand_in = partial(self._stand_in, plan, rows[: layout.batch_size])
            for micro, batch in enumerate(self.data.finish(own, len(rows), stand_in), 1):
                position.update = update + micro // layout.filled(len(rows))
                yield batch

    def _stand_in(self, plan: Plan, rows: range) -> MicroBatch:
        return self.collate_fn([self.dataset[plan.row(i)] for i in rows])


class IterableLoader(StreamLoader):
    """The `StreamLoader` of an iterable dataset: it reads each update ahead."""

    no_rows = "train_dataset: it gave no rows"

    def __init__(self, data: "DatasetModule") -> None:
        super().__init__(data.stream, data.layout, cast("Any", data.collate), trained=lambda: data.loop.global_step)
        self.data = data

    def batches_of(self, rows: Sequence[Any], update: int) -> Iterator[MicroBatch]:
        """The micro-batches of this rank in an update, each with what the update comes to."""
        collate, size = self.data.collate, self.layout.batch_size
        batches = [collate(rows[share.start : share.stop]) for share in self.layout.shares(len(rows))]
        return self.data.finish(batches, len(rows), lambda: collate(rows[:size]))


class DatasetStream:
    """One pass through an iterable dataset, as a `oumi_pl.data.stream_loader.Stream`.

    A dataset with a state goes back to where it was; any other is read again from the start of the epoch. So are
    streams of `datasets`, since their state loses what is in shuffle buffers, and what a loader process reads.

    Args:
        dataset: Its `set_epoch` is called if it has one.
        epoch: Which pass it is.
        start: State of the dataset at the beginning of a pass; None to read again.
        workers: Processes that read ahead: at most one, which keeps the order.
    """

    def __init__(self, dataset: Any, epoch: int, start: Any, workers: int) -> None:
        self.dataset = dataset
        self.start = start
        self.workers = workers
        self.read = self._skipped = 0
        if start is not None:
            dataset.load_state_dict(copy.deepcopy(start))
        if isinstance(dataset, HasEpochs):
            dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        rows = self.dataset
        if self.workers:
            rows = Loader(rows, batch_size=None, collate_fn=as_it_is, num_workers=1, generator=torch.Generator())
        for row in itertools.islice(rows, self._skipped, None):
            self.read += 1
            yield row

    def snapshot(self) -> dict[str, Any]:
        """How many rows were read, and the dataset's own state."""
        own = None if self.start is None else copy.deepcopy(self.dataset.state_dict())
        return {"read": self.read, "dataset": own}

    def as_state(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        """The same: plain values already."""
        return snapshot

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where a pass was."""
        self.read = state["read"]
        if self.start is None:
            self._skipped = self.read
        else:
            self.dataset.load_state_dict(copy.deepcopy(state["dataset"]))


class DatasetModule(L.LightningDataModule):
    """Trains and evaluates on any datasets.

    An update has `rows_per_update` rows, cut as a plan is. The order of a map-style dataset is a permutation drawn from
    `data_seed + epoch`. An iterable dataset is read by every rank, which keeps its own micro-batches: nothing has to be
    sharded by the dataset. No row is left out or repeated; the last update of an epoch may be short.

    Args:
        train: Map-style or iterable rows.
        evaluation: The same to evaluate on; None for nothing.
        collate: Rows to a micro-batch.
        layout: How an update is cut.
        params: What the run was given.
    """

    def __init__(
        self,
        train: Any,
        evaluation: Any,
        *,
        collate: Collate,
        layout: Layout,
        params: "TrainingParams",
    ) -> None:
        super().__init__()
        self.train = train
        self.evaluation = evaluation
        self.collate = collate
        self.layout = layout
        self.params = params
        self.rows = None if is_iterable(train) else len(train)
        if self.rows == 0:
            raise UserError("train_dataset: it has no rows")
        if evaluation is not None and not is_iterable(evaluation) and not len(evaluation):
            raise UserError("eval_dataset: it has no rows")
        self.loader: Any = None
        self.workers = number_of_workers(params.dataloader_num_workers)
        self._start: Any = None
        self._position: dict[str, Any] | None = None

    @property
    def loop(self) -> Any:
        """Lightning's Trainer, by the time that anything is read."""
        return self.trainer

    @property
    def updates_per_epoch(self) -> int | None:
        """Updates of a whole epoch; None where the length is not known."""
        return None if self.rows is None else len(self.plan(0))

    def plan(self, epoch: int) -> Plan:
        """The order of a map-style dataset in an epoch."""
        assert self.rows is not None
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.params.data_seed + epoch))
        return Plan(order.numpy(), np.arange(self.rows + 1), self.layout.rows_per_update)

    def stream(self, epoch: int) -> DatasetStream:
        """A pass through an iterable dataset."""
        return DatasetStream(self.train, epoch, self._start, self.workers)

    def train_dataloader(self) -> Any:
        """The training loader, at the position that was restored."""
        params, workers = self.params, self.workers
        if self.rows is not None:
            self.loader = MapLoader(
                self,
                workers=workers,
                pin_memory=torch.cuda.is_available(),
                prefetch_factor=params.dataloader_prefetch_factor if workers else None,
                persistent_workers=params.dataloader_persistent_workers and workers > 0,
            )
        else:
            is_stream = type(self.train).__module__.startswith("datasets.")
            if isinstance(self.train, HasState) and not is_stream and not workers:
                self._start = copy.deepcopy(self.train.state_dict())
            self.loader = IterableLoader(self)
        if self._position is not None:
            self.loader.load_state_dict(self._position)
        return self.loader

    def val_dataloader(self) -> Any:
        """The rows of one process to evaluate on; on all processes as many batches."""
        layout = Layout(self.params.per_device_eval_batch_size, 1, self.layout.ranks, self.layout.rank)
        if self.evaluation is None:
            return []
        if is_iterable(self.evaluation):
            rows, number = _Shares(self.evaluation, layout), min(self.workers, 1)
            seeded = torch.Generator().manual_seed(0)  # evaluating must not change what training draws
            return Loader(rows, batch_size=None, collate_fn=self.collate, num_workers=number, generator=seeded)
        number = len(self.evaluation)
        plan = Plan(np.arange(number), np.arange(number + 1), layout.rows_per_update)
        return eval_loader(self.evaluation, [plan], layout, self.collate.planned, workers=self.workers)

    def begin(self, epoch: int) -> None:
        """Called right before the first row of a pass through a map-style dataset is read."""
        if isinstance(self.train, HasEpochs):
            self.train.set_epoch(epoch)
        # rows are read right when they are needed, and may draw from the generators
        self.loop.lightning_module.restore_generators()

    def finish(
        self, batches: Sequence[MicroBatch], rows: int, stand_in: Callable[[], MicroBatch]
    ) -> Iterator[MicroBatch]:
        """The micro-batches of an update with what it comes to, but for those that no rank has rows for.

        Args:
            batches: Of this rank, without inputs where it ran out of rows.
            rows: Of the update, on all ranks.
            stand_in: Makes a micro-batch of other rows.
        """
        batches = batches[: self.layout.filled(rows)]
        with self.loop.profiler.profile("computing tokens"):
            targets = self._over_ranks(sum(batch["counts"]["targets"] for batch in batches))
        update = Update(targets, rows, self.layout.parts)
        for batch in batches:
            # a rank that ran out of rows runs the model on others: DDP needs that
            inputs = stand_in()["inputs"] if batch["inputs"] is None else batch["inputs"]
            yield MicroBatch(inputs=inputs, counts=batch["counts"], update=update)

    def _over_ranks(self, number: int) -> int:
        if self.layout.ranks == 1:
            return number
        strategy = self.loop.strategy
        return int(strategy.reduce(torch.tensor(number, device=strategy.root_device), reduce_op="sum"))

    # ---- position

    @property
    def epoch_is_done(self) -> bool:
        """Whether the update that was trained last ends the epoch."""
        return self.loop.fit_loop.epoch_loop.batch_progress.is_last_batch

    def state_dict(self) -> dict[str, Any]:
        """The position between two updates: in an epoch that is not over."""
        state = self.loader.state_dict()
        return state | {"epoch": state["epoch"] + 1, "update": 0, "stream": None} if self.epoch_is_done else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a position: the loader starts there when it is built."""
        self._position = state_dict


def is_iterable(dataset: Any) -> bool:
    """Whether rows can only be read one after the other."""
    return isinstance(dataset, IterableDataset) or not isinstance(dataset, MapStyle)


def number_of_workers(number: int | str) -> int:
    """The number itself, or for `auto` one that suits the processes on this machine and its cores."""
    if number != "auto":
        return int(number)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(2 * local, 8, (os.cpu_count() or 1) // 4))


class _Shares(IterableDataset):
    """A rank's share of an iterable dataset: lists of rows, empty where there are none left for it."""

    def __init__(self, rows: Any, layout: Layout) -> None:
        self.rows = rows
        self.layout = layout

    def __iter__(self) -> Iterator[list[Any]]:
        rows, size = iter(self.rows), self.layout.rows_per_update
        taken = list(itertools.islice(rows, size))
        if not taken:
            raise UserError("eval_dataset: it gave no rows")
        while taken:
            yield from (taken[share.start : share.stop] for share in self.layout.shares(len(taken)))
            taken = list(itertools.islice(rows, size))
