"""Whether a model knows as many positions as the rows have."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from oumi_pl.errors import UserError


def refuse_too_few_positions(hf: Any, max_length: int, documents: tuple[int, int] | None = None) -> None:
    """Refuses rows that are longer than a table of learned positions, and warns where positions are computed.

    Beyond a table (GPT-2, OPT) there is nothing to look up. Rotary positions can be computed, but a model that never
    saw them is worse there, unless its `rope_parameters` are scaled along, or it is trained on them.

    Args:
        hf: A model of transformers, without adapters around it.
        max_length: Tokens of the longest row.
        documents: Of rows that hold several documents, each with positions of its own: see `longest_document`.

    Raises:
        UserError: if there are surely too few positions to look up.
    """
    known = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    surely, at_most = documents or (max_length, max_length)
    if not isinstance(known, int) or not 0 < known < at_most:
        return
    name = type(hf).__name__
    told, shorten = f"data.max_length is {max_length}", "set it"
    if documents is not None:
        told, shorten = f"the longest document has {surely} tokens", "set data.max_length"
    if surely <= known:
        told = f"documents may be as long as {at_most} tokens"
    if not _looks_positions_up(hf):
        rank_zero_warn(f"{told}, and {name} was made for {known} positions: longer rows may go badly")
    elif surely > known:
        raise UserError(f"{told}, but {name} has a table of {known} positions: {shorten} to {known}")
    else:
        rank_zero_warn(f"{told}, and {name} has a table of {known} positions: a longer one stops the run")


def longest_document(data: Any, splits: Iterable[str]) -> tuple[int, int] | None:
    """Positions that the longest document needs surely, and at most; None where rows have positions from end to end.

    Both are the same but where documents are streamed, of which nothing is known but that rows end at `max_length`,
    or joined and cut, so that a row may begin within one.

    Args:
        data: Has been set up for the stage.
        splits: What the stage reads.
    """
    if not data.packing:
        return None
    if hasattr(data, "stores"):
        longest = max((store.longest for split in splits for store in data.stores(split)), default=0)
        return longest, longest
    if not hasattr(data, "shards"):
        return 0, data.max_length
    sources = [s for split in splits for s in (data.documents if split == "train" else data.shards(split))]
    lengths = [int(source.lengths.max()) for source in sources if hasattr(source, "lengths") and len(source)]
    # a document's last token is a label, and among the inputs only where the next document is joined to it
    surely = min(data.max_length, max(lengths, default=1) - 1)
    at_most = min(data.max_length, surely + (data.method == "concat"))
    return surely, at_most if all(hasattr(source, "lengths") for source in sources) else data.max_length


def _looks_positions_up(hf: Any) -> bool:
    """Whether the text model, and not only another part of it, such as one that sees, has a table of positions."""
    return any(isinstance(m, nn.Embedding) and _is_of_positions(path) for path, m in hf.get_decoder().named_modules())


def _is_of_positions(path: str) -> bool:
    last = path.rpartition(".")[2]
    return last == "wpe" or "position" in last
