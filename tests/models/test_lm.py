"""The wrapper's losses and log-probabilities are those of transformers, however an architecture makes its logits."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from oumi_pl import attention
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.models.lm import LM, States, documents, forest, padded
from oumi_pl.types import IGNORE_INDEX, Example
from tests.trees import batch_of

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ROUTER = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES = {
    "llama": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "gpt2": GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gemma2": SIZES | {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4},
    "cohere": SIZES | {"logit_scale": 0.3},
    "granite": SIZES | {"logits_scaling": 8.0},
    "mixtral": SIZES | ROUTER | {"num_local_experts": 4},
    "qwen3_moe": SIZES | ROUTER | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
}
LENGTHS = [9, 5, 7]


def build(name, attn=None, layout=padded, **values):
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **ARCHITECTURES[name] | values)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
    for p in hf.parameters():  # logits of a fresh model are too flat for scales and caps to matter
        p.data.mul_(3)
    return LM(hf.train(), layout)


def texts(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator) for length in LENGTHS]


def of_texts(texts):
    """A batch of documents; all tokens but the first of each carry loss."""
    return batch_of(*(Example(ids.numpy(), np.arange(len(ids)) > 0) for ids in texts))


def cross_entropy(states):
    return states.loss_sum(CrossEntropy())


def loss_of(model, batch):
    out = model(batch, cross_entropy)
    assert out.target_tokens == len(batch["targets"])
    return float((out.loss_sum / out.target_tokens).detach())


def transformers_loss(model, texts):
    """Transformers pads, and shifts its labels itself."""

    def padded(rows, value):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids, labels, mask = padded(texts, 0), padded(texts, IGNORE_INDEX), padded([torch.ones_like(t) for t in texts], 0)
    return float(model.hf(input_ids=ids, attention_mask=mask, labels=labels).loss.detach())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_that_of_transformers(name):
    model, rows = build(name), texts()
    assert loss_of(model, of_texts(rows)) == pytest.approx(transformers_loss(model, rows), rel=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logps_add_up_to_the_loss_of_transformers(name):
    """In evaluation, where no router loss is added."""
    model, rows = build(name), texts()
    model.eval()
    logps = model(of_texts(rows)).detach()
    assert (logps.shape, logps.dtype) == ((sum(LENGTHS) - len(LENGTHS),), torch.float32)
    expected = transformers_loss(build(name, output_router_logits=False), rows)
    assert -float(logps.mean()) == pytest.approx(expected, rel=1e-5)


def test_labels_that_are_shifted_twice_are_caught():
    model, rows = build("llama"), texts()
    batch = of_texts(rows)
    shifted_twice = batch | {"predictors": (batch["predictors"] - 1).clamp(min=0)}
    assert loss_of(model, shifted_twice) != pytest.approx(transformers_loss(model, rows), rel=1e-3)


def with_targets_of(batch, chosen):
    """The same batch, where only the targets of one document carry loss."""
    mine = batch["target_segments"] == chosen
    return batch | {name: batch[name][mine] for name in ("targets", "predictors", "target_segments")}


@pytest.mark.parametrize(
    ("name", "attn"),
    [*((name, attention.NAME) for name in ("llama", "qwen3", "gpt2", "cohere", "granite")), ("gemma2", "eager")],
)
@pytest.mark.parametrize("layout", [padded, documents, forest])
def test_each_document_has_the_same_loss_alone_and_in_every_layout(name, attn, layout):
    model, rows = build(name, attn, layout), texts()
    for i, ids in enumerate(rows):
        alone = model.hf(input_ids=ids[None], labels=ids[None]).loss.item()
        assert loss_of(model, with_targets_of(of_texts(rows), i)) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_router_loss_is_added_in_training_only(name):
    """With it, the loss is that of transformers, packed or padded; in evaluation it is the likelihood of the tokens."""
    model, rows = build(name, attention.NAME), texts()
    without = build(name, attention.NAME, output_router_logits=False)
    batch = of_texts(rows)
    training, likelihood = loss_of(model, batch), loss_of(without, batch)
    assert training > likelihood + 0.1
    assert training == pytest.approx(transformers_loss(model, rows), rel=1e-5)
    assert loss_of(build(name, attention.NAME, forest), batch) == pytest.approx(training, rel=1e-5)
    model.eval()
    assert loss_of(model, batch) == pytest.approx(likelihood, rel=1e-6)


def test_the_router_loss_is_the_same_with_gradient_checkpointing():
    model, again = build("qwen3_moe"), build("qwen3_moe")
    again.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for m in (model, again):
        m(of_texts(texts()), cross_entropy).loss_sum.backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6, msg=name)


# ---- what is computed from the hidden states


def test_what_is_computed_runs_inside_forward_and_gets_the_batch():
    """DDP and FSDP2 see only what happens between the hooks of the wrapper's `forward`."""
    model, batch, inside = build("llama"), of_texts(texts()), []
    model.register_forward_pre_hook(lambda *_: inside.append("begin"))
    model.register_forward_hook(lambda *_: inside.append("end"))

    def compute(states):
        assert isinstance(states, States)
        assert states.batch is batch
        inside.append("compute")
        return states.logps(), states.loss_sum(CrossEntropy()).loss_sum, states.router_loss

    logps, loss_sum, router_loss = model(batch, compute)
    assert inside == ["begin", "compute", "end"]
    assert float(loss_sum.detach()) == pytest.approx(-float(logps.detach().sum()), rel=1e-6)
    assert router_loss is None


def test_several_things_computed_at_once_have_the_gradient_of_their_sum():
    model, batch = build("llama"), of_texts(texts())

    def gradient(compute):
        model.zero_grad()
        model(batch, compute).backward()
        return [p.grad.clone() for p in model.parameters()]

    both = gradient(lambda states: states.logps().sum() + 3 * states.loss_sum(CrossEntropy()).loss_sum)
    losses = gradient(lambda states: 2 * states.loss_sum(CrossEntropy()).loss_sum)
    for ours, theirs in zip(both, losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- architectures whose logits are not known


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_logits_pass_the_check(name):
    build(name).refuse_unknown_logits()


class Shifted(LlamaForCausalLM):
    """An architecture that does something new to its logits."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.linspace(0, 0.1, out.logits.shape[-1])
        return out


def test_unknown_logits_are_refused():
    strange = LM(Shifted(AutoConfig.for_model("llama", **SIZES)))
    with pytest.raises(UserError, match="Shifted computes its logits in a way that is not supported"):
        strange.refuse_unknown_logits()


def test_the_check_leaves_generators_and_training_modes_as_they_were():
    model = build("gpt2", resid_pdrop=0.1)
    model.hf.transformer.h[0].eval()  # part of a model may be in evaluation mode for good
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model.refuse_unknown_logits()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)

    def drawing(*_):
        torch.rand(1)
        raise RuntimeError

    model.hf.transformer.register_forward_hook(drawing)
    with pytest.raises(RuntimeError):
        model.refuse_unknown_logits()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
