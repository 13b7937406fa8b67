"""How fast updates are, and how long the rest of a run will take."""

import time
from collections import deque

from oumi_pl.terminal.progress import worked

RECENT = 100
"""Number of updates that speed and time left are computed from."""
TRIMMED = 0.05
"""Share of the slowest, and of the fastest, recent updates that is left out of the mean: outliers say nothing."""


class Pace:
    """Measures the time of updates, and apart from it that of validating and saving between them."""

    def __init__(self) -> None:
        self.began = 0.0
        self.first_step = 0
        self._updated = self._worked = self._validated = 0.0
        self._validating: tuple[float, float] | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._paused, self._paused_at = 0.0, 0

    def begin(self, step: int) -> None:
        """Starts the clock before the first update, with `step` updates done in an earlier part of the run."""
        self.began = self._updated = time.monotonic()
        self.first_step, self._worked = step, worked()

    def validation_begins(self) -> None:
        """Starts a pause."""
        self._validating = (time.monotonic(), worked())

    def validation_ends(self) -> None:
        """Ends a pause. Work that `working` reported meanwhile is counted by `worked`, so it is left out here."""
        if self._validating is not None:
            since, worked_then = self._validating
            self._validated += time.monotonic() - since - (worked() - worked_then)
            self._validating = None

    def update_ends(self, step: int, tokens: float) -> None:
        """Counts an update of so many tokens, the `step`-th of the run."""
        now, work = time.monotonic(), worked()
        pause = self._validated + work - self._worked
        self._recent.append((max(0.0, now - self._updated - pause), tokens))
        self._updated, self._worked, self._validated = now, work, 0.0
        if pause:
            self._paused, self._paused_at = self._paused + pause, step - 1  # the pause was before this update

    @property
    def elapsed(self) -> float:
        """Seconds since the first update began."""
        return time.monotonic() - self.began

    @property
    def tokens_per_second(self) -> float:
        """Over the recent updates."""
        return sum(tokens for _, tokens in self._recent) / max(1e-9, sum(seconds for seconds, _ in self._recent))

    @property
    def seconds_per_update(self) -> float:
        """Mean of the recent updates without the fastest and the slowest few."""
        times = sorted(seconds for seconds, _ in self._recent)
        cut = int(len(times) * TRIMMED)
        kept = times[cut : len(times) - cut]
        return sum(kept) / max(1, len(kept))

    def left(self, steps: int) -> float:
        """Seconds that so many more updates take, with as much validating and saving per update as so far."""
        pause = self._paused / max(1, self._paused_at - self.first_step)
        return (self.seconds_per_update + pause) * steps
