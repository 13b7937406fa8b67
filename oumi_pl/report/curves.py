"""Draws the curves of a run: chooses panels for its metrics, and draws them into one PNG or as separate SVGs."""

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from oumi_pl.runs import files
from oumi_pl.runs.folders import Column
from oumi_pl.terminal.text import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that are distinct with any colour vision (Okabe and Ito 2008, "Color Universal Design")."""
POINTS = 600
"""Most points of a line."""
INK, FAINT = "#333333", "#999999"
STYLES: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "oumi_pl",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "path.simplify": True,
    "text.usetex": False,
}


@dataclass(frozen=True)
class Line:
    """A metric in a panel: drawn as a line for training, as points for validation."""

    column: str
    label: str
    color: str
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """A panel: title, lines, and the bounds of their values if known."""

    title: str
    lines: tuple[Line, ...]
    low: float | None = None
    high: float | None = None
    middle: float | None = None
    """A value to compare with, such as chance, drawn as a thin line."""


MOST_UNKNOWN = 12
"""Panels of metrics that have no known name, at most."""


def panels(metrics: Mapping[str, Column]) -> list[Panel]:
    """The panels for these metrics, the most informative first; one for each if none of them has a known name."""
    blue, orange, green, purple = COLORS[:4]
    # single responses (KTO) have margins as well, of the means over all good and all bad rows
    units = {"rewards/sign_accuracy": "Loss per row", "rewards/margins": "Loss per pair"}
    titles = (title for name, title in units.items() if f"train/{name}" in metrics or f"val/{name}" in metrics)
    loss = next(titles, "Loss, nats per target token")
    unknown = [Panel(name, (Line(name, "", blue),)) for name in metrics]
    if "train/reward" in metrics:
        return _filled(_online_panels(metrics), metrics)
    both = lambda name: (Line(f"train/{name}", "training", blue), Line(f"val/{name}", "validation", orange))  # noqa: E731
    rewards = (
        Line("train/rewards/chosen", "chosen", green),
        Line("train/rewards/rejected", "rejected", purple, "--"),
        Line("val/rewards/chosen", "chosen, validation", green),
        Line("val/rewards/rejected", "rejected, validation", purple),
    )
    candidates = [
        Panel(loss, both("loss")),
        Panel("Reward margin: chosen minus rejected", both("rewards/margins"), middle=0.0),
        Panel("Share of pairs ranked right", both("rewards/accuracies"), 0.0, 1.0, middle=0.5),
        Panel("Share of rewards with the right sign", both("rewards/sign_accuracy"), 0.0, 1.0, middle=0.5),
        Panel("Rewards", rewards, middle=0.0),
        Panel("Bits per byte, validation", _by_source(metrics, "bits_per_byte")),
        Panel("Perplexity, validation", _by_source(metrics, "perplexity")),
        Panel("Exact answers, share of held-out", (Line("val/exact_match", "validation", orange),), 0.0, 1.0),
        Panel("Solved held-out prompts", _in_colors(_passes(metrics), "val/"), 0.0, 1.0),
        Panel("Token accuracy", both("mean_token_accuracy"), low=0.0),
        Panel("KL divergence to the reference, nats", both("kl"), low=0.0),
        Panel("Learning rate", (Line("train/lr", "training", blue),), low=0.0),
        Panel("Gradient norm, before clipping", (Line("train/grad_norm", "training", blue),)),
        Panel("Tokens per second", (Line("train/tokens_per_second", "training", blue),), low=0.0),
        Panel("Model FLOPs utilisation", (Line("train/mfu", "training", blue),), low=0.0),
    ]
    if not _same(metrics, "val/nll", "val/loss"):
        candidates.insert(1, Panel("Cross-entropy, nats per target token", (Line("val/nll", "validation", orange),)))
    return _filled(candidates, metrics) or unknown[:MOST_UNKNOWN]


def _online_panels(metrics: Mapping[str, Column]) -> list[Panel]:
    """The panels of online training. They leave out the validation loss, which is minus the reward."""
    blue, orange, green, purple = COLORS[:4]
    both = lambda name: (Line(f"train/{name}", "training", blue), Line(f"val/{name}", "validation", orange))  # noqa: E731
    train = lambda *names: tuple(  # noqa: E731
        Line(f"train/{name}", label, color) for (name, label), color in zip(names, COLORS, strict=False)
    )
    components = sorted(name for name in metrics if re.fullmatch(r"train/rewards/.+(?<!_std)", name))
    sources = sorted(name for name in metrics if name.startswith("train/reward/"))
    shares = (
        Line("train/groups_without_variance", "groups without variance", blue),
        Line("train/truncated", "truncated completions", orange),
        Line("train/clipped/low", "clipped low", green),
        Line("train/clipped/high", "clipped high", purple),
    )
    return [
        Panel("Reward", both("reward")),
        Panel("Reward by component", _in_colors(components, "train/rewards/")),
        Panel("Reward by source", _in_colors(sources, "train/reward/")),
        Panel("Standard deviation of rewards", train(("reward_std", "")), low=0.0),
        Panel("Solved held-out prompts", _in_colors(_passes(metrics), "val/"), 0.0, 1.0),
        Panel("Exact answers, share of held-out", (Line("val/exact_match", "validation", orange),), 0.0, 1.0),
        Panel("Completion length, tokens", both("length"), low=0.0),
        Panel("Entropy of the policy, nats per token", train(("entropy", "")), low=0.0),
        Panel("KL divergence to the reference, nats", train(("kl", "")), low=0.0),
        Panel("Shares", shares, 0.0, 1.0),
        Panel("Policy loss", train(("loss", "")), middle=0.0),
        Panel("Sampling difference, nats per token", train(("sampling_difference", "")), low=0.0),
        Panel("Learning rate", train(("lr", "")), low=0.0),
        Panel("Gradient norm, before clipping", train(("grad_norm", ""))),
        Panel(
            "Seconds per update",
            train(*((f"seconds/{name}", name) for name in ("generating", "training", "rewarding"))),
            low=0.0,
        ),
        Panel("Tokens per second", train(("tokens_per_second", "")), low=0.0),
    ]


def _passes(metrics: Mapping[str, Column]) -> list[str]:
    """The columns of pass@k, sorted by k."""
    return sorted((name for name in metrics if name.startswith("val/pass@")), key=lambda name: (len(name), name))


def _in_colors(columns: Sequence[str], prefix: str) -> tuple[Line, ...]:
    return tuple(Line(name, name.removeprefix(prefix), COLORS[i % len(COLORS)]) for i, name in enumerate(columns))


def _filled(candidates: Iterable[Panel], metrics: Mapping[str, Column]) -> list[Panel]:
    """Keeps the lines whose metrics exist, and the panels that have any."""
    filled = []
    for panel in candidates:
        lines = tuple(line for line in panel.lines if line.column in metrics)
        if lines:
            filled.append(Panel(panel.title, lines, panel.low, panel.high, panel.middle))
    return filled


def _same(metrics: Mapping[str, Column], first: str, second: str) -> bool:
    if first not in metrics or second not in metrics:
        return False
    (steps, values), (other_steps, other_values) = metrics[first], metrics[second]
    return steps == other_steps and np.array_equal(values, other_values, equal_nan=True)


def _by_source(metrics: Mapping[str, Column], name: str) -> tuple[Line, ...]:
    if "val/bits_per_byte" not in metrics:  # not pretraining: perplexity says no more than the loss
        return ()
    names = sorted(column for column in metrics if re.fullmatch(rf"val/{name}(/.+)?", column))
    labels = [column.removeprefix(f"val/{name}").lstrip("/") or ("all" if len(names) > 1 else "") for column in names]
    colors = (COLORS[1], COLORS[0], *COLORS[2:])
    return tuple(Line(c, text, colors[i % len(colors)]) for i, (c, text) in enumerate(zip(names, labels, strict=True)))


# ---- long series, shortened without losing outliers


def smooth(values: ArrayLike, window: int) -> np.ndarray:
    """The moving mean over `window` values, fewer at the ends; values that are not finite are ignored.

    Returns:
        `[n]`; NaN where no neighbour is finite.
    """
    x = np.asarray(values, dtype=float)
    finite = np.isfinite(x)
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, x, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    last = np.minimum(np.arange(len(x)) + half + 1, len(x))
    first = np.maximum(np.arange(len(x)) - half, 0)
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / np.where(counts[last] > counts[first], counts[last] - counts[first], np.nan)


def window_of(n: int) -> int:
    """The smoothing window for `n` updates: a fiftieth of them, and odd, so that it is centred."""
    return 1 if n < 20 else max(5, n // 50) | 1


def thin(steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Keeps at most `POINTS` evenly spaced points, including the first and the last."""
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if len(x) <= POINTS:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, POINTS).round().astype(int))
    return x[keep], y[keep]


