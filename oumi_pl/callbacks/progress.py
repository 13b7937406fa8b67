"""The progress of a run: a bar with figures at the bottom of a terminal, a line now and then elsewhere."""

import math
import sys
import time
from collections import deque
from typing import Any

from lightning.pytorch.callbacks import ProgressBar

from oumi_pl.callbacks import find
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.figures import BAR, Figure, bar, drawn, pairs, short
from oumi_pl.callbacks.pace import Pace
from oumi_pl.callbacks.run_folder import run_directory
from oumi_pl.callbacks.throughput import peak_memory
from oumi_pl.runs import folders
from oumi_pl.terminal.progress import EVERY, LINE_EVERY, Line, clock, styled, terminal_width, wrapped
from oumi_pl.types import RunModule

LINES_GROW = 0.02
"""Without a terminal: time between two lines, as a share of the time so far; at least `every_seconds`."""
LINES_AT_MOST = 300.0
"""Seconds between two lines, at most."""
LOGGED = (
    ("grad_norm", "train/grad_norm", ".3g", "grad"),
    ("accuracy", "train/rewards/accuracies", ".2f", "accuracy"),
    ("margin", "train/rewards/margins", ".3g", "margin"),
    ("lr", "train/lr", ".1e", "lr"),
)
"""Name of a figure, its metric, its number format, and its label."""


class ProgressLine(ProgressBar):
    """Step, epoch, loss, learning rate, speed, memory and time left; validation has a bar of its own.

    Args:
        every_seconds: Without a terminal, the least time between two lines. They become rarer as a run goes on.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self.line = Line()
        self.pace = Pace()
        self._enabled = True
        self._total = 0
        self._losses: deque[float] = deque(maxlen=folders.RECENT)
        self._shown = self._began = self._said = float("-inf")
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
        """Notes the run's number of steps, and of a resumed one the earlier losses and the best value so far."""
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
        """Starts the clock: the other callbacks are done with what they do before the first update."""
        if self.pace.began:
            return
        self.pace.begin(trainer.global_step)
        if self._enabled and terminal_width() is not None:
            steps = f"{trainer.global_step:,}/{self._total:,}"
            self.line.show(f"{bar(0, 1, BAR[0])}  {steps}  {styled('the first update …', 'dim')}")

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Counts the update, and shows the figures if they are due."""
        if trainer.fit_loop._should_accumulate() or not self._enabled:
            return
        sums, now, step = pl_module.last_update, time.monotonic(), trainer.global_step
        self.pace.update_ends(step, sums["tokens"])
        loss = sums["loss"] / max(1.0, sums[pl_module.unit])
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
            self.line.show(drawn(figures, step / max(1, self._total), width - 2, self._widths))  # leaves room for "^C"

    def _figures(self, trainer: Any, pl_module: RunModule, step: int) -> list[Figure]:
        metrics = trainer.callback_metrics
        loss = f"{folders.recent(list(self._losses)):.4f}"
        endless = getattr(trainer.fit_loop, "max_batches", 0) == float("inf")
        epoch = [] if endless else [f"{float(metrics.get('epoch', 0.0)):.2f}"]
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
        """Removes the bar, and says how long training took and what was best."""
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
        """Removes the bar, if it is still there."""
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
        line = f"step {trainer.global_step}{values}"
        if terminal_width() is None:
            _write(line + (f"  best {self._best[1]:.4g}  best_step {self._best[0]}" if self._best else ""))
            return
        # lines are not wrapped between a name and its value, nor within the words about the best
        joined = [part.replace(" ", "\N{NO-BREAK SPACE}") for part in (*line.split("  "), *([best] if best else ()))]
        shown = wrapped("  ".join(joined), terminal_width()).replace("\N{NO-BREAK SPACE}", " ")
        _write(shown.replace(best, styled(best, style)) if best else shown)

    def on_test_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Removes the bar."""
        self.line.close()

    def on_predict_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Removes the bar."""
        self.line.close()

    def _begin(self, what: str) -> None:
        self._began = self._said = time.monotonic()
        self._advance(what, 0, None)

    def _advance(self, what: str, done: int, batches: Any) -> None:
        """Shows how many batches are done, of as many as `batches` says of each loader."""
        if not self._enabled:
            return
        now, width = time.monotonic(), terminal_width()
        counts = batches if isinstance(batches, list) else [batches]
        total = sum(counts) if counts and all(isinstance(n, int) for n in counts) else 0
        of = f"{done}/{total}" if total else f"{done}"
        if width is None:
            if now - self._said > LINE_EVERY:
                self._said = now
                _write(f"{what}  batch {of}")
        elif done in (0, total) or now - self._shown > EVERY:
            self._shown = now
            text = f"{what}  batch {of}  {clock(now - self._began)}" if done else f"{what} …"
            room = min(BAR[1], width - 3 - len(text))
            self.line.show(f"{bar(done, total, room, 'magenta')}  {text}" if room >= BAR[0] else text[: width - 1])

    def _is_best(self, step: int, value: float) -> bool:
        """Whether a value is the best so far; remembers it if it is."""
        better = self._best is None or (value < self._best[1] if self._lower else value > self._best[1])
        if better and math.isfinite(value):
            self._best = (step, value)
            return True
        return False


def _write(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
