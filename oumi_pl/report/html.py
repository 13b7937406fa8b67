"""The parts that HTML pages share: document, style, tables. A page needs no other file, no network and no script."""

from collections.abc import Iterable

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #24292f; --quiet: #59636e; --faint: #a5adb5;
  --edge: #dfe3e7; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b35a8e; --c4: #b87f00; --c5: #3a94c9; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e4e7ea; --quiet: #a3acb5;
  --faint: #6c757d; --edge: #32383e;
  --c0: #56b4e9; --c1: #f08a4b; --c2: #2fc99b; --c3: #dd95bf; --c4: #e8b23a; --c5: #8fd0f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
p { margin: 6px 0; overflow-wrap: anywhere; }
.quiet, .label, caption { color: var(--quiet); }
.small { font-size: 13px; }
.label, caption { font-size: 12.5px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; }
th, td { text-align: right; padding: 4px 14px 4px 0; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--edge); }
th:first-child, td:first-child { text-align: left; white-space: normal; }
th { font-weight: 600; }
figure { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; margin: 0; padding: 6px 8px 2px; }
summary { cursor: pointer; }
"""


def document(title: str, body: str, style: str, head: str = "") -> str:
    """A whole page.

    Args:
        title: HTML.
        body: HTML.
        style: CSS beyond `STYLE`.
        head: Further elements of the head.
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{head}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "") -> str:
    """A table that scrolls where it is too wide; cells are HTML, the first column names the rows of numbers."""
    lines = [_row("th", columns), *(_row("td", row) for row in rows)]
    titled = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{titled}{"".join(lines)}</table></div>'


def _row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"
