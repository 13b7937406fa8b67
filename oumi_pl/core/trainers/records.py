"""What a run writes about itself: `metrics_rank0000.jsonl`, and timings."""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends one JSON object per log event.

    Args:
        file: Where; only rank 0 has one.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def open(self, step: int) -> None:
        """Begins the file, or continues it from a step: what a killed run wrote after that is cut off."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text(encoding="utf-8").splitlines() if step and self.file.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self.file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row."""
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line).get("global_step", 0)
    except ValueError:  # the line that a kill cut short
        return float("inf")


class Timers:
    """Wall time of the parts of training, on the host; what a GPU still works on is counted where it is waited for.

    Args:
        enabled: Whether anything is noted.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.seconds: dict[str, list[float]] = {}
        self._began = time.perf_counter()

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Times what is inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Notes a time that was taken elsewhere."""
        if self.enabled:
            self.seconds.setdefault(name, []).append(seconds)

    def summary(self) -> dict[str, Any]:
        """Count, mean, median, standard deviation, extremes, total and share of the whole time, by name."""
        whole = time.perf_counter() - self._began
        timers = {
            name: {
                "count": len(values),
                "mean": statistics.fmean(values),
                "median": statistics.median(values),
                "std_dev": statistics.stdev(values) if len(values) > 1 else 0.0,
                "min": min(values),
                "max": max(values),
                "total": sum(values),
                "percentage": 100 * sum(values) / whole,
            }
            for name, values in self.seconds.items()
        }
        return {"timers": timers, "total_time": whole}

    def write(self, file: Path) -> None:
        """Writes the summary as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8")
