"""How long an update takes on a card."""

import pytest
import torch

from oumi_pl.errors import UserError
from oumi_pl.planning.cards import CARDS, NETWORK, card_of
from oumi_pl.planning.times import compute_seconds, message_seconds, seconds
from oumi_pl.planning.tracker import Collective, Costs, Operation

H100 = CARDS["h100"]


def costs(*operations, messages=()):
    result = Costs()
    result.operations.update(operations)
    result.collectives.update(messages)
    return result


def test_an_operation_is_limited_by_products_or_by_memory():
    products = Operation(10**15, torch.bfloat16, 10**6)
    copy = Operation(0, torch.bfloat16, 10**12)
    assert compute_seconds(costs(products), H100, 1.0) == pytest.approx(1e15 / 989e12)
    assert compute_seconds(costs(copy), H100, 1.0) == pytest.approx(1e12 / 3.35e12)
    assert compute_seconds(costs(products, copy), H100, 0.5) == pytest.approx(2 * (1e15 / 989e12 + 1e12 / 3.35e12))


def test_float32_has_a_peak_of_its_own():
    assert compute_seconds(costs(Operation(10**15, torch.float32, 0)), H100, 1.0) == pytest.approx(1e15 / 67e12)


def message_time(message, card=H100):
    return message_seconds(costs(messages=[message]), card, 1.0, waited_for=message.is_waited_for)


def test_ranks_of_other_nodes_are_reached_over_the_network():
    near, far = Collective("all_gather", 10**9, 8), Collective("all_gather", 10**9, 16, nodes=2)
    assert message_time(near) == pytest.approx(1e9 * 7 / 8 / H100.link)
    assert message_time(far) == pytest.approx(1e9 * 15 / 16 / NETWORK)
    assert Collective("all_reduce", 10**9, 8).sent == 2 * near.sent
    replicas = Collective("all_reduce", 10**9, 2, nodes=2)  # a rank of each node
    assert message_time(replicas) == pytest.approx(1e9 / NETWORK)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_other_nodes_are_never_faster_than_the_own_one(card):
    near, far = (Collective("all_gather", 10**9, 8, nodes=nodes) for nodes in (1, 2))
    assert message_time(far, card) >= message_time(near, card)


def test_messages_are_sent_while_the_card_computes():
    both = costs(Operation(10**15, torch.bfloat16, 0), messages=[Collective("all_gather", 10**9, 8)])
    assert seconds(both, H100, 0.5) == compute_seconds(both, H100, 0.5)


def test_messages_within_layers_are_waited_for():
    operation, activations = (
        Operation(10**15, torch.bfloat16, 0),
        Collective("all_reduce", 10**9, 8, is_waited_for=True),
    )
    weights = Collective("all_gather", 10**9, 8)
    waited = 2 * 2e9 * 7 / 8 / H100.link
    alone = seconds(costs(operation), H100, 0.5)
    assert seconds(costs(operation, messages=[activations, weights]), H100, 0.5) == pytest.approx(alone + waited)
    assert seconds(costs(messages=[activations, weights]), H100, 0.5) == pytest.approx(1.5 * waited)


def test_every_card_has_a_source():
    assert all(card.source and card.memory and card.single <= card.half for card in CARDS.values())


def test_an_unknown_card_is_refused():
    with pytest.raises(UserError, match="--card: unknown card 'h10'; did you mean 'h100'"):
        card_of("h10")
