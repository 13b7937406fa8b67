"""`compile: true` compiles what the forward pass calls, with adapters or without."""

import lightning as L
import pytest
import torch
from torch._dynamo.utils import counters

from oumi_pl.data.dpo import DPOData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.recomputation import EveryNth, Offload, Selective
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.sft import SFT
from tests.models.test_lora import pretrained
from tests.tiny import LLAMA, conversations, data, pairs, sgd, trainer, write_jsonl


@pytest.fixture
def compilations(monkeypatch):
    """Every graph that is compiled, with the names of its inputs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: real(self, backend=backend, **settings))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize(("lora", "products"), [(None, 7), ({"r": 2, "target_modules": ["q_proj"]}, 9)])
def test_the_layers_are_compiled(tmp_path, compilations, lora, products):
    """At least the matrix products of a layer, in one graph or several."""
    base = pretrained(tmp_path / "base")
    weights, count = [], 0
    for compiled in (True, False):
        sft = SFT(base, lora=lora, optimizer=sgd, compile=compiled)
        L.seed_everything(1)
        trainer(max_steps=1).fit(sft, data(tmp_path, 4, tokenizer=None, batch_size=4))
        weights.append([p.detach() for p in sft.parameters() if p.requires_grad])
        if compiled:
            nodes = [n for g in compilations for n in g.graph.nodes if "linear" in str(n.target)]
            assert len(nodes) >= products, "the layers were not compiled"
        else:
            assert len(compilations) == count
        count = len(compilations)
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Compilations(L.Callback):
    """Counts what is compiled in each epoch, and notes the losses."""

    def __init__(self):
        self.losses, self.of_epochs = [], []

    def on_train_batch_end(self, trainer, *_):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_epoch_start(self, *_):
        self.before = counters["frames"]["total"]

    def on_train_epoch_end(self, *_):
        self.of_epochs.append(counters["frames"]["total"] - self.before)


def three_epochs(folder, kind, *, compiled):
    """Trains for three epochs, whose batches hold the rows in other orders, each with a validation."""
    settings = {"config": LLAMA | {"num_hidden_layers": 3}, "optimizer": sgd, "compile": compiled}
    loader = {"batch_size": 2, "seed": 0, "max_length": 200, "tokenizer": ByteTokenizer()}
    if kind == "dpo":
        rows, held_out = (write_jsonl(folder / f"pairs-{n}.jsonl", pairs(n)) for n in (13, 3))
        module, loaded = DPO(**settings), DPOData(rows, validation=held_out, **loader)
    else:
        held_out = write_jsonl(folder / "held-out.jsonl", conversations(3, seed=5))
        module = SFT(**settings, attn="sdpa" if kind == "padded" else None)
        # of so different lengths that the number of documents in a row varies
        rows = write_jsonl(folder / "rows.jsonl", conversations(6) + conversations(9, seed=1, longest=2))
        loaded = SFTData(rows, validation=held_out, packing=kind == "packed", **loader)
    counted = Compilations()
    L.seed_everything(0)
    trainer(max_steps=-1, max_epochs=3, callbacks=[counted]).fit(module, loaded)
    return counted


@pytest.mark.parametrize(
    "kind", ["packed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("padded", "dpo"))]
)
def test_nothing_is_compiled_again_after_the_first_epoch(tmp_path, compilations, kind):
    first, *later = three_epochs(tmp_path, kind, compiled=True).of_epochs
    assert first > 0
    assert later == [0, 0]


@pytest.mark.slow
def test_layers_that_are_compiled_for_fixed_lengths_are_compiled_again(tmp_path, compilations, monkeypatch):
    """Planted fault."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compile_module(self, dynamic=False))
    with torch._dynamo.config.patch(recompile_limit=64):
        assert three_epochs(tmp_path, "packed", compiled=True).of_epochs[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "padded", "dpo"])
def test_inductor_gives_the_losses_of_eager_mode_and_compiles_nothing_again(tmp_path, kind):
    torch._dynamo.reset()
    compiled, eager = (three_epochs(tmp_path, kind, compiled=value) for value in (True, False))
    assert len(eager.losses) >= 6
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert compiled.of_epochs[0] > 0
    assert compiled.of_epochs[1:] == eager.of_epochs[1:] == [0, 0]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("policy", [True, EveryNth(2), Offload()])
def test_a_recomputed_layer_is_compiled_as_well(tmp_path, compilations, policy):
    weights = []
    for compiled in (True, False):
        sft = SFT(config=LLAMA, optimizer=sgd, compile=compiled, gradient_checkpointing=policy)
        L.seed_everything(1)
        trainer(max_steps=2).fit(sft, data(tmp_path, 8, batch_size=4))
        weights.append([p.detach() for p in sft.parameters()])
    assert len([n for g in compilations for n in g.graph.nodes if "linear" in str(n.target)]) >= 7
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_policy_for_single_operations_is_refused():
    """Compiled code reuses the memory of its products."""
    with pytest.raises(UserError, match=r"Selective can't be had with model\.compile"):
        SFT(config=LLAMA, compile=True, gradient_checkpointing=Selective())
