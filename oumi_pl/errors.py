"""The user's mistakes: one short message each, and the nearest name that would have been right."""

import contextlib
import errno
from collections.abc import Callable, Iterable
from pathlib import Path

LISTED = 12
"""How many known names an error lists at the most."""


class UserError(Exception):
    """A mistake of the user's, reported in one message without a traceback.

    The message says what is wrong, where (key path, file and row) and what would be right. The command line prints it
    and exits with code 2; anything else that is raised is a bug of ours and keeps its traceback.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """Ends an error message: offers the closest of `names`, or lists them all when none is close.

    Returns:
        `"; did you mean 'x'?"` or `"; known: 'a', 'b'"`.
    """
    import difflib  # imports of this module are those of the light commands

    known = list(names)
    # capitals are the commonest slip: `adamw` is one letter from `adam`, but none from `AdamW`
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
"""Share of letters in common from which on a name is offered. Endings don't count: all data files share theirs."""


def nearby(path: Path, fits: Callable[[Path], object] = Path.is_dir, *, tell_where: bool = True) -> str:
    """Ends a message about a missing path.

    Args:
        path: A path that does not exist.
        fits: Whether something that is there could have been meant; directories are offered in place of one.
        tell_where: Whether to name the directory that was searched if no name in it is close.

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
    names = {p.stem.casefold(): p for p in sorted(there.iterdir()) if not p.name.startswith(".") and could(p)}
    close = difflib.get_close_matches(missing.stem.casefold(), names, n=1, cutoff=CLOSE)
    if close:
        return f"; did you mean {names[close[0]].as_posix()!r}?"
    return f"; it is looked for in {there.resolve()}" if tell_where else ""


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    import textwrap

    lines = str(error).strip().splitlines()
    if lines and lines[0].rstrip().endswith(":"):  # what it announces is the reason
        return textwrap.shorten(" ".join(lines), 250)
    return lines[0] if lines else type(error).__name__


LIBRARIES = ("torch", "lightning", "transformers", "jsonargparse", "peft", "datasets")
"""Whose versions matter most when something breaks."""


def versions() -> str:
    """What this runs on, in a line to be pasted into a report."""
    import platform
    from importlib import metadata

    found = []
    for name in ("oumi_pl", *LIBRARIES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join([*found, f"Python {platform.python_version()}", platform.platform()])


OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "MPS backend out of memory", "CUDA error: out of memory", "ALLOC_FAILED")
"""What errors of torch say that are about memory, and of no kind of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that there is no memory: on a device, or on the host."""
    seen: BaseException | None = error
    while seen is not None:
        # the first is torch's, which is not imported here
        if type(seen).__name__ == "OutOfMemoryError" or isinstance(seen, MemoryError):
            return True
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in OUT_OF_MEMORY):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _noted(error: BaseException) -> str:
    """What was noted on an error while it was on its way: see `oumi_pl.callbacks.memory`."""
    return "\n".join(note for note in getattr(error, "__notes__", ()) if note.startswith("out of memory"))


def of_the_machine(error: BaseException) -> str | None:
    """What to say of an error that is neither the user's mistake nor a bug: a full disk, no memory; None for others."""
    if is_out_of_memory(error):
        return _noted(error) or (
            "out of memory; smaller micro-batches give the same updates: halve data.batch_size and double "
            "trainer.accumulate_grad_batches, or set model.gradient_checkpointing"
        )
    seen: BaseException | None = error
    while seen is not None:  # writers tend to fail again while they clean up after a full disk
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            place = f" to write {seen.filename}" if seen.filename else ""
            return f"{seen.strerror}{place}; make room, and go on with --resume, or choose another --runs_dir"
        if "Connection closed by peer" in str(seen):  # gloo's way to say that another rank is gone
            return "another rank exited; see its output for the cause"
        seen = seen.__cause__ or seen.__context__
    return None
