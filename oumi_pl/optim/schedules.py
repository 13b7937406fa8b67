"""Learning-rate schedules in optimizer steps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from oumi_pl.errors import UserError


def in_steps(value: int | float, total: int) -> int:
    """Number of steps: `value` itself, or below 1 that share of `total`, rounded up as in `transformers`."""
    return math.ceil(value * total) if value < 1 else int(value)


def _refuse_part_of_a_step(name: str, value: int | float) -> None:
    if value > 1 and value != int(value):
        raise UserError(
            f"model.schedule.{name} is {value}: a number of steps is whole, and a share of all steps is below 1"
        )


def _share(floor: float) -> float:
    if not 0 <= floor <= 1:
        raise UserError(f"model.schedule.floor is {floor}, but it is a share of the full rate, from 0 to 1")
    return floor


class Schedule(ABC):
    """A factor on the learning rate, as a function of the optimizer step. Subclass it to add one.

    Args:
        warmup: Steps of linear warm-up from 0; below 1, the share of all steps.
    """

    def __init__(self, warmup: int | float = 0) -> None:
        if warmup < 0:
            raise UserError(f"model.schedule.warmup is {warmup}, but can't be negative")
        _refuse_part_of_a_step("warmup", warmup)
        self.warmup = warmup

    def __call__(self, step: int, total: int) -> float:
        """Factor for the update that follows `step` updates, in a run of `total`."""
        start = in_steps(self.warmup, total)
        return step / start if step < start else self.factor(step, start, total)

    def doubts(self, total: int) -> list[str]:
        """Warnings about settings that don't fit into a run of `total` steps."""
        start = in_steps(self.warmup, total)
        if start < total:
            return []
        return [f"model.schedule.warmup takes {start} steps and the run has {total}: it ends before the full rate"]

    @abstractmethod
    def factor(self, step: int, start: int, total: int) -> float:
        """Factor at `step`; the warm-up ended at `start`."""


class Constant(Schedule):
    """Warm-up, then the full learning rate."""

    def factor(self, step: int, start: int, total: int) -> float:
        """1."""
        return 1.0


class Linear(Schedule):
    """Warm-up, then a straight line down to `floor`.

    Args:
        warmup: Steps of linear warm-up from 0; below 1, the share of all steps.
        floor: Factor at the end.
    """

    def __init__(self, warmup: int | float = 0, floor: float = 0.0) -> None:
        super().__init__(warmup)
        self.floor = _share(floor)

    def factor(self, step: int, start: int, total: int) -> float:
        """1 at `start`, `floor` at `total` and after."""
        return self.floor + (1 - self.floor) * (1 - _progress(step, start, total))


class Cosine(Schedule):
    """Warm-up, then half a cosine down to `floor` (Loshchilov & Hutter 2017, arXiv:1608.03983).

    Args:
        warmup: Steps of linear warm-up from 0; below 1, the share of all steps.
        floor: Factor at the end.
        cycles: Number of waves: with 0.5 the rate falls once, with 1.5 it falls, rises and falls again.
    """

    keeps_floor: bool = True
    """Whether the rate stays constant after `total` steps; `transformers` continues the wave."""

    def __init__(self, warmup: int | float = 0, floor: float = 0.0, cycles: float = 0.5) -> None:
        super().__init__(warmup)
        self.floor = _share(floor)
        self.cycles = cycles

    def factor(self, step: int, start: int, total: int) -> float:
        """1 at `start`; with half a wave `floor` at `total` and after."""
        progress = (step - start) / max(1, total - start)
        wave = 0.5 * (1 + math.cos(2 * math.pi * self.cycles * (min(1.0, progress) if self.keeps_floor else progress)))
        return self.floor + (1 - self.floor) * wave


class CosineRestarts(Schedule):
    """Warm-up, then half a cosine from 1 down to 0, several times over (warm restarts, arXiv:1608.03983).

    Args:
        warmup: Steps of linear warm-up from 0; below 1, the share of all steps.
        cycles: Number of descents.
    """

    def __init__(self, warmup: int | float = 0, cycles: int = 1) -> None:
        super().__init__(warmup)
        if cycles < 1:
            raise UserError(f"model.schedule.cycles is {cycles}, but has to be at least 1")
        self.cycles = cycles

    def factor(self, step: int, start: int, total: int) -> float:
        """1 at `start` and after each restart, 0 at `total` and after."""
        progress = _progress(step, start, total)
        return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (self.cycles * progress % 1)))


class WarmupStableDecay(Schedule):
    """Warm-up, a plateau, then a straight line down over the last steps (Hu et al. 2024, arXiv:2404.06395).

    Args:
        warmup: Steps of linear warm-up from 0; below 1, the share of all steps.
        decay: Steps of decay at the end; below 1, the share of all steps.
        floor: Factor at the end.
    """

    def __init__(self, warmup: int | float = 0, decay: int | float = 0.1, floor: float = 0.0) -> None:
        super().__init__(warmup)
        if decay <= 0:
            raise UserError(f"model.schedule.decay is {decay}, but a decay takes at least one step")
        _refuse_part_of_a_step("decay", decay)
        self.decay = decay
        self.floor = _share(floor)

    def doubts(self, total: int) -> list[str]:
        """As for every schedule, and whether warm-up and decay fit into the run."""
        start, decay = in_steps(self.warmup, total), in_steps(self.decay, total)
        if start + decay <= total or start >= total:
            return super().doubts(total)
        problem = f"model.schedule: {start} steps of warm-up and {decay} of decay don't fit into a run of {total}"
        return [f"{problem}: the decay is cut to {total - start}, and there is no plateau"]

    def factor(self, step: int, start: int, total: int) -> float:
        """1 until the decay begins, `floor` at `total` and after."""
        begin = max(start, total - in_steps(self.decay, total))
        return self.floor + (1 - self.floor) * (1 - _progress(step, begin, total))


def _progress(step: int, start: int, total: int) -> float:
    """How far `step` is from `start` to `total`, between 0 and 1."""
    return min(1.0, max(0.0, (step - start) / max(1, total - start)))


class ScheduledRates(LambdaLR):
    """The learning rates of all groups, as their base rates times a common factor.

    Unlike torch's schedules, it takes in groups that are added to the optimizer during training: their rate at that
    moment is scaled like the others from then on.

    Args:
        optimizer: The optimizer.
        factor: Number of finished updates -> factor for the next one.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        super().__init__(optimizer, factor)

    def step(self, epoch: int | None = None) -> None:
        """Sets the rates of the next update."""
        self.__take_in_new_groups()
        super().step(epoch)

    def follow(self) -> None:
        """Sets the rates of the next update again, from the base rates in the groups."""
        self.__take_in_new_groups()
        self.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.lr_lambdas[0](self.last_epoch)

    def __take_in_new_groups(self) -> None:
        groups = self.optimizer.param_groups
        for group in groups[len(self.base_lrs) :]:
            if "initial_lr" not in group:
                now = self.lr_lambdas[0](self.last_epoch)
                group["initial_lr"] = group["lr"] / now if now else group["lr"]
        self.base_lrs += [group["initial_lr"] for group in groups[len(self.base_lrs) :]]
        self.lr_lambdas = [self.lr_lambdas[0]] * len(groups)
