"""What appears on a terminal: what it supports, safe text, progress, and which messages of libraries stay."""

import os
import re
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from oumi_pl.terminal.text import visible


def is_terminal(stream: Any) -> bool:
    """Whether a stream writes to a terminal that supports escape codes."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # an object without `isatty`, or a closed stream
        return False


def has_colours(stream: Any) -> bool:
    """Whether a stream supports colours: it is a terminal and NO_COLOR (no-color.org) is not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


@contextmanager
def meanwhile(text: str) -> Iterator[None]:
    """Shows a line on stderr while the block runs, then removes it; does nothing without a terminal."""
    if not is_terminal(sys.stderr):
        yield
        return
    sys.stderr.write(f"{text} …")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


SHOW_AFTER = 1.0
"""Work that takes fewer seconds is not shown."""
SHOW_AFTER_PLAIN = 10.0
"""The same without a terminal, where lines are not removed."""
LINE_EVERY = 30.0
"""Seconds between two lines without a terminal."""
WIDTH = 140
"""Most columns of a line of text: longer lines are hard to read."""
EVERY = 0.2
"""Seconds between two updates of the line."""
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

ERASE = "\r\033[K"
STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "magenta": 35, "cyan": 36}


class Line:
    """A line at the bottom of a terminal, rewritten in place; other output appears above it.

    From `show` to `close`, it replaces `sys.stdout` and `sys.stderr`, also in the log handlers that write to them.
    """

    current: "Line | None" = None
    """The line that is shown now."""

    def __init__(self) -> None:
        self.text = ""
        self._terminal: Any = None
        self._is_drawn = False
        self._at_line_start = True
        self._replaced: dict[str, tuple[Any, Any]] = {}

    def show(self, text: str) -> None:
        """Draws the line. `text` has to be narrower than the terminal."""
        other = Line.current
        if other is not self:
            self._at_line_start = True
            if other is not None:  # so that streams are never replaced twice
                other.close()
                self._at_line_start = other._at_line_start
            self._replace_streams()
            Line.current = self
        elif text == self.text and self._is_drawn:
            return
        self.text = text
        if not self._at_line_start:  # something was printed without a line end
            self._write("\n")
            self._at_line_start = True
        self._draw()

    def close(self) -> None:
        """Erases the line, and restores the streams."""
        if Line.current is self:
            self._erase()
            Line.current = None
        replaced, self._replaced = self._replaced, {}
        for name, (stream, above) in replaced.items():
            if getattr(sys, name) is above:
                setattr(sys, name, stream)
            _redirect_logs(above, stream)

    @staticmethod
    def end() -> None:
        """Closes the line that is shown, if any."""
        if (shown := Line.current) is not None:
            shown.close()

    def _replace_streams(self) -> None:
        self._terminal = _below(sys.stderr)
        for name in ("stdout", "stderr"):
            stream = _below(getattr(sys, name))
            if is_terminal(stream):
                above = _Above(stream)
                self._replaced[name] = (stream, above)
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
        # a signal handler may print while this does, and a terminal may be closed: no reason for the run to fail
        with suppress(RuntimeError, OSError, ValueError):
            self._terminal.write(text)
            self._terminal.flush()

    def print_above(self, stream: Any, text: str) -> int:
        """Writes to a stream of the terminal, and redraws the line once the text ends a line."""
        self._erase()
        written: int = stream.write(text)
        self._at_line_start = text.endswith("\n")
        if self._at_line_start:
            stream.flush()
            if Line.current is self:  # else another thread has closed it
                self._draw()
        return written


class _Above:
    """A stream that writes above the shown line, if any, and otherwise behaves like the original stream.

    It stays valid after the line is closed: code that read `sys.stdout` in the meantime may keep it.
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
    """The original stream: other code may have put an `_Above` back into `sys`."""
    while isinstance(stream, _Above):
        stream = stream._stream
    return stream


def _redirect_logs(old: Any, new: Any) -> None:
    """Redirects log handlers, which keep the stream that they were created with."""
    import logging  # here, because it takes longer to import than `--help` takes to answer

    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    for handler in (handler for logger in loggers for handler in logger.handlers):
        if vars(handler).get("stream") is old and isinstance(handler, logging.StreamHandler):
            handler.setStream(new)


def terminal_width() -> int | None:
    """Columns of the terminal that stderr writes to; None if it is no terminal, or does not support escape codes."""
    if not is_terminal(sys.stderr):
        return None
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def styled(text: str, style: str) -> str:
    """Adds a style to text if stderr supports colours."""
    return f"\033[{STYLES[style]}m{text}\033[0m" if text and has_colours(sys.stderr) else text


def wrapped(text: str, width: int | None, indent: str = "  ") -> str:
    """Wraps text, made `visible`, to `width` columns between words, and indents further lines; None wraps nothing."""
    text = visible(text)
    if width is None:
        return text
    room = max(20, min(WIDTH, width - 1))
    lines = textwrap.wrap(text, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """Formats seconds as `0:07`, `12:34` or `1:02:03`; from two days on as `3 d 4 h`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


