"""Models passed as objects: trained like the same weights by name, or refused in one line."""

import math

import peft
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.lm import LM, documents, forest
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.sft import SFT
from tests.tiny import data, distance, dpo, dpo_data, fit, module, sgd, trainer, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "m"
    torch.manual_seed(0)
    module().build(ByteTokenizer().build()).hf.save_pretrained(folder)
    return str(folder)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def preset(made, model):
    made.model = model
    return made


WAYS = {
    "an argument": lambda cls, folder, **k: cls(load(folder), **k),
    "assigned": lambda cls, folder, **k: preset(cls(config={"model_type": "llama"}, **k), load(folder)),
    "built by another module": lambda cls, folder, **k: preset(
        cls(config={"model_type": "llama"}, **k), SFT(folder).build(ByteTokenizer().build(), branching=cls is DPO)
    ),
    "wrapped by hand": lambda cls, folder, **k: preset(cls(config={"model_type": "llama"}, **k), LM(load(folder))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("cls", "rows"), [(SFT, data), (DPO, dpo_data)], ids=["SFT", "DPO"])
def test_an_object_trains_like_the_folder_with_its_weights(tmp_path, folder, cls, rows, way):
    named, given = cls(folder, optimizer=sgd), WAYS[way](cls, folder, optimizer=sgd)
    by_name = fit(named, rows(tmp_path, n=8), max_steps=3)
    assert distance(fit(given, rows(tmp_path, n=8), max_steps=3), by_name) < 1e-6
    if way != "wrapped by hand":
        assert given.causal_lm.layout is (forest if cls is DPO else documents)


def test_the_object_itself_is_trained_and_two_modules_can_share_it(tmp_path, folder):
    hf = load(folder)
    before = hf.lm_head.weight.clone()
    first, second = SFT(hf, optimizer=sgd), SFT(hf, optimizer=sgd)
    fit(first, data(tmp_path, n=8), max_steps=1)
    assert first.causal_lm.hf is hf
    assert not torch.equal(hf.lm_head.weight, before)
    after = weights(first)
    second.build(ByteTokenizer().build())
    assert distance(dict(hf.named_parameters()), after) == 0
    assert distance(fit(second, data(tmp_path, n=8), max_steps=1), after) > 0


def test_a_preset_policy_is_its_own_reference_at_the_start(tmp_path, folder):
    built = preset(dpo(), load(folder))
    loop = trainer(max_steps=1)
    loop.fit(built, dpo_data(tmp_path, n=8))
    assert float(loop.callback_metrics["train/loss"]) == pytest.approx(math.log(2), abs=1e-6)
    built.model = load(folder)  # another model, and so another reference
    loop = trainer(max_steps=1)
    loop.fit(built, dpo_data(tmp_path, n=8))
    assert float(loop.callback_metrics["train/loss"]) == pytest.approx(math.log(2), abs=1e-6)


def test_adapters_around_an_object(tmp_path, folder):
    built = SFT(load(folder), optimizer=sgd, lora={"r": 2})
    trained = fit(built, data(tmp_path, n=8), max_steps=1)
    assert {name for name in trained if "lora" in name}
    assert not built.keeps_trained_weights_only, "checkpoints hold the base, which no name leads to"
    assert "model.hf.base_model.model.lm_head.weight" in built.state_dict()


def test_rows_of_added_tokens_are_initialised_once(folder):
    hf = load(folder)
    tokenizer = ByteTokenizer().build()
    added = [tokenizer.add_tokens("<new>") and len(tokenizer) - 1]
    SFT(hf).build(tokenizer, added)
    mean = hf.lm_head.weight[:260].mean(0)
    assert len(hf.lm_head.weight) == 261
    assert torch.allclose(hf.lm_head.weight[260], mean, atol=1e-6)
    with torch.no_grad():
        hf.lm_head.weight[260] = 1.0
    SFT(hf).build(tokenizer, added)
    assert float(hf.lm_head.weight[260].min()) == 1.0, "trained meanwhile"


REFUSED = {
    "a reference": (
        lambda hf, folder: DPO(folder, reference=hf),
        "model.reference is a LlamaForCausalLM; name a model",
    ),
    "a layer": (lambda hf, folder: SFT(torch.nn.Linear(2, 2)), "model: Linear can't be called on token ids"),
    "something else": (lambda hf, folder: SFT({"model_type": "llama"}), "model: dict is no model; pass a name"),
    "no head": (lambda hf, folder: SFT(AutoModel.from_pretrained(folder)), "LlamaModel has no output head"),
    "adapters": (lambda hf, folder: SFT(peft.get_peft_model(hf, peft.LoraConfig())), "model: a PeftModel has its"),
    "adapters inside": (
        lambda hf, folder: [peft.get_peft_model(hf, peft.LoraConfig()), SFT(hf)],
        "has adapters in its layers already",
    ),
    "a config": (lambda hf, folder: SFT(hf, {"hidden_size": 8}), "model.config: LlamaForCausalLM was passed as an"),
    "a dtype": (lambda hf, folder: SFT(hf, dtype="bfloat16"), "model.dtype: LlamaForCausalLM was passed as an object"),
    "a small vocabulary": (
        lambda hf, folder: SFT(hf.resize_token_embeddings(9) and hf).build(ByteTokenizer().build()),
        "the tokenizer has 260 tokens, the model's vocabulary 9",
    ),
    "an unknown attention": (
        lambda hf, folder: SFT(hf, attn="nonsense").build(None),
        "model.attn: 'nonsense' does not work for this model",
    ),
    "assigned": (
        lambda hf, folder: preset(SFT(folder), torch.nn.Linear(2, 2)).assemble(None),
        "Linear can't be called on token ids",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_refused_in_one_line(folder, case):
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        make(load(folder), folder)
    assert "\n" not in str(error.value)


def test_the_tokenizer_of_a_model_with_a_name_is_its_own(tmp_path, folder):
    ByteTokenizer().build().save_pretrained(folder)
    rows = data(tmp_path, n=8, tokenizer=None)
    trainer(max_steps=1).fit(SFT(load(folder), optimizer=sgd), rows)
    assert len(rows.tokenizer) == 260
