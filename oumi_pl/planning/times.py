"""How long an update takes on a card, from what it computes, moves and sends."""

import torch

from oumi_pl.planning.cards import NETWORK, Card
from oumi_pl.planning.tracker import Costs


def compute_seconds(costs: Costs, card: Card, fraction: float) -> float:
    """Seconds of the operations: each is limited by its products or by the memory that it reads and writes.

    Args:
        costs: Of an update on one rank.
        card: The card.
        fraction: The share of the card's peak, of FLOP/s and of bandwidth, that operations reach.
    """
    total = 0.0
    for operation, times in costs.operations.items():
        is_half = operation.dtype in (torch.bfloat16, torch.float16)
        products = operation.flops / (card.half if is_half else card.single)
        total += times * max(products, operation.moved / card.bandwidth)
    return total / fraction


def message_seconds(costs: Costs, card: Card, fraction: float) -> float:
    """Seconds of the messages among ranks. The arguments are those of `compute_seconds`."""
    sent = (
        (times * collective.sent, card.link if collective.nodes == 1 else NETWORK)
        for collective, times in costs.collectives.items()
    )
    return sum(size / speed for size, speed in sent) / fraction


def seconds(costs: Costs, card: Card, fraction: float) -> float:
    """Seconds of an update, whose messages are sent while it computes."""
    return max(compute_seconds(costs, card, fraction), message_seconds(costs, card, fraction))
