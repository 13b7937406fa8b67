"""Policies of activation checkpointing change memory and time, and no gradient."""

import gc
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.models import recomputation
from oumi_pl.models.build import build_model
from oumi_pl.models.lm import LM
from oumi_pl.models.recomputation import EveryNth, Full, Offload, OnHost, Recomputation, Selective
from tests.models.test_build import count_calls
from tests.tiny import LLAMA, module
from tests.trees import batch_of_rows

LAYERS, ROWS = 4, torch.arange(256).view(2, 128) % 60
MODELS = {
    "llama": LLAMA | {"num_hidden_layers": LAYERS, "vocab_size": 64},
    "gpt2 with dropout": {"model_type": "gpt2", "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 64}
    | {"n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
    | dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.2),
}
LORA = {"r": 4, "lora_dropout": 0.3}
POLICIES = {
    # how many of the layers run again in the backward pass
    "none": (False, 0),
    "full": (True, LAYERS),
    "every second": (EveryNth(2), 2),
    "every third": (EveryNth(3), 2),
    "selective": (Selective(), LAYERS),
    "offload": (Offload(), LAYERS),
    "offload all": (Offload(recompute=False), 0),
}


def run(model, policy, **settings):
    """Loss, gradients, runs of layers, and bytes that are held between the forward and the backward pass."""
    torch.manual_seed(0)
    hf = build_model(None, config=MODELS[model], gradient_checkpointing=policy, **settings)
    calls = count_calls(hf)
    torch.manual_seed(1)
    gc.collect()  # what an earlier profile counted would be subtracted from this one when it is freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = LM(hf)(batch_of_rows(ROWS, ROWS), lambda states: states.loss_sum(CrossEntropy())).loss_sum
    events = profiler.profiler.kineto_results.events()
    held = sum(event.nbytes() for event in events if event.name() == "[memory]")
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in hf.parameters() if p.requires_grad])
    return loss, gradients, len(calls), held


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "lora"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_without_and_the_stated_layers_run_again(model, lora):
    held = {}
    loss, gradients, *_ = run(model, False, lora=lora)
    for name, (policy, recomputed) in POLICIES.items():
        again, of_policy, calls, held[name] = run(model, policy, lora=lora)
        assert calls == LAYERS + recomputed, name
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(of_policy, gradients, rtol=1e-6, atol=1e-7)
    assert held["full"] < held["selective"] < held["none"]
    assert held["full"] < held["every second"] < held["none"]
    assert held["every second"] - held["full"] == pytest.approx((held["none"] - held["full"]) / 2, rel=0.1)


def test_layers_that_drop_out_other_values_again_would_be_caught(monkeypatch):
    """Planted fault."""
    model = "gpt2 with dropout"
    _, gradients, *_ = run(model, False)
    monkeypatch.setattr(recomputation, "checkpoint", partial(recomputation.checkpoint, preserve_rng_state=False))
    for policy in (Full(), EveryNth(2), Selective(), Offload()):
        _, of_policy, *_ = run(model, policy)
        assert (of_policy - gradients).norm() > 1e-2 * gradients.norm(), policy


def test_attention_that_drops_out_is_recomputed():
    """Else what follows it would draw other numbers."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    kept, recomputed = recomputation.CheckpointPolicy.MUST_SAVE, recomputation.CheckpointPolicy.PREFER_RECOMPUTE
    x = torch.zeros(1, 1, 1, 1)
    assert recomputation._products_and_attention(None, attention, x, x, x) is kept
    assert recomputation._products_and_attention(None, attention, x, x, x, 0.0, True) is kept
    assert recomputation._products_and_attention(None, attention, x, x, x, 0.1) is recomputed
    assert recomputation._products_and_attention(None, attention, x, x, x, dropout_p=0.1) is recomputed
    assert recomputation._products_and_attention(None, torch.ops.aten.bmm.default, x, x) is recomputed


@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_offloaded_are_the_activations_and_no_weights(monkeypatch, recompute):
    moved = []

    class Elsewhere(OnHost):
        def __init__(self, tensor):
            moved.append(tensor.shape)
            self.copy = tensor.clone()

        def to_device(self):
            return self.copy.clone()

    _, gradients, *_ = run("llama", False)
    monkeypatch.setattr(recomputation, "to_host", Elsewhere)
    _, of_policy, *_ = run("llama", Offload(recompute))
    torch.testing.assert_close(of_policy, gradients, rtol=1e-6, atol=1e-7)
    hidden = (*ROWS.shape, 32)
    assert moved == [hidden] * LAYERS if recompute else len(moved) > 10 * LAYERS
    assert not {(32, 32), (64, 32), (32, 64), (16, 32), (32, 16), (32,)} & set(moved)


def test_a_policy_of_ones_own_chooses_layers():
    class LastOne(Recomputation):
        def function_of(self, layer, index):
            return Full().function_of(layer, index) if index == LAYERS - 1 else None

    assert run("llama", LastOne())[2] == LAYERS + 1


def test_a_wrong_number_of_layers_is_refused():
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing\.n is 0, but has to be at least 1"):
        module(gradient_checkpointing=EveryNth(0)).build(None)
