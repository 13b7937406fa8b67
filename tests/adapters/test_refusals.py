"""What an engine can't do as the recipe says is refused by name."""

import subprocess
import sys

import pytest
import torch

from oumi_pl import adapters
from oumi_pl.adapters.losses import dpo_settings
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.ema import EMA
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.losses.policy import GSPOLoss, ReinforceLoss
from oumi_pl.losses.preference import (
    AOT,
    CPO,
    EXO,
    IPO,
    LDDPO,
    ORPO,
    DiscoPOP,
    ForwardKL,
    SFTTerm,
    Sigmoid,
    SimPO,
    WeightedSum,
)
from oumi_pl.modules.grpo import GRPO
from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.modules.sft import SFT
from oumi_pl.rollouts.advantages import LeaveOneOut
from oumi_pl.types import PreferenceLoss
from tests.tiny import LLAMA, data, dpo, dpo_data, module, sgd, trainer


class Own(PreferenceLoss):
    def __call__(self, pairs):
        return -pairs.chosen_logratios


class OwnStep(SFT):
    def training_step(self, batch, batch_idx):
        return 2 * super().training_step(batch, batch_idx)


class OwnSums(SFT):
    def loss_sums(self, batch, split):
        return super().loss_sums(batch, split)


def refused(engine, what, its_data=None, **settings):
    with pytest.raises(UserError) as error:
        adapters.run(engine, trainer(**({"max_steps": 1} | settings)), what, its_data)
    return str(error.value)


def test_engines_that_cannot_train_a_trainer_type():
    assert "hf can't train DPO; these can: lightning, trl" in refused("hf", dpo())
    assert "trl can't train Pretrain; these can: lightning, hf" in refused("trl", Pretrain(config=LLAMA))
    assert "would not call OwnStep.training_step" in refused("hf", OwnStep(config=LLAMA, optimizer=sgd))
    assert "would not call OwnSums.loss_sums" in refused("trl", OwnSums(config=LLAMA, optimizer=sgd))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"callbacks": [EMA()]}, "trainer.callbacks: EMA belongs to Lightning's loop"),
        ({"max_time": "00:01:00:00"}, "trainer.max_time belongs"),
        ({"limit_train_batches": 3}, "trainer.limit_train_batches has no effect with --engine hf"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "clips by norm"),
        ({"precision": "64-true"}, "trainer.precision: 64-true is unknown"),
        ({"devices": 2, "strategy": "ddp"}, "trains on one device, and this run has 2"),
        (
            {"callbacks": [Checkpoints(asynchronous=True)], "enable_checkpointing": True},
            "checkpoint.asynchronous: --engine hf waits for its files",
        ),
    ],
)
def test_settings_of_lightning_alone(settings, message):
    assert message in refused("hf", module(), **settings)


def test_validation_within_an_update(tmp_path):
    with_held_out = data(tmp_path, 16, batch_size=1, validation=0.3)
    message = refused("hf", module(), its_data=with_held_out, accumulate_grad_batches=4, val_check_interval=3)
    assert "3 micro-batches end within an update of 4" in message


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Own(), "Own has no counterpart in TRL"),
        (SimPO(), "SimPO has no counterpart in TRL"),
        (ORPO(), "ORPO has no counterpart"),
        (CPO(), "CPO has no counterpart"),
        (WeightedSum([Sigmoid(), SFTTerm()], [1.0, 1.0]), "SFTTerm has no counterpart in TRL: TRL's averages over the"),
        (Sigmoid(label_smoothing=0.1), "TRL's Sigmoid has no label_smoothing"),
        (
            WeightedSum([Sigmoid(0.1), IPO(0.2)], [1.0, 1.0]),
            "one beta for all losses of a sum, and here",
        ),
        (WeightedSum([Sigmoid(), LDDPO(IPO(), 0.5)], [1.0, 1.0]), "one alpha of LDDPO"),
        (WeightedSum([Sigmoid(), IPO(divergence=ForwardKL())], [1.0, 1.0]), "one divergence"),
    ],
)
def test_losses_that_trl_does_not_have(loss, message):
    with pytest.raises(UserError) as error:
        dpo_settings(loss)
    assert message in str(error.value)
    assert "--engine lightning" in str(error.value)


