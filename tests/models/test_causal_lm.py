"""The loss of the wrapper is transformers' own, for every way in which architectures make logits."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from oumi_pl import attention
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.models.causal_lm import CausalLM
from oumi_pl.types import IGNORE_INDEX

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


def build(name, attn=None, **values):
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **ARCHITECTURES[name] | values)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
    for p in hf.parameters():  # logits of a fresh model are too flat for scales and caps to matter
        p.data.mul_(3)
    return CausalLM(hf.train())


def documents(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator) for length in LENGTHS]


def shifted(ids):
    return torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])])


def padded(documents, labels=shifted):
    """A batch as the collator makes it."""

    def pad(rows, value):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return {
        "input_ids": pad(documents, 0),
        "labels": pad([labels(ids) for ids in documents], IGNORE_INDEX),
        "attention_mask": pad([torch.ones_like(ids) for ids in documents], 0),
        "position_ids": torch.arange(max(LENGTHS)).expand(len(documents), -1),
    }


def packed(documents):
    return {
        "input_ids": torch.cat(documents)[None],
        "labels": torch.cat([shifted(ids) for ids in documents])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in documents])[None],
        "document_lengths": [len(ids) for ids in documents],
    }


def loss_of(model, batch):
    out = model(batch, CrossEntropy())
    assert out.target_tokens == (batch["labels"] != IGNORE_INDEX).sum()
    return float((out.loss_sum / out.target_tokens).detach())


def transformers_loss(model, batch, documents):
    """Transformers shifts its labels itself."""
    labels = nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=IGNORE_INDEX)
    mask = batch["attention_mask"]
    return float(model.hf(input_ids=batch["input_ids"], attention_mask=mask, labels=labels).loss.detach())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_that_of_transformers(name):
    model, rows = build(name), documents()
    batch = padded(rows)
    assert loss_of(model, batch) == pytest.approx(transformers_loss(model, batch, rows), rel=1e-5)


def test_labels_shifted_twice_would_be_caught():
    model, rows = build("llama"), documents()
    batch = padded(rows, labels=lambda ids: shifted(shifted(ids)))
    assert loss_of(model, batch) != pytest.approx(transformers_loss(model, batch, rows), rel=1e-3)


def with_labels_of(batch, chosen):
    """Only the targets of one document carry loss."""
    labels = batch["labels"].clone()
    if "document_lengths" in batch:
        start = sum(LENGTHS[:chosen])
        labels[:, :start] = labels[:, start + LENGTHS[chosen] :] = IGNORE_INDEX
    else:
        labels[[row for row in range(len(labels)) if row != chosen]] = IGNORE_INDEX
    return batch | {"labels": labels}


@pytest.mark.parametrize(
    ("name", "attn"),
    [*((name, attention.NAME) for name in ("llama", "qwen3", "gpt2", "cohere", "granite")), ("gemma2", "eager")],
)
def test_each_document_has_the_same_loss_alone_padded_and_packed(name, attn):
    model, rows = build(name, attn), documents()
    for i, ids in enumerate(rows):
        alone = model.hf(input_ids=ids[None], labels=ids[None]).loss.item()
        assert loss_of(model, with_labels_of(padded(rows), i)) == pytest.approx(alone, rel=1e-5)
        assert loss_of(model, with_labels_of(packed(rows), i)) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_router_loss_is_added_in_training_alone(name):
    """With it, transformers' loss; packed as padded; in evaluation, the likelihood of the tokens and nothing else."""
    model, rows = build(name, attention.NAME), documents()
    without = build(name, attention.NAME, output_router_logits=False)
    batch = padded(rows)
    training, likelihood = loss_of(model, batch), loss_of(without, batch)
    assert training > likelihood + 0.1
    assert loss_of(model, packed(rows)) == pytest.approx(training, rel=1e-5)
    model.eval()
    assert loss_of(model, batch) == pytest.approx(likelihood, rel=1e-6)


def test_the_router_loss_survives_gradient_checkpointing():
    model, again = build("qwen3_moe"), build("qwen3_moe")
    again.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for m in (model, again):
        m(padded(documents()), CrossEntropy()).loss_sum.backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_logits_pass(name):
    build(name).refuse_unknown_logits()


class Shifted(LlamaForCausalLM):
    """An architecture that does something new to its logits."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.linspace(0, 0.1, out.logits.shape[-1])
        return out


def test_unknown_logits_are_refused():
    strange = CausalLM(Shifted(AutoConfig.for_model("llama", **SIZES)))
    with pytest.raises(UserError, match="Shifted computes its logits in a way that is not known"):
        strange.refuse_unknown_logits()


def test_probing_leaves_generators_and_training_modes_as_they_were():
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
