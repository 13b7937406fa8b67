"""Formats numbers and times for people, and looks up what metrics mean."""

import ast
import math
import re
import time
from functools import cache
from pathlib import Path

GENERAL = {r"^(val|test)/pass@\d+$": "val/pass@K", r"^(train|val|test)/rewards/[^/]+?(_std)?$": r"train/rewards/NAME\2"}
"""Pattern of metric names with a part that the user chose -> name of their row in the table."""


def clock(seconds: float | None) -> str:
    """A duration: `0.4 s`, `12 s`, `3:05 min`, `1:02:03 h`, `2 d 03 h`; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours < 48 else f"{hours // 24} d {hours % 24:02} h"


def ago(seconds: float) -> str:
    """How long ago something was, roughly: `now`, `5 min ago`, `3 h ago`, `2 d ago`."""
    if seconds < 60:
        return "now"
    for size, unit in ((86400, "d"), (3600, "h")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds / 60:.0f} min ago"


def moment(nanoseconds: object) -> str:
    """A time stamp as local time, to the minute; a dash if it is missing or impossible."""
    if not isinstance(nanoseconds, int | float) or not 0 < nanoseconds < 4e18:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(nanoseconds / 1e9))


def number(value: object, digits: int = 4) -> str:
    """A number with `digits` significant digits; counts as `12,345`; a dash for None; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, float) and (not math.isfinite(value) or abs(value) < 10_000):
        return f"{value:.{digits}g}"
    return f"{value:,.0f}"


def large(value: float) -> str:
    """A count in three digits: `950`, `12.4k`, `135M`, `1.2B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


@cache
def meanings() -> dict[str, str]:
    """Metric -> meaning, from the table in the docstring of `runs/metrics.py`, whose import would load Lightning."""
    file = Path(__file__).parents[1] / "runs" / "metrics.py"
    table = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    by_name: dict[str, str] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if not line.startswith("| `") or len(cells) < 2:
            continue
        names = [name.strip(" `") for name in cells[0].split(",")]
        for (
            name
        ) in names:  # a cell may name several, the later without the first part: `train/rewards/chosen`, `/rejected`
            whole = name if not name.startswith("/") else names[0].rpartition("/")[0] + name
            by_name[whole] = cells[1].replace("`", "")
    return by_name


def meaning(name: str) -> str:
    """What a metric means. `val/NAME` falls back to `train/NAME`, and a metric of one source to that of all sources."""
    known = meanings()
    if name in known:
        return known[name]
    split, _, rest = name.partition("/")
    if split in ("val", "test") and f"train/{rest}" in known:
        return known[f"train/{rest}"]
    parent = name.rpartition("/")[0]  # `val/perplexity/SOURCE`
    if "/" in parent and (inherited := meaning(parent)):
        return inherited
    general = (re.sub(pattern, row, name) for pattern, row in GENERAL.items())
    return next((known[row] for row in general if row in known), "")