def test_losses_keep_their_settings():
    weighted = WeightedSum(
        [WeightedSum([EXO(0.2, 0.01), DiscoPOP(0.2, tau=0.1)], [0.5, 2.0]), AOT(0.2, 0.01)], [2.0, 1.0]
    )
    assert dpo_settings(LDDPO(weighted, 0.3)) == {
        "loss_type": ["exo_pair", "discopop", "aot"],
        "loss_weights": [1.0, 4.0, 1.0],
        "beta": 0.2,
        "ld_alpha": 0.3,
        "label_smoothing": 0.01,
        "discopop_tau": 0.1,
        "f_divergence_type": "reverse_kl",
    }


def test_references_that_trl_does_not_have(tmp_path):
    pairs = dpo_data(tmp_path)
    assert "compares with the initial model, not with other/model" in refused(
        "trl", dpo(reference="other/model"), pairs
    )
    assert "model.sync_every" in refused("trl", dpo(sync_every=2), pairs)
    assert "with LoRA, --engine trl compares with the base" in refused(
        "trl", dpo(reference="online", lora={"r": 2}), pairs
    )
    assert "prompts twice" in refused("trl", dpo(share_prompt=True), its_data=pairs)


OPT = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
BLOOM = {"model_type": "bloom", "n_layer": 1, "n_head": 2, "hidden_size": 16}


@pytest.mark.parametrize("config", [OPT | {"num_attention_heads": 2}, BLOOM])
def test_an_attention_that_does_not_isolate_packed_documents(tmp_path, config):
    packed = data(tmp_path, 16, packing=True)
    message = refused("hf", SFT(config=config, optimizer=sgd), its_data=packed)
    assert "lets packed documents see each other, and --engine hf runs no other; set data.packing to false" in message


def mean_of_means(logits, labels, vocab_size, **kwargs):
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:])


def test_a_model_that_averages_by_micro_batch(tmp_path):
    rows = data(tmp_path)
    sft = module()
    sft.model = sft.build(rows.tokenizer)
    sft.model.base.loss_function = mean_of_means
    assert "can't weigh all target tokens of an update alike" in refused("hf", sft, its_data=rows)
    own = module(loss=CrossEntropy(label_smoothing=0.1))  # the model is not asked for a loss
    own.model = sft.model
    adapters.run("hf", trainer(max_steps=1), own, rows)


def test_an_adapter_on_the_head(tmp_path):
    with_head = module(lora={"r": 2, "target_modules": ["q_proj", "lm_head"]})
    assert "an adapter or added tokens on it would not be trained" in refused("trl", with_head, its_data=data(tmp_path))


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "pip install trl" in refused("trl", module())


def test_the_engines_are_imported_lazily():
    heavy = ("trl", "transformers.trainer", "oumi_pl.adapters")
    code = f"import sys, oumi_pl.config.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def rollouts(loss=None, **kwargs):
    return GRPO(config=LLAMA, optimizer=sgd, loss=loss, **kwargs)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"loss": ReinforceLoss()}, "model.loss: ReinforceLoss has no counterpart in TRL"),
        ({"advantage": LeaveOneOut()}, "model.advantage: TRL's GRPO knows GroupMean, not LeaveOneOut"),
        ({"kl": 0.1, "kl_estimator": "k2"}, "model.kl: TRL's GRPO knows kl_estimator: k3"),
        ({"kl": 0.1, "kl_in": "reward"}, "model.kl: TRL's GRPO knows kl_estimator: k3"),
        ({"kl": 0.1, "kl_corrected": True, "loss": GSPOLoss()}, "model.kl_corrected: TRL weighs by the ratio"),
        ({"kl": 0.1, "sync_every": 5}, "model.sync_every: with --engine trl"),
        ({"share_prompt": True}, "model.share_prompt: TRL computes prompts for each completion"),
    ],
)
def test_online_training(policy, message):
    assert message in refused("trl", rollouts(**policy))


def test_online_training_by_transformers():
    assert "hf can't train GRPO; these can: lightning, trl" in refused("hf", rollouts())
