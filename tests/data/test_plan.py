"""The plan: every example exactly once per epoch; updates do not depend on ranks and micro-batches."""

import numpy as np
import pytest

from oumi_pl.data.plan import Layout, plan_epoch, plan_in_order

LENGTHS = np.random.default_rng(0).integers(5, 200, size=101)
IDS = np.arange(101)


def examples(plan, layouts):
    """Example ids of each update, sorted, over all ranks and micro-batches."""
    return [
        sorted(int(i) for layout in layouts for rows in plan.micro_batches(update, layout) for row in rows for i in row)
        for update in range(len(plan))
    ]


def make(seed=0, epoch=0, rows=8, **kwargs):
    return plan_epoch(LENGTHS, IDS, rows, seed=seed, epoch=epoch, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"group_by_length": False}, {"capacity": 256}])
def test_every_example_exactly_once(kwargs):
    plan = make(**kwargs)
    assert sorted(np.concatenate([plan.row(i) for i in range(plan.rows)])) == list(IDS)
    seen = examples(plan, [Layout(8)])
    assert sorted(i for update in seen for i in update) == list(IDS)


@pytest.mark.parametrize("kwargs", [{}, {"capacity": 256}])
def test_the_updates_do_not_depend_on_ranks_and_micro_batches(kwargs):
    plan = make(**kwargs)
    expected = examples(plan, [Layout(8)])
    for batch_size, micro, ranks in [(1, 8, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)]:
        layouts = [Layout(batch_size, micro, ranks, rank) for rank in range(ranks)]
        assert {layout.rows_per_update for layout in layouts} == {8}
        assert examples(plan, layouts) == expected


def test_a_short_update_leaves_micro_batches_empty():
    plan = make(rows=40)  # 101 rows: 40, 40, 21
    cut = list(plan.micro_batches(2, Layout(8, 5)))
    assert [len(rows) for rows in cut] == [8, 8, 5, 0, 0]
    every_rank = [list(plan.micro_batches(2, Layout(4, 5, 2, rank))) for rank in range(2)]
    assert [[len(rows) for rows in rank] for rank in every_rank] == [[4, 4, 4, 0, 0], [4, 4, 1, 0, 0]]


def test_order_follows_seed_and_epoch():
    assert np.array_equal(make().example_ids, make().example_ids)
    assert not np.array_equal(make().example_ids, make(epoch=1).example_ids)
    assert not np.array_equal(make().example_ids, make(seed=1).example_ids)


def test_packs_differ_between_epochs_and_stay_within_capacity():
    first, second = (make(epoch=epoch, capacity=256) for epoch in range(2))
    as_sets = [{frozenset(plan.row(i).tolist()) for i in range(plan.rows)} for plan in (first, second)]
    assert as_sets[0] != as_sets[1]
    assert all(LENGTHS[first.row(i)].sum() <= 256 for i in range(first.rows))


def test_grouping_puts_similar_lengths_together():
    def spread(plan):
        return np.mean([np.ptp(LENGTHS[update]) for update in examples(plan, [Layout(8)])[:-1]])

    assert spread(make()) < spread(make(group_by_length=False)) / 3


def test_in_order_is_longest_first_and_complete():
    plan = plan_in_order(LENGTHS, 8)
    assert list(LENGTHS[plan.example_ids]) == sorted(LENGTHS, reverse=True)
    assert sorted(plan.example_ids) == list(IDS)
