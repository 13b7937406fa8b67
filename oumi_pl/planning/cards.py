"""Graphics cards, and how long an update takes on one."""

from dataclasses import dataclass

from oumi_pl.errors import UserError, nearest

NODE = 8
"""Cards that are linked directly; more ranks communicate over the network."""
NETWORK = 50e9
"""Bytes per second that a card sends to other nodes: one port of 400 Gbit/s for each card."""


@dataclass(frozen=True)
class Card:
    """A card, by the numbers of its data sheet: dense products, without sparsity.

    memory: GB. half: FLOP/s in bfloat16, with sums in float32. single: FLOP/s in float32, without TF32, as torch's
    default. bandwidth: bytes per second of its memory. link: bytes per second that it sends to the cards of its node.
    """

    name: str
    memory: int
    half: float
    single: float
    bandwidth: float
    link: float
    source: str


CARDS = {
    "h100": Card("H100 SXM", 80, 989e12, 67e12, 3.35e12, 450e9, "nvidia.com/en-us/data-center/h100"),
    "h200": Card("H200 SXM", 141, 989e12, 67e12, 4.8e12, 450e9, "nvidia.com/en-us/data-center/h200"),
    "a100": Card("A100 80GB SXM", 80, 312e12, 19.5e12, 2.039e12, 300e9, "nvidia.com/en-us/data-center/a100"),
    "a100-40": Card("A100 40GB SXM", 40, 312e12, 19.5e12, 1.555e12, 300e9, "nvidia.com/en-us/data-center/a100"),
    "l40s": Card("L40S", 48, 362e12, 91.6e12, 864e9, 32e9, "nvidia.com/en-us/data-center/l40s"),
    "l4": Card("L4", 24, 121e12, 30.3e12, 300e9, 32e9, "nvidia.com/en-us/data-center/l4"),
    "a10": Card("A10", 24, 125e12, 31.2e12, 600e9, 32e9, "nvidia.com/en-us/data-center/products/a10-gpu"),
    "4090": Card("RTX 4090", 24, 165.2e12, 82.6e12, 1.008e12, 32e9, "NVIDIA Ada GPU architecture, v2.02, table 2"),
    "3090": Card("RTX 3090", 24, 71e12, 35.6e12, 936e9, 32e9, "NVIDIA GA102 GPU architecture, v2.1, table 9"),
}
"""Name for `--card` -> the card. Cards without NVLink are linked by PCIe 4.0 x16."""
DEFAULT = "h100"


def card_of(name: str) -> Card:
    """The card of a name.

    Raises:
        UserError: there is none.
    """
    if name not in CARDS:
        raise UserError(f"--card: unknown card {name!r}{nearest(name, CARDS)}; known: {', '.join(CARDS)}")
    return CARDS[name]
