"""Compares runs: results side by side, means over seeds, differing settings, and losses in one picture."""

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from oumi_pl.report.curves import COLORS, FAINT, MOST_UNKNOWN, grid, smooth, steps_of, thin, ticks, window_of
from oumi_pl.report.record import Record
from oumi_pl.report.words import clock, large, number
from oumi_pl.runs import folders
from oumi_pl.runs.lineage import parent_text

PLACES = ("name", "runs_dir", "report", "config")
"""Keys of a config that say where a run is written, and do not affect training."""
SEEDS = ("seed_everything", "data.seed")
"""Keys in which the runs of a group may differ."""
MACHINE = ("python", "packages", "git", "device", "devices", "cpu")
"""Keys of a run's environment that are compared."""
DRAWN = {
    "train/loss": "Training loss, smoothed",
    "val/loss": "Validation loss",
    "val/bits_per_byte": "Bits per byte, validation",
    "val/rewards/accuracies": "Share of pairs ranked right, validation",
    "val/rewards/sign_accuracy": "Share of rewards with the right sign, validation",
    "val/rewards/margins": "Reward margin, validation",
    "val/exact_match": "Exact answers, share of held-out",
}
"""Metric -> title in the picture. Losses are drawn if one run has them, other metrics if several have."""
STYLES = ("-", "--", "-.", ":")
LAST = itemgetter(-1)
LONGEST = 60
"""Most characters of a value in the list of differences."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    name: str
    runs: Sequence[Record]

    @property
    def label(self) -> str:
        """The name, and for several runs their seeds, if these differ."""
        seeds = [
            next((value for key in reversed(SEEDS) if (value := flat(run.config).get(key)) is not None), "-")
            for run in self.runs
        ]
        if len(set(seeds)) == 1:
            return self.name if len(seeds) == 1 else f"{self.name} ({len(seeds)} runs, the same seed)"
        return f"{self.name} ({len(seeds)} runs, seeds {', '.join(map(str, seeds))})"


def groups(records: Sequence[Record], names: Sequence[str]) -> list[Group]:
    """The runs grouped by all settings but the seed, in order; a group is named by what its runs' names begin with."""
    by_settings: dict[str, list[int]] = {}
    for i, run in enumerate(records):
        settings = flat({key: value for key, value in run.config.items() if key not in PLACES})
        shown = {key: value for key, value in settings.items() if key not in SEEDS and value is not None}
        shown |= rows_by_source(run)
        shown["parent"] = run.part("parent").get("step")  # a branch is no repetition of a run from the start
        by_settings.setdefault(json.dumps(shown, sort_keys=True, default=str), []).append(i)
    grouped = []
    for members in by_settings.values():
        first = names[members[0]]
        # characters, not folders: `base-1` and `base-2` are `base`
        common = os.path.commonprefix([names[i] for i in members]).rstrip("-_. ")  # noqa: RUF071
        grouped.append(Group(common or first if len(members) > 1 else first, [records[i] for i in members]))
    return grouped


def spreads(found: Sequence[Group]) -> dict[str, list[str]]:
    """Means and sample standard deviations over the runs of each group: name of a metric -> a cell for each group."""
    values: dict[str, Callable[[Record], float]] = {
        f"train/loss, mean of {folders.RECENT}": lambda run: folders.recent(run.metrics["train/loss"][1]),
    }
    for name in sorted({name for group in found for run in group.runs for name in run.metrics}):
        if name.startswith("val/"):
            values[name] = lambda run, name=name: run.metrics[name][1][-1]  # type: ignore[misc]
    rows = {name: [_spread(group, value) for group in found] for name, value in values.items()}
    return {name: cells for name, cells in rows.items() if any(cell != "-" for cell in cells)}


def _spread(group: Group, value: Callable[[Record], float]) -> str:
    try:
        each = [value(run) for run in group.runs]
    except KeyError:  # one of them lacks the metric
        return "-"
    if len(each) == 1:
        return number(each[0])
    return f"{number(statistics.fmean(each))} ± {number(statistics.stdev(each), 2)}"


def outcomes(records: Sequence[Record]) -> dict[str, list[str]]:
    """The results: name of a row -> a cell for each run."""
    rows: dict[str, list[str]] = {
        "state": [run.condition for run in records],
        "steps": [f"{run.step:,}" for run in records],
        "parent": [parent_text(run.state) or "-" for run in records],
        "time": [clock(folders.seconds(run.folder, run.state)) for run in records],
        "tokens": [_cell(run, "train/num_tokens", LAST, large) for run in records],
        "tokens/s, median": [_cell(run, "train/tokens_per_second", statistics.median) for run in records],
        "peak memory, GB": [_cell(run, "train/peak_memory_gb", LAST) for run in records],
        f"train/loss, mean of {folders.RECENT}": [_cell(run, "train/loss", folders.recent) for run in records],
    }
    names = dict.fromkeys(name for run in records for name in run.metrics if name.startswith("val/"))
    order = sorted(names, key=lambda name: (name != "val/loss", name))
    for name in order:
        rows[name] = [_cell(run, name, LAST) for run in records]
        if name == "val/loss":
            rows["val/loss, best"] = [_best(run) for run in records]
    return {name: cells for name, cells in rows.items() if any(cell != "-" for cell in cells)}


