"""Checkpoints: whole ones only, the newest kept, the best by a metric, and nothing in the middle of an update."""

import lightning as L
import pytest
import torch

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.errors import UserError
from oumi_pl.runs.checkpoints import AtomicCheckpointIO, rng_state, set_rng_state
from oumi_pl.runs.files import HALF
from tests.tiny import conversations, data, module, trainer, write_jsonl


def run(tmp_path, checkpoints, **kwargs):
    checkpoints.directory = tmp_path / "checkpoints"
    checkpoints.directory.mkdir()
    validation = write_jsonl(tmp_path / "val.jsonl", conversations(5, seed=3))
    loop = trainer(
        **{"max_steps": 7, "accumulate_grad_batches": 2, "enable_checkpointing": True} | kwargs,
        callbacks=[checkpoints],
        plugins=[AtomicCheckpointIO()],
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    sft = module()
    L.seed_everything(0)
    loop.fit(sft, data(tmp_path, 16, batch_size=2, validation=validation))
    return sft, sorted(p.name for p in checkpoints.directory.iterdir())


def test_the_newest_are_kept_and_the_end_is_saved(tmp_path):
    _, names = run(tmp_path, Checkpoints(every=2, keep=2))
    assert names == ["step-00000006.ckpt", "step-00000007.ckpt"]


def test_the_best_is_the_step_with_the_lowest_metric(tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0])
    seen = {}
    original = Checkpoints._keep_best

    def scored(self, trainer, directory, monitor):
        trainer.callback_metrics[monitor] = torch.tensor(next(scores))
        seen[trainer.global_step] = {n: p.clone() for n, p in trainer.lightning_module.state_dict().items()}
        trainer._logger_connector._callback_metrics[monitor] = trainer.callback_metrics[monitor]
        original(self, trainer, directory, monitor)

    monkeypatch.setattr(Checkpoints, "_keep_best", scored)
    checkpoints = Checkpoints(every=100, monitor="val/fake")
    _, names = run(tmp_path, checkpoints)
    assert "best.ckpt" in names
    assert checkpoints.best_score == 1.0
    best = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)
    assert all(torch.equal(value, seen[2][name]) for name, value in best["state_dict"].items())
    assert "optimizer_states" not in best


def test_a_checkpoint_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert not list(tmp_path.glob(f"*{HALF}"))


def test_generators_are_restored_without_running_code(tmp_path):
    state = rng_state()
    torch.save(state, tmp_path / "rng.pt")
    expected = torch.rand(3)
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert torch.equal(torch.rand(3), expected)


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        Checkpoints(every=0)
