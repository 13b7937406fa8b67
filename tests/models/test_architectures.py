"""Exports of all causal architectures of transformers that build small: whole, and with a merged adapter.

`export_model` compares each with the live model itself; these tests compare once more, by other code.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.models.export import export_model
from oumi_pl.models.lm import LM
from oumi_pl.types import Segment
from tests.architectures import NAMES, small, small_with_parts
from tests.models.test_lora import trainable

CONTROLS = ["llama", "gpt2", "gemma3_text", "qwen3_moe", "gpt_oss", "mamba"]
"""What the default suite tries: plain, transposed weights, scaled and tied, two kinds of experts, no attention."""
LARGEST = 700_000
"""Parameters; those of models with parts besides the language model can't be made small by a few keys."""
UNBUILDABLE = {
    "blt", "cohere_compass_text", "dbrx", "deepseek_v4", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n",
    "gemma3n_text", "gemma4", "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant", "git", "got_ocr2",
    "inkling2_loop_text", "inkling2_text", "inkling_text", "kimi_linear", "lfm2_moe", "llama4", "mllama",
    "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe",
    "qwen4_exp", "reformer", "rembert", "roc_bert", "xmod", "zamba", "zamba2",
}  # fmt: skip
"""Not built by `small`: their configs need several parts or values that fit each other."""
UNKNOWN_LOGITS = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "modernbert-decoder",
    "prophetnet", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xlstm",
}  # fmt: skip
"""Their head is more than a matrix: refused before training."""
NOT_LOADED = {"youtu"}
"""transformers overwrites weights when it loads them: in 5.24 the row of the padding token, which is also its logit."""


NOT_LOADED_ALONE = {"laguna"}
"""PEFT gives the adapters of their shared experts another name when it loads them."""


def moved(hf):
    """As if trained: every weight differs, and LoRA's B is not zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return hf


def logits(hf):
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        return hf.eval()(input_ids=ids, use_cache=False).logits


def assert_same(folder, live):
    ours, theirs = logits(live), logits(AutoModelForCausalLM.from_pretrained(folder))
    assert (ours - theirs).norm() <= 1e-4 * ours.norm()


def assert_exports(folder, name):
    torch.manual_seed(0)
    model = LM(moved(build_model(None, config=small(name))))
    model.refuse_unknown_logits()
    export_model(model, folder / "whole")
    assert_same(folder / "whole", model.hf)
    adapted = LM(moved(build_model(str(folder / "whole"), lora={"r": 2, "lora_alpha": 4})))
    assert trainable(adapted.hf)
    assert (logits(adapted.hf) - logits(model.hf)).norm() > 1e-3 * logits(model.hf).norm()
    export_model(adapted, folder / "merged", merge=True)
    assert_same(folder / "merged", adapted.hf)
    if name in NOT_LOADED_ALONE:
        with pytest.raises(UserError, match=r"is not the trained model.*; merge the adapter"):
            export_model(adapted, folder / "alone")
        return
    export_model(adapted, folder / "alone")
    assert_same(folder / "alone", adapted.hf)


HIDDEN = {"llama4": "Llama4ForCausalLM", "mllama": "MllamaForCausalLM", "qwen3_5": "Qwen3_5ForCausalLM"}
"""What the default suite tries: prefixes that name a part which the causal class does not have, and a vision tower."""
NO_SMALL_CONFIG = {
    **dict.fromkeys(("musicgen", "musicgen_melody"), "transformers builds no causal model of their default config"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "they read the cache of another model"),
    **{"gemma3n": "needs timm", "dots3_note": "values by layer that have to fit 48 layers"},
}
"""Not built by `small_with_parts`, and why."""


def assert_hidden_states_give_the_logits_or_are_refused(name):
    """Our logits equal the model's own, or the message names the class."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small_with_parts(name))).train()
    assert sum(p.numel() for p in hf.parameters()) < 14_000_000
    try:
        LM(hf).refuse_unknown_logits()
    except UserError as error:
        assert type(hf).__name__ in str(error)
        assert "is not supported" in str(error) or "no hidden states" in str(error)
    return hf


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_states_are_those_of_the_logits(name):
    hf = assert_hidden_states_give_the_logits_or_are_refused(name)
    assert type(hf).__name__ == HIDDEN[name]
    batch = {
        "input_ids": torch.arange(3, 9)[None],
        "position_ids": torch.arange(6)[None],
        "segments": [Segment(6)],
        "targets": torch.arange(4, 9),
        "predictors": torch.arange(5),
    }
    own = hf(input_ids=batch["input_ids"], use_cache=False).logits[0, :5].float().log_softmax(-1)
    logps = LM(hf)(batch)
    torch.testing.assert_close(logps, own.gather(1, batch["targets"][:, None])[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(HIDDEN) - set(NO_SMALL_CONFIG)))
def test_hidden_states_of_every_causal_class_give_its_logits_or_the_class_is_refused(name):
    assert_hidden_states_give_the_logits_or_are_refused(name)


def test_a_class_without_hidden_states_is_refused_by_name():
    hf = build_model(None, config=small("llama"))
    hf.model.forward = lambda **_: (torch.zeros(1, 3, 32),)
    with pytest.raises(UserError, match="LlamaForCausalLM returns no hidden states"):
        LM(hf).hidden_states({"input_ids": torch.zeros(1, 3, dtype=torch.long), "position_ids": torch.arange(3)[None]})


@pytest.mark.parametrize("name", CONTROLS)
def test_exports_equal_the_live_model(tmp_path, name):
    assert_exports(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(CONTROLS) - UNBUILDABLE - UNKNOWN_LOGITS - NOT_LOADED))
def test_exports_of_every_architecture_equal_the_live_model(tmp_path, name):
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small(name))).parameters()
    assert sum(p.numel() for p in parameters) < LARGEST
    assert_exports(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(UNKNOWN_LOGITS))
def test_architectures_whose_head_is_more_than_a_matrix_are_refused(name):
    with pytest.raises(UserError, match="in a way that is not supported"):
        LM(build_model(None, config=small(name))).refuse_unknown_logits()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NOT_LOADED))
def test_architectures_that_load_other_weights_than_were_saved_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="is not the trained model: its logits are off by"):
        export_model(LM(moved(build_model(None, config=small(name)))), tmp_path / "out")
