"""What a run writes about itself: `metrics_rank0000.jsonl` and timings."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.profilers import SimpleProfiler

PARTS = {
    "train_dataloader_next": "fetching batch",
    "backward": "loss backward",
    "computing tokens": "computing tokens",
    "model forward": "model forward",
    "optimizer step": "optimizer step",
}
"""What Lightning or this package profiles, without the object that does it -> Oumi's name of the timer."""


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


class Telemetry(SimpleProfiler):
    """Lightning's profiler, which writes the wall times of the parts of an update under Oumi's names.

    Times are taken on the host: what a GPU still works on is counted where it is waited for.

    Args:
        file: Where they are written when training ends.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def describe(self) -> None:
        """Writes count, mean, median, standard deviation, extremes, total and share of the whole time, by name."""
        whole, timers = time.perf_counter() - self.start_time, {}
        for action, values in self.recorded_durations.items():
            if name := PARTS.get(action.rpartition(".")[2]):
                timers[name] = {
                    "count": len(values),
                    "mean": statistics.fmean(values),
                    "median": statistics.median(values),
                    "std_dev": statistics.stdev(values) if len(values) > 1 else 0.0,
                    "min": min(values),
                    "max": max(values),
                    "total": sum(values),
                    "percentage": 100 * sum(values) / whole,
                }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"timers": timers, "total_time": whole}, indent=2)
        self.file.write_text(content + "\n", encoding="utf-8")
