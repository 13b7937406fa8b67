"""What the settings of a loss may be, and what is said when one is not."""

import math

from oumi_pl.errors import UserError


def require(holds: bool, name: str, value: float, wanted: str) -> None:
    """Refuses the `value` of the setting `name` unless `holds`.

    Raises:
        UserError: it does not hold; `wanted` ends the sentence "but has to be".
    """
    if not holds:
        raise UserError(f"model.loss: {name} is {value}, but has to be {wanted}")


def above_zero(name: str, value: float) -> None:
    """Refuses everything but finite numbers above 0, with a UserError."""
    require(value > 0, name, value, "above 0")
    require(value < math.inf, name, value, "finite")


def zero_or_more(name: str, value: float) -> None:
    """Refuses everything but finite numbers of 0 or more, with a UserError."""
    require(value >= 0, name, value, "0 or more")
    require(value < math.inf, name, value, "finite")


def less_than_half(label_smoothing: float) -> None:
    """Refuses shares of wrong labels outside `[0, 0.5)`, with a UserError: from a half on, labels say nothing."""
    require(0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "from 0 to below 0.5")
