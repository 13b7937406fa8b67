"""MuonAdamW against the two optimizers that it is made of."""

import copy
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from oumi_pl.errors import UserError
from oumi_pl.modules.sft import SFT
from oumi_pl.optim import parameter_groups
from oumi_pl.optim.muon import MuonAdamW
from tests.architectures import small
from tests.conftest import free_port
from tests.tiny import data, fit, weights


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


class Experts(nn.Module):
    """A stack of matrices as one parameter, or as many."""

    def __init__(self, stacked):
        super().__init__()
        torch.manual_seed(0)
        values = torch.randn(3, 8, 16)
        self.weights = nn.ParameterList(
            [nn.Parameter(values)] if stacked else [nn.Parameter(v.clone()) for v in values]
        )

    def forward(self, x):
        stack = self.weights[0] if len(self.weights) == 1 else torch.stack(list(self.weights))
        return torch.einsum("bi,eio->beo", x, stack).tanh().sum((0, 2)) @ torch.tensor([1.0, 2.0, -1.0])


def test_each_expert_is_a_matrix_of_its_own():
    results = []
    for stacked in (True, False):
        model = Experts(stacked)
        optimizer = MuonAdamW(parameter_groups(model.named_parameters()), lr=0.01, weight_decay=0.1)
        for step in range(4):
            if step == 2:  # from its state
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = MuonAdamW(parameter_groups(model.named_parameters()), lr=0.5)
                optimizer.load_state_dict(state)
            model.zero_grad()
            torch.manual_seed(step)
            model(torch.randn(5, 8)).backward()
            optimizer.step()
        results.append(torch.cat([w.detach().view(-1, 8, 16) for w in model.weights]))
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.stack(list(Experts(False).weights)))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe"])
def test_a_mixture_of_experts_trains(tmp_path, name):
    config = {k: v for k, v in small(name).items() if k != "vocab_size"}
    sft = SFT(config=config, optimizer=lambda params: MuonAdamW(params, lr=0.01))
    before = {}
    fit(sft, data(tmp_path, 8, batch_size=4), max_steps=2, callbacks=[Remember(before)])
    experts = [n for n, p in sft.causal_lm.hf.named_parameters() if p.ndim == 3]
    assert experts
    assert all(not torch.equal(weights(sft)[n], before[n]) for n in experts)


class Remember(L.Callback):
    def __init__(self, into):
        self.into = into

    def on_train_start(self, trainer, pl_module):
        self.into |= weights(pl_module)


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


WORKER = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
sys.path.insert(0, {root!r})
from oumi_pl.optim import muon
rank, port, fault = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://localhost:{{port}}", rank=rank, world_size=4)
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
if fault:  # products of shards are summed
    muon._orthogonal = muon._zeropower_via_newtonschulz

def trained(placements, shape):
    torch.manual_seed(0)
    sharded = (lambda x: x) if placements is None else (lambda x: distribute_tensor(x, mesh, placements))
    weight = torch.nn.Parameter(sharded(torch.randn(shape)))
    optimizer = muon.MuonAdamW([dict(params=[weight], name="matrices")], lr=0.1)
    for _ in range(3):
        weight.grad = sharded(torch.randn(*shape[:-1], 4) @ torch.randn(*shape[:-2], 4, shape[-1]))  # of low rank
        optimizer.step()
    return weight.detach() if placements is None else weight.detach().full_tensor()

layouts = [(Shard(0), Replicate()), (Shard(0), Shard(1)), (Shard(1), Shard(0)), (Replicate(), Shard(0))]
cases = [(shape, layout) for shape in ((64, 32), (32, 64)) for layout in layouts]
cases += [((4, 32, 16), layouts[0])] * (not fault)
distances = [float((trained(layout, shape) - trained(None, shape)).norm()) for shape, layout in cases]
assert not torch.isnan(torch.tensor(distances)).any()
assert (max(distances) > 1e-2) if fault else (max(distances) == 0), distances
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "products of shards"])
def test_sharded_matrices_are_updated_as_whole_ones(tmp_path, fault):
    script, port = tmp_path / "worker.py", free_port()
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2])))
    command = [[sys.executable, str(script), str(rank), port, fault] for rank in range(4)]
    ranks = [subprocess.Popen(call, stderr=subprocess.PIPE, text=True) for call in command]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), errors[0][-3000:]
