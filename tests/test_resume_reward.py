"""A reward model killed at any moment and resumed: the same rows, bit-identical weights and metrics."""

import contextlib

import lightning as L
import pytest
import torch

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.stopping import LastStep
from oumi_pl.losses.reward import BCE
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from tests.models.test_lora import pretrained
from tests.test_resume import DROPOUT, Kill
from tests.test_resume_dpo import Losses, Run, assert_equal
from tests.tiny import reward, reward_data, trainer, weights

MICRO = 2
LORA = {"r": 4, "lora_dropout": 0.3}
MODELS = {"full": {}, "lora": {"lora": LORA}, "packing": {}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("base") / "model")


def run(folder, base, model, kill=10**9, resume=None, seed=1):
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(every=3, keep=1)
    checkpoints.directory = folder
    killer, losses = Kill(kill), Losses()
    adamw = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
    module = reward(base, adamw, DROPOUT, outcome_loss=BCE(), **MODELS[model])
    L.seed_everything(seed)
    loop = trainer(
        max_epochs=2,
        accumulate_grad_batches=MICRO,
        enable_checkpointing=True,
        callbacks=[killer, losses, LastStep(), checkpoints],
        plugins=[AtomicCheckpointIO()],
    )
    packing = {"packing": True, "batch_size": 1} if model == "packing" else {"batch_size": 2}
    rows = reward_data(folder.parent, 14, outcomes=5, validation=0.2, **packing)
    with contextlib.suppress(InterruptedError):
        loop.fit(module, rows, ckpt_path=resume, weights_only=True)
    return Run(module, killer.seen, losses.values, folder)


@pytest.mark.parametrize(("model", "kill"), [("full", 8), ("full", 13), ("lora", 8), ("packing", 4)])
def test_killed_and_resumed_is_bit_identical(tmp_path, base, model, kill):
    whole = run(tmp_path / "whole", base, model)
    killed = run(tmp_path / "killed", base, model, kill)
    assert killed.seen == whole.seen[:kill]
    checkpoint = killed.checkpoint
    step = 0 if checkpoint is None else int(checkpoint.stem.split("-")[1])
    # another seed: whatever is drawn again instead of restored shows, such as the head
    resumed = run(tmp_path / "killed", base, model, resume=checkpoint, seed=2 if step else 1)
    assert resumed.seen == whole.seen[step * MICRO :]
    assert resumed.losses == whole.losses[step:]
    head = "base_model.model.score.original_module.weight"  # PEFT's untrained copy, which is not used
    ours, theirs = ({n: w for n, w in weights(r.module).items() if n != head} for r in (resumed, whole))
    assert_equal(ours, theirs)
