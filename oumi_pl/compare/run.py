"""Runs each engine in its own process, and compares their steps.

The first engine, the lead, runs once. The others run twice: each step from the lead's weights, then freely.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from csv import DictReader
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oumi_pl.errors import UserError
from oumi_pl.terminal.text import echo

WORKER = (sys.executable, "-m", "oumi_pl.compare.worker")
COLUMNS = {
    "target_tokens": "train/target_tokens",
    "lr": "train/lr",
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
}
"""Quantity -> its column in `metrics.csv`."""
ROLES = {"lead": "training", "held": "each step from the first engine's weights", "free": "training on its own"}
"""Role of a process -> its description in the terminal."""
CHECKED = ("batch", "target_tokens", "lr", "loss", "grad_norm", "update")
"""Compared quantities, in the order in which a difference in one causes a difference in the next."""


@dataclass
class Engine:
    """The steps of an engine.

    held: steps that each start from the lead's weights. free: steps of a run of its own; for the lead both are the
    same. A step is a dict with `step`, `batch`, `target_tokens`, `lr`, `loss`, `grad_norm`, `seconds`,
    `peak_memory_gb`, and for the others `update` or `weights`, the distance to the lead's.
    """

    name: str
    held: list[dict[str, Any]] = field(default_factory=list)
    free: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """The first difference between an engine and the lead: quantity, step, and both values."""

    what: str
    step: int
    lead: Any
    other: Any


def compare(
    recipe: Sequence[str], engines: Sequence[str], steps: int, folder: Path, worker: Sequence[str] = WORKER
) -> list[Engine]:
    """Trains a recipe on each engine, and returns the steps of the engines, the lead first.

    Args:
        recipe: The file of a recipe, and overrides for `fit`.
        engines: The lead, and the engines to compare with it.
        steps: Optimizer steps; the schedule ends with the last.
        folder: Folder for runs, records and, temporarily, the weights of every step.
        worker: Command that runs one engine.

    Raises:
        UserError: an engine refuses the recipe.
        RuntimeError: an engine failed.
    """
    snapshots = folder / "weights"

    def steps_of(engine: str, role: str) -> list[dict[str, Any]]:
        echo(f"{engine}: {ROLES[role]}", file=sys.stderr, flush=True)
        run_folder = folder / f"{engine}-{role}"
        _run([*worker, engine, role, str(run_folder), str(snapshots), str(steps), *recipe], engine)
        return read_steps(run_folder)

    try:
        lead = steps_of(engines[0], "lead")
        others = [Engine(name, steps_of(name, "held"), steps_of(name, "free")) for name in engines[1:]]
    finally:
        shutil.rmtree(snapshots, ignore_errors=True)
    return [Engine(engines[0], lead, lead), *others]


def _run(command: Sequence[str], engine: str) -> None:
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if not process.returncode:
        return
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    message = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    if message:
        raise UserError(f"{engine}: {message}")
    raise RuntimeError(f"{engine} failed:\n" + "\n".join(lines[-40:]))


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Reads the steps of a worker: its records, joined with the metrics that the run logged."""
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    (file,) = folder.glob("runs/*/metrics.csv")
    with file.open(newline="") as lines:
        metrics = {int(row["step"]): row for row in DictReader(lines)}
    total = 0.0
    for step in steps:
        row = metrics[step["step"]]
        step |= {name: float(row[column]) for name, column in COLUMNS.items()}
        step["target_tokens"], total = step["target_tokens"] - total, step["target_tokens"]  # logged as a running total
    return steps


def first_difference(
    lead: Engine, other: Engine, tolerance: float, update_tolerance: float | None = None
) -> Difference | None:
    """The first difference in the first step that differs; None if all steps agree.

    Hashes and counts have to be equal. Learning rate, loss and gradient norm may differ by `tolerance`, relative to the
    larger value. Updates may differ by `allowed(step, update_tolerance)`; `update_tolerance` defaults to `tolerance`.
    """
    for ours, theirs in zip(lead.held, other.held, strict=False):
        for what in CHECKED:
            if what == "update":
                if not theirs[what] <= allowed(theirs, update_tolerance or tolerance):
                    return Difference(what, ours["step"], 0.0, theirs[what])
            elif what in ("batch", "target_tokens"):
                if ours[what] != theirs[what]:
                    return Difference(what, ours["step"], ours[what], theirs[what])
            elif not relative(ours[what], theirs[what]) <= tolerance:
                return Difference(what, ours["step"], ours[what], theirs[what])
    if len(lead.held) != len(other.held):
        return Difference("steps", min(len(lead.held), len(other.held)) + 1, len(lead.held), len(other.held))
    return None


def allowed(line: dict[str, Any], tolerance: float) -> float:
    """The largest relative distance of an update to the lead's if both agreed within `tolerance` before rounding.

    A difference `d` in an element changes the rounded weight by one unit in the last place, `ulp`, with probability
    `d / ulp`: a squared difference of `d ulp` on average. At small learning rates, this term dominates.
    """
    return float((tolerance**2 + tolerance * line["rounding"]) ** 0.5)


def relative(a: float, b: float) -> float:
    """Difference of two numbers, relative to the larger."""
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0
