"""Warns, once each, of what preference training does wrong without any error."""

from typing import Any

import lightning as L

from oumi_pl.callbacks.advice import tell

EARLY = 3
"""Updates in which hardly anything can have been learned."""
ENOUGH_PAIRS = 32
"""Pairs below which being right about all of them may be chance."""
DISPLACED = 20
"""Updates in a row after which falling log-probabilities are no accident."""


class PreferenceWarnings(L.Callback):
    """Watches for pairs that give themselves away, and for likelihoods that fall on both sides.

    Does nothing for modules that compare no responses.
    """

    def __init__(self) -> None:
        self._right = self._pairs = 0.0
        self._told_leak = self._told_displacement = False
        self._margins: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Looks at the update that has just ended."""
        counts = pl_module.last_update
        if trainer.fit_loop._should_accumulate() or "rewards/accuracies" not in counts:
            return
        self._watch_leak(trainer, counts)
        if pl_module.loss.needs_reference:
            self._watch_displacement(trainer, counts)

    def _watch_leak(self, trainer: Any, counts: dict[str, float]) -> None:
        step = trainer.global_step
        if step > EARLY or self._told_leak:
            return
        # margins are exactly 0 before the first update, which counts half
        if counts["rewards/accuracies"] != 0.5 * counts["pairs"]:
            self._right += counts["rewards/accuracies"]
            self._pairs += counts["pairs"]
        if self._pairs >= ENOUGH_PAIRS and self._right == self._pairs:
            self._told_leak = True
            tell(
                trainer,
                f"each of {self._pairs:.0f} pairs is ranked right after {step} updates: something tells the chosen "
                "responses apart that is easier than what you want to teach (length, a phrase, a format, the data's "
                "order); look at some pairs",
            )

    def _watch_displacement(self, trainer: Any, counts: dict[str, float]) -> None:
        chosen, rejected, margin = (
            counts[f"rewards/{name}"] / max(1.0, counts["pairs"]) for name in ("chosen", "rejected", "margins")
        )
        falling = chosen < 0 and rejected < 0 and margin > 0
        self._margins = [*self._margins, margin] if falling else []
        half = len(self._margins) // 2
        grows = sum(self._margins[half:]) > sum(self._margins[:half])
        if len(self._margins) >= DISPLACED and grows and not self._told_displacement:
            self._told_displacement = True
            tell(
                trainer,
                f"for {len(self._margins)} updates the chosen responses have become less likely, too, while the margin "
                "grows (likelihood displacement, Razin et al. 2024, arXiv:2410.08847): what the model gains in their "
                "stead is neither; a larger beta, a smaller learning rate, APOZero, or an SFTTerm in a WeightedSum "
                "help",
            )
