"""The figures of a run in one line: fitted to a terminal, or as names and values."""

import sys
from typing import NamedTuple

from oumi_pl.terminal.progress import styled

BAR = (10, 40)
"""Columns of the bar, at least and at most."""
DROPPED = ("elapsed", "grad_norm", "margin", "memory_gb", "epoch", "accuracy", "lr", "tokens/s")
"""Figures that are left out in a narrow terminal, the least important first."""


class Figure(NamedTuple):
    """A value: its name and text for `grep`, and how a terminal shows it, with a label if it needs one."""

    name: str
    value: str
    shown: str
    label: str = ""

    @property
    def text(self) -> str:
        """What the terminal shows."""
        return f"{self.label} {self.shown}" if self.label else self.shown


def bar(done: float, total: float, width: int, style: str = "cyan") -> str:
    """A bar of `width` columns, filled from the left."""
    full, empty = ("━", "─") if "utf" in (getattr(sys.stderr, "encoding", "") or "").lower() else ("#", "-")
    filled = min(width, int(width * done / max(1, total)))
    return styled(full * filled, style) + styled(empty * (width - filled), "dim")


def drawn(figures: list[Figure], share: float, width: int, widths: dict[str, int]) -> str:
    """A bar and as many figures as fit into `width` columns, of which the last stays free.

    Args:
        figures: In the order in which they are shown.
        share: How much of the bar is filled.
        width: Columns of the terminal.
        widths: Length of the longest text of each figure so far, by name: keeps figures in place. Updated.
    """
    for figure in figures:
        widths[figure.name] = max(widths.get(figure.name, 0), len(figure.text))
    room = width - 1 - BAR[0]
    shown = figures
    for name in DROPPED:
        if sum(widths[figure.name] + 2 for figure in shown) <= room:
            break
        shown = [figure for figure in shown if figure.name != name]
    length = min(BAR[1], width - 1 - sum(widths[figure.name] + 2 for figure in shown))
    if length < BAR[0]:
        return "  ".join(figure.text for figure in shown)[: width - 1]
    parts = []
    for figure in shown:
        label = styled(figure.label, "dim") + " " if figure.label else ""
        parts.append(label + figure.shown + " " * (widths[figure.name] - len(figure.text)))
    return "  ".join([bar(share, 1, length), *parts]).rstrip()


def pairs(figures: list[Figure]) -> str:
    """Names and values, for `grep` and `awk`."""
    return "  ".join(f"{figure.name} {figure.value}" for figure in figures)


def short(number: float) -> str:
    """A number in three digits: `1.23k` for 1234, `135M`, `8.03B`."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}B"
