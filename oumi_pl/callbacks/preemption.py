"""SIGTERM and Ctrl-C end a run between two updates, with a checkpoint."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

from oumi_pl.callbacks.checkpoint import Checkpoints


class Stopped(Exception):  # noqa: N818 - no error: what was asked for has been done
    """The run was asked to stop, has saved, and can be resumed."""

    def __init__(self, signum: int, step: int, run: Path | None) -> None:
        how = f"go on with: oumi_pl fit --resume {run}" if run else "no checkpoint is written in this run"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; {how}")
        self.exit_code = 128 + signum


class Preemption(L.Callback):
    """Finishes the running update, saves and stops when a signal asks for it. A second Ctrl-C stops at once.

    The handler only notes the signal. Ranks agree on it at the end of each update, so that none is left waiting.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over the signals, after Lightning has installed its own handlers."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._note)

    @property
    def signum(self) -> int:
        """The signal that asked the run to stop; 0 for none."""
        return self._signal

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self._signal = signum
        print(f"\n{signal.Signals(signum).name}: finishing this update, then saving; Ctrl-C again stops at once")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Between two updates: saves and stops if any rank was told to."""
        if trainer.fit_loop._should_accumulate():
            return
        if not trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            return
        run = None
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints) and callback.directory is not None:
                callback.save(trainer)
                run = callback.directory.parent
        raise Stopped(self._signal or signal.SIGTERM, trainer.global_step, run)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the signals back."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
