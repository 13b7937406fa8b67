"""Models with a vision tower: the text is trained, and an export holds every weight of the base."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig

from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.models.export import export_model
from oumi_pl.models.lm import LM
from tests.architectures import small_with_parts
from tests.models.test_architectures import logits, moved

WHOLE = {"qwen3_5": "Qwen3_5ForConditionalGeneration", "llama4": "Llama4ForConditionalGeneration"}
"""Architectures whose causal class is the text model alone."""


@pytest.fixture(scope="module", params=WHOLE)
def base(request, tmp_path_factory):
    """The folder of a tiny model with a vision tower."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    cls = getattr(transformers, WHOLE[request.param])
    cls(AutoConfig.for_model(**small_with_parts(request.param))).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_an_export_holds_the_trained_text_and_the_tower_of_the_base(base, tmp_path):
    model = LM(moved(build_model(str(base))))
    export_model(model, tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    towers = {name for name in before if "visual" in name or "vision" in name or "projector" in name}
    assert towers
    assert changed == before.keys() - towers
    own, read = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert own["architectures"] == read["architectures"]
    assert (tmp_path / "out/preprocessor_config.json").is_file()
    again = build_model(str(tmp_path / "out"))
    torch.testing.assert_close(logits(again), logits(model.hf))


def test_a_merged_adapter_is_put_back_and_an_adapter_alone_needs_no_tower(base, tmp_path):
    model = LM(moved(build_model(str(base), lora={"r": 2})))
    export_model(model, tmp_path / "alone")
    export_model(model, tmp_path / "merged", merge=True)
    assert weights(tmp_path / "merged").keys() == weights(base).keys()
    torch.testing.assert_close(logits(build_model(str(tmp_path / "merged"))), logits(model.hf), rtol=1e-3, atol=1e-4)
    assert (tmp_path / "alone/adapter_model.safetensors").is_file()


def test_text_only_leaves_the_tower_out(base, tmp_path):
    model = LM(moved(build_model(str(base), text_only=True)))
    export_model(model, tmp_path / "out")
    assert not any("visual" in name or "vision" in name for name in weights(tmp_path / "out"))
    assert "vision_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_new_tokens_get_rows_in_the_whole_model(base, tmp_path):
    from oumi_pl.data.tokenizers import ByteTokenizer

    tokenizer = ByteTokenizer().build()
    ids = list(range(97, len(tokenizer)))
    model = LM(build_model(str(base), tokenizer=tokenizer, added_tokens=ids))
    export_model(model, tmp_path / "out")
    (name,) = (name for name in weights(base) if "embed_tokens" in name)
    assert len(weights(tmp_path / "out")[name]) == len(tokenizer)


def test_a_text_model_with_unknown_places_is_refused(base, monkeypatch):
    monkeypatch.setattr("oumi_pl.models.text_part.PARTS", ())
    with pytest.raises(UserError, match=r"ForConditionalGeneration has parts beside .*set model\.text_only: true"):
        build_model(str(base))


def test_a_model_whose_causal_class_is_whole_gives_its_text_model_alone(tmp_path):
    cls = transformers.Gemma3ForConditionalGeneration
    cls(AutoConfig.for_model(**small_with_parts("gemma3"))).save_pretrained(tmp_path / "base")
    assert type(build_model(str(tmp_path / "base"))) is cls
    assert type(build_model(str(tmp_path / "base"), text_only=True)).__name__ == "Gemma3ForCausalLM"
