"""A progress bar for work that takes more than a moment, and a plain line where there is no terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SHOW_AFTER = 1.0
"""Seconds of work below which nothing is shown."""
LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
EVERY = 0.2
"""Seconds between two looks of the bar."""


def track(
    items: Iterable,
    what: str,
    *,
    total: int | None = None,
    unit: str = "rows",
    size: Callable[[Any], int] = lambda item: 1,
) -> Iterator:
    """Yields `items` and shows on stderr how far they have come.

    Args:
        items: What is gone through.
        what: What is done with them.
        total: How many units there are, if known.
        unit: What is counted.
        size: Units that an item stands for.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    of = "" if total is None else f" of {total:,}"
    counted = TextColumn("{task.description}: {task.completed:,}" + f"{of} {unit}")
    known = () if total is None else (BarColumn(), TimeRemainingColumn())
    start, count, shown = time.monotonic(), 0, 0.0
    said = start
    columns = (SpinnerColumn(), counted, *known, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            count += size(item)
            now = time.monotonic()
            if now - shown > EVERY:
                bar.update(task, completed=count)
                shown = now
            if not console.is_terminal and now - said > LINE_EVERY:
                sys.stderr.write(f"{what}: {count:,}{of} {unit}\n")
                said = now
    seconds = time.monotonic() - start
    if seconds > SHOW_AFTER:
        sys.stderr.write(f"{what}: {count:,} {unit} in {seconds:.1f} s\n")
