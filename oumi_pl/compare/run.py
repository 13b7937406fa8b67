"""Runs each engine in its own process, and compares their steps.

The first engine, the lead, runs once. The others run twice: each step from the lead's weights, then freely.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from csv import DictReader
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

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
MEASURED = ("loss", "grad_norm", "update")
"""Those of them that are rounded."""


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


TOLERANCE = 1e-5
"""Relative difference that is allowed if none is named."""
ROUNDING = 4.0
"""Without a named tolerance: how many times the lead's own rounding is allowed, which is measured if it is needed."""
MOST_ROUNDING = 1e-3
"""Larger differences are never taken for rounding."""


@dataclass(frozen=True)
class Difference:
    """The first difference between an engine and the lead: quantity, step, and both values."""

    what: str
    step: int
    lead: Any
    other: Any


@dataclass(frozen=True)
class Outcome:
    """The first difference of an engine to the lead, and what was tried to find its cause.

    difference: None if all steps agree. rounding: by how much the lead differs from itself if its updates are cut into
    other micro-batches, by quantity; empty if that was not needed. whole: whether the difference is gone if each update
    is a single micro-batch; None if that was not tried.
    """

    difference: Difference | None
    rounding: dict[str, float] = field(default_factory=dict)
    whole: bool | None = None


def compare(
    recipe: Sequence[str],
    engines: Sequence[str],
    steps: int,
    folder: Path,
    worker: Sequence[str] = WORKER,
    *,
    tolerance: float | None = None,
    update_tolerance: float | None = None,
) -> tuple[list[Engine], list[Outcome]]:
    """Trains a recipe on each engine, and returns the steps of the engines, the lead first, and how the others compare.

    Args:
        recipe: The file of a recipe, and overrides for `fit`.
        engines: The lead, and the engines to compare with it.
        steps: Optimizer steps; the schedule ends with the last.
        folder: Folder for runs, records and, temporarily, the weights of every step.
        worker: Command that runs one engine.
        tolerance: See `first_difference`. None: `TOLERANCE`, or `ROUNDING` times the lead's rounding if that is more.
        update_tolerance: See `first_difference`.

    Raises:
        UserError: an engine refuses the recipe.
        RuntimeError: an engine failed.
    """
    snapshots = folder / "weights"

    def steps_of(engine: str, role: str, cut: tuple[int, int] | None = None) -> list[dict[str, Any]]:
        how = "" if cut is None else f", in {cut[1]} micro-batches of {cut[0]} per update"
        echo(f"{engine}: {ROLES[role]}{how}", file=sys.stderr, flush=True)
        run_folder = folder / (f"{engine}-{role}" if cut is None else f"{engine}-{cut[1]}x{cut[0]}")
        sizes = () if cut is None else (f"--data.batch_size={cut[0]}", f"--trainer.accumulate_grad_batches={cut[1]}")
        _run([*worker, engine, role, str(run_folder), str(snapshots), str(steps), *recipe, *sizes], engine)
        return read_steps(run_folder)

    try:
        steps_of_lead = steps_of(engines[0], "lead")
        lead = Engine(engines[0], steps_of_lead, steps_of_lead)
        others = [Engine(name, steps_of(name, "held"), steps_of(name, "free")) for name in engines[1:]]
        sizes = sizes_of(folder / f"{engines[0]}-lead")
        tests = _Tests(lead, lambda engine, cut: Engine(engine, steps_of(engine, "held", cut)), sizes)
        outcomes = [tests.outcome(other, tolerance, update_tolerance) for other in others]
    finally:
        shutil.rmtree(snapshots, ignore_errors=True)
    return [lead, *others], outcomes


