"""The loader that walks a plan, and whose position is two numbers: epoch and update."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from oumi_pl.data.plan import Layout, Plan
from oumi_pl.errors import UserError
from oumi_pl.types import Example, Update


class Rows(Dataset):
    """Looks up rows: an array of example ids becomes `(ids, examples)`."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __getitem__(self, row: np.ndarray) -> tuple[list[int], list[Example]]:
        ids = row.tolist()
        return ids, [self.examples[i] for i in ids]


class PlanSampler(Sampler[list[np.ndarray]]):
    """Yields the micro-batches of one rank, from a position on.

    Lightning announces a new epoch by `set_epoch` on `loader.batch_sampler.sampler`, hence the property `sampler`.
    """

    def __init__(self, plan: Callable[[int], Plan], layout: Layout) -> None:
        self.plan = plan
        self.layout = layout
        self.epoch = 0
        self.update = 0

    @property
    def plan(self) -> Callable[[int], Plan]:
        """Makes the plan of an epoch; may be replaced before the epoch has begun."""
        return self._plan

    @plan.setter
    def plan(self, plan: Callable[[int], Plan]) -> None:
        self._plan = plan
        self._planned: tuple[int, Plan] | None = None

    @property
    def sampler(self) -> "PlanSampler":
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    @property
    def current(self) -> Plan:
        """The plan of the current epoch, made once."""
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = (self.epoch, self._plan(self.epoch))
        return self._planned[1]

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch; a position within the same epoch is kept, which is what a resume needs."""
        if epoch != self.epoch:
            self.epoch, self.update = epoch, 0

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on one rank, whatever the position."""
        return len(self.current) * self.layout.micro_batches

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        plan = self.current
        for update in range(self.update, len(plan)):
            yield from plan.micro_batches(update, self.layout)


class PlanLoader(DataLoader):
    """A DataLoader over a plan that knows where it is and can go on from there.

    Each micro-batch carries what its update comes to over all micro-batches and ranks (`Batch.update`).

    Its state is `{epoch, update}`, counted as batches are handed out, so that prefetching workers can't run ahead of
    it. It is the same on every rank: Lightning keeps only rank 0's.
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
        workers: int = 0,
        pin_memory: bool = False,
        **fetching: Any,
    ) -> None:
        """Makes the loader.

        Args:
            examples: By id.
            targets: Tokens that carry loss, per example, `[examples]`.
            plan: Of an epoch.
            layout: How an update is cut.
            collate: Rows to a micro-batch.
            limit: Micro-batches of an epoch that will be trained on, or the share of them (`limit_train_batches`).
            workers: Processes that fetch.
            pin_memory: Put batches where a GPU copies them from without waiting.
            fetching: Further arguments of `DataLoader` on how its workers fetch.
        """
        self.position = PlanSampler(plan, layout)
        self.targets = targets
        self.limit = limit
        super().__init__(
            Rows(examples),
            batch_sampler=self.position,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin_memory,
            **fetching,
            # its own generator: the seeds of workers must not be drawn from the stream that dropout uses
            generator=torch.Generator().manual_seed(0),
        )

    @property
    def layout(self) -> Layout:
        """How an update is cut; may be replaced before the first batch is asked for."""
        return self.position.layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        self.position.layout = layout

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing is fetched before `set_epoch` and `load_state_dict` have had their say:
        # Lightning calls iter() first.
        position, micro_batches = self.position, self.position.layout.micro_batches
        handed = position.update * micro_batches
        update: Update | None = None
        for batch in super().__iter__():
            if handed % micro_batches == 0 or update is None:
                update = self._comes_to(position.update)
            batch["update"] = update
            handed += 1
            position.update = handed // micro_batches
            yield batch

    def _comes_to(self, update: int) -> Update:
        """Targets, rows and micro-batches of an update; of one that the limit cuts short, those within it."""
        layout, plan = self.position.layout, self.position.current
        ids = plan.examples_of(update, layout, layout.within(self.limit, update, len(plan)))
        return Update(int(self.targets[ids].sum()), len(ids), layout.parts)

    def state_dict(self) -> dict[str, int]:
        """Position between two updates, and the layout it was reached with."""
        layout = self.position.layout
        return {
            "epoch": self.position.epoch,
            "update": self.position.update,
            "micro_batches": layout.micro_batches,
            "rows_per_update": layout.rows_per_update,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position.

        Raises:
            UserError: if an update has another number of rows than when the state was saved.
        """
        refuse_other_rows(state, self.position.layout)
        self.position.epoch, self.position.update = state["epoch"], state["update"]


def as_it_is(batch: Any) -> Any:
    """Collates nothing: for a DataLoader whose items are what it is to yield."""
    return batch


def refuse_other_rows(state: dict[str, Any], layout: Layout) -> None:
    """Refuses a position that was reached with another number of rows per update.

    Raises:
        UserError: it was.
    """
    if state["rows_per_update"] != layout.rows_per_update:
        raise UserError(
            f"the checkpoint was made with {state['rows_per_update']} rows per update, this run has "
            f"{layout.rows_per_update} (batch_size {layout.batch_size} x accumulate_grad_batches "
            f"{layout.micro_batches} x {layout.ranks} ranks): a run resumes with any layout of the same product"
        )


def eval_loader(
    examples: Any,
    plan: Plan,
    layout: Layout,
    collate: Callable[[list], Any],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader that goes through a plan once per pass, from the start: for validation and test."""
    return DataLoader(
        Rows(examples),
        batch_sampler=[rows for update in range(len(plan)) for rows in plan.micro_batches(update, layout)],
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
