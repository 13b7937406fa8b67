"""Rows longer than a model has positions: refused where positions are looked up, a warning where they are computed."""

import warnings

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model, refuse_too_few_positions
from oumi_pl.modules.sft import SFT
from tests.data.corpora import corpus, documents, pretrain_data
from tests.tiny import LLAMA, data, dpo_data, sgd, trainer
from tests.trees import pair_lengths

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 99}
OPT = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
LAYER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SEES = {
    "model_type": "gemma3",
    "text_config": LAYER
    | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0},
    "vision_config": LAYER | {"image_size": 28, "patch_size": 14},
}


@pytest.mark.parametrize(
    "config", [GPT2, OPT | {"num_attention_heads": 2, "max_position_embeddings": 64, "vocab_size": 99}]
)
def test_rows_beyond_a_table_of_positions_are_refused(config):
    hf = build_model(None, config=config)
    refuse_too_few_positions(hf, 64)
    with pytest.raises(UserError, match=r"max_length is 65, but \w+ has a table of 64 positions: set it to 64"):
        refuse_too_few_positions(hf, 65)


@pytest.mark.parametrize("config", [LLAMA | {"vocab_size": 99, "max_position_embeddings": 64}, SEES])
def test_rows_beyond_the_trained_rotary_positions_are_a_warning(config):
    hf = build_model(None, config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_too_few_positions(hf, 64)
        refuse_too_few_positions(hf, 512, (64, 64))
    with pytest.warns(UserWarning, match=r"max_length is 65, and \w+ was trained on 64 positions"):
        refuse_too_few_positions(hf, 65)


def test_only_the_first_rank_warns(monkeypatch):
    hf = build_model(None, config=LLAMA | {"vocab_size": 99, "max_position_embeddings": 64})
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_too_few_positions(hf, 65)


def test_the_longest_document_counts_where_positions_start_at_each():
    hf = build_model(None, config=GPT2)
    refuse_too_few_positions(hf, 512, (64, 64))
    with pytest.raises(UserError, match=r"the longest document has 65 tokens, .* set data\.max_length to 64"):
        refuse_too_few_positions(hf, 512, (65, 65))
    with pytest.warns(UserWarning, match="documents may be as long as 512 tokens, and .* table of 64 positions"):
        refuse_too_few_positions(hf, 512, (0, 512))


def test_a_pack_may_be_longer_than_the_table(tmp_path):
    packed = data(tmp_path, packing=True, max_length=512)
    packed.setup("fit")
    longest = int(packed.lengths("train").max())
    for positions in (longest, longest - 1):
        sft = SFT(config=GPT2 | {"n_positions": positions, "vocab_size": 300}, optimizer=sgd)
        runner = trainer(max_steps=1)
        if positions == longest:
            runner.fit(sft, data(tmp_path, packing=True, max_length=512))
        else:
            with pytest.raises(UserError, match=f"the longest document has {longest} tokens"):
                runner.fit(sft, data(tmp_path, packing=True, max_length=512))


def test_a_pair_needs_the_positions_of_its_prompt_and_the_longer_response(tmp_path):
    for packing in (True, False):
        built = dpo_data(tmp_path, packing=packing)
        built.setup("fit")
        pairs = [pair_lengths(pair) for pair in built.examples("train")]
        longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in pairs)
        assert built.longest_path(["train"]) == ((longest, longest) if packing else None)


def test_the_longest_path_of_a_corpus(tmp_path):
    file = corpus(tmp_path, n=9)
    longest = max(len(text.encode()) for text in documents(9))  # and an EOS
    expected = {
        ("best_fit", False): (longest, longest),
        ("concat", False): (longest, longest + 1),
        ("best_fit", True): (0, 4096),
    }
    for (packing, streaming), positions in expected.items():
        built = pretrain_data(file, packing=packing, isolate=True, streaming=streaming, max_length=4096)
        assert built.longest_path(["train"]) == positions
    short = pretrain_data(file, packing="best_fit", isolate=True, max_length=16)
    assert short.longest_path(["train"]) == (16, 16)
    assert pretrain_data(file, max_length=4096).longest_path(["train"]) is None
