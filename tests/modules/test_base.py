"""What a model computes is checked before its weights are sharded: each rank then holds parts that can't be run."""

import pytest

from oumi_pl.errors import UserError
from oumi_pl.modules.sft import SFT
from tests.tiny import data, fit, sgd

FALCON_H1 = {
    "model_type": "falcon_h1",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "lm_head_multiplier": 0.039,
}


def test_unknown_logits_are_refused_before_sharding(tmp_path, monkeypatch):
    """Falcon-H1 multiplies its logits by a number that the wrapper does not know."""
    sharded = []
    monkeypatch.setattr("oumi_pl.modules.base.shard", lambda model, module: sharded.append(model))
    with pytest.raises(UserError, match="FalconH1ForCausalLM computes its logits in a way that is not supported"):
        fit(SFT(config=FALCON_H1, optimizer=sgd), data(tmp_path), max_steps=1)
    assert not sharded


def test_known_logits_are_sharded(tmp_path, monkeypatch):
    sharded = []
    monkeypatch.setattr("oumi_pl.modules.base.shard", lambda model, module: sharded.append(model))
    fit(SFT(config=FALCON_H1 | {"lm_head_multiplier": 1.0}, optimizer=sgd), data(tmp_path), max_steps=1)
    assert len(sharded) == 1