def _cell(run: Record, name: str, value: Callable[[list[float]], float], shown: Callable[[float], str] = number) -> str:
    """A value of a metric as text; a dash for a run without the metric."""
    return shown(value(run.metrics[name][1])) if name in run.metrics else "-"


def _best(run: Record) -> str:
    steps, values = run.metrics.get("val/loss", ([], []))
    finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    return f"{number(min(finite)[0])} at {min(finite)[1]:,}" if finite else "-"


def differences(records: Sequence[Record]) -> dict[str, list[str]]:
    """The dotted config keys whose values differ, with the value of each run; then the same for data and machines."""
    configs = [flat({key: value for key, value in run.config.items() if key not in PLACES}) for run in records]
    machines = []
    for run in records:
        kept = {key: value for key, value in run.part("environment").items() if key in MACHINE}
        machines.append(flat({"environment": kept | {"oumi_pl": run.state.get("oumi_pl")}}))
    return _differing(configs) | _differing([rows_by_source(run) for run in records]) | _differing(machines)


def rows_by_source(run: Record) -> dict[str, str]:
    """Rows that were kept of each source, by split and name, and the tokens of each split."""
    counted = {}
    section = run.config.get("data")
    arguments = section.get("init_args") if isinstance(section, dict) else None
    for split, report in run.data.items():
        if not isinstance(report, dict):
            continue
        sources = [source for source in report.get("sources") or [] if isinstance(source, dict)]
        named = arguments.get(split) if isinstance(arguments, dict) else None
        alone = named.get("path") if isinstance(named, dict) else named
        for source in sources or [{"source": alone if isinstance(alone, str) else "", "kept": report.get("kept")}]:
            if isinstance(kept := source.get("kept"), int):
                counted[f"rows of {split} {source.get('source', '')}".rstrip()] = f"{kept:,}"
        if isinstance(tokens := report.get("tokens"), int):
            counted[f"tokens of {split}"] = f"{tokens:,}"
    return counted


def _differing(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for tree in trees for key in tree)
    values = {key: [tree.get(key) for tree in trees] for key in keys}  # null equals a key that is left out
    return {key: list(map(_shown, each)) for key, each in values.items() if any(v != each[0] for v in each)}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a tree to dotted keys; a list without mappings counts as a plain value."""
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


def incomparable(records: Sequence[Record]) -> str | None:
    """A warning if the runs trained different kinds of losses, which can't be compared."""
    models = {run.name: model for run in records if (model := run.part("model"))}
    kinds = {name: f"{model.get('trainer')} with {model.get('loss')}" for name, model in models.items()}
    listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
    return f"these losses are of different kinds ({listed})" if len(set(kinds.values())) > 1 else None


def picture(found: Sequence[Group], file: Path) -> None:
    """Draws the metrics of all runs into one picture, each group of runs in its own colour and line style.

    Of several runs, it draws the mean, and a band of one standard deviation around it.
    """
    from matplotlib.lines import Line2D

    records = [run for group in found for run in group.runs]
    counts = {name: sum(name in run.metrics for run in records) for name in DRAWN}
    drawn = {name: title for name, title in DRAWN.items() if counts[name] > (0 if name.endswith("/loss") else 1)}
    if not drawn:
        names = dict.fromkeys(name for run in records for name in run.metrics)
        drawn = {name: name for name in [*names][:MOST_UNKNOWN]}
    with grid(file, len(drawn), min(3, len(drawn)), (4.8, 3.1), 0.22 * len(found) + 0.35) as (figure, axes):
        bounds = steps_of(run.metrics[name] for name in drawn for run in records if name in run.metrics)
        for axis, (metric, title) in zip(axes, drawn.items(), strict=True):
            for i, group in enumerate(found):
                if columns := [run.metrics[metric] for run in group.runs if metric in run.metrics]:
                    _draw(axis, metric, columns, i)
            axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            axis.set_xlabel("step")
            axis.grid(alpha=0.25, linewidth=0.6, color=FAINT)
            axis.set_xlim(*bounds)
            ticks(axis)
        width, height = figure.get_size_inches()
        for i, group in enumerate(found):
            y = 1 - (0.18 + 0.22 * i) / height
            line = figure.add_artist(Line2D((0.1 / width, 0.55 / width), (y, y), **_style(i)))
            line.set_transform(figure.transFigure)
            figure.text(0.65 / width, y, group.label, va="center", fontsize=9.5, parse_math=False)


def _draw(axis: Any, metric: str, columns: Sequence[folders.Column], index: int) -> None:
    """Draws a metric of the runs of a group, over the steps that all of them have."""
    is_validation = metric.startswith("val/")
    curves = []
    for steps, values in columns:
        y = values if is_validation else smooth(values, window_of(len(values)))
        curves.append(dict(zip(steps, y, strict=True)))
    steps = sorted(set.intersection(*map(set, curves)))
    means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
    few = len(steps) < 3 or (is_validation and len(steps) <= 60)
    axis.plot(*thin(steps, means), **_style(index), marker="o" if few else "", markersize=3)
    if len(curves) > 1:
        spread = [statistics.stdev(curve[step] for curve in curves) for step in steps]
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        shown, lows = thin(steps, low)
        axis.fill_between(shown, lows, thin(steps, high)[1], color=_style(index)["color"], alpha=0.18, linewidth=0)


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": STYLES[index % len(STYLES)], "linewidth": 1.6}
