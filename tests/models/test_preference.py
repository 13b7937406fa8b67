"""Pairs in three layouts against each response alone, with transformers' own model and the full logits."""

import pytest
import torch
from torch import nn

from oumi_pl.attention import NAME
from oumi_pl.data.collate import flatten_pairs
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.preference import PreferenceLM, documents, padded, shared
from oumi_pl.modules.dpo import DPO
from oumi_pl.types import PreferenceExample
from tests.attention.test_documents import RECURRENT, VOCAB, assert_close, make, registered
from tests.tiny import LLAMA, dpo, dpo_data, fit, sgd

__all__ = ["registered"]  # the fixture

LENGTHS = [(5, 4, 7), (1, 1, 3), (9, 6, 1), (1, 1, 1), (3, 2, 2)]  # prompt, chosen, rejected
LAYOUTS = {"shared": (shared, NAME), "documents": (documents, NAME), "padded": (padded, None)}
MODELS = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "mistral": {},  # a window of 4, less than most sequences
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
}


def pairs():
    """Ragged pairs. Some response tokens carry no loss, but the first of each response always does."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for lengths in LENGTHS:
        prompt, chosen, _ = lengths
        ids = torch.randint(3, VOCAB, (sum(lengths),), generator=generator)
        mask = torch.rand(sum(lengths), generator=generator) < 0.7
        mask[:prompt] = False
        mask[[prompt, prompt + chosen]] = True
        made.append(PreferenceExample(ids.numpy(), mask.numpy(), chosen_start=prompt, rejected_start=prompt + chosen))
    return made


def batch_of(examples):
    return flatten_pairs([([i], [example]) for i, example in enumerate(examples)], pad_id=0)


def sequences(example):
    """Both responses with their prompt: ids `[1, length]`, and which tokens carry loss."""
    ids, mask = torch.tensor(example.input_ids), torch.tensor(example.loss_mask)
    prompt, chosen, _ = example.lengths
    for response in (slice(prompt, prompt + chosen), slice(prompt + chosen, None)):
        yield torch.cat([ids[:prompt], ids[response]])[None], torch.cat([mask[:prompt], mask[response]])


def one_by_one(model):
    """Log-probabilities of all targets, each response run alone through the whole head."""
    logps = []
    for example in pairs():
        for ids, mask in sequences(example):
            logits = model(ids, use_cache=False).logits[0]
            predicted = nn.functional.log_softmax(logits[:-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
            logps.append(predicted[mask[1:]])
    return torch.cat(logps)


def projected(logps):
    """A scalar that weighs every number differently, so that no error cancels."""
    return (logps * torch.linspace(-1, 2, len(logps))).sum()


def gradients(model, value):
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_each_response_alone(layout, name):
    laid, attention = LAYOUTS[layout]
    model, reference = (make(name, implementation, **MODELS[name]) for implementation in (attention, "eager"))
    ours = PreferenceLM(model.train(), laid)(batch_of(pairs())).logps
    theirs = one_by_one(reference)
    assert ours.dtype == torch.float32
    assert_close([ours], [theirs])
    assert_close(gradients(model, projected(ours)), gradients(reference, projected(theirs)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_router_loss_is_that_of_the_tokens_that_were_run(layout):
    """Where the prompt is shared its tokens are routed once, else twice; padding is not counted."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    laid, attention = LAYOUTS[layout]
    model, reference = (make("mixtral", attn, **MODELS["mixtral"]) for attn in (attention, "eager"))
    routed = []
    for example in pairs():
        for response, (ids, _) in enumerate(sequences(example)):
            logits = reference(ids, use_cache=False, output_router_logits=True).router_logits
            skipped = example.lengths[0] if laid is shared and response == 1 else 0
            routed.append([layer[skipped:] for layer in logits])
    layers = tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
    expected = 0.5 * load_balancing_loss_func(layers, 4, reference.config.num_experts_per_tok)
    policy = PreferenceLM(model.train(), laid)
    found = policy(batch_of(pairs())).router_loss
    assert_close([found], [expected])
    router = [name for name, _ in model.named_parameters() if "gate.weight" in name]
    assert_close(
        [g for g, (name, _) in zip(gradients(model, found), model.named_parameters(), strict=True) if name in router],
        [
            g
            for g, (name, _) in zip(gradients(reference, expected), reference.named_parameters(), strict=True)
            if name in router
        ],
    )
    assert policy.eval()(batch_of(pairs())).router_loss is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_rows_gives_every_parameter_a_gradient_of_zero(layout, name):
    laid, attention = LAYOUTS[layout]
    model = make(name, attention, **MODELS[name])
    out = PreferenceLM(model.train(), laid)(flatten_pairs([], pad_id=0))
    assert out.logps.shape == (0,)
    router_loss = 0 if out.router_loss is None else out.router_loss
    (out.logps.sum() + 0 * router_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.any()] == []


