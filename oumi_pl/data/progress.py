"""A progress bar for work on data that takes more than a moment, and a plain line where there is no terminal."""

import sys
import time
from collections.abc import Iterable, Iterator

SHOW_AFTER = 1.0
"""Seconds of work below which nothing is shown."""


def track(items: Iterable, what: str) -> Iterator:
    """Yields `items` and shows on stderr how many have gone by."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,} rows"), TimeElapsedColumn())
    start, count = time.monotonic(), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        for count, item in enumerate(items, start=1):
            yield item
            if count % 256 == 0:
                bar.update(task, completed=count)
    seconds = time.monotonic() - start
    if seconds > SHOW_AFTER:
        sys.stderr.write(f"{what}: {count:,} rows in {seconds:.1f} s\n")