_worked = [0.0]


def worked() -> float:
    """Seconds that this process has spent in `working` so far: a way for progress lines to leave it out."""
    return _worked[0]


@contextmanager
def working(what: str) -> Iterator[None]:
    """Prints to stderr what is being done if it takes more than a moment, and afterwards how long it took.

    On rank 0 only. A progress line that is shown already is replaced for the time being.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    start, line, what = time.monotonic(), Line.current, visible(what)
    done = threading.Event()
    watcher, before, text = None, "", _shortened(f"{what} …")
    if line is not None:
        before = line.text
        line.show(text)
    elif not getattr(rank_zero_only, "rank", 0):
        watcher = threading.Thread(target=_show_work, args=(what, done), daemon=True)
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
        if finished and watcher is not None and seconds > SHOW_AFTER_PLAIN:
            sys.stderr.write(f"{what}: {seconds:.1f} s\n")


def _show_work(what: str, done: threading.Event) -> None:
    """Turns a spinner on a terminal until `done` is set; without a terminal, prints one line."""
    start, turn = time.monotonic(), 0
    rewritten = terminal_width() is not None
    if done.wait(SHOW_AFTER if rewritten else SHOW_AFTER_PLAIN):
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
    """Yields `items` and shows progress on stderr.

    Args:
        items: Items to process.
        what: Description of the work.
        total: Number of units, if known.
        unit: Name of a unit.
        size: Number of units of an item.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console, rewritten, what = Console(stderr=True), terminal_width() is not None, visible(what)
    of = "" if total is None else f" of {total:,}"
    counted = TextColumn("{task.description}: {task.completed:,}" + f"{of} {unit}")
    known = () if total is None else (BarColumn(), TimeRemainingColumn())
    start, count, shown = time.monotonic(), 0, 0.0
    printed = start
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
            if not rewritten and now - printed > LINE_EVERY:
                left = (now - start) * (total - count) / count if total and 0 < count <= total else None
                until = "" if left is None else f", about {left:,.0f} s left"
                sys.stderr.write(f"{what}: {count:,}{of} {unit}{until}\n")
                printed = now
    seconds = time.monotonic() - start
    if seconds > SHOW_AFTER:
        sys.stderr.write(f"{what}: {count:,} {unit} in {seconds:.1f} s\n")


def _formatted(message: Any, *_: Any, **__: Any) -> str:
    """Formats a warning: yellow and wrapped on a terminal, one line elsewhere."""
    return styled(wrapped(f"warning: {message}", terminal_width()), "yellow") + "\n"


def _with_visible_text(record: Any) -> bool:
    """A filter of log handlers: the texts of libraries hold names and values from files as well."""
    record.msg, record.args = visible(record.getMessage()), ()
    return True


LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"
"""Lightning's logger that names a process of the run which has ended, before the others are killed."""


def _with_cause(record: Any) -> bool:
    """A filter of that logger, whose message names no cause and nothing to do."""
    if match := re.search(r"\[rank: (\d+)\].* terminated with code (-?\d+)", record.getMessage()):
        rank, code = int(match[1]), int(match[2])
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        cause = " (often because memory ran out)" if code == -9 else ""
        record.msg = f"error: process {rank} of the run {how}{cause}; the others are stopped; go on with --resume"
        record.args = ()
    return True


def quiet() -> None:
    """Silences the loggers and warnings of dependencies, and formats the warnings that remain."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # prints the table of `trainer.profiler`
    logging.getLogger("lightning.pytorch.profilers.profiler").setLevel(logging.INFO)
    logging.getLogger(LAUNCHER).setLevel(logging.INFO)
    logging.getLogger(LAUNCHER).addFilter(_with_cause)
    # bitsandbytes warns at each product of int8 that it rounds its input to float16; torchao, at its import, about
    # kernels for cards that this machine lacks, and torch about how torchao registers its types
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as hf_logging

    for name in ("transformers", "lightning.pytorch", "lightning.fabric", "datasets", "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_with_visible_text)
    hf_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # users need to know what is wrong, not which line of which file warned
    warnings.formatwarning = _formatted
    for harmless in (
        ".*does not have many workers.*",  # rows are tokenized before training, so workers only collate
        ".*ModelCheckpoint.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*Total length of `list` across ranks is zero.*",  # the recipe names no validation rows
        ".*LightningCLI's args parameter is intended.*",
        ".*already initialized or opened.*",
        # we log the step and sums over all ranks, which are equal on every rank
        ".*recommended to use `self.log\\('(step|(val|test)/.*)', .*sync_dist=True.*",
        ".*`is_gradient_checkpointing` is deprecated.*",  # peft asks for it
        ".*`gradient_checkpointing_enable` is deprecated.*",  # trl calls it
    ):
        warnings.filterwarnings("ignore", harmless)
