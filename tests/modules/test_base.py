"""The order of checks when a model is built, and steps of a subclass that do without ours."""

import pytest

from oumi_pl.errors import UserError
from oumi_pl.modules.sft import SFT
from tests.tiny import LLAMA, data, fit, sgd, trainer

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


class OwnValidation(SFT):
    """Validates in a way of its own, without ours."""

    def validation_step(self, batch, batch_idx):
        self.log("val/rows", float(len(batch["sample_ids"])), reduce_fx="sum")


def test_a_validation_step_without_ours_logs_what_it_logs(tmp_path):
    sft, run = OwnValidation(config=LLAMA, optimizer=sgd), trainer(max_steps=3, val_check_interval=1)
    run.fit(sft, data(tmp_path, 16, validation=0.3, batch_size=2))
    assert (run.global_step, run.current_epoch) == (3, 1), "a validation without sums ended the epoch"
    assert float(run.callback_metrics["val/rows"]) >= 1
    assert "val/loss" not in run.callback_metrics


def test_known_logits_are_trained(tmp_path):
    sft = SFT(config=FALCON_H1 | {"lm_head_multiplier": 1.0}, optimizer=sgd)
    fit(sft, data(tmp_path), max_steps=1)
    assert sft.trainer.global_step == 1
