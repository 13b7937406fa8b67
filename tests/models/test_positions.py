"""Rows longer than what a model knows of positions: refused where they are looked up, told where they are computed."""

import warnings

import pytest

from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.models.positions import refuse_too_few_positions
from tests.tiny import LLAMA

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 99}
OPT = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    "config", [GPT2, OPT | {"num_attention_heads": 2, "max_position_embeddings": 64, "vocab_size": 99}]
)
def test_beyond_a_table_of_positions(config):
    hf = build_model(None, config=config)
    refuse_too_few_positions(hf, 64)
    with pytest.raises(UserError, match=r"max_length is 65, but \w+ has a table of 64 positions: set it to 64"):
        refuse_too_few_positions(hf, 65)


def test_beyond_what_rotary_positions_were_made_for():
    hf = build_model(None, config=LLAMA | {"vocab_size": 99, "max_position_embeddings": 64})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_too_few_positions(hf, 64)
    with pytest.warns(UserWarning, match="max_length is 65, and LlamaForCausalLM was made for 64 positions"):
        refuse_too_few_positions(hf, 65)
