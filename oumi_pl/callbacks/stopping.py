"""Ends a run between two updates: after its last one, or when a signal asks for it."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L

from oumi_pl.callbacks import find_all
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.terminal.text import echo
from oumi_pl.types import RunModule

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class LastStep(L.Callback):
    """Asks Lightning to stop after the last update, so that it validates first, whatever the interval.

    Without this, a run that ends between two validations would have no final metrics.
    """

    def __init__(self) -> None:
        self._total = 0

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Computes the last step of the run."""
        self._total = pl_module.total_steps()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Stops at the end of the last update."""
        if not trainer.fit_loop._should_accumulate() and trainer.global_step >= self._total:
            trainer.should_stop = True


class Stopped(Exception):  # noqa: N818 - not an error: the run did as it was asked
    """The run was asked to stop, has saved a checkpoint, and can be resumed."""

    def __init__(self, signum: int, step: int, run: Path | None) -> None:
        how = f"resume it with: oumi_pl fit --resume {run}" if run else "this run writes no checkpoints"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; {how}")
        self.exit_code = 128 + signum
        self.signal = signal.Signals(signum).name


class Preemption(L.Callback):
    """Finishes the current update, saves and stops on SIGTERM, SIGUSR1 or Ctrl-C. A second Ctrl-C stops at once.

    SLURM sends SIGUSR1 before a job's time is over if it is asked to (`--signal=USR1@300`). Lightning would then save a
    checkpoint of its own outside of the run folder.

    The handler only sets a flag. Ranks agree on it at the end of each update: a rank that stopped alone would leave the
    others waiting in a collective operation.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def on_fit_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Replaces Lightning's handler of SIGTERM, which is installed after this and before training starts.

        That calls a collective operation wherever the signal finds it, and the ranks may then wait for ever.
        """
        trainer._signal_connector._sigterm_notifier_fn = self._set_flag

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Installs the handlers, after Lightning has installed its own."""
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, self._set_flag)

    @property
    def signum(self) -> int:
        """The signal that asked the run to stop; 0 for none."""
        return self._signal

    def _set_flag(self, signum: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self._signal = signum
        echo(f"\n{signal.Signals(signum).name}: finishing this update, then saving; Ctrl-C again stops at once")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Saves and stops at the end of an update if any rank got a signal.

        Raises:
            Stopped: once the checkpoint is written.
        """
        if trainer.fit_loop._should_accumulate():
            return
        if not trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            return
        self._stop(trainer)

    def on_train_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Stops before the export if a signal came after the last update; a resumed run continues with the export.

        Raises:
            Stopped: a signal asked the run to stop.
        """
        if trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False):
            self._stop(trainer)

    def _stop(self, trainer: Any) -> NoReturn:
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
