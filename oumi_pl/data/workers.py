"""Loader processes that outlive signals to their process group, so that a run can finish its update and save."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader


class Loader(DataLoader):
    """A DataLoader whose workers ignore SIGTERM and SIGINT, unless their own process sends SIGTERM to end them.

    `srun`, a container's stop and Ctrl-C send signals to all processes of a run. If its workers ended at once, the run
    could not finish its update.
    """

    def __iter__(self) -> Any:
        """As of its base class. Lightning may have set `worker_init_fn` by now."""
        if self.num_workers == 0 or sys.platform == "win32":
            return super().__iter__()
        if not isinstance(self.worker_init_fn, WorkerStart):
            self.worker_init_fn = WorkerStart(self.worker_init_fn)
        with _blocked():  # workers inherit this from their first moment on
            return super().__iter__()


class WorkerStart:
    """Prepares a worker for signals, then calls another function, with its number.

    Args:
        function: What else is to be called.
    """

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self.function = function

    def __call__(self, number: int) -> None:
        """Runs in the worker."""
        if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a worker ends when it notices that its parent is gone
            threading.Thread(target=_end_on_request, daemon=True, name="signals").start()
        if self.function is not None:
            self.function(number)


def _end_on_request() -> None:
    """Waits for a SIGTERM of the parent, which PyTorch sends to workers that do not end by themselves."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
