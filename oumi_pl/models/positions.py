"""Whether a model knows as many positions as the rows have."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from oumi_pl.errors import UserError


def refuse_too_few_positions(hf: Any, max_length: int, longest: tuple[int, int] | None = None) -> None:
    """Refuses rows that are longer than a table of learned positions, and warns where positions are computed.

    Beyond a table (GPT-2, OPT) there is nothing to look up. Rotary positions can be computed, but a model that never
    saw them is worse there, unless its `rope_parameters` are scaled along, or it is trained on them.

    Args:
        hf: A model of transformers, without adapters around it.
        max_length: Tokens of the longest row.
        longest: Positions that the longest path needs surely, and at most, where that is not `max_length`.

    Raises:
        UserError: if there are surely too few positions to look up.
    """
    known = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    surely, at_most = longest or (max_length, max_length)
    if not isinstance(known, int) or not 0 < known < at_most:
        return
    name = type(hf).__name__
    needed, shorten = f"data.max_length is {max_length}", "set it"
    if longest is not None:
        needed, shorten = f"the longest document has {surely} tokens", "set data.max_length"
    if surely <= known:
        needed = f"documents may be as long as {at_most} tokens"
    if not _looks_positions_up(hf):
        rank_zero_warn(f"{needed}, and {name} was made for {known} positions: longer rows may go badly")
    elif surely > known:
        raise UserError(f"{needed}, but {name} has a table of {known} positions: {shorten} to {known}")
    else:
        rank_zero_warn(f"{needed}, and {name} has a table of {known} positions: a longer one stops the run")


def _looks_positions_up(hf: Any) -> bool:
    """Whether the text model, and not only another part of it, such as one that sees, has a table of positions."""
    return any(isinstance(m, nn.Embedding) and _is_of_positions(path) for path, m in hf.get_decoder().named_modules())


def _is_of_positions(path: str) -> bool:
    last = path.rpartition(".")[2]
    return last == "wpe" or "position" in last
