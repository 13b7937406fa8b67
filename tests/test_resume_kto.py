"""KTO killed at any moment and resumed: the same rows, the same divergences and reference, bit-identical weights."""

import contextlib

import lightning as L
import pytest
import torch

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.stopping import LastStep
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from tests.models.test_lora import pretrained
from tests.test_resume import DROPOUT, Kill
from tests.test_resume_dpo import Losses, Run, assert_equal
from tests.tiny import kto, kto_data, trainer, weights

ROWS, BATCH, MICRO = 14, 2, 2  # updates of 4 rows: 4 in an epoch, the last one short
MODELS = {
    "cached": {},
    "lora": {"lora": {"r": 4, "lora_dropout": 0.3}},
    "moving": {"sync_every": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("base") / "model")


def run(folder, base, model, kill=10**9, resume=None, seed=1):
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(every=3, keep=1)
    checkpoints.directory = folder
    killer, losses = Kill(kill), Losses()
    module = kto(base, lambda params: torch.optim.AdamW(params, lr=1e-2), DROPOUT, **MODELS[model])
    L.seed_everything(seed)
    loop = trainer(
        max_epochs=2,
        accumulate_grad_batches=MICRO,
        enable_checkpointing=True,
        callbacks=[killer, losses, LastStep(), checkpoints],
        plugins=[AtomicCheckpointIO()],
    )
    data = kto_data(folder.parent, ROWS, batch_size=BATCH, validation=0.2)
    with contextlib.suppress(InterruptedError):
        loop.fit(module, data, ckpt_path=resume, weights_only=True)
    return Run(module, killer.seen, losses.values, folder)


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """Whole runs, one for each kind of reference."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}

    def whole(model):
        if model not in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OUMI_PL_CACHE", str(folder / "cache"))
                runs[model] = run(folder / model, base, model)
        return runs[model]

    return whole


@pytest.mark.parametrize(
    ("model", "kill"),
    [("cached", 1), ("cached", 6), ("cached", 8), ("cached", 13), ("lora", 8), ("moving", 8)],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, base, uninterrupted, model, kill):
    """Also in the middle of an update, whose divergence is estimated again."""
    whole = uninterrupted(model)
    assert any(line["train/kl"] > 0 for line in whole.losses)
    killed = run(tmp_path / "killed", base, model, kill)
    checkpoint = killed.checkpoint
    # another seed: whatever is drawn anew instead of restored shows
    seed = 1 if checkpoint is None or model == "lora" else 2
    resumed = run(tmp_path / "killed", base, model, resume=checkpoint, seed=seed)
    step = 0 if checkpoint is None else int(checkpoint.stem.split("-")[1])
    assert step == {1: 0, 6: 3, 8: 3, 13: 6}[kill]
    assert resumed.seen == whole.seen[step * MICRO :]
    assert resumed.losses == whole.losses[step:]
    assert_equal(weights(resumed.module), weights(whole.module))


def test_a_second_run_computes_no_reference(tmp_path, base, monkeypatch):
    """Neither of the rows nor of the mismatched rows, even with another seed and layout."""
    (tmp_path / "first").mkdir()
    run(tmp_path / "first" / "run", base, "cached")
    monkeypatch.setattr("oumi_pl.modules.reference.precompute", None)
    module = kto(base, lambda params: torch.optim.AdamW(params, lr=1e-2), DROPOUT)
    data = kto_data(tmp_path / "first", ROWS, batch_size=4, validation=0.2, packing=True)
    data.seed = 5
    trainer(max_epochs=1).fit(module, data)
    assert "from the cache" in module.notes[0]
