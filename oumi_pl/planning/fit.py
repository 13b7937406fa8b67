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
    """Settings that leave updates as they are."""

    batch_size: int
    gradient_checkpointing: bool
    devices: int


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
        start = self.start
        return Layout(start.batch_size, start.gradient_checkpointing, start.devices)

    def fits(self, result: Estimate) -> bool:
        """Whether an estimate leaves a margin in the memory."""
        return result.total <= USABLE * self.memory

    def at(self, layout: Layout) -> Estimate:
        """The estimate of a layout; rows of an update stay the same."""
        if layout not in self._known:
            start = self.start
            parts = start.micro_batches * start.batch_size // layout.batch_size
            changed = {
                "data.batch_size": (layout.batch_size, start.batch_size),
                "trainer.accumulate_grad_batches": (parts, start.micro_batches),
                "model.gradient_checkpointing": (layout.gradient_checkpointing, start.gradient_checkpointing),
            }
            options = [part for key, (new, old) in changed.items() if new != old for part in (f"--{key}", str(new))]
            settings = self.settings
            settings = replace(settings, overrides=(*settings.overrides, *options), devices=layout.devices)
            self._known[layout] = estimate(settings)
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
            if self.fits(self.at(layout._replace(batch_size=sizes[middle]))):
                low = middle + 1
            else:
                high = middle
        return self.at(layout._replace(batch_size=sizes[low - 1])) if low else None

    def fastest(self, seconds: Callable[[Estimate], float]) -> Estimate | None:
        """The fastest layout that fits, with or without recomputation; None if none fits."""
        layouts = [self.layout._replace(gradient_checkpointing=value) for value in (False, True)]
        fitting = [result for layout in layouts if (result := self.largest(layout)) is not None]
        return min(fitting, key=seconds, default=None)

    def with_more_devices(self, layout: Layout) -> Estimate | None:
        """The estimate of the fewest devices that fit, by doubling; None if even `MOST_DEVICES` don't, or hold all."""
        while self.start.sharded and (layout := layout._replace(devices=2 * layout.devices)).devices <= MOST_DEVICES:
            if self.fits(result := self.at(layout)):
                return result
        return None


def options(start: Estimate, result: Estimate) -> str:
    """The options of `fit` that turn one estimate's layout into the other's."""
    changed = {
        "data.batch_size": (start.batch_size, result.batch_size),
        "trainer.accumulate_grad_batches": (start.micro_batches, result.micro_batches),
        "model.gradient_checkpointing": (start.gradient_checkpointing, result.gradient_checkpointing),
    }
    return " ".join(f"--{key} {str(new).lower()}" for key, (old, new) in changed.items() if new != old)
