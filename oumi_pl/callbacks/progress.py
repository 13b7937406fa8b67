"""Shows the progress of a run: a bar with figures in a terminal, and a line from time to time elsewhere."""

import math
import sys
import time
from collections import deque
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import ProgressBar

from oumi_pl.callbacks import find
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.run_folder import run_directory
from oumi_pl.callbacks.throughput import peak_memory
from oumi_pl.runs import folders
from oumi_pl.terminal.screen import EVERY, LINE_EVERY, Line, clock, styled, terminal_width, worked, wrapped
from oumi_pl.terminal.text import visible
from oumi_pl.types import RunModule

RECENT = 100
"""Speed and remaining time are computed from this many updates."""
TRIMMED = 0.05
"""Share of the recent updates that is left out of the mean at either end: outliers are no measure of speed."""


class Pace:
    """Measures the speed of updates, and separately the time of validating and saving between them."""

    def __init__(self) -> None:
        self.began = 0.0
        self.first_step = 0
        self._updated = self._worked = self._validated = 0.0
        self._validating: tuple[float, float] | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._paused, self._paused_at = 0.0, 0

    def begin(self, step: int) -> None:
        """Starts the clock before the first update. `step` updates were done before the run was resumed."""
        self.began = self._updated = time.monotonic()
        self.first_step, self._worked = step, worked()

    def validation_begins(self) -> None:
        """Starts a pause."""
        self._validating = (time.monotonic(), worked())

    def validation_ends(self) -> None:
        """Ends a pause. Time spent in `working` meanwhile is left out here, because `worked` counts it."""
        if self._validating is not None:
            since, worked_then = self._validating
            self._validated += time.monotonic() - since - (worked() - worked_then)
            self._validating = None

    def update_ends(self, step: int, tokens: float) -> None:
        """Counts an update of `tokens` tokens, the `step`-th of the run."""
        now, work = time.monotonic(), worked()
        pause = self._validated + work - self._worked
        self._recent.append((max(0.0, now - self._updated - pause), tokens))
        self._updated, self._worked, self._validated = now, work, 0.0
        if pause:
            self._paused, self._paused_at = self._paused + pause, step - 1  # the pause was before this update

    @property
    def elapsed(self) -> float:
        """Seconds since the first update began."""
        return time.monotonic() - self.began

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over the recent updates."""
        return sum(tokens for _, tokens in self._recent) / max(1e-9, sum(seconds for seconds, _ in self._recent))

    @property
    def seconds_per_update(self) -> float:
        """Mean time of the recent updates, without the fastest and the slowest few."""
        times = sorted(seconds for seconds, _ in self._recent)
        cut = int(len(times) * TRIMMED)
        kept = times[cut : len(times) - cut]
        return sum(kept) / max(1, len(kept))

    def left(self, steps: int) -> float:
        """Seconds that `steps` more updates take, with as much validating and saving per update as so far."""
        pause = self._paused / max(1, self._paused_at - self.first_step)
        return (self.seconds_per_update + pause) * steps


BAR = (10, 40)
"""Fewest and most columns of the bar."""
DROPPED = ("elapsed", "grad_norm", "margin", "memory_gb", "epoch", "accuracy", "lr", "tokens/s")
"""Figures that a narrow terminal leaves out, the least important first."""


class Figure(NamedTuple):
    """A figure: name and value for `grep`, and how a terminal shows it, with a label if it needs one."""

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


def fitted(figures: list[Figure], share: float, width: int, widths: dict[str, int]) -> str:
    """A bar and as many figures as fit into `width` columns; the last column stays free.

    Args:
        figures: In the order in which they are shown.
        share: Filled share of the bar.
        width: Columns of the terminal.
        widths: Longest text of each figure so far, by name, so that figures stay in place. Updated here.
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
    """The figures as names and values, for `grep` and `awk`."""
    return "  ".join(f"{figure.name} {figure.value}" for figure in figures)


