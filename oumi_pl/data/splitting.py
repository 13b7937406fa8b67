"""Splits a source into training and held-out rows by a hash of each prompt, if `data.validation` is a fraction.

Rows with the same prompt, or with the same value of the column `data.group`, are on the same side. So no held-out
prompt is also a training prompt, even if a row is repeated under another id.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Record, Row


@dataclass(frozen=True)
class Side:
    """A predicate for the rows of one side of the split.

    fraction: share of the prompts that is held out. is_held_out: whether this is the held-out side. group: column whose
    value keeps rows together; None groups by prompt.
    """

    fraction: float
    is_held_out: bool
    group: str | None = None

    def __call__(self, row: Row, record: Record | None) -> bool:
        """Whether a row is on this side. A row without a record (left out because of its label) is hashed as a whole.

        Raises:
            UserError: the row has no column `group`.
        """
        if self.group is not None:
            if self.group not in row:
                raise UserError(f"data.group: this row has no column {self.group!r}{nearest(self.group, row)}")
            key: Any = row[self.group]
        else:
            key = row if record is None else record.split_key()
        return is_held_out(key, self.fraction) == self.is_held_out

    def counts_bad(self, row: Row) -> bool:
        """Whether to count an unusable row on this side. Each is counted on one side only."""
        return is_held_out(row, self.fraction) == self.is_held_out

    def __str__(self) -> str:
        name = "held out" if self.is_held_out else "not held out"
        return f"{name}: {self.fraction} by {self.group or 'prompt'}"


def is_held_out(key: Any, fraction: float) -> bool:
    """Whether the hash of a key falls into the held-out `fraction`; the same in every run and on every machine.

    Keys that are held out at a fraction are also held out at any larger one. Texts that differ only in white space or
    case are the same key.
    """
    return prompt_hash(key) < fraction * 2**64


def prompt_hash(key: Any) -> int:
    """A hash of a prompt, 64 bits; texts that differ only in white space or case have the same."""
    return content_hash(" ".join(key.casefold().split()) if isinstance(key, str) else key)


def content_hash(key: Any) -> int:
    """A hash of a text or JSON value, 64 bits, the same in every run and on every machine."""
    content = json.dumps(key, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
