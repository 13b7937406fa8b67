"""Lists the runs of a folder as a table. Imports nothing heavy, so that it answers at once."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from oumi_pl.report.words import ago, clock, number
from oumi_pl.runs import folders
from oumi_pl.runs.lineage import parent_text
from oumi_pl.terminal.text import visible

COLUMNS = ("name", "recipe", "parent", "state", "step", "loss", "val", "best val", "time", "begun")
RIGHT = ("step", "loss", "val", "best val", "time")
DISPENSABLE = ("parent", "recipe", "best val", "begun", "time", "loss")
"""Columns that a narrow terminal leaves out, in this order."""
GAP = "  "


def line(run: Path) -> dict[str, str]:
    """The cells of a run; a dash for what can't be read."""
    state = folders.read_state(run)
    metrics = folders.read_metrics(run, only=("train/loss", "val/loss", "step"))
    condition = folders.condition(state)
    done = max([0, state.get("step", 0), *(steps[-1] for steps, _ in metrics.values())])
    steps = state.get("steps")
    begun, why = state.get("created_ns"), state.get("why")
    val = [value for value in metrics.get("val/loss", ([], []))[1] if math.isfinite(value)]
    cells = {
        "name": run.name,
        "recipe": state.get("recipe", "-"),
        "parent": parent_text(state),
        "state": f"{condition} ({why})" if why and condition in ("finished", "stopped") else condition,
        "step": f"{done:,}" if steps is None else f"{done:,}/{steps:,}",
        "loss": number(folders.recent(metrics["train/loss"][1])) if "train/loss" in metrics else "-",
        "val": number(metrics["val/loss"][1][-1]) if "val/loss" in metrics else "-",
        "best val": number(min(val)) if val else "-",
        "time": clock(folders.seconds(run, state)),
        "begun": "-" if begun is None else ago(time.time() - begun / 1e9),
    }
    return {name: visible(cell) for name, cell in cells.items()}


def table(lines: Sequence[dict[str, str]], width: int | None) -> str:
    """The lines below a head. Fits into `width` columns by leaving columns out, then by cutting names."""
    columns = [c for c in COLUMNS if c != "recipe" or any(cells["recipe"] != cells["name"] for cells in lines)]
    if not any(cells["parent"] for cells in lines):
        columns.remove("parent")
    sizes = {c: max(len(c), *(len(cells[c]) for cells in lines)) for c in columns}
    total = lambda: sum(sizes[c] + len(GAP) for c in columns) - len(GAP)  # noqa: E731
    if width is not None:
        for column in DISPENSABLE:
            if total() > width and column in columns:
                columns.remove(column)
        if total() > width:
            sizes["name"] = max(8, sizes["name"] - (total() - width))
    return "\n".join(_row(cells, columns, sizes) for cells in ({c: c for c in COLUMNS}, *lines))


def _row(cells: dict[str, str], columns: Sequence[str], sizes: dict[str, int]) -> str:
    shown = []
    for column in columns:
        text, size = cells[column], sizes[column]
        if len(text) > size:
            text = text[: size - 1] + "…"
        shown.append(text.rjust(size) if column in RIGHT else text.ljust(size))
    return GAP.join(shown).rstrip()


def notes(runs: Sequence[Path], lines: Sequence[dict[str, str]]) -> list[str]:
    """Notes on runs whose process can't be checked from here: where they run, and when they last wrote a step."""
    messages = []
    for run in (run for run, cells in zip(runs, lines, strict=True) if cells["state"] == "running?"):
        host = folders.read_state(run).get("process", {}).get("host")
        try:
            last = f"its last step was written {ago(time.time() - (run / folders.METRICS).stat().st_mtime)}"
        except OSError:
            last = "it has written no step yet"
        where = f" on {host}" if host else ""
        messages.append(f"{run.name} is marked as running{where}, which can't be checked from here; {last}")
    return messages
