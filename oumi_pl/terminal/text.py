"""Text from anywhere, made safe to show on a terminal."""

import unicodedata
from typing import Any

JOINERS = "\u200c\u200d"
"""Invisible, but needed to spell Persian, Indic scripts and emoji."""
NAMES = {"\0": "NUL", "\a": "BEL", "\b": "BS", "\r": "CR", "\x1b": "ESC", "\x7f": "DEL"}


def visible(text: str) -> str:
    """Replaces characters that would control a terminal or stay invisible by their names.

    These are control characters, changes of direction and unassigned code points. Line ends, tabs and spaces stay.
    """
    return text if text.isprintable() else "".join(c if _is_harmless(c) else named(c) for c in text)


def echo(text: object, *, end: str = "\n", file: Any = None, flush: bool = False) -> None:
    """Prints text as `visible`: names of runs, metrics, files and columns, and values, may come from anybody."""
    print(visible(str(text)), end=end, file=file, flush=flush)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in JOINERS + "\n\t" or unicodedata.category(character) == "Zs"


def named(character: str) -> str:
    """The name or code point of a character: `⟨ESC⟩`, `⟨U+202E⟩`."""
    return f"⟨{NAMES.get(character, f'U+{ord(character):04X}')}⟩"
