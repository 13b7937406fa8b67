"""Whether a model knows as many positions as the rows have."""

import warnings
from typing import Any

from torch import nn

from oumi_pl.errors import UserError


def refuse_too_few_positions(hf: Any, max_length: int) -> None:
    """Refuses rows that are longer than a table of learned positions, and warns where positions are computed.

    Beyond a table (GPT-2, OPT) there is nothing to look up. Rotary positions can be computed, but a model that never
    saw them is worse there, unless its `rope_parameters` are scaled along, or it is trained on them.

    Args:
        hf: A model of transformers, without adapters around it.
        max_length: Tokens of the longest row.

    Raises:
        UserError: if there are too few positions to look up.
    """
    known = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(known, int) or not 0 < known < max_length:
        return
    name = type(hf).__name__
    if any(isinstance(m, nn.Embedding) and _is_of_positions(path) for path, m in hf.named_modules()):
        raise UserError(
            f"data.max_length is {max_length}, but {name} has a table of {known} positions: set it to {known}"
        )
    told = f"data.max_length is {max_length}, and {name} was made for {known} positions: longer rows may go badly"
    warnings.warn(told, stacklevel=2)


def _is_of_positions(path: str) -> bool:
    last = path.rpartition(".")[2]
    return last == "wpe" or "position" in last
