"""How fast updates come, and how long the rest will take."""

import time
from collections import deque

from oumi_pl.terminal.progress import worked

RECENT = 100
"""Updates of which speed and time left are told."""
TRIMMED = 0.05
"""Share of the recent updates, at either end, that is left out of their mean time: one that hung says nothing."""


class Pace:
    """Measures updates, without the time that validating and saving take between them; that is foreseen by itself."""

    def __init__(self) -> None:
        self.began = 0.0
        self.first_step = 0
        self._updated = self._worked = self._validated = 0.0
        self._validating: tuple[float, float] | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._paused, self._paused_at = 0.0, 0

    def begin(self, step: int) -> None:
        """The first update begins, after `step` others in an earlier part of the run."""
        self.began = self._updated = time.monotonic()
        self.first_step, self._worked = step, worked()

    def validation_begins(self) -> None:
        """From here on to `validation_ends` no update is made."""
        self._validating = (time.monotonic(), worked())

    def validation_ends(self) -> None:
        """What was told to `working` in between is part of it, and not to be counted twice."""
        if self._validating is not None:
            since, worked_then = self._validating
            self._validated += time.monotonic() - since - (worked() - worked_then)
            self._validating = None

    def update_ends(self, step: int, tokens: float) -> None:
        """An update of so many tokens is done, the `step`-th of the run."""
        now, work = time.monotonic(), worked()
        pause = self._validated + work - self._worked
        self._recent.append((max(0.0, now - self._updated - pause), tokens))
        self._updated, self._worked, self._validated = now, work, 0.0
        if pause:
            self._paused, self._paused_at = self._paused + pause, step - 1  # it came before this update

    @property
    def elapsed(self) -> float:
        """Seconds since the first update began."""
        return time.monotonic() - self.began

    @property
    def tokens_per_second(self) -> float:
        """Of the recent updates."""
        return sum(tokens for _, tokens in self._recent) / max(1e-9, sum(seconds for seconds, _ in self._recent))

    @property
    def seconds_per_update(self) -> float:
        """Mean of the recent updates but the fastest and slowest few."""
        times = sorted(seconds for seconds, _ in self._recent)
        cut = int(len(times) * TRIMMED)
        kept = times[cut : len(times) - cut]
        return sum(kept) / max(1, len(kept))

    def left(self, steps: int) -> float:
        """Seconds that so many more updates take, with as much validating and saving per update as there was so far."""
        pause = self._paused / max(1, self._paused_at - self.first_step)
        return (self.seconds_per_update + pause) * steps