def test_the_layout_says_what_is_computed():
    """Two pairs written out: ids, positions, and where each target is predicted."""
    examples = [
        PreferenceExample(torch.tensor([10, 11, 12, 13, 14]).numpy(), mask([2, 4]), chosen_start=2, rejected_start=4),
        PreferenceExample(torch.tensor([20, 21, 22, 23]).numpy(), mask([1, 2, 3], 4), chosen_start=1, rejected_start=2),
    ]
    batch = batch_of(examples)
    inputs, predictors = shared(batch)
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21, 22, 23]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert predictors.tolist() == [1, 1, 5, 5, 7]
    inputs, predictors = documents(batch)
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 13, 10, 11, 14, 20, 21, 20, 22, 23]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2]]
    assert inputs["document_lengths"] == [4, 3, 2, 3]
    assert predictors.tolist() == [1, 5, 7, 9, 10]
    inputs, predictors = padded(batch)
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 13], [10, 11, 14, 0], [20, 21, 0, 0], [20, 22, 23, 0]]
    assert inputs["attention_mask"].sum(1).tolist() == [4, 3, 2, 3]
    assert predictors.tolist() == [1, 5, 8, 12, 13]


def mask(targets, length=5):
    made = torch.zeros(length, dtype=torch.bool)
    made[targets] = True
    return made.numpy()


# ---- which layout


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer().build()


def test_prompts_are_shared_where_the_model_can(tokenizer):
    policy = dpo().build(tokenizer)
    assert (policy.layout, policy.layout_reason) == (shared, "")
    assert policy.base.config._attn_implementation == NAME


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_documents_where_the_attention_is_not_ours(tokenizer, attn):
    policy = dpo(attn=attn).build(tokenizer)
    assert policy.layout is documents
    assert "mixes responses" in policy.layout_reason
    assert policy.base.config._attn_implementation == attn


def test_documents_where_sharing_is_switched_off(tokenizer):
    policy = dpo(share_prompt=False).build(tokenizer)
    assert policy.layout is documents
    assert "share_prompt" in policy.layout_reason


UNABLE = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2} | RECURRENT["mamba"],
    "qwen3_next": {**LLAMA, "head_dim": 8} | RECURRENT["qwen3_next"],
    "gemma2": {**LLAMA, "head_dim": 8},  # a soft cap on attention logits
}


@pytest.mark.parametrize("name", UNABLE)
def test_padded_where_nothing_else_is_exact_and_then_it_trains(tmp_path, name):
    module = DPO(config=UNABLE[name] | {"model_type": name}, optimizer=sgd)
    fit(module, dpo_data(tmp_path, 4, batch_size=2), max_steps=2)
    assert module.policy.layout is padded
    assert module.policy.layout_reason
    assert module.policy.base.config._attn_implementation != NAME
    assert f"computed twice per pair: {module.policy.layout_reason}" in module.notes[1]


def test_sharing_can_be_insisted_on(tokenizer):
    assert dpo(share_prompt=True).build(tokenizer).layout is shared
    with pytest.raises(UserError, match=r"model\.share_prompt: .*mixes responses"):
        dpo(share_prompt=True, attn="eager").build(tokenizer)
    with pytest.raises(UserError, match=r"model\.share_prompt: Mamba"):
        DPO(share_prompt=True, config=UNABLE["mamba"] | {"model_type": "mamba"}).build(tokenizer)


# ---- dropout

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
DROPPING = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_off_in_training(tokenizer, name, monkeypatch):
    config = SMALL | DROPPING[name] | {"model_type": name}

    def differs():
        policy = DPO(config=config, lora={"r": 2, "lora_dropout": 0.5, "init_lora_weights": False}).build(tokenizer)
        assert policy.training
        one, other = (policy(batch_of(pairs())).logps for _ in range(2))
        return not torch.equal(one, other)

    assert not differs()
    monkeypatch.setattr("oumi_pl.models.preference.disable_dropout", lambda model: None)
    assert differs()


def test_dropout_stays_off_after_evaluation_and_checkpointing_stays_on(tokenizer):
    policy = dpo(config={"attention_dropout": 0.5}, gradient_checkpointing=True).build(tokenizer)
    policy.eval().train()
    one, other = (policy(batch_of(pairs())).logps for _ in range(2))
    assert torch.equal(one, other)
    assert policy.base.is_gradient_checkpointing
    plain = dpo().build(tokenizer)
    plain.load_state_dict(policy.state_dict())
    expected = gradients(plain, projected(plain(batch_of(pairs())).logps))
    assert_close(gradients(policy, projected(one)), expected)
