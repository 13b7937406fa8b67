"""SIGTERM and Ctrl-C end a run between two updates, with a checkpoint."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

from oumi_pl.callbacks import find_all
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.types import RunModule


class Stopped(Exception):  # noqa: N818 - no error: the run did what it was asked to
    """The run was asked to stop, has saved a checkpoint, and can be resumed."""

    def __init__(self, signum: int, step: int, run: Path | None) -> None:
        how = f"go on with: oumi_pl fit --resume {run}" if run else "this run writes no checkpoints"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; {how}")
        self.exit_code = 128 + signum


class Preemption(L.Callback):
    """Finishes the current update, saves and stops when a signal asks for it. A second Ctrl-C stops at once.

    The handler only sets a flag. Ranks agree on it at the end of each update, so that none waits for another.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Installs the handlers, after Lightning has installed its own."""
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

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Between two updates: saves and stops if any rank got a signal.

        Raises:
            Stopped: once the checkpoint is written.
        """
        if trainer.fit_loop._should_accumulate():
            return
        if not trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            return
        run = None
        for checkpoints in find_all(trainer, Checkpoints):
            if checkpoints.directory is not None:
                checkpoints.save(trainer)
                run = checkpoints.directory.parent
        raise Stopped(self._signal or signal.SIGTERM, trainer.global_step, run)

    def teardown(self, trainer: Any, pl_module: RunModule, stage: str) -> None:
        """Restores the earlier handlers."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
