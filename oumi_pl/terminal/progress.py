"""How far work has come: a line at the bottom of a terminal, and now and then a plain line where there is none."""

import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from oumi_pl.terminal.screen import has_colours, is_terminal

SHOW_AFTER = 1.0
"""Seconds of work below which nothing is shown."""
SAY_AFTER = 10.0
"""The same where there is no terminal, and a line stays."""
LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
WIDTH = 140
"""Columns of a line of text at the most: longer ones are hard to read."""
EVERY = 0.2
"""Seconds between two looks of the bar."""
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

ERASE = "\r\033[K"
STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "magenta": 35, "cyan": 36}


class Line:
    """A line at the bottom of a terminal, rewritten in place; other output appears above it.

    From `show` to `close`, `sys.stdout` and `sys.stderr`, and log handlers that write to them, go through it.
    """

    current: "Line | None" = None
    """The one that is shown now."""

    def __init__(self) -> None:
        self.text = ""
        self._terminal: Any = None
        self._is_drawn = False
        self._is_free = True
        self._taken: dict[str, tuple[Any, Any]] = {}

    def show(self, text: str) -> None:
        """Draws the line. `text` has to be narrower than the terminal."""
        other = Line.current
        if other is not self:
            self._is_free = True
            if other is not None:  # its text makes room, and the streams are never wrapped twice
                other.close()
                self._is_free = other._is_free
            self._take_streams()
            Line.current = self
        elif text == self.text and self._is_drawn:
            return
        self.text = text
        if not self._is_free:  # something was printed without the end of its line
            self._write("\n")
            self._is_free = True
        self._draw()

    def close(self) -> None:
        """Erases the line, and gives the streams back."""
        if Line.current is self:
            self._erase()
            Line.current = None
        taken, self._taken = self._taken, {}
        for name, (stream, above) in taken.items():
            if getattr(sys, name) is above:
                setattr(sys, name, stream)
            _redirect_logs(above, stream)

    @staticmethod
    def end() -> None:
        """Closes the one that is shown, if there is one."""
        if (shown := Line.current) is not None:
            shown.close()

    def _take_streams(self) -> None:
        self._terminal = _below(sys.stderr)
        for name in ("stdout", "stderr"):
            stream = _below(getattr(sys, name))
            if is_terminal(stream):
                above = _Above(stream)
                self._taken[name] = (stream, above)
                setattr(sys, name, above)
                _redirect_logs(stream, above)

    def _draw(self) -> None:
        self._write(ERASE + self.text)
        self._is_drawn = True

    def _erase(self) -> None:
        if self._is_drawn:
            self._write(ERASE)
            self._is_drawn = False

    def _write(self, text: str) -> None:
        # a signal handler may print in the midst of this, and a terminal may be closed: neither is worth the run
        with suppress(RuntimeError, OSError, ValueError):
            self._terminal.write(text)
            self._terminal.flush()

    def print_above(self, stream: Any, text: str) -> int:
        """Writes to a stream of the terminal, and redraws the line once the text ends a line."""
        self._erase()
        written: int = stream.write(text)
        self._is_free = text.endswith("\n")
        if self._is_free:
            stream.flush()
            if Line.current is self:  # else another thread has closed it meanwhile
                self._draw()
        return written


class _Above:
    """A stream whose text comes above the line that is shown then, if any; in all else the stream itself.

    Whoever took it from `sys` while a line was shown may keep it for good.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = Line.current
        if line is None or not text:
            return int(self._stream.write(text))
        return line.print_above(self._stream, text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _below(stream: Any) -> Any:
    """The stream itself, also where somebody has put an `_Above` back into `sys`."""
    while isinstance(stream, _Above):
        stream = stream._stream
    return stream


def _redirect_logs(old: Any, new: Any) -> None:
    """Log handlers keep the stream that they were made with."""
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if vars(handler).get("stream") is old and isinstance(handler, logging.StreamHandler):
            handler.setStream(new)


def terminal_width() -> int | None:
    """Columns of the terminal that stderr writes to; None if it writes elsewhere, or lines can't be rewritten there."""
    if not is_terminal(sys.stderr):
        return None
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def styled(text: str, style: str) -> str:
    """Text in a colour where stderr has colours."""
    return f"\033[{STYLES[style]}m{text}\033[0m" if text and has_colours(sys.stderr) else text


def wrapped(text: str, width: int | None, indent: str = "  ") -> str:
    """Text broken between words for so many columns, its further lines indented; None leaves it in one line."""
    if width is None:
        return text
    room = max(20, min(WIDTH, width - 1))
    found = textwrap.wrap(text, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(found)


def clock(seconds: float) -> str:
    """Seconds as `0:07`, `12:34` or `1:02:03`; from two days on as `3 d 4 h`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


_worked = [0.0]


def worked() -> float:
    """Seconds that this process has spent in `working` so far."""
    return _worked[0]


@contextmanager
def working(what: str) -> Iterator[None]:
    """Says on stderr what is being done, if it takes more than a moment, and afterwards how long it took.

    Only on rank 0. Where a bar is shown already, it stands in its place, and leaves no line behind.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    start, line = time.monotonic(), Line.current
    done = threading.Event()
    watcher, before, text = None, "", _shortened(f"{what} …")
    if line is not None:
        before = line.text
        line.show(text)
    elif not getattr(rank_zero_only, "rank", 0):
        watcher = threading.Thread(target=_tell_of, args=(what, done), daemon=True)
        watcher.start()
    finished = False
    try:
        yield
        finished = True
    finally:
        done.set()
        if watcher is not None:
            watcher.join()
        if line is not None and Line.current is line and line.text == text:
            line.show(before)
        seconds = time.monotonic() - start
        _worked[0] += seconds
        if finished and watcher is not None and seconds > SAY_AFTER:
            sys.stderr.write(f"{what}: {seconds:.1f} s\n")


def _tell_of(what: str, done: threading.Event) -> None:
    """Turns a spinner on a terminal, from a second on until it is done; elsewhere, writes a line once."""
    start, turn = time.monotonic(), 0
    rewritten = terminal_width() is not None
    if done.wait(SHOW_AFTER if rewritten else SAY_AFTER):
        return
    if not rewritten:
        sys.stderr.write(f"{what} ...\n")
        sys.stderr.flush()
        return
    line = Line()
    try:
        while not done.wait(EVERY if turn else 0.0):
            turn += 1
            line.show(_shortened(f"{SPINNER[turn % len(SPINNER)]} {what} {clock(time.monotonic() - start)}"))
    finally:
        line.close()


def _shortened(text: str) -> str:
    return text[: (terminal_width() or 80) - 1]


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

    console, rewritten = Console(stderr=True), terminal_width() is not None
    of = "" if total is None else f" of {total:,}"
    counted = TextColumn("{task.description}: {task.completed:,}" + f"{of} {unit}")
    known = () if total is None else (BarColumn(), TimeRemainingColumn())
    start, count, shown = time.monotonic(), 0, 0.0
    said = start
    columns = (SpinnerColumn(), counted, *known, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not rewritten) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            count += size(item)
            now = time.monotonic()
            if now - shown > EVERY:
                bar.update(task, completed=count)
                shown = now
            if not rewritten and now - said > LINE_EVERY:
                sys.stderr.write(f"{what}: {count:,}{of} {unit}\n")
                said = now
    seconds = time.monotonic() - start
    if seconds > SHOW_AFTER:
        sys.stderr.write(f"{what}: {count:,} {unit} in {seconds:.1f} s\n")
