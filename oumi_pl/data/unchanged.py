"""Whether the documents that a run goes on with are those that it began with."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from oumi_pl.data.corpus import Part
from oumi_pl.data.documents import Documents
from oumi_pl.data.shards import Shards
from oumi_pl.data.sources import find_files
from oumi_pl.errors import UserError


def identities(parts: Sequence[Part], documents: Sequence[Documents]) -> list[dict[str, Any]]:
    """What each source is known again by, as plain values.

    Shards know what they were made from. Of local files that are streamed it is their size: reading a corpus through at
    each start to find out whether it is the same would take as long as reading it. Of streams from the hub, nothing.
    """
    return [_identity(part, found) for part, found in zip(parts, documents, strict=True)]


def refuse_changed(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], parts: Sequence[Part]) -> None:
    """Compares what a checkpoint knows its documents by with those that are there now.

    Raises:
        UserError: they are others, where both ways of reading them tell.
    """
    for part, old, new in zip(parts, before, now, strict=False):
        if any(old[key] != new[key] for key in old.keys() & new.keys()):
            raise UserError(
                f"data.train: {part.source.path} has changed since the checkpoint was written: the run can't go on "
                "where it was; undo the change, or start anew from its model"
            )


def _identity(part: Part, documents: Documents) -> dict[str, Any]:
    if isinstance(documents, Shards):
        made_from = json.dumps(documents.manifest.get("source"), default=str)
        return {"texts": hashlib.blake2b(made_from.encode(), digest_size=8).hexdigest(), "tokens": documents.tokens}
    files = find_files(part.source.path)
    return {} if files is None else {"bytes": sum(path.stat().st_size for split in files.values() for path in split)}
