"""The data report as tables: what became of the rows, how long they are, how they are mixed."""

from html import escape
from typing import Any

from oumi_pl.report.record import Record
from oumi_pl.report.words import number

ROWS = {
    "rows": ("rows read", "n"),
    "documents": ("documents", "n"),
    "kept": ("kept", "n"),
    "dropped": ("dropped", "reasons"),
    "cut": ("cut to length", "n"),
    "empty_answers": ("empty answers", "n"),
    "straddled": ("a token crosses the border of prompt and answer", "n"),
    "replaced": ("characters that were not UTF-8", "n"),
    "tokens": ("tokens", "n"),
    "target_tokens": ("tokens that carry loss", "n"),
    "bytes": ("bytes of text", "n"),
    "bytes_per_token": ("bytes per token", "n"),
    "rows_planned": ("rows of an epoch", "n"),
    "windows": ("windows", "n"),
    "updates_per_epoch": ("updates per epoch", "n"),
    "fill": ("fill of the rows", "%"),
    "padding": ("padding", "%"),
    "saved_by_sharing": ("tokens saved where prompts are shared", "%"),
}
"""Key of a data report -> what it counts, and how it is written."""


def tables(run: Record) -> str:
    """The data report of all splits, side by side; empty if there is none."""
    splits = {name: report for name, report in run.data.items() if isinstance(report, dict)}
    if not splits:
        return ""
    parts = []
    head = "".join(f'<th class="n">{escape(name)}</th>' for name in splits)
    rows = []
    for key, (title, kind) in ROWS.items():
        if any(report.get(key) not in (None, {}) and (report.get(key) or key == "kept") for report in splits.values()):
            cells = "".join(f'<td class="n">{_cell(report.get(key), kind)}</td>' for report in splits.values())
            rows.append(f"<tr><td>{title}</td>{cells}</tr>")
    parts.append(f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>')
    lengths = {name: report["lengths"] for name, report in splits.items() if report.get("lengths")}
    if lengths:
        parts.append(f'<p class="label">Length in tokens</p>{_lengths(lengths)}')
    for name, report in splits.items():
        if isinstance(report.get("sources"), list):
            parts.append(_sources(f"Sources of {name}", report["sources"]))
    consumed = run.data.get("consumed")
    if isinstance(consumed, list) and any(source.get("tokens") for source in consumed if isinstance(source, dict)):
        parts.append(_sources("Read in the running pass", consumed))
    return "".join(parts)


def _cell(value: Any, kind: str) -> str:
    if value is None or value == {}:
        return ""
    if kind == "reasons" and isinstance(value, dict):
        return "<br>".join(f"{escape(number(n))} ({escape(str(reason))})" for reason, n in value.items())
    return f"{value:.1%}" if kind == "%" and isinstance(value, int | float) else escape(number(value))


def _lengths(splits: dict[str, dict[str, int]]) -> str:
    """Percentiles of each split as a strip, all to one scale, and in numbers."""
    longest = max(max(lengths.values()) for lengths in splits.values()) or 1
    differ = any(min(lengths.values()) < max(lengths.values()) for lengths in splits.values())
    percentiles = list(next(iter(splits.values())))
    head = "".join(f'<th class="n">{_percentile(p)}</th>' for p in percentiles)
    rows, strips = [], []
    for name, found in splits.items():
        cells = "".join(f'<td class="n">{found.get(p, 0):,}</td>' for p in percentiles)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
        strips.append(f'<span class="label">{escape(name)}</span>{_strip(found, longest)}')
    table = f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
    legend = '<p class="quiet small">Line: all rows; pale: 90 % of them; dark: half of them; mark: the median.</p>'
    return "".join(strips) + legend + table if differ else table


def _percentile(name: str) -> str:
    return {"p0": "least", "p50": "median", "p100": "most"}.get(name, f"{name[1:]} %")


def _strip(found: dict[str, int], longest: int) -> str:
    """A box plot, 0 to the longest row of all splits, drawn in 500 by 26 units and stretched to the page."""
    at = {p: 500 * found[p] / longest for p in ("p0", "p5", "p25", "p50", "p75", "p95", "p100") if p in found}
    if len(at) < 7:
        return ""
    box = lambda low, high, y, height, fill: (  # noqa: E731
        f'<rect x="{at[low]:.1f}" y="{y}" width="{max(1.5, at[high] - at[low]):.1f}" height="{height}" {fill}/>'
    )
    return (
        '<svg class="strip" viewBox="0 0 504 26" preserveAspectRatio="none" aria-hidden="true">'
        + box("p0", "p100", 12, 2, 'fill="var(--faint)"')
        + box("p5", "p95", 7, 12, 'fill="var(--c0)" opacity="0.3"')
        + box("p25", "p75", 7, 12, 'fill="var(--c0)" opacity="0.7"')
        + f'<rect x="{at["p50"] - 1:.1f}" y="3" width="3" height="20" fill="var(--c1)"/></svg>'
    )


def _sources(title: str, sources: list[Any]) -> str:
    found = [source for source in sources if isinstance(source, dict)]
    keys = [key for key in dict.fromkeys(key for source in found for key in source) if key != "source"]
    keys = [key for key in keys if any(source.get(key) for source in found)]
    head = "".join(f'<th class="n">{escape(key.replace("_", " "))}</th>' for key in keys)
    rows = []
    for source in found:
        kinds = ["%" if key in ("share", "wanted") else "reasons" for key in keys]
        cells = "".join(f'<td class="n">{_cell(source.get(k), kind)}</td>' for k, kind in zip(keys, kinds, strict=True))
        rows.append(f"<tr><td>{escape(str(source.get('source', '')))}</td>{cells}</tr>")
    table = f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
    return f'<p class="label">{escape(title)}</p>{table}'
