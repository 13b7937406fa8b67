"""Distillation killed at any moment and resumed: the same rows, bit-identical weights, and no distribution twice."""

import contextlib

import lightning as L
import pytest
import torch

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.stopping import LastStep
from oumi_pl.modules import reference
from oumi_pl.modules.distill import Distill, Teacher
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from tests.models.test_lora import pretrained
from tests.test_resume import Kill
from tests.test_resume_dpo import Losses, Run, assert_equal
from tests.tiny import LLAMA, data, trainer, weights

ROWS, MICRO = 14, 2
MODELS = {"cached": {"top_k": 4}, "online": {}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("teacher") / "model", hidden_size=64, initializer_range=0.3)


def run(folder, teacher, model, kill=10**9, resume=None, seed=1):
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(every=3, keep=1)
    checkpoints.directory = folder
    killer, losses = Kill(kill), Losses()
    adamw = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
    module = Distill(config=LLAMA, teacher=teacher, optimizer=adamw, **MODELS[model])
    L.seed_everything(seed)
    loop = trainer(
        max_epochs=2,
        accumulate_grad_batches=MICRO,
        enable_checkpointing=True,
        callbacks=[killer, losses, LastStep(), checkpoints],
        plugins=[AtomicCheckpointIO()],
    )
    with contextlib.suppress(InterruptedError):
        loop.fit(module, data(folder.parent, ROWS, batch_size=2, validation=0.2), ckpt_path=resume, weights_only=True)
    return Run(module, killer.seen, losses.values, folder)


@pytest.mark.parametrize(("model", "kill"), [("cached", 1), ("cached", 8), ("cached", 9), ("online", 8)])
def test_killed_and_resumed_is_bit_identical(tmp_path, teacher, model, kill, monkeypatch):
    """Also in the middle of an update. The killed run finds an empty cache; the resumed one loads no teacher."""
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache of the whole run"))
    whole = run(tmp_path / "whole", teacher, model)
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache of the killed run"))
    killed = run(tmp_path / "killed", teacher, model, kill)
    assert killed.seen == whole.seen[:kill]
    checkpoint = killed.checkpoint
    step = 0 if checkpoint is None else int(checkpoint.stem.split("-")[1])
    assert step == {1: 0, 8: 3, 9: 3}[kill]
    if model == "cached":
        monkeypatch.setattr(Teacher, "_model", lambda self: pytest.fail("the teacher was loaded"))
    # another seed: whatever is drawn anew instead of restored shows
    resumed = run(tmp_path / "killed", teacher, model, resume=checkpoint, seed=2 if step else 1)
    assert resumed.seen == whole.seen[step * MICRO :]
    assert resumed.losses == whole.losses[step:]
    assert_equal(weights(resumed.module), weights(whole.module))


def test_a_run_killed_while_it_fills_the_cache_continues_with_the_next_chunk(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr("oumi_pl.data.reference.CHUNK", 2)
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache of the whole run"))
    whole = run(tmp_path / "whole", teacher, "cached")
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache of the killed run"))
    computed, original = [], reference._logps

    def interrupted(trainer, model, split, ids, compute):
        if len(computed) == 5:
            raise InterruptedError
        computed.append((split, *ids))
        return original(trainer, model, split, ids, compute)

    monkeypatch.setattr(reference, "_logps", interrupted)
    assert not run(tmp_path / "killed", teacher, "cached").seen
    before = set(computed)

    def counted(trainer, model, split, ids, compute):
        computed.append((split, *ids))
        return original(trainer, model, split, ids, compute)

    computed.clear()
    monkeypatch.setattr(reference, "_logps", counted)
    again = run(tmp_path / "killed", teacher, "cached")
    assert len(before & set(computed)) <= 1, "at most the chunk that was not finished"
    assert again.losses == whole.losses
    assert_equal(weights(again.module), weights(whole.module))
