"""AdamW with states of 8 bits, from torchao: trained, saved and resumed like any optimizer."""

import sys
from functools import partial

import lightning as L
import pytest
import torch

from oumi_pl.__main__ import main
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.errors import UserError
from oumi_pl.modules.sft import SFT
from oumi_pl.runs.checkpoints import AtomicCheckpointIO, read_tensors
from tests.crash.harness import prepare
from tests.tiny import LLAMA, data, trainer

LARGE = LLAMA | {"hidden_size": 64, "intermediate_size": 128}
"""Weights of fewer than 4,096 values have states of 32 bits."""


def train(folder, optimizer, checkpoints=None, resume=None):
    """Trains for six updates; the module and its losses."""
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(float(trainer.callback_metrics["train/loss"]))

    L.seed_everything(0)
    module = SFT(config=LARGE, optimizer=optimizer)
    callbacks = [Losses(), *([] if checkpoints is None else [checkpoints])]
    loop = trainer(
        max_steps=6, callbacks=callbacks, enable_checkpointing=bool(checkpoints), plugins=[AtomicCheckpointIO()]
    )
    with torch.compiler.set_stance("force_eager"):  # its step would be compiled, which takes a minute
        loop.fit(module, data(folder, 32, batch_size=2), ckpt_path=resume)
    return module, losses


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_states_of_eight_bits_train_like_adamw_and_resume_exactly(tmp_path, asynchronous):
    low_bit = pytest.importorskip("torchao.optim")
    checkpoints = Checkpoints(every=3, keep=5, asynchronous=asynchronous)
    checkpoints.directory = tmp_path / "checkpoints"
    checkpoints.directory.mkdir()
    whole, losses = train(tmp_path, partial(low_bit.AdamW8bit, lr=1e-2), checkpoints)
    _, expected = train(tmp_path, partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.01))
    assert losses == pytest.approx(expected, rel=1e-3)
    saved = read_tensors(checkpoints.directory / "step-00000003.ckpt")
    states = saved["optimizer_states"][0]["state"].values()
    assert any(type(state["exp_avg"]) is low_bit.subclass_8bit.OptimState8bit for state in states)
    resumed, later = train(
        tmp_path, partial(low_bit.AdamW8bit, lr=1e-2), resume=checkpoints.directory / "step-00000003.ckpt"
    )
    assert later == losses[3:]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_without_torchao_the_extra_is_named(tmp_path, monkeypatch, capsys):
    optimizer = {"class_path": "torchao.optim.AdamW8bit", "init_args": {"lr": 1e-2}}
    prepare(tmp_path / "run", changes={"model.init_args.optimizer": optimizer})
    monkeypatch.chdir(tmp_path / "run")
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert main(["fit", "--config", "r.yaml"]) == 2
    assert "torchao.optim.AdamW8bit needs torchao: pip install 'oumi_pl[low-bit]'" in capsys.readouterr().err


def test_a_file_with_its_states_names_the_extra_as_well(tmp_path, monkeypatch):
    import pickle

    def unknown(*_, **__):
        raise pickle.UnpicklingError("Unsupported global: GLOBAL torchao.optim.subclass_8bit.OptimState8bit")

    monkeypatch.setattr(torch, "load", unknown)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"pip install 'oumi_pl\[low-bit\]'"):
        read_tensors(tmp_path / "x.ckpt")
