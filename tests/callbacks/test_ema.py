"""A moving average of the weights: the one that is validated, exported and kept, while training goes on without it."""

import contextlib

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.ema import EMA
from oumi_pl.callbacks.stopping import LastStep
from oumi_pl.errors import UserError
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from tests.tiny import conversations, data, module, trainer, weights, write_jsonl

DECAY = 0.8


class Watch(L.Callback):
    """Keeps the weights after each update, and those that validation and the hook at its end see."""

    def __init__(self, kill=10**9):
        self.trained, self.validated, self.at_end, self.kill = {}, {}, {}, kill

    def on_train_start(self, trainer, pl_module):
        self.trained[trainer.global_step] = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained[trainer.global_step] = weights(pl_module)
        if trainer.global_step == self.kill:
            raise InterruptedError

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated[trainer.global_step] = weights(pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.at_end[trainer.global_step] = weights(pl_module)


def run(tmp_path, directory, average, kill=10**9, resume=None, steps=6, **kwargs):
    checkpoints = Checkpoints(every=2, keep=10, monitor="val/loss")
    checkpoints.directory = directory
    directory.mkdir(exist_ok=True)
    watch = Watch(kill)
    validation = write_jsonl(tmp_path / "val.jsonl", conversations(4, seed=3))
    loop = trainer(
        max_steps=steps,
        enable_checkpointing=True,
        callbacks=[watch, LastStep(), *average, checkpoints],
        plugins=[AtomicCheckpointIO()],
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    sft = module(lambda params: torch.optim.AdamW(params, lr=1e-2), **kwargs)
    L.seed_everything(0)
    with contextlib.suppress(InterruptedError):
        loop.fit(sft, data(tmp_path, 16, batch_size=2, validation=validation), ckpt_path=resume, weights_only=True)
    return sft, watch


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def close(a, b):
    return all(torch.allclose(a[name], b[name], atol=1e-7) for name in a)


def average_by_hand(trained, last):
    average = trained[1]  # Lightning's first update of the average copies
    for step in range(2, last + 1):
        average = {name: DECAY * average[name] + (1 - DECAY) * value for name, value in trained[step].items()}
    return average


@pytest.mark.parametrize("make", [EMA, EMAWeightAveraging], ids=["ours", "Lightning's"])
def test_the_average_is_validated_and_exported_and_best_and_training_does_not_notice(tmp_path, make):
    sft, watch = run(tmp_path, tmp_path / "ema", [make(decay=DECAY)])
    _, alone = run(tmp_path, tmp_path / "alone", [])
    assert watch.trained.keys() == alone.trained.keys() == set(range(7))
    assert all(same(watch.trained[step], alone.trained[step]) for step in alone.trained)
    for step in (3, 6):
        assert close(watch.validated[step], average_by_hand(watch.trained, step))
        assert not close(watch.validated[step], watch.trained[step])
    assert close(weights(sft), average_by_hand(watch.trained, 6))  # what is exported
    best = torch.load(tmp_path / "ema/best.ckpt", weights_only=True)
    best_step = 3 if best["global_step"] == 3 else 6
    assert same(saved(best), watch.validated[best_step])


def saved(checkpoint, key="state_dict"):
    return {name.removeprefix("model.hf."): value for name, value in checkpoint[key].items()}


def test_all_that_looks_at_the_model_when_validation_ends_sees_the_average(tmp_path):
    _, watch = run(tmp_path, tmp_path / "ema", [EMA(decay=DECAY)])
    assert all(same(watch.at_end[step], watch.validated[step]) for step in (3, 6))


@pytest.mark.parametrize("kill", [3, 5])
@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, kill, lora):
    options = {"lora": lora}
    if lora:  # on pretrained weights, which are in no checkpoint
        first, _ = run(tmp_path, tmp_path / "first", [], steps=1)
        first.causal_lm.hf.save_pretrained(tmp_path / "model")
        options |= {"config": {}, "model": str(tmp_path / "model")}
    whole, _ = run(tmp_path, tmp_path / "whole", [EMA(decay=DECAY)], **options)
    run(tmp_path, tmp_path / "killed", [EMA(decay=DECAY)], kill, **options)
    checkpoint = max((tmp_path / "killed").glob("step-*.ckpt"))
    resumed, _ = run(tmp_path, tmp_path / "killed", [EMA(decay=DECAY)], resume=checkpoint, **options)
    assert same(weights(resumed), weights(whole))


def test_a_checkpoint_holds_both_and_the_average_can_begin_at_one_without(tmp_path):
    _, watch = run(tmp_path, tmp_path / "ema", [EMA(decay=DECAY)], steps=4)
    checkpoint = torch.load(tmp_path / "ema/step-00000004.ckpt", weights_only=True)
    assert same(saved(checkpoint, "current_model_state"), watch.trained[4])
    assert close(saved(checkpoint), average_by_hand(watch.trained, 4))
    run(tmp_path, tmp_path / "without", [], steps=4)
    _, watch = run(tmp_path, tmp_path / "new", [EMA(decay=DECAY)], resume=tmp_path / "without/step-00000004.ckpt")
    expected = {n: DECAY * value + (1 - DECAY) * watch.trained[6][n] for n, value in watch.trained[5].items()}
    assert close(watch.validated[6], expected)


def test_its_arguments_are_checked():
    with pytest.raises(UserError, match="decay is 1"):
        EMA(decay=1)
    with pytest.raises(UserError, match="every"):
        EMA(every=0)