def short(number: float) -> str:
    """A number in three digits: `1.23k` for 1234, `135M`, `8.03B`."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}B"


LINES_GROW = 0.02
"""Without a terminal: time between two lines as a share of the elapsed time, no less than `every_seconds`."""
LINES_AT_MOST = 300.0
"""Most seconds between two lines."""
LOGGED = (
    ("grad_norm", "train/grad_norm", ".3g", "grad"),
    ("accuracy", "train/rewards/accuracies", ".2f", "accuracy"),
    ("signs", "train/rewards/sign_accuracy", ".2f", "right sign"),
    ("margin", "train/rewards/margins", ".3g", "margin"),
    ("lr", "train/lr", ".1e", "lr"),
)
"""Name of a figure, its metric, its number format, and its label."""


class ProgressLine(ProgressBar):
    """Step, epoch, loss, learning rate, speed, memory and time left; validation has a bar of its own.

    Args:
        every_seconds: Least time between two lines without a terminal. Lines become rarer in the course of a run.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self.line = Line()
        self.pace = Pace()
        self._enabled = True
        self._total = 0
        self._losses: deque[float] = deque(maxlen=folders.RECENT)
        self._shown = self._began = self._printed = float("-inf")
        self._widths: dict[str, int] = {}
        self._monitor, self._lower, self._keeps_best = "val/loss", True, False
        self._best: tuple[int, float] | None = None

    def enable(self) -> None:
        """Shows the bar; Lightning calls this on rank 0."""
        self._enabled = True

    def disable(self) -> None:
        """Shows nothing; Lightning calls this on the other ranks."""
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        print(*args, **kwargs)

    # ---- training

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Computes the number of steps; for a resumed run, reads the earlier losses and the best value so far."""
        self._total = pl_module.total_steps()
        checkpoints, directory = find(trainer, Checkpoints), run_directory(trainer)
        if checkpoints is not None and checkpoints.monitor is not None:
            self._monitor, self._lower, self._keeps_best = checkpoints.monitor, checkpoints.mode == "min", True
        if self._enabled and trainer.global_step and directory is not None:
            earlier = folders.read_metrics(directory, ["train/loss", self._monitor])
            self._losses.extend(earlier.get("train/loss", ([], []))[1])
            for step, value in zip(*earlier.get(self._monitor, ([], [])), strict=True):
                self._is_best(step, value)

    def on_train_batch_start(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Starts the clock here, not in `on_train_start`, where other callbacks may still take long."""
        if self.pace.began:
            return
        self.pace.begin(trainer.global_step)
        if self._enabled and terminal_width() is not None:
            steps = f"{trainer.global_step:,}/{self._total:,}"
            self.line.show(f"{bar(0, 1, BAR[0])}  {steps}  {styled('the first update …', 'dim')}")

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Counts an update at its end, and shows the figures if they are due."""
        if trainer.fit_loop._should_accumulate() or not self._enabled:
            return
        sums, now, step = pl_module.last_update, time.monotonic(), trainer.global_step
        self.pace.update_ends(step, sums["tokens"])
        loss = sums["loss"] / (pl_module.units(sums) or 1.0)
        self._losses.append(loss)
        width, wait = terminal_width(), EVERY
        if width is None:
            wait = min(max(self.every_seconds, LINES_GROW * self.pace.elapsed), LINES_AT_MOST)
        if now - self._shown < wait and step not in (self.pace.first_step + 1, self._total):
            return
        self._shown = now
        figures = self._figures(trainer, pl_module, step)
        if width is None:
            _write(pairs(figures))
        else:
            self.line.show(fitted(figures, step / max(1, self._total), width - 2, self._widths))  # leaves room for "^C"

    def _figures(self, trainer: Any, pl_module: RunModule, step: int) -> list[Figure]:
        metrics = trainer.callback_metrics
        loss = f"{folders.recent(list(self._losses)):.4f}"
        is_endless = getattr(trainer.fit_loop, "max_batches", 0) == float("inf")  # a stream has no epochs to count
        epoch = [] if is_endless else [f"{float(metrics.get('epoch', 0.0)):.2f}"]
        speed, memory = self.pace.tokens_per_second, peak_memory(pl_module.device) / 1e9
        left, elapsed = clock(self.pace.left(self._total - step)), clock(self.pace.elapsed)
        logged = [
            Figure(name, format(float(metrics[metric]), form), format(float(metrics[metric]), form), label)
            for name, metric, form, label in LOGGED
            if metric in metrics
        ]
        return [
            Figure("step", f"{step}/{self._total}", f"{step:>{len(f'{self._total:,}')},}/{self._total:,}"),
            *(Figure("epoch", value, value, "epoch") for value in epoch),
            Figure("loss", loss, loss, "loss"),
            *logged,
            Figure("tokens/s", f"{speed:.0f}", f"{short(speed)} tokens/s"),
            Figure("memory_gb", f"{memory:.2f}", f"{memory:.1f} GB"),
            Figure("elapsed", elapsed.replace(" ", ""), elapsed, "elapsed"),
            Figure("left", left.replace(" ", ""), f"{left} left"),
        ]

    def on_train_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Removes the bar, and prints how long training took and the best value."""
        self.line.close()
        if self._enabled and self.pace.began:
            done = trainer.global_step - self.pace.first_step
            best = f"; best {self._monitor} {self._best[1]:.4g} at step {self._best[0]:,}" if self._best else ""
            if self._best and self._best[0] < trainer.global_step and not self._keeps_best:
                best += f", not kept: the model is the last step's (--checkpoint.monitor {self._monitor} keeps it)"
            summary = f"trained {done:,} step{'s' if done != 1 else ''} in {clock(self.pace.elapsed)}{best}"
            _write(wrapped(summary, terminal_width()))

    def on_exception(self, trainer: Any, pl_module: RunModule, exception: BaseException) -> None:
        """Removes the bar before the error is shown."""
        self.line.close()

    def teardown(self, trainer: Any, pl_module: RunModule, stage: str) -> None:
        """Removes the bar of a test or a prediction, or of a run that failed."""
        self.line.close()

    # ---- held-out rows

    def on_validation_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Shows a bar for validation."""
        self.pace.validation_begins()
        if not trainer.sanity_checking:
            self._begin("validating")

    def on_test_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Shows a bar for the test."""
        self._begin("testing")

    def on_predict_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Shows a bar for prediction."""
        self._begin("predicting")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: RunModule, out: Any, batch: Any, index: int, *_: Any
    ) -> None:
        """Shows the progress of validation."""
        if not trainer.sanity_checking:
            self._advance("validating", index + 1, trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Any, pl_module: RunModule, out: Any, batch: Any, index: int, *_: Any) -> None:
        """Shows the progress of the test."""
        self._advance("testing", index + 1, trainer.num_test_batches)

    def on_predict_batch_end(
        self, trainer: Any, pl_module: RunModule, out: Any, batch: Any, index: int, *_: Any
    ) -> None:
        """Shows the progress of prediction."""
        self._advance("predicting", index + 1, trainer.num_predict_batches)

    def on_validation_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Prints the validation metrics, with the best value so far."""
        self.pace.validation_ends()
        if trainer.state.fn != "fit":
            self.line.close()
        elif self._enabled and not trainer.sanity_checking:
            self._print_validation(trainer, pl_module.details)

    def _print_validation(self, trainer: Any, details: tuple[str, ...]) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if metrics.get("val/nll") == metrics.get("val/loss"):
            metrics.pop("val/nll", None)
        values = "".join(f"  {name} {v:.4g}" for name, v in metrics.items() if name.removeprefix("val/") not in details)
        if not values:
            return
        before, best, style = self._best, "", ""
        if self._monitor in metrics and self._is_best(trainer.global_step, metrics[self._monitor]):
            best, style = "best so far", "green"
        elif before is not None:
            best, style = f"(best {before[1]:.4g} at step {before[0]})", "dim"
        line = visible(f"step {trainer.global_step}{values}")
        if terminal_width() is None:
            _write(line + (f"  best {self._best[1]:.4g}  best_step {self._best[0]}" if self._best else ""))
            return
        # lines are not wrapped between a name and its value, nor within the note about the best
        joined = [part.replace(" ", "\N{NO-BREAK SPACE}") for part in (*line.split("  "), *([best] if best else ()))]
        shown = wrapped("  ".join(joined), terminal_width()).replace("\N{NO-BREAK SPACE}", " ")
        _write(shown.replace(best, styled(best, style)) if best else shown)

    def _begin(self, what: str) -> None:
        self._began = self._printed = time.monotonic()
        self._advance(what, 0, None)

    def _advance(self, what: str, done: int, batches: Any) -> None:
        """Shows how many batches are done. `batches` is the number of each loader; it may be infinite or unknown."""
        if not self._enabled:
            return
        now, width = time.monotonic(), terminal_width()
        counts = batches if isinstance(batches, list) else [batches]
        total = sum(counts) if counts and all(isinstance(n, int) for n in counts) else 0
        of = f"{done}/{total}" if total else f"{done}"
        if width is None:
            if now - self._printed > LINE_EVERY:
                self._printed = now
                _write(f"{what}  batch {of}")
        elif done in (0, total) or now - self._shown > EVERY:
            self._shown = now
            text = f"{what}  batch {of}  {clock(now - self._began)}" if done else f"{what} …"
            room = min(BAR[1], width - 3 - len(text))
            self.line.show(f"{bar(done, total, room, 'magenta')}  {text}" if room >= BAR[0] else text[: width - 1])

    def _is_best(self, step: int, value: float) -> bool:
        """Whether a value is the best so far, which is then stored."""
        better = self._best is None or (value < self._best[1] if self._lower else value > self._best[1])
        if better and math.isfinite(value):
            self._best = (step, value)
            return True
        return False


def _write(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
