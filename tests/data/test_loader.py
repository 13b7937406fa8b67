"""The loader's position: counted as batches are handed out; a loader resumed from it yields the remaining batches."""

import numpy as np
import pytest
import torch

from oumi_pl.data.loader import PlanLoader
from oumi_pl.data.plan import Layout, plan_epoch
from oumi_pl.errors import UserError
from oumi_pl.types import Example

LENGTHS = np.arange(3, 24)


def loader(workers=0, layout=None):
    layout = layout or Layout(2, 2)
    examples = [Example(np.full(n, n, dtype=np.int32), np.ones(n, dtype=bool)) for n in LENGTHS]

    def plan(epoch):
        return plan_epoch(LENGTHS, np.arange(len(LENGTHS)), layout.rows_per_update, seed=0, epoch=epoch)

    return PlanLoader(examples, LENGTHS, plan, layout, collate=ids_of, workers=workers)


def ids_of(rows):
    return {"sample_ids": [i for ids, _ in rows for i in ids]}


def sample_ids(batches):
    return [batch["sample_ids"] for batch in batches]


def test_the_length_is_that_of_a_whole_epoch_at_any_position():
    built = loader()
    assert len(built) == 12  # 21 rows in updates of 4: 6 updates of 2 micro-batches
    built.load_state_dict(built.state_dict() | {"update": 4})
    assert len(built) == 12
    assert len(list(built)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loaded_state_yields_the_remaining_batches(workers):
    whole = list(loader())
    first = loader(workers)
    iterator = iter(first)
    before = [next(iterator) for _ in range(6)]
    state = first.state_dict()
    assert (state["epoch"], state["update"]) == (0, 3), "prefetching must not count"
    second = loader(workers)
    second.load_state_dict(state)
    assert before + list(second) == whole


def test_each_epoch_has_its_order_and_set_epoch_keeps_a_loaded_position():
    built = loader()
    first = sample_ids(built)
    built.batch_sampler.sampler.set_epoch(1)
    second = sample_ids(built)
    assert first != second
    assert sorted(i for b in first for i in b) == sorted(i for b in second for i in b)
    resumed = loader()
    resumed.load_state_dict(built.state_dict() | {"epoch": 1, "update": 2})
    iterator = iter(resumed)  # Lightning asks for the iterator before it announces the epoch
    resumed.batch_sampler.sampler.set_epoch(1)
    assert sample_ids(iterator) == second[4:]


def test_loading_does_not_use_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(loader())
    assert torch.equal(torch.rand(1), expected)


def test_another_update_size_is_refused():
    with pytest.raises(UserError, match="made with 4 rows per update, this run has 8"):
        loader(layout=Layout(8)).load_state_dict(loader().state_dict())
    loader(layout=Layout(1, 4)).load_state_dict(loader().state_dict())
