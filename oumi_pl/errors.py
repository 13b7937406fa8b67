"""Errors of the user: one short message each, with the nearest name that would have been right."""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeGuard

LISTED = 12
"""Most known names that an error lists."""


class UserError(Exception):
    """An error of the user, reported as one message without a traceback.

    The message says what is wrong, where (key path, file and row) and what would be right. The command line prints it
    and exits with code 2. Any other exception is a bug of this package and keeps its traceback.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """Suggests the closest of `names`, or lists them if none is close; for the end of an error message.

    Returns:
        `"; did you mean 'x'?"` or `"; known: 'a', 'b'"`.
    """
    import difflib  # not at the top: this module is imported by commands that must start fast

    known = list(names)
    # wrong capitals are the most frequent mistake: `adamw` should suggest `AdamW`, not `Adam`
    by_case = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), by_case, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {by_case[close[0]]!r}?"
    if not known:
        return ""
    shown = sorted(known)[:LISTED]
    more = f", ... ({len(known)} in all)" if len(known) > LISTED else ""
    return "; known: " + ", ".join(repr(n) for n in shown) + more


CLOSE = 0.6
"""Similarity from which a name is suggested. Suffixes are not compared, since all data files share them."""


def nearby(path: Path, fits: Callable[[Path], object] = Path.is_dir, *, tell_where: bool = True) -> str:
    """Suggests a path that exists; for the end of a message about one that does not.

    Args:
        path: A path that does not exist.
        fits: Whether an existing path could be the one that was meant, if it is in an existing directory.
        tell_where: Whether to name the searched directory if no name in it is close.

    Returns:
        `"; did you mean 'data/train.jsonl'?"`, or `"; it is looked for in /home/me"`, or nothing.
    """
    import difflib

    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    there = missing.parent
    if not there.is_dir():
        return f"; {there} is not a directory"
    could = Path.is_dir if missing != path else fits
    others = [p for p in sorted(there.iterdir()) if not p.name.startswith(".") and p.name != missing.name]
    names = {p.stem.casefold(): p for p in others if could(p)}
    close = difflib.get_close_matches(missing.stem.casefold(), names, n=1, cutoff=CLOSE)
    if close:
        return f"; did you mean {names[close[0]].as_posix()!r}?"
    return f"; it is looked for in {there.resolve()}" if tell_where else ""


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    import textwrap

    if isinstance(error, UnicodeEncodeError):  # a path, most likely
        shown = error.object.encode(errors="backslashreplace").decode()
        return textwrap.shorten(f"not UTF-8 text: {shown}", 250)
    lines = str(error).strip().splitlines()
    if lines and lines[0].rstrip().endswith(":"):  # the first line only introduces the reason
        return textwrap.shorten(" ".join(lines), 250)
    return lines[0] if lines else type(error).__name__


LIBRARIES = ("torch", "lightning", "transformers", "jsonargparse", "peft", "datasets")
"""Dependencies whose versions a bug report needs."""


def versions() -> str:
    """Versions of this package, its dependencies, Python and the platform, in a line for bug reports."""
    import platform
    from importlib import metadata

    packages = []
    for name in ("oumi_pl", *LIBRARIES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages.append(f"{name} {metadata.version(name)}")
    return ", ".join([*packages, f"Python {platform.python_version()}", platform.platform()])


OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "MPS backend out of memory", "CUDA error: out of memory", "ALLOC_FAILED")
"""Texts of torch's plain RuntimeErrors that mean out of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, means that the device or the host is out of memory."""
    seen: BaseException | None = error
    while seen is not None:
        # torch's class is matched by name, since importing torch takes seconds
        if type(seen).__name__ == "OutOfMemoryError" or isinstance(seen, MemoryError):
            return True
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in OUT_OF_MEMORY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


WORKER_ENDED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: ([^.]+)|exited unexpectedly)"
)
RANK_ENDED = re.compile(r"Connection (closed by|reset by) peer|Broken pipe|remote process exited|NCCL.*aborted", re.I)
"""Messages of gloo and NCCL if the process at the other end is gone."""
OUT_OF_HOST_MEMORY = "which is what the system does to a process when memory runs out (`dmesg` says so)"


def is_disk_failure(error: BaseException) -> TypeGuard[OSError]:
    """Whether nothing can be written to a disk: it is full, over quota, or read-only."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _why_not_written(error: OSError) -> str:
    place = f" to write {error.filename}" if error.filename else ""
    is_read_only = error.errno == errno.EROFS
    if error.filename and Path(str(error.filename)).absolute().is_relative_to(cache_folder().absolute()):
        remedy = (
            "mount it writable" if is_read_only else "free some space (the cache may be deleted; it is written again)"
        )
        return (
            f"{error.strerror}{place}, in the cache; {remedy}, or set OUMI_PL_CACHE to a folder on another disk; then "
            "repeat the command, with --resume if the run had begun"
        )
    remedy = "mount it writable" if is_read_only else "free some space"
    return f"{error.strerror}{place}; {remedy} and continue with --resume, or choose another --runs_dir"


def machine_failure(error: BaseException) -> str | None:
    """The message for an error that is neither the user's nor a bug: out of memory, a disk that is full or read-only, a
    process that was killed; None for others.
    """
    if is_out_of_memory(error):
        # `oumi_pl.callbacks.memory` attaches a better message as notes
        noted = [note for note in getattr(error, "__notes__", ()) if note.startswith("out of memory")]
        return "\n".join(noted) or (
            "out of memory; smaller micro-batches give the same updates: halve data.batch_size and double "
            "trainer.accumulate_grad_batches, or set model.gradient_checkpointing"
        )
    seen: BaseException | None = error
    while seen is not None:  # the whole chain, since writers often fail again while they clean up
        if is_disk_failure(seen):
            return _why_not_written(seen)
        if ended := WORKER_ENDED.search(str(seen)):
            by_signal = WORKER_ENDED.search(str(seen.__cause__))  # PyTorch's first error names the signal
            return _why_worker_ended(ended[1] or (by_signal and by_signal[1]))
        if isinstance(seen, RuntimeError) and RANK_ENDED.search(str(seen)):
            return (
                "another rank exited; see its output for the cause. If it says nothing, it was killed, "
                f"{OUT_OF_HOST_MEMORY}; continue with --resume"
            )
        seen = seen.__cause__ or seen.__context__
    return None


def _why_worker_ended(signal: str | None) -> str:
    """The message for a loader process that ended; `signal` is the name of what ended it, if that is known."""
    if signal == "Killed":
        why = f"was killed, {OUT_OF_HOST_MEMORY}: set data.workers lower, or give the run more memory"
    elif signal is not None and "Bus error" in signal:
        why = "ran out of shared memory (/dev/shm): enlarge it (docker run --shm-size 8g), or set data.workers to 0"
    elif signal is not None:
        why = f"was ended by the signal {signal!r}: by a crash in native code, or another program"
    else:
        why = "ended unexpectedly: set data.workers to 0 to see the error"
    return f"a loader process {why}; continue with --resume"


def cache_folder() -> Path:
    """The cache directory: `$OUMI_PL_CACHE`, else `oumi_pl` in the user's cache directory."""
    explicit = os.environ.get("OUMI_PL_CACHE")
    return Path(explicit or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "oumi_pl").expanduser()
