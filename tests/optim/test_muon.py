"""MuonAdamW against the two optimizers that it is made of."""

import copy

import pytest
import torch
from torch import nn

from oumi_pl.errors import UserError
from oumi_pl.optim import parameter_groups
from oumi_pl.optim.muon import MuonAdamW


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 10))


def groups(model):
    return parameter_groups(model.named_parameters(), [model[0].weight, model[3].weight])


def train(model, optimizers, schedules=(), steps=range(6)):
    for step in steps:
        torch.manual_seed(100 + step)
        x = torch.randint(0, 10, (4, 5))
        model.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        for part in (*optimizers, *schedules):
            part.step()
    return list(model.parameters())


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def test_equals_muon_and_adamw_side_by_side():
    ours, theirs = network(), network()
    optimizer = MuonAdamW(groups(ours), lr=0.01, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9))
    matrices, *others = groups(theirs)
    scaled = {"momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    apart = [
        torch.optim.Muon([matrices], lr=0.01, weight_decay=0.1, **scaled),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)),
    ]
    got = train(ours, [optimizer], [halving(optimizer)])
    expected = train(theirs, apart, [halving(optimizer) for optimizer in apart])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "embeddings", "no_decay"]
    assert optimizer.param_groups[2]["weight_decay"] == 0


def test_goes_on_from_its_state():
    whole, first = network(), network()
    expected = train(whole, [MuonAdamW(groups(whole), lr=0.01)])
    optimizer = MuonAdamW(groups(first), lr=0.01)
    train(first, [optimizer], steps=range(3))
    state = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second = network()
    second.load_state_dict(state[0])
    resumed = MuonAdamW(groups(second), lr=0.5)
    resumed.load_state_dict(state[1])
    assert all(torch.equal(a, b) for a, b in zip(train(second, [resumed], steps=range(3, 6)), expected, strict=True))


def test_the_closure_is_called_once_with_gradients():
    model, calls = network(), []
    optimizer = MuonAdamW(groups(model), lr=0.01)

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = model(torch.arange(4)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) > 0
    assert calls == [True]


def test_without_matrices_there_is_nothing_for_muon():
    with pytest.raises(UserError, match="needs hidden matrices"):
        MuonAdamW(parameter_groups([("bias", nn.Parameter(torch.zeros(3)))]))
