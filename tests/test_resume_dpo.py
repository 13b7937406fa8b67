"""DPO killed at any moment and resumed: the same pairs, the same reference, bit-identical weights."""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.stopping import LastStep
from oumi_pl.errors import UserError
from oumi_pl.losses.preference import Sigmoid
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from tests.models.test_lora import pretrained
from tests.test_resume import DROPOUT, Kill, newest
from tests.tiny import dpo, dpo_data, trainer, weights

ROWS, BATCH, MICRO = 14, 2, 2  # updates of 4 pairs: 4 in an epoch, the last one short
LORA = {"r": 4, "lora_dropout": 0.3}


class Centred(Sigmoid, nn.Module):
    """A loss that keeps a running mean."""

    def __init__(self):
        nn.Module.__init__(self)
        Sigmoid.__init__(self)
        self.register_buffer("mean", torch.zeros(()))

    def logits(self, pairs):
        logits = super().logits(pairs)
        if logits.requires_grad:
            self.mean.lerp_(logits.detach().mean(), 0.5)
        return logits - self.mean


MODELS = {
    "cached": {},
    "online": {"reference": "online"},
    "lora": {"lora": LORA},
    "moving": {"sync_every": 2},
    "moving-lora": {"sync_every": 4, "mixup": 0.3, "lora": LORA},
    "state": {"lora": LORA, "loss": Centred},
}


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.values.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


@dataclass
class Run:
    module: Any
    seen: list
    losses: list
    folder: Path

    @property
    def checkpoint(self):
        return newest(self.folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("base") / "model")


def run(folder, base, model, kill=10**9, resume=None, seed=1, **kwargs):
    folder.mkdir(exist_ok=True)
    checkpoints = Checkpoints(every=3, keep=1)
    checkpoints.directory = folder
    killer, losses = Kill(kill), Losses()
    arguments = {name: value() if isinstance(value, type) else value for name, value in MODELS[model].items()}
    module = dpo(base, lambda params: torch.optim.AdamW(params, lr=1e-2), DROPOUT, **arguments)
    L.seed_everything(seed)
    loop = trainer(
        **{"max_epochs": 2, "accumulate_grad_batches": MICRO, "enable_checkpointing": True} | kwargs,
        callbacks=[killer, losses, LastStep(), checkpoints],
        plugins=[AtomicCheckpointIO()],
    )
    with contextlib.suppress(InterruptedError):
        loop.fit(module, rows(folder), ckpt_path=resume, weights_only=True)
    return Run(module, killer.seen, losses.values, folder)


def rows(folder):
    return dpo_data(folder.parent, ROWS, batch_size=BATCH, validation=0.2)


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
    # the checkpoint is of step 3 or 6: moving references have moved, or are about to
    [("cached", 1), ("cached", 6), ("cached", 13), *((model, 8) for model in MODELS if model != "cached")],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, base, uninterrupted, model, kill):
    whole = uninterrupted(model)
    killed = run(tmp_path / "killed", base, model, kill)
    assert killed.seen == whole.seen[:kill]
    checkpoint = killed.checkpoint
    # another seed: whatever is drawn anew instead of restored shows. But adapters are drawn, and copies begin with them
    seed = 1 if checkpoint is None or model == "moving-lora" else 2
    resumed = run(tmp_path / "killed", base, model, resume=checkpoint, seed=seed)
    step = 0 if checkpoint is None else int(checkpoint.stem.split("-")[1])
    assert step == {1: 0, 6: 3, 8: 3, 13: 6}[kill]
    assert resumed.seen == whole.seen[step * MICRO :]
    assert resumed.losses == whole.losses[step:]
    assert_equal(weights(resumed.module), weights(whole.module))
    if hasattr(whole.module.reference.opened, "model"):
        ours, theirs = (dict(r.module.reference.opened.model.named_parameters()) for r in (resumed, whole))
        assert_equal(ours, theirs)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def reference_logps(module):
    store = module.reference.opened.stores["train"]
    return torch.from_numpy(store.logps(range(len(store.offsets) - 1)).copy())


def test_without_its_cache_the_reference_is_computed_from_where_training_started(tmp_path, base, uninterrupted):
    """Not from the weights of the checkpoint, which have been trained."""
    killed = run(tmp_path / "killed", base, "cached", 8)
    shutil.rmtree(tmp_path / "cache" / "reference")
    resumed = run(tmp_path / "killed", base, "cached", resume=killed.checkpoint).module
    assert "computed before training" in resumed.notes[0]
    whole = uninterrupted("cached").module
    torch.testing.assert_close(reference_logps(resumed), reference_logps(whole), rtol=0, atol=1e-5)
    assert_equal(weights(resumed), weights(whole))
    assert resumed.reference._kept is None, "the copy stays in memory"


@pytest.mark.parametrize("model", ["cached", "lora", "moving"])
def test_validation_of_a_checkpoint_compares_with_the_reference_it_was_trained_with(
    tmp_path, base, uninterrupted, model
):
    whole = uninterrupted(model)
    expected = float(whole.module.trainer.callback_metrics["val/loss"])
    assert expected != pytest.approx(0.693147, abs=1e-4)
    actual = trainer().validate(
        dpo(base, **MODELS[model]), rows(tmp_path / "x"), ckpt_path=whole.checkpoint, weights_only=True, verbose=False
    )
    assert actual[0]["val/loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("model", ["cached", "online", "moving"])
def test_another_model_to_start_from_is_refused(tmp_path, base, uninterrupted, model):
    """The reference would be another one too, in the middle of a run."""
    other = pretrained(tmp_path / "other", initializer_range=0.03)
    with pytest.raises(UserError, match=r"has changed since, and the reference with it: .*other gives other weights"):
        run(tmp_path / "run", other, model, resume=uninterrupted(model).checkpoint)


class RestoresLate(SingleDeviceStrategy):
    """Restores weights after `on_fit_start`, as sharding strategies do."""

    restore_checkpoint_after_setup = True


@pytest.mark.parametrize("model", ["cached", "lora"])
@pytest.mark.parametrize("late", [False, True])
def test_only_where_training_starts_policy_and_reference_are_equal(tmp_path, base, recwarn, model, late):
    killed = run(tmp_path / "killed", base, model, 8)
    recwarn.clear()
    strategy = {"strategy": RestoresLate(device=torch.device("cpu"))} if late else {}
    run(tmp_path / "killed", base, model, resume=killed.checkpoint, max_epochs=1, **strategy)
    assert [str(w.message) for w in recwarn if "cached log-probabilities" in str(w.message)] == []
