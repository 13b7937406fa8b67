"""Where the time of a run goes."""

import time

PHASES = {
    "data": "reading and tokenizing",
    "model": "making model and optimizer",
    "checks": "checks and reference before the first update",
    "start": "what callbacks do before the first update",
    "training": "training, with waiting for data",
    "validation": "validation",
    "saving": "checkpoints",
    "end": "last answers, export, report",
    "killed": "sessions that were killed, after their last validation",
}
"""Name of a phase -> what is done in it."""


class Clock:
    """Adds the seconds of a run to the phase that it is in. One phase is on at any time, so they sum to the whole."""

    def __init__(self) -> None:
        self.phase = "data"
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def enter(self, phase: str) -> None:
        """Ends the running phase and begins another."""
        now = time.perf_counter()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now

    def read(self, before: dict[str, float] | None = None) -> dict[str, float]:
        """Seconds of each phase so far, added to those of earlier sessions of the run."""
        self.enter(self.phase)
        before = before or {}
        return {
            p: round(before.get(p, 0.0) + self.seconds.get(p, 0.0), 3) for p in (*PHASES,) if p in self.seconds | before
        }
