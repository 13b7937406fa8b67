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


def message_seconds(costs: Costs, card: Card, fraction: float, *, waited_for: bool) -> float:
    """Seconds of the messages among ranks.

    Args:
        costs: Of an update on one rank.
        card: The card.
        fraction: The share of the card's peak that messages reach.
        waited_for: Whether to take those that the card waits for, or those that are sent while it computes.
    """
    between_nodes = min(card.link, NETWORK)  # what goes to another node leaves the card by its link
    total = sum(
        times * collective.sent / (card.link if collective.nodes == 1 else between_nodes)
        for collective, times in costs.collectives.items()
        if collective.is_waited_for == waited_for
    )
    return total / fraction


def seconds(costs: Costs, card: Card, fraction: float) -> float:
    """Seconds of an update. Weights and their gradients are sent while it computes, activations are waited for."""
    overlapped = message_seconds(costs, card, fraction, waited_for=False)
    waited = message_seconds(costs, card, fraction, waited_for=True)
    return max(compute_seconds(costs, card, fraction), overlapped) + waited