def envelope(steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The minimum and maximum of each of `POINTS / 2` stretches, for lines too long to draw each point.

    Returns:
        Middle of the stretch, minimum, maximum, each `[stretches]`; stretches without a finite value are left out.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    starts = np.linspace(0, len(x), min(POINTS // 2, len(x)) + 1).astype(int)[:-1]
    low = np.minimum.reduceat(np.where(np.isfinite(y), y, np.inf), starts)
    high = np.maximum.reduceat(np.where(np.isfinite(y), y, -np.inf), starts)
    ends = np.append(starts[1:], len(x)) - 1
    finite = low <= high
    return ((x[starts] + x[ends]) / 2)[finite], low[finite], high[finite]


# ---- drawing


@contextmanager
def styled() -> Iterator[None]:
    """Draws in our style; the caller's matplotlib settings are restored afterwards."""
    import matplotlib

    with matplotlib.rc_context(STYLES):
        yield


def png(metrics: Mapping[str, Column], title: str, file: Path, resumed: Sequence[int] = ()) -> None:
    """Draws all panels into one PNG file; an existing file is replaced."""
    shown = panels(metrics)
    columns = min(4 if len(shown) in (4, 7, 8, 10, 11, 12) else 3, len(shown))
    with grid(file, len(shown), columns, (4.4, 2.75), 0.55) as (figure, axes):
        for axis, panel in zip(axes, shown, strict=True):
            draw(axis, panel, metrics, resumed)
        for axis in axes[-columns:]:
            axis.set_xlabel("step")
        width, height = figure.get_size_inches()
        heading = f"{title}   ({legend(metrics, resumed)})"
        figure.text(0.1 / width, 1 - 0.12 / height, heading, va="top", fontsize=10.5, parse_math=False)


@contextmanager
def grid(
    file: Path, count: int, columns: int, cell: tuple[float, float], head: float
) -> Iterator[tuple["Figure", list[Any]]]:
    """Opens a figure of `count` axes in `columns` columns, each `cell` inches large, below a head; saves it on exit."""
    from matplotlib.figure import Figure

    with styled():
        size = max(6.4, cell[0] * columns), cell[1] * math.ceil(count / columns) + head
        figure = Figure(figsize=size)
        # our tick labels are always short, so fixed margins suffice; a layout engine would double the drawing time
        space = 0.65 * columns / (size[0] - 0.65 * columns - 0.15)
        margins(figure, left=0.65, right=0.15, bottom=0.5, top=head + 0.15, wspace=space, hspace=0.31)
        axes = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False).flat)
        for axis in axes[count:]:
            axis.remove()
        yield figure, axes[:count]
        _show_only_glyphs(figure)
        with files.replacing(file) as half:
            figure.savefig(half, dpi=110, format="png")


def _show_only_glyphs(figure: Any) -> None:
    """Makes the texts of a picture `visible`: for other characters, matplotlib prints warnings with them, or fails."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if not text.get_text().isprintable():
            text.set_text(visible(text.get_text()))


def legend(metrics: Mapping[str, Column], resumed: Sequence[int] = ()) -> str:
    """Explains thin, bold and vertical lines."""
    width = max((window_of(len(steps)) for name, (steps, _) in metrics.items() if name.startswith("train/")), default=1)
    words = [f"thin: each update, bold: mean of {width}"] if width > 1 else ["each update"]
    if resumed:
        words.append(f"vertical: resumed at step {', '.join(f'{step:,}' for step in resumed)}")
    return "; ".join(words)


def svg(panel: Panel, metrics: Mapping[str, Column], resumed: Sequence[int] = ()) -> str:
    """One panel as an SVG element whose colours are CSS variables of the page: `var(--c0)`, `var(--ink)`, ..."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(4.3, 2.5))
        margins(figure, left=0.55, right=0.1, bottom=0.3, top=0.3)
        draw(figure.subplots(), panel, metrics, resumed)
        figure.patch.set_alpha(0.0)
        text = io.StringIO()
        _show_only_glyphs(figure)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    markup = text.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    markup = re.sub(r'<g id="[^"]*"', "<g", markup)
    markup = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", markup))
    markup = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", markup)
    own = re.sub(r"\W+", "", panel.title)  # ids are shared by all SVG elements of a page
    markup = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}-", markup)
    for i, color in enumerate(COLORS):
        markup = markup.replace(color, f"var(--c{i})")
    return markup.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)").replace("\n", " ").strip()


