"""Calls a function on many batches in several processes, with the results in order."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from oumi_pl.errors import UserError, reason

Item = TypeVar("Item")
Result = TypeVar("Result")

START = "fork" if sys.platform == "linux" else "spawn"
"""How processes are started. A forked process inherits the function; a spawned one gets it pickled."""
AHEAD = 3
"""Items per process that are submitted ahead: enough to keep it busy, few enough to fit in memory."""
PARALLELISM = "TOKENIZERS_PARALLELISM"

_functions: list[Callable[[Any], Any]] = []
"""In a worker process, the function that it calls."""


def mapped(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int, what: str = "processes"
) -> Generator[Result, None, None]:
    """Yields `function(item)` for each item in order.

    The first item is processed here, so that whatever the function builds once exists before the other processes start,
    and a single item starts no process.

    Args:
        function: Called in worker processes. Its results and errors must be picklable.
        items: Read in this process, a few items ahead of the results.
        processes: Number of worker processes; with 1, all items are processed here.
        what: Name of the setting that `processes` comes from, for error messages.

    Raises:
        UserError: a process died, or the function can't be pickled.
    """
    iterator = iter(items)
    yield from map(function, itertools.islice(iterator, 1 if processes > 1 else None))
    second = list(itertools.islice(iterator, 1))
    if not second:
        return
    with _one_thread_each():
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context(START), _begin, (function,))
        waiting: deque[Any] = deque()
        try:
            for item in itertools.chain(second, iterator):
                waiting.append(pool.submit(_call, item))
                if len(waiting) >= AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{what}: one of {processes} processes ended before its work did; if memory ran out, use fewer"
            ) from error
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if "pickle" not in str(error):
                raise
            raise UserError(f"{what}: what they need can't be sent to other processes: {reason(error)}") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    """Prepares a worker process: it ignores Ctrl-C, which its parent handles, and ends when the parent ends."""
    _functions.append(function)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _functions[-1](item)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Turns off the tokenizers' own threads: they don't survive a fork, and the processes already use all cores."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before
