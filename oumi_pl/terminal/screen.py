"""Finds out what a terminal supports, and makes text safe to print there."""

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

JOINERS = "\u200c\u200d"
"""Invisible, but needed to spell Persian, Indic scripts and emoji."""
NAMES = {"\0": "NUL", "\a": "BEL", "\b": "BS", "\r": "CR", "\x1b": "ESC", "\x7f": "DEL"}


def is_terminal(stream: Any) -> bool:
    """Whether a stream writes to a terminal that supports escape codes."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # an object without `isatty`, or a closed stream
        return False


def has_colours(stream: Any) -> bool:
    """Whether a stream supports colours: it is a terminal and NO_COLOR (no-color.org) is not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


@contextmanager
def meanwhile(text: str) -> Iterator[None]:
    """Shows a line on stderr while the block runs, then removes it; does nothing without a terminal."""
    if not is_terminal(sys.stderr):
        yield
        return
    sys.stderr.write(f"{text} …")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


def visible(text: str) -> str:
    """Replaces characters that would control a terminal or stay invisible by their names.

    These are control characters, changes of direction and unassigned code points. Line ends, tabs and spaces stay.
    """
    return text if text.isprintable() else "".join(c if _is_harmless(c) else named(c) for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in JOINERS + "\n\t" or unicodedata.category(character) == "Zs"


def named(character: str) -> str:
    """The name or code point of a character: `⟨ESC⟩`, `⟨U+202E⟩`."""
    return f"⟨{NAMES.get(character, f'U+{ord(character):04X}')}⟩"
