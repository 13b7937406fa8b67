"""What a path may have meant that leads nowhere: a name beside it that is spelt much like it."""

import difflib
from collections.abc import Callable
from pathlib import Path

CLOSE = 0.6
"""Share of letters in common from which on a name is offered. Endings don't count: all data files share theirs."""


def nearby(path: Path, fits: Callable[[Path], object] = Path.is_dir, *, tell_where: bool = True) -> str:
    """Ends a message about a missing path.

    Args:
        path: What there is not.
        fits: Whether something that is there could have been meant; directories are offered in place of one.
        tell_where: Whether the directory that was searched is told where no name in it is close.

    Returns:
        `"; did you mean 'data/train.jsonl'?"`, or `"; it is looked for in /home/me"`, or nothing.
    """
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
