"""Which rows of a source are held out, if `data.validation` is a fraction: a hash of each row's prompt decides.

Rows with the same prompt, or with the same value of the column `data.group`, are on the same side. So nothing that is
asked in the held-out rows is answered in the training rows, however often a row is repeated under other ids.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Record, Row


@dataclass(frozen=True)
class Side:
    """One of the two sides of a source; called with a row and its record.

    fraction: the share of the prompts that is held out. is_held_out: which side this is. group: the column that keeps
    rows together; None for their prompts.
    """

    fraction: float
    is_held_out: bool
    group: str | None = None

    def __call__(self, row: Row, record: Record | None) -> bool:
        """Whether a row is on this side; one without a record (left out for its label) is placed by its content.

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
        """Whether a row that can't be used counts on this side, so that it counts once."""
        return is_held_out(row, self.fraction) == self.is_held_out

    def __str__(self) -> str:
        name = "held out" if self.is_held_out else "not held out"
        return f"{name}: {self.fraction} by {self.group or 'prompt'}"


def is_held_out(key: Any, fraction: float) -> bool:
    """Whether a key lies in the held-out `fraction`, by its hash: the same in every run and on every machine.

    What is held out at a smaller fraction is held out at a larger one. Texts that differ in white space or in upper and
    lower case are one key.
    """
    if isinstance(key, str):
        key = " ".join(key.casefold().split())
    content = json.dumps(key, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") < fraction * 2**64
