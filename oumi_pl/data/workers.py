"""A DataLoader whose workers survive signals to the process group, so that a run can finish its update and save."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader


class Loader(DataLoader):
    """A DataLoader whose workers ignore SIGINT, and SIGTERM unless their parent sends it.

    `srun`, a stopping container and Ctrl-C signal all processes of a run. If workers ended at once, the run could not
    finish its update.
    """

    def __iter__(self) -> Any:
        """Starts the workers with signals blocked. Lightning may have set `worker_init_fn` by now."""
        if self.num_workers == 0 or sys.platform == "win32":
            return super().__iter__()
        if not isinstance(self.worker_init_fn, WorkerStart):
            self.worker_init_fn = WorkerStart(self.worker_init_fn)
        with _blocked():  # workers inherit the mask, so no signal reaches them while they start
            return super().__iter__()


class WorkerStart:
    """A `worker_init_fn` that sets up signal handling, then calls the one that it replaces.

    Args:
        function: The replaced `worker_init_fn`, if there was one.
    """

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self.function = function

    def __call__(self, number: int) -> None:
        """Called in the worker, with the worker's number."""
        if hasattr(signal, "sigwaitinfo"):  # not on macOS; there a worker ends once it sees that its parent is gone
            threading.Thread(target=_end_on_request, daemon=True, name="signals").start()
        if self.function is not None:
            self.function(number)


def _end_on_request() -> None:
    """Ends the worker on a SIGTERM from its parent, which PyTorch sends to workers that don't end by themselves."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Blocks SIGTERM and SIGINT in this thread, and in processes that are started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
