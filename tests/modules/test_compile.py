"""`compile: true` compiles what the forward pass calls, with adapters or without."""

import lightning as L
import pytest
import torch

from oumi_pl.modules.sft import SFT
from tests.models.test_lora import pretrained
from tests.tiny import data, sgd, trainer


@pytest.fixture
def compilations(monkeypatch):
    """Every graph that is compiled, with the names of its inputs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend=backend))
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
