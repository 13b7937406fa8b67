"""What each micro-batch says its update comes to: the sums over the micro-batches of all ranks that are trained on."""

import random
from functools import partial

import lightning as L
import numpy as np
import pytest

from oumi_pl.data.collate import collate
from oumi_pl.data.loader import PlanLoader
from oumi_pl.data.plan import Layout, Plan, plan_epoch
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.row_stream import batch_of
from oumi_pl.data.stream_loader import StreamLoader
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.types import Update
from tests.data.corpora import corpus, pretrain_data
from tests.tiny import data, dpo, dpo_data, module, trainer
from tests.trees import random_example

LAYOUTS = [(1, 1, 1), (2, 3, 1), (3, 1, 2), (2, 2, 3), (16, 2, 2)]
"""Rows, micro-batches, ranks: the last update is ragged in most, and without rows on some ranks."""
LIMITS = [1.0, 1, 3, 5, 1000, 0.3, 0.5, 0.99]


def trained_on(loader, limit):
    """The batches that Lightning trains on, by its own rule."""
    batches = list(loader)
    return batches[: limit if isinstance(limit, int) else int(limit * len(batches))]


def wrong_totals(load, layout, limit):
    """Updates whose batches say something else than their sums; `load` makes the loader of a layout."""
    rows, micro_batches, ranks = layout
    shares = [trained_on(load(Layout(rows, micro_batches, ranks, rank)), limit) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    wrong = []
    for first in range(0, len(shares[0]), micro_batches):
        batches = [batch for share in shares for batch in share[first : first + micro_batches]]
        targets = sum(len(batch["targets"]) for batch in batches)
        examples = sum(len(batch["sample_ids"]) for batch in batches)
        if {batch["update"] for batch in batches} != {Update(targets, examples, micro_batches * ranks)}:
            wrong.append(first // micro_batches)
    return wrong


# ---- plans


def plan_loader(layout, limit, packing=False, depth=1):
    rng = random.Random(0)
    examples = [random_example(rng, depth) for _ in range(37)]
    lengths = np.array([len(example.input_ids) for example in examples])
    capacity = 2 * int(lengths.max()) if packing else None

    def plan(epoch):
        return plan_epoch(lengths, np.arange(37), layout.rows_per_update, seed=0, epoch=epoch, capacity=capacity)

    targets = np.array([example.target_tokens for example in examples])
    return PlanLoader(examples, targets, plan, layout, partial(collate, pad_id=0), limit=limit)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("limit", LIMITS)
def test_the_batches_of_a_plan_add_up_to_their_updates(layout, limit):
    for kwargs in ({}, {"packing": True}, {"depth": 3}, {"packing": True, "depth": 3}):
        assert wrong_totals(partial(plan_loader, limit=limit, **kwargs), layout, limit) == []


def test_totals_are_right_after_a_resume_and_in_the_next_epoch():
    def load(layout, epoch, update):
        loader = plan_loader(layout, limit=1.0)
        loader.load_state_dict(loader.state_dict() | {"epoch": epoch, "update": update})
        return loader

    for epoch, update in ((0, 2), (1, 0), (1, 3)):
        assert wrong_totals(partial(load, epoch=epoch, update=update), (2, 2, 2), 1.0) == []


def test_a_resumed_epoch_counts_the_limit_from_its_beginning():
    layout, limit = Layout(2, 2), 9
    whole = list(plan_loader(layout, limit))[:limit]
    resumed = plan_loader(layout, limit)
    resumed.load_state_dict(resumed.state_dict() | {"update": 3})
    rest = [batch["update"] for batch in resumed][: limit - 6]
    assert rest == [batch["update"] for batch in whole[6:]]
    assert rest[-1].rows == 2 < rest[0].rows


# ---- streams


def stream_loader(layout, limit, made, length_known):
    rows = made.rows_till_exhausted if length_known else None
    return StreamLoader(made.stream, layout, partial(batch_of, pad_id=0), rows=rows, limit=limit)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("isolate", [False, True])
def test_the_batches_of_a_stream_add_up_to_their_updates(tmp_path, layout, isolate):
    built = pretrain_data(corpus(tmp_path, 25), isolate=isolate, packing="best_fit" if isolate else "concat")
    for limit in LIMITS:
        assert wrong_totals(partial(stream_loader, limit=limit, made=built, length_known=True), layout, limit) == []
        if isinstance(limit, int) or limit == 1.0:  # of a stream of unknown length Lightning takes no share
            load = partial(stream_loader, limit=limit, made=built, length_known=False)
            assert wrong_totals(load, layout, limit) == []


def test_a_stream_that_ignores_the_limit_is_caught(tmp_path, monkeypatch):
    built = pretrain_data(corpus(tmp_path, 25))
    load = partial(stream_loader, limit=3, made=built, length_known=True)
    monkeypatch.setattr(Layout, "within", whole_updates)
    assert wrong_totals(load, (2, 2, 2), 3) == [1]


# ---- planted faults in plans


def whole_updates(self, limit, update, updates):
    """As if no limit cut an update short."""
    return self.micro_batches


def of_one_rank(self, update, layout, micro_batches):
    """Counts the examples of this rank alone."""
    rows = [row for cut in list(self.micro_batches(update, layout))[:micro_batches] for row in cut]
    return np.concatenate([np.empty(0, dtype=np.int64), *rows])


def of_a_full_update(self, update, layout, micro_batches):
    """Counts a short last update as if it were full."""
    return np.concatenate([original(self, update, layout, micro_batches), self.example_ids])[: self.rows_per_update]


original = Plan.examples_of


@pytest.mark.parametrize(
    ("owner", "name", "fault", "limit", "wrong"),
    [
        (Layout, "within", whole_updates, 7, [3]),
        (Layout, "within", whole_updates, 0.5, [2]),
        (Plan, "examples_of", of_one_rank, 1.0, [0, 1, 2, 3, 4]),
        (Plan, "examples_of", of_a_full_update, 1.0, [4]),
    ],
)
def test_totals_of_other_batches_are_caught(monkeypatch, owner, name, fault, limit, wrong):
    monkeypatch.setattr(owner, name, fault)
    assert wrong_totals(partial(plan_loader, limit=limit), (2, 2, 2), limit) == wrong


# ---- in a run


class Batches(L.Callback):
    """Collects the micro-batches of each update as they are trained on."""

    def __init__(self):
        self.updates = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.updates.setdefault(trainer.global_step, []).append(batch)


def runs(tmp_path):
    texts = {"tokenizer": ByteTokenizer(chat_template=False), "max_length": 32, "batch_size": 2, "seed": 0}
    yield module(), data(tmp_path, 13, batch_size=2)
    yield module(), data(tmp_path, 13, batch_size=1, packing=True, max_length=128)
    yield dpo(loss=None), dpo_data(tmp_path, 13, batch_size=2)
    yield module(), PretrainData(corpus(tmp_path, 6), **texts)
    yield module(), PretrainData(corpus(tmp_path, 6), streaming=True, **texts)


@pytest.mark.parametrize("limit", [None, "batches", "share"])
def test_what_a_run_trains_on_adds_up_to_its_updates(tmp_path, limit):
    for model, rows in runs(tmp_path):
        settings, limits = {"max_epochs": 2}, {None: 1.0, "batches": 5}
        if rows.streaming:  # the length of a pass is not known
            if limit == "share":
                continue
            settings = {"max_steps": 9}
        elif limit == "share":
            rows.micro_batches = 2
            rows.prepare_data()
            batches = len(rows.train_dataloader())
            limits["share"] = (batches - 2.5) / batches
        watch = Batches()
        settings |= {"accumulate_grad_batches": 2, "limit_train_batches": limits[limit]}
        trainer(**settings, callbacks=[watch]).fit(model, rows)
        assert len(watch.updates) > 3
        assert {len(batches) for batches in watch.updates.values()} == ({1, 2} if limit else {2})
        for batches in watch.updates.values():
            expected = Update(
                sum(len(batch["targets"]) for batch in batches), sum(len(batch["sample_ids"]) for batch in batches), 2
            )
            assert {batch["update"] for batch in batches} == {expected}
