"""Loaders that follow a plan. The position of the training loader is two numbers: epoch and update."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from oumi_pl.data.plan import Layout, Plan
from oumi_pl.data.workers import Loader
from oumi_pl.errors import UserError
from oumi_pl.types import Example, Update


class Rows(Dataset):
    """Maps a row of the plan, an array of example ids, to `(ids, examples)`."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __getitem__(self, row: np.ndarray) -> tuple[list[int], list[Example]]:
        ids = row.tolist()
        return ids, [self.examples[i] for i in ids]


class PlanSampler(Sampler[list[np.ndarray]]):
    """Yields the micro-batches of one rank, starting at a position.

    Lightning calls `set_epoch` on `loader.batch_sampler.sampler`, hence the property `sampler`. `plan`, the function
    from an epoch to its plan, may be replaced before the epoch has begun.
    """

    def __init__(self, plan: Callable[[int], Plan], layout: Layout) -> None:
        self.plan = plan
        self.layout = layout
        self.epoch = 0
        self.update = 0
        self.on_epoch: Callable[[int], None] = lambda epoch: None
        """Called with the number of each epoch before its first batch, also if a resumed run begins within it."""
        self._planned: tuple[Any, Plan] | None = None

    @property
    def sampler(self) -> "PlanSampler":
        """Itself: Lightning looks here for `set_epoch`."""
        return self

    @property
    def current(self) -> Plan:
        """The plan of the current epoch, computed once."""
        key = self.epoch, self.plan
        if self._planned is None or self._planned[0] != key:
            self._planned = key, self.plan(self.epoch)
        return self._planned[1]

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch; keeps the position if it is within the same epoch, as after a resume."""
        if epoch != self.epoch:
            self.epoch, self.update = epoch, 0
        self.on_epoch(epoch)

    @property
    def layout_now(self) -> Layout:
        """The layout in the current epoch."""
        return self.layout.at(self.epoch)

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on one rank, whatever the position."""
        return len(self.current) * self.layout_now.micro_batches

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        plan, layout = self.current, self.layout_now
        for update in range(self.update, len(plan)):
            yield from plan.micro_batches(update, layout)


class FollowsPlan:
    """A loader whose position is that of a `PlanSampler`."""

    position: PlanSampler

    @property
    def layout(self) -> Layout:
        """How the rows of an update are divided, in all epochs; may be replaced before the first batch is fetched."""
        return self.position.layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        self.position.layout = layout

    @property
    def on_epoch(self) -> Callable[[int], None]:
        """Called with the number of each epoch before its first batch, also if a resumed run begins within it."""
        return self.position.on_epoch

    @on_epoch.setter
    def on_epoch(self, function: Callable[[int], None]) -> None:
        self.position.on_epoch = function


class PlanLoader(FollowsPlan, Loader):
    """A DataLoader over a plan, with a position that can be saved and restored.

    Each micro-batch carries the totals of its update over all micro-batches and ranks (`Batch.update`), and the ids of
    the update's examples, the same list in each of them.

    Its state is `{epoch, update}`, counted when batches are yielded, so that prefetching doesn't change it. It is the
    same on every rank, because Lightning saves only rank 0's.
    """

    def __init__(
        self,
        examples: Any,
        targets: np.ndarray,
        plan: Callable[[int], Plan],
        layout: Layout,
        collate: Callable[[list], Any],
        *,
        limit: int | float = 1.0,
        weights: np.ndarray | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        **fetching: Any,
    ) -> None:
        """Creates the loader.

        Args:
            examples: Examples by id.
            targets: Tokens that carry loss, per example, `[examples]`.
            plan: Epoch -> plan.
            layout: How the rows of an update are divided.
            collate: Rows -> micro-batch.
            limit: Micro-batches of an epoch that are trained on, or the share of them (`limit_train_batches`).
            weights: Sum of the weights of these tokens, `[examples]`; None if all are 1.
            workers: Loader processes.
            pin_memory: Pin batches in memory, for asynchronous copies to a GPU.
            fetching: Further arguments of `DataLoader` for its workers.
        """
        self.position = PlanSampler(plan, layout)
        self.targets = targets
        self.weights = weights
        self.limit = limit
        super().__init__(
            Rows(examples),
            batch_sampler=self.position,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin_memory,
            **fetching,
            # a separate generator, so that the seeds of workers are not drawn from the one that dropout uses
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing is fetched before the first `next`: Lightning calls `iter` before `set_epoch` and
        # `load_state_dict`.
        position, micro_batches = self.position, self.position.layout_now.micro_batches
        yielded = position.update * micro_batches
        update: Update | None = None
        ids: list[int] = []
        for batch in super().__iter__():
            if yielded % micro_batches == 0 or update is None:
                ids = self._examples_of(position.update).tolist()
                weight = None if self.weights is None else float(self.weights[ids].sum())
                update = Update(int(self.targets[ids].sum()), len(ids), position.layout_now.parts, weight)
            batch["update"], batch["update_ids"] = update, ids
            yielded += 1
            position.update = yielded // micro_batches
            yield batch

    def _examples_of(self, update: int) -> np.ndarray:
        """The examples of an update; only those within `limit` if it ends within the update."""
        layout, plan = self.position.layout_now, self.position.current
        return plan.examples_of(update, layout, layout.within(self.limit, update, len(plan)))

    def state_dict(self) -> dict[str, int]:
        """The position, between two updates, and the layout of updates."""
        layout = self.position.layout_now
        return {
            "epoch": self.position.epoch,
            "update": self.position.update,
            "micro_batches": layout.micro_batches,
            "rows_per_update": layout.rows_per_update,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores a position.

        Raises:
            UserError: an update has another number of rows than when the state was saved.
        """
        refuse_other_rows(state, self.position.layout.at(state["epoch"]))
        self.position.epoch, self.position.update = state["epoch"], state["update"]


def as_it_is(batch: Any) -> Any:
    """A collate function that changes nothing, for datasets whose items are batches."""
    return batch


def refuse_other_rows(state: dict[str, Any], layout: Layout) -> None:
    """Refuses a position from a run with another number of rows per update.

    Raises:
        UserError: the numbers differ.
    """
    if state["rows_per_update"] != layout.rows_per_update:
        raise UserError(
            f"the checkpoint was made with {state['rows_per_update']} rows per update, this run has "
            f"{layout.rows_per_update} (batch_size {layout.batch_size} x accumulate_grad_batches "
            f"{layout.micro_batches} x {layout.ranks} ranks): a run can resume with any layout of the same product"
        )


def eval_loader(
    examples: Any,
    plans: Sequence[Plan],
    layout: Layout,
    collate: Callable[[list], Any],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Creates a loader that follows plans from the start in each pass, for validation and test."""
    return Loader(
        Rows(examples),
        batch_sampler=[
            rows for plan in plans for update in range(len(plan)) for rows in plan.micro_batches(update, layout)
        ],
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
