"""Reports a comparison: a table, the first difference in words, a CSV of all steps, and a picture."""

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from oumi_pl.compare.run import MOST_ROUNDING, ROUNDING, TOLERANCE, Engine, Outcome, allowed, relative

MEANING = {  # quantity that differs -> what that means, and where to look for the cause
    "batch": "it trains on other tokens or targets",
    "target_tokens": "it counts other targets",
    "lr": "its learning rate is another",
    "loss": "its loss is another on the same batch and weights",
    "grad_norm": "its gradient is another though the loss agrees",
    "update": "its update is another though the gradient's norm agrees: look at clipping and the optimizer",
    "steps": "it takes another number of steps",
}


def table(engines: Sequence[Engine]) -> str:
    """A line per engine: largest differences to the lead in held steps; distance, loss and speed in free ones."""
    lead = engines[0]
    head = (
        f"{'engine':10} {'lr':>9} {'loss':>9} {'grad_norm':>9} {'update':>9}   {'weights':>9} {'last loss':>10}"
        f"   {'s/update':>8} {'peak GB':>8}"
    )
    lines = [f"{'':10} {'largest relative difference per step':>39}   {'run free':>20}", head]
    for engine in engines:
        cells = [""] * 5  # the lead has no difference to itself
        if engine is not lead:
            steps = list(zip(lead.held, engine.held, strict=False))
            largest = [max(relative(a[what], b[what]) for a, b in steps) for what in ("lr", "loss", "grad_norm")]
            update = max(line["update"] for line in engine.held)
            cells = [f"{value:.1e}" for value in (*largest, update, engine.free[-1]["weights"])]
        lines.append(
            f"{engine.name:10} {' '.join(f'{cell:>9}' for cell in cells[:4])}   {cells[4]:>9} "
            f"{engine.free[-1]['loss']:10.6f}   {median(line['seconds'] for line in engine.free):8.3f} "
            f"{engine.free[-1]['peak_memory_gb']:8.2f}"
        )
    return "\n".join(lines)


WHOLE = {
    None: "",
    True: "; with each update in one micro-batch it agrees, so micro-batches are weighed otherwise",
    False: "; with each update in one micro-batch it differs as well, so weighing micro-batches is not the cause",
}
"""Whether a difference is gone if each update is one micro-batch -> what that shows."""


def verdict(name: str, lead: str, steps: int, outcome: Outcome, tolerance: float | None = None) -> str:
    """The result of one engine in a sentence, with what was measured to judge it."""
    difference, rounding = outcome.difference, outcome.rounding
    own = ""
    if rounding:
        measured = ", ".join(f"{what} {value:.1e}" for what, value in rounding.items())
        own = f" ({lead} cut into other micro-batches differs from itself by {measured}: that is rounding)"
    if difference is None:
        allowed_now = f", or {ROUNDING:g} times {lead}'s rounding" if rounding else ""
        bound = TOLERANCE if tolerance is None else tolerance
        return f"{name} equals {lead} in all {steps} steps, within {bound:g}{allowed_now}{own}"
    values = f"{lead} {_shown(difference.lead)}, {name} {_shown(difference.other)}"
    if difference.what == "update":
        values = f"by {difference.other:.2e} of {lead}'s"
    where = f"{name} differs from {lead} first in {difference.what} at step {difference.step} ({values})"
    more = own.replace("that is rounding", f"{ROUNDING:g} times that, at most {MOST_ROUNDING:g}, would be rounding")
    return f"{where}: {MEANING[difference.what]}{WHOLE[outcome.whole]}{more}"


def _shown(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def write_csv(engines: Sequence[Engine], file: Path) -> None:
    """Writes all steps of all engines, held and free."""
    columns = ("engine", "run", "step", "batch", "target_tokens", "lr", "loss", "grad_norm", "update")
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, (*columns, "rounding", "weights", "seconds", "peak_memory_gb"), restval="")
        writer.writeheader()
        for engine in engines:
            for run, lines in (("held", engine.held), ("free", engine.free)):
                writer.writerows({"engine": engine.name, "run": run, **line} for line in lines)


def picture(engines: Sequence[Engine], title: str, file: Path, tolerance: float = 1e-5) -> None:
    """Draws loss, gradient norm and learning rate of the free runs, and the differences of held runs to the lead."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    lead = engines[0]
    styles = ("-", "--", ":", "-.")
    for engine, style in zip(engines, styles, strict=False):
        steps = [line["step"] for line in engine.free]
        for axis, what in zip(axes[0], ("loss", "grad_norm", "lr"), strict=True):
            axis.plot(steps, [line[what] for line in engine.free], style, label=engine.name, linewidth=2)
            axis.set_title(f"{what}, run free")
        if engine is lead:
            continue
        held = [line["step"] for line in engine.held]
        pairs = list(zip(lead.held, engine.held, strict=False))
        for axis, what in zip(axes[1], ("loss", "grad_norm"), strict=False):
            axis.plot(
                held[: len(pairs)], [_visible(relative(a[what], b[what])) for a, b in pairs], style, label=engine.name
            )
            axis.set_title(f"{what}: difference per step")
        update = [_visible(line["update"]) for line in engine.held]
        axes[1][2].plot(held, update, style, label=f"{engine.name}: update")
        free = [_visible(line["weights"]) for line in engine.free]
        axes[1][2].plot(steps, free, style, label=f"{engine.name}: weights", alpha=0.6)
        axes[1][2].set_title("update: distance per step; weights: run free")
    if len(engines) > 1:
        bound = [allowed(line, tolerance) for line in engines[1].held]
        axes[1][2].plot(range(1, len(bound) + 1), bound, color="gray", linewidth=1, label="allowed update")
    for axis in axes[1]:
        axis.set_yscale("log")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(f"{title}   (lower row: each step from the weights of {lead.name})")
    figure.savefig(file, dpi=110)


def _visible(value: float) -> float:
    """Clips a difference for a logarithmic axis, so that 0 is drawn at the bottom."""
    return max(value, 1e-9)
