"""Warns, once each, of failures of preference training that raise no error."""

from typing import Any

import lightning as L

from oumi_pl.callbacks.advice import warn
from oumi_pl.types import RunModule

EARLY = 3
"""Updates in which hardly anything can have been learned."""
ENOUGH_PAIRS = 32
"""Pairs below which ranking all of them right may be chance."""
DISPLACED = 20
"""Updates in a row after which falling log-probabilities are no accident."""


class PreferenceWarnings(L.Callback):
    """Watches for pairs that are too easy to tell apart, and for likelihoods that fall on both sides.

    Does nothing for modules that log no accuracy of rewards.
    """

    def __init__(self) -> None:
        self._right = self._pairs = 0.0
        self._warned_of_leak = self._warned_of_displacement = False
        self._margins: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Looks at the update that has just ended."""
        sums, reference = pl_module.last_update, pl_module.reference
        if trainer.fit_loop._should_accumulate() or "rewards/accuracies" not in sums:
            return
        self._watch_leak(trainer, sums)
        if reference is not None and reference.kind != "none":  # without one, rewards are no log-ratios
            self._watch_displacement(trainer, sums)

    def _watch_leak(self, trainer: Any, sums: dict[str, float]) -> None:
        step = trainer.global_step
        if step > EARLY or self._warned_of_leak:
            return
        # margins are exactly 0 before the first update, and count as half right
        if sums["rewards/accuracies"] != 0.5 * sums["rows"]:
            self._right += sums["rewards/accuracies"]
            self._pairs += sums["rows"]
        if self._pairs >= ENOUGH_PAIRS and self._right == self._pairs:
            self._warned_of_leak = True
            warn(
                trainer,
                f"each of {self._pairs:.0f} pairs is ranked right after {step} updates: something tells the chosen "
                "responses apart that is easier to learn than what you want to teach (length, a phrase, a format, the "
                "order of the data); look at some pairs",
            )

    def _watch_displacement(self, trainer: Any, sums: dict[str, float]) -> None:
        chosen, rejected, margin = (
            sums[f"rewards/{name}"] / max(1.0, sums["rows"]) for name in ("chosen", "rejected", "margins")
        )
        is_falling = chosen < 0 and rejected < 0 and margin > 0
        self._margins = [*self._margins, margin] if is_falling else []
        half = len(self._margins) // 2
        grows = sum(self._margins[half:]) > sum(self._margins[:half])
        if len(self._margins) >= DISPLACED and grows and not self._warned_of_displacement:
            self._warned_of_displacement = True
            warn(
                trainer,
                f"for {len(self._margins)} updates the chosen responses have become less likely as well, while the "
                "margin grows (likelihood displacement, Razin et al. 2024, arXiv:2410.08847): probability moves to "
                "responses that are neither chosen nor rejected; try a larger beta, a smaller learning rate, APOZero, "
                "or an SFTTerm in a WeightedSum",
            )
