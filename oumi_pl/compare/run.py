"""Runs each engine in a process of its own: the first leads, each other is held to its weights, and then runs free."""

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

WORKER = (sys.executable, "-m", "oumi_pl.compare.worker")
COLUMNS = {
    "target_tokens": "train/target_tokens",
    "lr": "train/lr",
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
}
"""What is compared -> its column in `metrics.csv`."""
ROLES = {"lead": "training", "held": "each step from the first engine's weights", "free": "training on its own"}
CHECKED = ("batch", "target_tokens", "lr", "loss", "grad_norm", "update")
"""In the order in which one difference causes the next."""


@dataclass
class Engine:
    """What an engine did.

    held: per step, started from the lead's weights. free: per step, gone its own way; for the lead both are the same.
    Each step is a dict with `step`, `batch`, `target_tokens`, `lr`, `loss`, `grad_norm`, `seconds`, `peak_memory_gb`,
    and for the others `update` or `weights`, the distance to the lead's.
    """

    name: str
    held: list[dict[str, Any]] = field(default_factory=list)
    free: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """The first thing in which an engine differs from the lead: what, at which step, and both values."""

    what: str
    step: int
    lead: Any
    other: Any


def compare(
    recipe: Sequence[str], engines: Sequence[str], steps: int, folder: Path, worker: Sequence[str] = WORKER
) -> list[Engine]:
    """Trains a recipe for some steps on each engine and returns what they did, the lead first.

    Args:
        recipe: The file of a recipe, and any overrides of `fit`.
        engines: The lead, and those that are held to it.
        steps: Optimizer steps; schedules run their whole course in them.
        folder: Where the runs, the records and, while it lasts, the weights of every step go.
        worker: Command that runs one engine.

    Raises:
        UserError: an engine refuses the recipe, or failed.
    """
    snapshots = folder / "weights"
    done = []
    try:
        for engine in engines:
            made = Engine(engine)
            for role in ("lead",) if engine == engines[0] else ("held", "free"):
                place = folder / f"{engine}-{role}"
                print(f"{engine}: {ROLES[role]}", file=sys.stderr, flush=True)
                _run([*worker, engine, role, str(place), str(snapshots), str(steps), *recipe], engine)
                lines = _lines(place)
                made.held = lines if role != "free" else made.held
                made.free = lines if role != "held" else made.free
            done.append(made)
    finally:
        shutil.rmtree(snapshots, ignore_errors=True)
    return done


def _run(command: Sequence[str], engine: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if not ended.returncode:
        return
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    if told:
        raise UserError(f"{engine}: {told}")
    raise RuntimeError(f"{engine} failed:\n" + "\n".join(lines[-40:]))


def _lines(place: Path) -> list[dict[str, Any]]:
    """Joins what was recorded with what the run logged, step by step."""
    recorded = [json.loads(line) for line in (place / "steps.jsonl").read_text().splitlines()]
    (file,) = place.glob("runs/*/metrics.csv")
    with file.open(newline="") as lines:
        logged = {int(row["step"]): row for row in DictReader(lines)}
    seen = 0.0
    for line in recorded:
        row = logged[line["step"]]
        line |= {name: float(row[column]) for name, column in COLUMNS.items()}
        line["target_tokens"], seen = line["target_tokens"] - seen, line["target_tokens"]
    return recorded


def first_difference(
    lead: Engine, other: Engine, tolerance: float, update_tolerance: float | None = None
) -> Difference | None:
    """What differs first, at the first step that differs; None if nothing does.

    Hashes and counts have to be equal; the learning rate, the loss and the norm of the gradient may differ by
    `tolerance` of the larger; the update by what `allowed` says of `update_tolerance`, which is the same if left out.
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
    """How far an update may be from the lead's, in its norm, if before it was rounded it agreed within `tolerance`.

    A difference `d` in an element makes its rounded sums differ by a last digit of the weight, `ulp`, with probability
    `d / ulp`: a squared difference of `d ulp` on average. Where the learning rate is small this is all that one sees.
    """
    return float((tolerance**2 + tolerance * line["rounding"]) ** 0.5)


def relative(a: float, b: float) -> float:
    """Difference of two numbers, as a share of the larger."""
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0
