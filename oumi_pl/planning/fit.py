"""Searches the settings with which a run fits into memory: rows of a micro-batch, recomputation, number of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from oumi_pl.planning.update import Estimate, Settings, estimate

USABLE = 0.95
"""Share of the memory that a plan counts on: an allocator can't use the last fragments of it, and CUDA needs some."""
MOST_DEVICES = 1024
"""Most ranks that are tried."""


class Layout(NamedTuple):
    """Settings that change memory and time, but hardly the numbers of a run while an update has the same rows."""

    batch_size: int
    micro_batches: int
    gradient_checkpointing: bool
    devices: int

    @classmethod
    def of(cls, result: Estimate) -> "Layout":
        """The layout of an estimate."""
        return cls(result.batch_size, result.micro_batches, result.gradient_checkpointing, result.devices)

    @property
    def rows(self) -> int:
        """Rows of an update of all ranks."""
        return self.batch_size * self.micro_batches * self.devices

    def options(self, before: "Layout") -> list[str]:
        """The options of `fit` that turn another layout into this one; devices have no option of their own."""
        keys = ("data.batch_size", "trainer.accumulate_grad_batches", "model.gradient_checkpointing")
        changed = [(key, new) for key, new, old in zip(keys, self, before, strict=False) if new != old]
        return [part for key, new in changed for part in (f"--{key}", str(new).lower())]

    def with_batch_size(self, size: int) -> "Layout":
        """The same rows in micro-batches of another size, which divides those of a rank."""
        return self._replace(batch_size=size, micro_batches=self.batch_size * self.micro_batches // size)

    def on(self, devices: int) -> "Layout":
        """The same update on other devices: fewer micro-batches, or smaller ones if they are few.

        An update has more rows only if its own can't be divided among the devices.
        """
        rows = -(-self.rows // devices)
        size = next(size for size in range(min(self.batch_size, rows), 0, -1) if rows % size == 0)
        return self._replace(batch_size=size, micro_batches=rows // size, devices=devices)


@dataclass
class Search:
    """Plans layouts of a recipe, each once.

    Args:
        settings: The recipe.
        start: The estimate of the recipe as it is.
        memory: Bytes of a card.
        report: Called with each new estimate.
    """

    settings: Settings
    start: Estimate
    memory: float
    report: Callable[[Estimate], None] = lambda estimate: None

    def __post_init__(self) -> None:
        self._known = {self.layout: self.start}

    @property
    def layout(self) -> Layout:
        """The layout of the recipe."""
        return Layout.of(self.start)

    def fits(self, result: Estimate) -> bool:
        """Whether an estimate leaves a margin in the memory."""
        return result.total <= USABLE * self.memory

    def at(self, layout: Layout) -> Estimate:
        """The estimate of a layout."""
        if layout not in self._known:
            overrides = (*self.settings.overrides, *layout.options(self.layout))
            self._known[layout] = estimate(replace(self.settings, overrides=overrides, devices=layout.devices))
            self.report(self._known[layout])
        return self._known[layout]

    @property
    def sizes(self) -> list[int]:
        """Values of `batch_size` that divide the rows of a rank's update, ascending."""
        rows = self.start.batch_size * self.start.micro_batches
        return [size for size in range(1, rows + 1) if rows % size == 0]

    def largest(self, layout: Layout, sizes: Sequence[int] | None = None) -> Estimate | None:
        """The estimate of the largest `batch_size` that fits; None if none does. Memory grows with it."""
        sizes = self.sizes if sizes is None else sizes
        low, high = 0, len(sizes)
        while low < high:
            middle = (low + high) // 2
            if self.fits(self.at(layout.with_batch_size(sizes[middle]))):
                low = middle + 1
            else:
                high = middle
        return self.at(layout.with_batch_size(sizes[low - 1])) if low else None

    def fastest(self, seconds: Callable[[Estimate], float]) -> Estimate | None:
        """The faster one of two layouts, with and without recomputation; None if neither fits.

        Each has the largest `batch_size` that fits, with which weights are read and gathered least often.
        """
        layouts = [self.layout._replace(gradient_checkpointing=value) for value in (False, True)]
        fitting = [result for layout in layouts if (result := self.largest(layout)) is not None]
        return min(fitting, key=seconds, default=None)

    def with_more_devices(self, layout: Layout) -> Estimate | None:
        """The estimate of the same update on the fewest devices that fit, by doubling.

        None if `MOST_DEVICES` are not enough, or if nothing is sharded.
        """
        devices = 2 * layout.devices
        while self.start.sharded and devices <= MOST_DEVICES:
            if self.fits(result := self.at(layout.on(devices))):
                return result
            devices *= 2
        return None