class _Tests:
    """Finds what a difference to the lead comes from, by running engines again with other micro-batches.

    Args:
        lead: The lead.
        run: Runs an engine, each step from the lead's weights, with (rows of a micro-batch, micro-batches).
        sizes: These two of the recipe; None if they are unknown.
    """

    def __init__(self, lead: Engine, run: Callable[[str, tuple[int, int]], Engine], sizes: tuple[int, int] | None):
        self.lead = lead
        self.run = run
        self.sizes = sizes
        self._rounding: dict[str, float] | None = None

    def outcome(self, other: Engine, tolerance: float | None, update_tolerance: float | None) -> Outcome:
        """The first difference of an engine, after what may be rounding was measured."""
        of_rows, of_updates = TOLERANCE if tolerance is None else tolerance, update_tolerance
        difference = first_difference(self.lead, other, of_rows, of_updates)
        rounding: dict[str, float] = {}
        if difference is not None and tolerance is None and difference.what in MEASURED:
            rounding = self.rounding()
            difference = first_difference(self.lead, other, of_rows, of_updates, rounding)
        whole = None
        if difference is not None and difference.what in ("loss", "grad_norm") and self.sizes and self.sizes[1] > 1:
            again = self.run(other.name, (self.sizes[0] * self.sizes[1], 1))
            whole = first_difference(self.lead, again, of_rows, of_updates, rounding) is None
        return Outcome(difference, rounding, whole)

    def rounding(self) -> dict[str, float]:
        """By how much the lead differs from itself if its updates are cut otherwise; runs it once."""
        if self._rounding is None:
            cut = other_cut(self.sizes) if self.sizes else None
            again = None if cut is None else self.run(self.lead.name, cut)
            self._rounding = {} if again is None else _largest_differences(self.lead, again)
        return self._rounding


def _largest_differences(lead: Engine, again: Engine) -> dict[str, float]:
    pairs = list(zip(lead.held, again.held, strict=True))
    largest = {what: max(relative(a[what], b[what]) for a, b in pairs) for what in ("loss", "grad_norm")}
    return largest | {"update": max(line["update"] for line in again.held)}


def sizes_of(folder: Path) -> tuple[int, int] | None:
    """Rows of a micro-batch and micro-batches of an update, in the run of a worker; None if they are unknown."""
    (file,) = folder.glob("runs/*/config.yaml")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    rows = ((config.get("data") or {}).get("init_args") or {}).get("batch_size")
    parts = (config.get("trainer") or {}).get("accumulate_grad_batches")
    return (rows, parts) if isinstance(rows, int) and isinstance(parts, int) else None


def other_cut(sizes: tuple[int, int]) -> tuple[int, int] | None:
    """The same rows per update in more micro-batches, or fewer if each has one row; None for an update of one row."""
    rows, parts = sizes
    if rows > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        return rows // factor, parts * factor
    if parts > 1:
        factor = next(n for n in range(2, parts + 1) if parts % n == 0)
        return factor, parts // factor
    return None


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
    lead: Engine,
    other: Engine,
    tolerance: float,
    update_tolerance: float | None = None,
    rounding: Mapping[str, float] | None = None,
) -> Difference | None:
    """The first difference in the first step that differs; None if all steps agree.

    Hashes and counts have to be equal. Learning rate, loss and gradient norm may differ by `tolerance`, relative to the
    larger value. Updates may differ by `allowed(step, update_tolerance)`; `update_tolerance` defaults to `tolerance`.
    If `rounding`, the lead's own, is known, `ROUNDING` times as much is allowed, but at most `MOST_ROUNDING`.
    """

    def bound(what: str, least: float) -> float:
        return max(least, min(MOST_ROUNDING, ROUNDING * (rounding or {}).get(what, 0.0)))

    of_updates = tolerance if update_tolerance is None else update_tolerance
    for ours, theirs in zip(lead.held, other.held, strict=False):
        for what in CHECKED:
            if what == "update":
                if not theirs[what] <= allowed(theirs, bound(what, of_updates)):
                    return Difference(what, ours["step"], 0.0, theirs[what])
            elif what in ("batch", "target_tokens"):
                if ours[what] != theirs[what]:
                    return Difference(what, ours["step"], ours[what], theirs[what])
            elif not relative(ours[what], theirs[what]) <= bound(what, tolerance):
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
