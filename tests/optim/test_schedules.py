"""Schedules against transformers' own, and parameter groups."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.errors import UserError
from oumi_pl.optim import Constant, Cosine, CosineRestarts, Linear, Schedule, WarmupStableDecay, parameter_groups
from tests.tiny import module, trainer

TOTAL, WARMUP = 40, 7


def theirs(name, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = getattr(transformers, name)(optimizer, num_warmup_steps=WARMUP, **kwargs)
    factors = []
    for _ in range(TOTAL):
        factors.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return factors


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (Constant(WARMUP), lambda: theirs("get_constant_schedule_with_warmup")),
        (Linear(WARMUP), lambda: theirs("get_linear_schedule_with_warmup", num_training_steps=TOTAL)),
        (Cosine(WARMUP), lambda: theirs("get_cosine_schedule_with_warmup", num_training_steps=TOTAL)),
        (
            Cosine(WARMUP, floor=0.1),
            lambda: theirs("get_cosine_with_min_lr_schedule_with_warmup", num_training_steps=TOTAL, min_lr_rate=0.1),
        ),
        (
            Cosine(WARMUP, cycles=1.5),
            lambda: theirs("get_cosine_schedule_with_warmup", num_training_steps=TOTAL, num_cycles=1.5),
        ),
        (
            Cosine(WARMUP, floor=0.2, cycles=1.0),
            lambda: theirs(
                "get_cosine_with_min_lr_schedule_with_warmup",
                num_training_steps=TOTAL,
                min_lr_rate=0.2,
                num_cycles=1.0,
            ),
        ),
        (
            CosineRestarts(WARMUP, cycles=3),
            lambda: theirs(
                "get_cosine_with_hard_restarts_schedule_with_warmup", num_training_steps=TOTAL, num_cycles=3
            ),
        ),
        (
            WarmupStableDecay(WARMUP, decay=10),
            lambda: theirs(
                "get_wsd_schedule",
                num_training_steps=TOTAL,
                num_decay_steps=10,
                decay_type="linear",
                warmup_type="linear",
            ),
        ),
    ],
    ids=["constant", "linear", "cosine", "cosine-floor", "cosine-cycles", "cosine-floor-cycles", "restarts", "wsd"],
)
def test_equals_transformers(ours, expected):
    assert [ours(step, TOTAL) for step in range(TOTAL)] == pytest.approx(expected(), abs=1e-12)


def test_shares_are_of_all_steps_and_rounded_up():
    assert Linear(0.03)(1, 100) == pytest.approx(1 / 3)
    assert Linear(0.101)(10, 100) == pytest.approx(10 / 11)
    assert WarmupStableDecay(0.1, decay=0.2)(80, 100) == 1.0
    assert WarmupStableDecay(0.1, decay=0.2)(90, 100) == pytest.approx(0.5)


def test_the_floor_is_reached_and_kept():
    for schedule in (Linear(2, floor=0.1), Cosine(2, floor=0.1), WarmupStableDecay(2, floor=0.1)):
        assert schedule(TOTAL, TOTAL) == pytest.approx(0.1)
        assert schedule(TOTAL + 5, TOTAL) == pytest.approx(0.1)


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="warmup"):
        Linear(-1)
    with pytest.raises(UserError, match="decay"):
        WarmupStableDecay(decay=0)
    with pytest.raises(UserError, match="cycles"):
        CosineRestarts(cycles=0)
    with pytest.raises(UserError, match=r"warmup is 1.5: a number of steps is whole"):
        Linear(1.5)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Linear(10), None),
        (Linear(100), "warmup takes 100 steps and the run has 100"),
        (WarmupStableDecay(10, decay=90), None),
        (WarmupStableDecay(10, decay=95), "10 steps of warm-up and 95 of decay don't fit into a run of 100: the decay"),
        (WarmupStableDecay(200, decay=5), "warmup takes 200 steps"),
    ],
)
def test_what_does_not_fit_into_the_run_is_reported(schedule, message):
    doubts = schedule.doubts(100)
    assert bool(doubts) == (message is not None)
    assert all(message in doubt for doubt in doubts)


class Halved(Schedule):
    """A schedule of one's own."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def factor(self, step, start, total):
        return self.number(0.5)


def optimized(schedule):
    sft = module(config={"vocab_size": 99}, schedule=schedule)
    sft.model, sft.trainer = sft.build(None), trainer(max_steps=5)
    return sft.configure_optimizers()["lr_scheduler"]["scheduler"].get_last_lr()


@pytest.mark.parametrize("number", [float, np.float32, torch.tensor, lambda x: torch.tensor([x], dtype=torch.bfloat16)])
def test_a_schedule_may_give_any_kind_of_number(number):
    (lr,) = set(optimized(Halved(number)))
    assert (lr, type(lr)) == (0.05, float)


@pytest.mark.parametrize("number", [lambda _: None, lambda _: "half", lambda x: torch.tensor([x, x])])
def test_a_schedule_that_gives_no_number_is_refused(number):
    with pytest.raises(UserError, match=r"model\.schedule: Halved gives .* instead of a number"):
        optimized(Halved(number))


def test_the_first_rank_alone_warns(monkeypatch):
    with pytest.warns(UserWarning, match="warmup takes 9 steps"):
        optimized(Linear(9))
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimized(Linear(9))


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    groups = {g["name"]: g for g in parameter_groups(model.named_parameters())}
    assert [p.shape for p in groups["matrices"]["params"]] == [(3, 4)]
    assert [p.shape for p in groups["no_decay"]["params"]] == [(3,), (3,), (3,)]
    assert groups["no_decay"]["weight_decay"] == 0.0
    optimizer = torch.optim.AdamW(list(groups.values()), lr=1.0, weight_decay=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
