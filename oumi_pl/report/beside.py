"""Runs beside each other: what came out, what was set otherwise, and their losses in one picture."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oumi_pl.report.curves import COLORS, FAINT, margins, smooth, steps_of, styled, thin, ticks, window_of
from oumi_pl.report.record import Record
from oumi_pl.report.words import clock, large, number
from oumi_pl.runs import folders

NOISE = ("name", "runs_dir", "report", "config")
"""Keys of a config that say where a run goes, not what it is."""
DRAWN = {
    "train/loss": "Training loss, smoothed",
    "val/loss": "Validation loss",
    "val/bits_per_byte": "Bits per byte, validation",
    "val/rewards/accuracies": "Share of pairs ranked right, validation",
    "val/rewards/margins": "Reward margin, validation",
    "val/exact_match": "Exact answers, share of held-out",
}
"""Metrics of the picture -> their titles; losses if a run has them, others if there is something to compare."""
STYLES = ("-", "--", "-.", ":")
LONGEST = 60
"""Characters of a value that a difference shows."""


def outcomes(records: Sequence[Record]) -> dict[str, list[str]]:
    """What came out of each run: name of a row -> a cell for each run."""
    rows: dict[str, list[str]] = {
        "state": [run.condition for run in records],
        "steps": [f"{run.step:,}" for run in records],
        "time": [clock(folders.seconds(run.folder, run.state)) for run in records],
        "tokens": [_last(run, "train/num_tokens", large) for run in records],
        "tokens/s, median": [_median(run, "train/tokens_per_second") for run in records],
        "peak memory, GB": [_last(run, "train/peak_memory_gb", number) for run in records],
        f"train/loss, mean of {folders.RECENT}": [_recent(run) for run in records],
    }
    names = dict.fromkeys(name for run in records for name in run.metrics if name.startswith("val/"))
    order = sorted(names, key=lambda name: (name != "val/loss", name))
    for name in order:
        rows[name] = [_last(run, name, number) for run in records]
        if name == "val/loss":
            rows["val/loss, best"] = [_best(run) for run in records]
    return {name: cells for name, cells in rows.items() if any(cell != "-" for cell in cells)}


def _last(run: Record, name: str, shown: Any) -> str:
    return str(shown(run.metrics[name][1][-1])) if name in run.metrics else "-"


def _median(run: Record, name: str) -> str:
    return number(statistics.median(run.metrics[name][1])) if name in run.metrics else "-"


def _recent(run: Record) -> str:
    if "train/loss" not in run.metrics:
        return "-"
    return number(folders.recent(run.metrics["train/loss"][1]))


def _best(run: Record) -> str:
    steps, values = run.metrics.get("val/loss", ([], []))
    found = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    return f"{number(min(found)[0])} at {min(found)[1]:,}" if found else "-"


def differences(records: Sequence[Record]) -> dict[str, list[str]]:
    """The dotted keys of the configs that are not the same in all runs, with each run's value; then of the machines."""
    trees = [flat({key: value for key, value in run.config.items() if key not in NOISE}) for run in records]
    found = _differing(trees)
    grounds = []
    for run in records:
        place = run.state.get("environment")
        place = place if isinstance(place, dict) else {}
        kept = {key: place[key] for key in ("python", "packages", "git", "device", "devices", "cpu") if key in place}
        grounds.append(flat({"environment": kept | {"oumi_pl": run.state.get("oumi_pl")}}))
    return found | _differing(grounds)


def _differing(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for tree in trees for key in tree)
    values = {key: [tree.get(key) for tree in trees] for key in keys}  # null and left out are the same
    return {key: list(map(_shown, found)) for key, found in values.items() if any(v != found[0] for v in found)}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A tree as dotted keys; lists of plain values are values."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        name = str(key) if key != "init_args" else ""  # `model.lr`, as it is typed on the command line
        out |= flat(inner, ".".join(part for part in (prefix, name) if part))
    return out


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def not_alike(records: Sequence[Record]) -> str | None:
    """A word of warning where the losses are not of one kind, and so not to be compared."""
    kinds = {}
    for run in records:
        model = run.state.get("model")
        if isinstance(model, dict):
            kinds[run.name] = f"{model.get('trainer')} with {model.get('loss')}"
    if len(set(kinds.values())) < 2:
        return None
    told = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
    return f"these losses are not of one kind ({told})"


def picture(records: Sequence[Record], names: Sequence[str], file: Path) -> None:
    """The losses of all runs, overlaid, each run in a colour and a style of its own."""
    from matplotlib.figure import Figure

    having = {name: sum(name in run.metrics for run in records) for name in DRAWN}
    there = {name: title for name, title in DRAWN.items() if having[name] > (0 if name.endswith("/loss") else 1)}
    columns = min(3, len(there))
    rows = -(-len(there) // columns)
    with styled():
        legend = 0.22 * len(records) + 0.2
        size = (max(6.4, 4.8 * columns), 3.1 * rows + legend + 0.3)
        figure = Figure(figsize=size)
        width = (size[0] - 0.65 * columns - 0.15) / columns
        margins(figure, left=0.65, right=0.15, bottom=0.5, top=legend + 0.35, wspace=0.65 / width, hspace=0.3)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        bounds = steps_of(run.metrics[name] for name in there for run in records if name in run.metrics)
        for axis, (metric, title) in zip(axes, there.items(), strict=False):
            for i, run in enumerate(records):
                if metric in run.metrics:
                    _draw(axis, metric, run.metrics[metric], i)
            axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            axis.set_xlabel("step")
            axis.grid(alpha=0.25, linewidth=0.6, color=FAINT)
            axis.set_xlim(*bounds)
            ticks(axis)
        for axis in axes[len(there) :]:
            axis.remove()
        for i, name in enumerate(names):
            y = 1 - (0.18 + 0.22 * i) / size[1]
            line = figure.add_artist(_sample(i, (0.1 / size[0], 0.55 / size[0]), y))
            line.set_transform(figure.transFigure)
            figure.text(0.65 / size[0], y, name, va="center", fontsize=9.5, parse_math=False)
        half = file.with_name(f"{file.name}.half")
        figure.savefig(half, dpi=110, format="png")
    half.replace(file)


def _draw(axis: Any, metric: str, column: folders.Column, index: int) -> None:
    steps, values = column
    is_validation = metric.startswith("val/")
    y = values if is_validation else smooth(values, window_of(len(values)))
    few = len(values) < 3 or (is_validation and len(values) <= 60)
    axis.plot(*thin(steps, y), **_look(index), marker="o" if few else "", markersize=3)


def _look(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": STYLES[index % len(STYLES)], "linewidth": 1.6}


def _sample(index: int, x: tuple[float, float], y: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(x, (y, y), **_look(index))
