"""The hardware that a recipe needs, as the header of the recipe writes it."""

import math
from pathlib import Path

from oumi_pl.planning.fit import USABLE
from oumi_pl.planning.update import Settings, estimate

DEVICES = (1, 2, 8)
"""Numbers of devices that a header speaks of."""


def hardware(recipe: Path) -> str:
    """Memory that each GPU needs, for one, two and eight of them: `1 GPU with 12 GB, 2 to 8 with 13 GB each`."""
    needed: dict[int, int] = {}
    for devices in DEVICES:
        last = estimate(Settings((recipe,), devices=devices))
        needed[devices] = gigabytes(last.total)
        if devices > 1 and not last.sharded:  # every rank holds all of it, however many there are
            needed |= dict.fromkeys(DEVICES[1:], needed[devices])
            break
    return in_words(needed)


def gigabytes(peak: int) -> int:
    """Whole GB of the memory that a device needs for a peak."""
    return math.ceil(peak / USABLE / 1e9)


def in_words(needed: dict[int, int]) -> str:
    """The hardware, from the GB that each device needs by the number of devices."""
    one, *others = needed.values()
    if set(others) == {one}:
        return f"1 to 8 GPUs with {one} GB each"
    if len(set(others)) == 1:
        return f"1 GPU with {one} GB, 2 to 8 with {others[0]} GB each"
    return f"1 GPU with {one} GB, " + ", ".join(f"{n} with {needed[n]} GB" for n in DEVICES[1:])
