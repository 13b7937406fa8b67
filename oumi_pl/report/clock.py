"""Measures how a run spends its time, by phase."""

import time

PHASES = {
    "data": "reading and tokenizing",
    "model": "building model and optimizer",
    "checks": "checks and reference before the first update",
    "start": "callbacks before the first update",
    "training": "training, including waiting for data",
    "validation": "validation",
    "saving": "checkpoints",
    "end": "last answers, export, report",
    "killed": "processes that were killed, after their last validation",
}
"""Phase -> its description in the report."""


class Clock:
    """Adds up the seconds of each phase. A run is in exactly one phase at a time, so they sum to the whole."""

    def __init__(self) -> None:
        self.phase = "data"
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def enter(self, phase: str) -> None:
        """Ends the current phase and begins another."""
        now = time.perf_counter()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now

    def read(self, before: dict[str, float] | None = None) -> dict[str, float]:
        """Seconds of each phase so far, with those before the run was resumed (`before`) added."""
        self.enter(self.phase)  # adds the seconds since the last call
        before = before or {}
        return {
            p: round(before.get(p, 0.0) + self.seconds.get(p, 0.0), 3) for p in PHASES if p in self.seconds | before
        }