def margins(figure: Any, *, left: float, right: float, bottom: float, top: float, **spaces: float) -> None:
    """Sets the margins of a figure, in inches."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, **spaces)


def draw(axis: Any, panel: Panel, metrics: Mapping[str, Column], resumed: Sequence[int] = ()) -> None:
    """Draws a panel: training thin and smoothed in bold, validation as points, the last value beside the title."""
    spans: list[tuple[float, float] | None] = []
    handles: list[Any] = []
    for line in panel.lines:
        steps, values = metrics[line.column]
        drawn = _points if line.column.startswith("val/") else _line
        handle, span = drawn(axis, line, steps, values)
        handles.append(handle)
        spans.append(span)
    for step in resumed:
        axis.axvline(step, color=FAINT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    if panel.middle is not None:
        axis.axhline(panel.middle, color=FAINT, linewidth=0.8, zorder=0)
    axis.set_xlim(*steps_of(metrics.values()))
    _limits(axis, panel, [span for span in spans if span is not None])
    axis.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold", parse_math=False)
    if len(panel.lines) == 1:
        last = _last(np.asarray(metrics[panel.lines[0].column][1]))
        axis.set_title(_short(last), loc="right", fontsize=8.5)
    axis.grid(alpha=0.25, linewidth=0.6, color=FAINT)
    axis.set_axisbelow(True)
    if len(panel.lines) > 1:
        _name_lines(axis, handles)


def _name_lines(axis: Any, handles: list[Any]) -> None:
    """Draws a legend. Names of sources come from users, so they are set without parsing them as formulas."""
    blank = [" "] * len(handles)  # matplotlib leaves out labels that begin with an underscore
    legend = axis.legend(handles, blank, fontsize=8, frameon=False, loc="best", handlelength=1.8)
    for text, handle in zip(legend.get_texts(), handles, strict=True):
        text.set_parse_math(False)
        text.set_text(handle.get_label())


def steps_of(columns: Iterable[Column]) -> tuple[float, float]:
    """The bounds of an axis that shows all steps of these columns."""
    bounds = [(steps[0], steps[-1]) for steps, _ in columns]
    first, last = min(low for low, _ in bounds), max(high for _, high in bounds)
    room = max(0.03 * (last - first), 0.5)
    return first - room, last + room


Drawn = tuple[Any, tuple[float, float] | None]
"""The handle of a line for the legend, and the bounds of its finite values."""


def _line(axis: Any, line: Line, steps: list[int], values: list[float]) -> Drawn:
    y = np.asarray(values)
    width = 1 if line.column == "train/lr" else window_of(len(y))
    mean = smooth(y, width)
    marker = "o" if len(y) < 3 else ""
    label = f"{line.label} {_short(_last(mean))}"
    if width > 1:
        if len(y) > POINTS:
            x, low, high = envelope(steps, y)
            axis.fill_between(x, low, high, color=line.color, alpha=0.18, linewidth=0)
        else:
            axis.plot(steps, y, color=line.color, alpha=0.3, linewidth=0.8)
    x, y_mean = thin(steps, mean)
    look: dict[str, Any] = {"color": line.color, "linewidth": 1.7, "marker": marker, "markersize": 4}
    (handle,) = axis.plot(x, y_mean, line.style, label=label, **look)
    gaps = np.flatnonzero(~np.isfinite(y))
    if len(gaps):
        where = f"not finite: {len(gaps):,} of {len(y):,}, first at step {steps[gaps[0]]:,}"
        axis.text(0.02, 0.03, where, transform=axis.transAxes, fontsize=8, color=COLORS[1])
    return handle, _span(np.concatenate([mean, y]))


def _points(axis: Any, line: Line, steps: list[int], values: list[float]) -> Drawn:
    x, y = thin(steps, values)
    few = len(x) <= 60
    label = f"{line.label} {_short(_last(y))}".strip()
    look: dict[str, Any] = {"color": line.color, "linewidth": 1.2, "marker": "o" if few else "", "markersize": 3.5}
    (handle,) = axis.plot(x, y, ":", label=label, zorder=3, **look)
    return handle, _span(y)


def _span(y: np.ndarray) -> tuple[float, float] | None:
    finite = y[np.isfinite(y)]
    return (float(finite.min()), float(finite.max())) if len(finite) else None


def _last(y: np.ndarray) -> float:
    return float(y[-1]) if len(y) else math.nan


def _short(value: float) -> str:
    if 0 < abs(value) < 0.01:
        return _tick(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def _limits(axis: Any, panel: Panel, spans: list[tuple[float, float]]) -> None:
    """Sets the y axis: logarithmic if unbounded values span more than a factor of 10, else between known bounds."""
    from matplotlib.ticker import LogFormatter

    class Short(LogFormatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return _tick(value) if super().__call__(value, position) else ""

    ticks(axis)
    if not spans:
        return
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    unbounded = panel.low is None and panel.middle is None
    if unbounded and low > 0 and high / low > 10:
        axis.set_yscale("log")
        formatter = Short(labelOnlyBase=high / low > 1000, minor_thresholds=(2, 1))
        axis.yaxis.set_major_formatter(formatter)
        axis.yaxis.set_minor_formatter(formatter)
        return
    if panel.low is not None:
        axis.set_ylim(bottom=panel.low - (0.03 if panel.high else 0))
    if panel.high is not None:
        axis.set_ylim(top=panel.high + 0.03)


def ticks(axis: Any) -> None:
    """Whole steps along the bottom, and short numbers on both axes."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(lambda value, _: _tick(value))


def _tick(value: float) -> str:
    """A number as a short tick label: 15k, 0.25, 3e-4."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.6g}k"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"
