"""The user's mistakes: one short message each, and the nearest name that would have been right."""

import difflib
from collections.abc import Iterable


LISTED = 12
"""How many known names an error lists at the most."""


class UserError(Exception):
    """A mistake of the user's, told in one message and without a traceback.

    The message says what is wrong, where (key path, file and row) and what would be right. The command line prints it
    and exits with code 2; anything else that is raised is a bug of ours and keeps its traceback.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """Ends an error message: offers the closest of `names`, or lists them all when none is close.

    Returns:
        `"; did you mean 'x'?"` or `"; known: 'a', 'b'"`.
    """
    known = list(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = sorted(known)[:LISTED]
    more = f", ... ({len(known)} in all)" if len(known) > LISTED else ""
    return "; known: " + ", ".join(repr(n) for n in shown) + more
