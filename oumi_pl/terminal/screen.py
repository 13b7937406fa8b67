"""What a stream writes to: whether a line can be rewritten there, whether there are colours, what it must not get."""

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

JOINERS = "\u200c\u200d"
"""Persian, Indic scripts and emoji are misspelt without."""
NAMES = {"\0": "NUL", "\a": "BEL", "\b": "BS", "\r": "CR", "\x1b": "ESC", "\x7f": "DEL"}


def is_terminal(stream: Any) -> bool:
    """Whether a stream goes to a terminal that obeys escape codes."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # not quite a stream, or closed
        return False


def has_colours(stream: Any) -> bool:
    """Whether colours may be used there: the same, unless the environment asks for none (no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


@contextmanager
def meanwhile(text: str) -> Iterator[None]:
    """Shows a line on stderr while the block runs, and removes it; does nothing without a terminal."""
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
    """Text without what would drive a terminal or hide: control characters, changes of direction and code points that
    are no characters are written as `named`. Line ends, tabs and spaces of all kinds stay.
    """
    return text if text.isprintable() else "".join(c if _is_harmless(c) else named(c) for c in text)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in JOINERS + "\n\t" or unicodedata.category(character) == "Zs"


def named(character: str) -> str:
    """A character by its name or code point: `⟨ESC⟩`, `⟨U+202E⟩`."""
    return f"⟨{NAMES.get(character, f'U+{ord(character):04X}')}⟩"
