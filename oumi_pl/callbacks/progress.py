"""One line that tells how the run is doing: rewritten in place on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

from lightning.pytorch.callbacks import ProgressBar

SMOOTHING = 0.9
"""Weight of the past in the displayed loss and speed (an exponential mean)."""


class ProgressLine(ProgressBar):
    """Step, loss, learning rate, speed, memory and time left.

    Args:
        every_seconds: How often to write a line when the output is not a terminal.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._smooth: dict[str, float] = {}
        self._last = 0.0
        self._started = (0.0, 0)
        self._enabled = True
        self._total = 0

    def enable(self) -> None:
        """Shows the line; Lightning calls this on rank 0."""
        self._enabled = True

    def disable(self) -> None:
        """Shows nothing; Lightning calls this on the other ranks."""
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the line."""
        self._end_line()
        print(*args, **kwargs)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Notes how far the run will go."""
        self._total = pl_module.total_steps()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Starts the clock, now that the other callbacks have done what they do before the first update."""
        if not self._started[0]:
            self._started = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Shows the line after an update, if it is time."""
        if trainer.fit_loop._should_accumulate() or not self._enabled:
            return
        for name in ("train/loss", "train/tokens_per_second"):
            value = float(trainer.callback_metrics.get(name, 0.0))
            past = self._smooth.get(name, value)
            self._smooth[name] = SMOOTHING * past + (1 - SMOOTHING) * value
        now, step = time.monotonic(), trainer.global_step
        wait = 0.1 if sys.stderr.isatty() else self.every_seconds
        if now - self._last < wait and step not in (1, self._total):
            return
        self._last = now
        self._write(self._line(trainer, step, now))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Shows what validation found, on a line that stays."""
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        metrics = {k: v for k, v in found.items() if k.removeprefix("val/") not in pl_module.details}
        if not self._enabled or trainer.state.fn != "fit" or trainer.sanity_checking or not metrics:
            return
        self._end_line()
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        sys.stderr.write(f"step {trainer.global_step}  {shown}\n")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the line."""
        self._end_line()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the line, so that the message stands alone."""
        self._end_line()

    def _line(self, trainer: Any, step: int, now: float) -> str:
        started, first = self._started
        left = (now - started) / max(1, step - first) * (self._total - step)
        metrics = trainer.callback_metrics
        names = {"accuracy": "train/rewards/accuracies", "margin": "train/rewards/margins"}
        compared = "".join(f"{word} {float(metrics[name]):.3g}  " for word, name in names.items() if name in metrics)
        return (
            f"step {step}/{self._total}  epoch {float(metrics.get('epoch', 0)):.2f}  "
            f"loss {self._smooth['train/loss']:.4f} (smoothed)  {compared}lr {float(metrics.get('train/lr', 0)):.2e}  "
            f"{self._smooth['train/tokens_per_second']:,.0f} tokens/s  "
            f"{float(metrics.get('train/peak_memory_gb', 0)):.1f} GB  {_clock(left)} left"
        )

    def _write(self, line: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{line}")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def _end_line(self) -> None:
        if self._enabled and sys.stderr.isatty():
            sys.stderr.write("\r\033[K")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
