"""Exported folders load in plain transformers with the logits of the live model, which is left unchanged."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from oumi_pl.data.template import apply_template, load_template
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models import export
from oumi_pl.models.build import build_model
from oumi_pl.models.export import HEADS, export_model, read_heads
from oumi_pl.models.lm import LM
from tests.models.test_lora import batch, loss_of, moved, plain_tokenizer, pretrained
from tests.tiny import LLAMA


def logits(hf, ids=None):
    ids = torch.arange(40).view(2, 20) if ids is None else ids
    with torch.no_grad():
        return hf.eval()(ids).logits


def assert_same(folder, live, tolerance=1e-6, ids=None):
    """The folder, by nothing but its name, is the live model."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ours, theirs = logits(live, ids), logits(loaded, ids)
    assert (ours - theirs).abs().max() <= tolerance * ours.abs().max()
    return loaded


def with_chat(folder):
    """A tokenizer that lacks the template's tokens, with them added; and the ids of these."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    n = len(tokenizer)
    template = load_template(tokenizer, "chatml")
    apply_template(tokenizer, template)
    return tokenizer, list(range(n, len(tokenizer))), tokenizer.convert_tokens_to_ids(template.end_of_turn)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model(tmp_path, tied):
    base = pretrained(tmp_path / "base", plain_tokenizer(), tie_word_embeddings=tied)
    tokenizer, added, end = with_chat(base)
    model = LM(build_model(base, tokenizer=tokenizer, added_tokens=added))
    before = logits(model.hf)
    model.train()
    export_model(model, tmp_path / "out", tokenizer, stop_tokens=[end], card="# card")
    assert_same(tmp_path / "out", model.hf)
    assert torch.equal(logits(model.hf), before)
    written = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert written <= names(tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".half"]
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (again.chat_template, again.get_vocab()) == (tokenizer.chat_template, tokenizer.get_vocab())
    assert set(GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id) == {tokenizer.eos_token_id, 2, end}


def test_generate_stops_at_the_end_of_turn(tmp_path):
    """The exported folder alone: `generate` without arguments ends where an answer ends."""
    base = pretrained(tmp_path / "base", plain_tokenizer())
    tokenizer, added, end = with_chat(base)
    hf = build_model(base, tokenizer=tokenizer, added_tokens=added)
    with torch.no_grad():  # a model that ends every answer at once
        hf.lm_head.weight[end] = 100 * hf.model.norm(hf.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1])
    export_model(LM(hf), tmp_path / "out", tokenizer, stop_tokens=[end])
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(torch.tensor([[5, 6, 7]]), do_sample=False)
    assert out[0, 3:].tolist() == [end]


def test_the_attention_of_training_is_not_in_the_exported_config(tmp_path):
    model = LM(build_model(None, config=LLAMA, tokenizer=ByteTokenizer().build(), attn="documents"))
    export_model(model, tmp_path / "out")
    assert "documents" not in (tmp_path / "out" / "config.json").read_text()
    assert_same(tmp_path / "out", model.hf)


def test_a_contradictory_generation_config_is_repaired(tmp_path):
    """Some published models have a temperature but greedy decoding: transformers would refuse to save it."""
    model = LM(build_model(None, config=LLAMA | {"vocab_size": 97}))
    model.hf.generation_config.temperature = 0.6
    with pytest.raises(ValueError, match="temperature"):
        model.hf.save_pretrained(tmp_path / "plain")
    export_model(model, tmp_path / "out")
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.temperature, saved.do_sample) == (0.6, True)
    assert not model.hf.generation_config.do_sample


@pytest.mark.parametrize("lora", [{"r": 4}, {"r": 4, "use_dora": True}, {"r": 4, "use_rslora": True}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_adapter(tmp_path, tied, lora):
    base = pretrained(tmp_path / "base", tie_word_embeddings=tied)
    model = LM(moved(base, lora=lora))
    before = logits(model.hf)
    export_model(model, tmp_path / "out", merge=True)
    assert "adapter_config.json" not in names(tmp_path / "out")
    assert_same(tmp_path / "out", model.hf, 1e-5)
    assert torch.equal(logits(model.hf), before)
    model.hf.train()
    loss_of(model.hf, batch()).backward()
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)


EMBEDDINGS = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}
"""LoRA that changes embedding or head, which share a weight."""


@pytest.mark.parametrize("lora", EMBEDDINGS)
def test_an_adapter_on_tied_embeddings_is_merged_into_an_untied_model(tmp_path, lora):
    """And training on from the folder of the adapter starts from the same model."""
    base = pretrained(tmp_path / "base", tie_word_embeddings=True)
    model = LM(moved(base, lora={"r": 4} | EMBEDDINGS[lora]))
    before = logits(model.hf)
    export_model(model, tmp_path / "merged", merge=True)
    assert not assert_same(tmp_path / "merged", model.hf, 1e-5).config.tie_word_embeddings
    assert torch.equal(logits(model.hf), before)
    assert model.base.config.tie_word_embeddings
    export_model(model, tmp_path / "alone")
    again = build_model(str(tmp_path / "alone"))
    assert (logits(again) - before).abs().max() <= 1e-5 * before.abs().max()
    export_model(LM(again), tmp_path / "again")
    assert_same(tmp_path / "again", model.hf, 1e-5)


def test_an_adapter_that_leaves_tied_embeddings_equal_is_merged_into_a_tied_model(tmp_path):
    """`ensure_weight_tying`: embedding and head have one adapter."""
    base = pretrained(tmp_path / "base", tie_word_embeddings=True)
    saved = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "ensure_weight_tying": True}
    model = LM(moved(base, lora={"r": 4} | saved))
    export_model(model, tmp_path / "merged", merge=True)
    assert assert_same(tmp_path / "merged", model.hf, 1e-5).config.tie_word_embeddings


def test_an_export_that_is_another_model_is_refused(tmp_path, monkeypatch):
    """Merged into tied embeddings, as PEFT does it by itself."""
    base = pretrained(tmp_path / "base", tie_word_embeddings=True)
    model = LM(moved(base, lora={"r": 4} | EMBEDDINGS["embedding"]))
    monkeypatch.setattr(export, "merged", lambda hf: hf.merge_and_unload())
    with pytest.raises(UserError, match=r"exported LlamaForCausalLM is not the trained model: its logits are off by"):
        export_model(model, tmp_path / "out", merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_weight_that_is_not_written_is_noticed_in_any_precision(tmp_path, monkeypatch, dtype):
    model = LM(build_model(None, config=LLAMA | {"vocab_size": 97}, dtype=dtype))
    export_model(model, tmp_path / "right")
    save = type(model.hf).save_pretrained

    def forget(hf, folder, **kwargs):
        state = {n: torch.zeros_like(v) if n == "model.norm.weight" else v for n, v in hf.state_dict().items()}
        save(hf, folder, **kwargs | {"state_dict": state})

    monkeypatch.setattr(type(model.hf), "save_pretrained", forget)
    with pytest.raises(UserError, match="is not the trained model"):
        export_model(model, tmp_path / "wrong")


def test_the_comparison_leaves_generators_and_training_modes_as_they_were(tmp_path):
    model = LM(build_model(None, config=LLAMA | {"vocab_size": 97, "attention_dropout": 0.5}))
    model.hf.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    export_model(model, tmp_path / "out")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mixture_of_experts(tmp_path):
    """Its experts are separate tensors in the folder, and one tensor in the live model."""
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 97}
    model = LM(build_model(None, config=LLAMA | experts))
    export_model(model, tmp_path / "out")
    assert_same(tmp_path / "out", model.hf)


@pytest.mark.parametrize("lora", [{"r": 4}, {"r": 4, "use_dora": True}])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_alone(tmp_path, monkeypatch, tied, lora):
    """It is small, and finds its base from any directory, even if the recipe named that by a relative path."""
    pretrained(tmp_path / "base", tie_word_embeddings=tied)
    monkeypatch.chdir(tmp_path)
    model = LM(moved("base", lora=lora))
    before = logits(model.hf)
    export_model(model, tmp_path / "out", ByteTokenizer().build(), card="# card")
    assert "model.safetensors" not in names(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "# card"
    monkeypatch.chdir("/")
    assert_same(tmp_path / "out", model.hf)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert torch.allclose(logits(by_peft), before, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits(model.hf), before)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_with_added_tokens_where_the_base_has_room(tmp_path, tied):
    base = pretrained(tmp_path / "base", plain_tokenizer(), tie_word_embeddings=tied, room=8)
    tokenizer, added, _ = with_chat(base)
    model = LM(moved(base, tokenizer=tokenizer, added_tokens=added, lora={"r": 4}))
    ids = torch.tensor([[5, added[0], 6, added[1], 7]])
    export_model(model, tmp_path / "out", tokenizer)
    assert_same(tmp_path / "out", model.hf, ids=ids)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(by_peft, ids), logits(model.hf, ids))
    export_model(model, tmp_path / "merged", tokenizer, merge=True)
    assert_same(tmp_path / "merged", model.hf, 1e-5, ids)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_with_added_tokens_that_the_base_has_no_rows_for(tmp_path, tied):
    """On the base as it is on the disk, neither transformers nor PEFT could load it."""
    base = pretrained(tmp_path / "base", plain_tokenizer(), tie_word_embeddings=tied)
    tokenizer, added, _ = with_chat(base)
    model = LM(moved(base, tokenizer=tokenizer, added_tokens=added, lora={"r": 4}))
    with pytest.raises(UserError, match=r"2 rows more than the base.*--merge"):
        export_model(model, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()
    model.hf.save_pretrained(tmp_path / "unloadable")
    with pytest.raises(IndexError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "unloadable")
    export_model(model, tmp_path / "out", tokenizer, merge=True)
    assert_same(tmp_path / "out", model.hf, 1e-5, torch.tensor([[5, added[0], 6, added[1]]]))


@pytest.mark.parametrize(
    ("folder", "config", "why"),
    [
        (None, LLAMA | {"vocab_size": 97}, "random weights"),
        ("base", {"rope_theta": 5.0}, r"model\.config \(rope_theta\)"),
        ("base", {"attention_dropout": 0.1}, None),
    ],
)
def test_adapters_whose_base_is_not_that_on_the_disk(tmp_path, folder, config, why):
    base = pretrained(tmp_path / "base") if folder else None
    model = LM(moved(base, config=config, lora={"r": 4}))
    if why is None:
        export_model(model, tmp_path / "out")
        assert_same(tmp_path / "out", model.hf)
        return
    with pytest.raises(UserError, match=f"{why}.*--merge"):
        export_model(model, tmp_path / "out")
    export_model(model, tmp_path / "out", merge=True)
    assert_same(tmp_path / "out", model.hf, 1e-5)


def test_only_new_or_empty_folders_are_written(tmp_path, monkeypatch):
    model = LM(build_model(None, config=LLAMA | {"vocab_size": 97}))
    (tmp_path / "empty").mkdir()
    before = (tmp_path / "empty").stat().st_ino
    monkeypatch.chdir(tmp_path / "empty")
    export_model(model, Path())
    assert_same(tmp_path / "empty", model.hf)
    assert (tmp_path / "empty").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    (tmp_path / "file").write_text("mine")
    for there in ("empty", "file"):
        with pytest.raises(UserError, match=f"{there} is there and not an empty folder"):
            export_model(model, tmp_path / there)
    with pytest.raises(UserError, match="can't write to"):
        export_model(model, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_leaves_no_half_folder(tmp_path, monkeypatch):
    model = LM(build_model(None, config=LLAMA | {"vocab_size": 97}))
    tokenizer = ByteTokenizer().build()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_model(model, tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []


# ---- heads beside the language model


def test_heads_are_written_beside_the_model_and_read_again(tmp_path):
    model = LM(build_model(None, config=LLAMA | {"vocab_size": 97}))
    head = nn.Linear(32, 1)
    heads = {f"score.{name}": value for name, value in head.named_parameters()}
    export_model(model, tmp_path / "out", heads=heads)
    assert_same(tmp_path / "out", model.hf)
    again = nn.Linear(32, 1)
    read_heads(tmp_path / "out", {f"score.{name}": value for name, value in again.named_parameters()})
    for ours, theirs in zip(again.parameters(), head.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad


def test_a_model_without_heads_has_no_file_of_them(tmp_path):
    export_model(LM(build_model(None, config=LLAMA | {"vocab_size": 97})), tmp_path / "out")
    assert HEADS not in names(tmp_path / "out")
    value = torch.ones(3)
    read_heads(tmp_path / "out", {"score": value})
    assert value.tolist() == [1, 1, 1]


@pytest.mark.parametrize("heads", [{"score": torch.zeros(4)}, {"value": torch.zeros(3)}, {}])
def test_other_heads_than_those_of_the_folder_are_refused(tmp_path, heads):
    model = LM(build_model(None, config=LLAMA | {"vocab_size": 97}))
    export_model(model, tmp_path / "out", heads={"score": torch.ones(3)})
    with pytest.raises(UserError, match=r"holds the heads \{'score': \[3\]\}, and this trainer type has"):
        read_heads(tmp_path / "out", heads)
