"""Checkpoints: whole ones only, the newest kept, the best by a metric, and nothing in the middle of an update."""

import errno
import threading
import time

import lightning as L
import pytest
import torch

from oumi_pl.callbacks import checkpoint, export
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.errors import UserError
from oumi_pl.runs import background
from oumi_pl.runs.background import Background, snapshot
from oumi_pl.runs.checkpoints import AtomicCheckpointIO, rng_state, set_rng_state
from oumi_pl.runs.files import HALF
from tests.tiny import conversations, data, module, trainer, write_jsonl


def run(tmp_path, checkpoints, **kwargs):
    checkpoints.directory = tmp_path / "checkpoints"
    checkpoints.directory.mkdir(parents=True)
    validation = write_jsonl(tmp_path / "val.jsonl", conversations(5, seed=3))
    before = kwargs.pop("before", [])
    loop = trainer(
        **{"max_steps": 7, "accumulate_grad_batches": 2, "enable_checkpointing": True} | kwargs,
        callbacks=[*before, checkpoints],
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


# ---- asynchronous saves


class Hold(L.Callback):
    """Lets a checkpoint be written only once the next update is done, or the run waits for it."""

    def __init__(self, monkeypatch):
        self.released, self.held = threading.Event(), []
        copied, finish, write = checkpoint._copied, Checkpoints.finish, checkpoint._write_file

        def hold(*args):
            self.released.clear()
            return copied(*args)

        def release(checkpoints, trainer):
            self.released.set()
            finish(checkpoints, trainer)

        def write_late(checkpoint_io, content, half, path):
            self.held.append((path.name, path.exists()))
            assert self.released.wait(20)
            write(checkpoint_io, content, half, path)

        monkeypatch.setattr(checkpoint, "_copied", hold)
        monkeypatch.setattr(Checkpoints, "finish", release)
        monkeypatch.setattr(checkpoint, "_write_file", write_late)

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.released.set()


@pytest.mark.parametrize("copies", [True, False])
def test_asynchronous_saves_write_the_bytes_of_synchronous_ones(tmp_path, monkeypatch, copies):
    """Planted fault: without a copy, the checkpoint has weights of later updates."""
    settings = {"every": 3, "keep": 5, "monitor": "val/loss"}
    run(tmp_path / "waits", Checkpoints(**settings))
    hold = Hold(monkeypatch)
    if not copies:
        monkeypatch.setattr(checkpoint, "snapshot", lambda content: content)
    run(tmp_path / "goes-on", Checkpoints(**settings, asynchronous=True), before=[hold])
    files = {path.name: path.read_bytes() for path in (tmp_path / "waits/checkpoints").iterdir()}
    assert {*files} == {"best.ckpt", "step-00000003.ckpt", "step-00000006.ckpt", "step-00000007.ckpt"}
    written = {path.name: path.read_bytes() for path in (tmp_path / "goes-on/checkpoints").iterdir()}
    assert len(hold.held) >= 4
    assert (written == files) is copies


def test_old_checkpoints_stay_until_the_newer_one_is_written(tmp_path, monkeypatch):
    seen, write = [], checkpoint._write_file

    def look(checkpoint_io, content, half, path):
        seen.append(sorted(p.name for p in path.parent.iterdir()))
        write(checkpoint_io, content, half, path)

    monkeypatch.setattr(checkpoint, "_write_file", look)
    _, names = run(tmp_path, Checkpoints(every=3, asynchronous=True), limit_val_batches=0)
    assert seen == [[], ["step-00000003.ckpt"], ["step-00000006.ckpt"]]
    assert names == ["step-00000007.ckpt"]


def test_an_asynchronous_save_that_fails_ends_the_run_with_its_error(tmp_path, monkeypatch):
    write = checkpoint._write_file

    def full_disk(checkpoint_io, content, half, path):
        if path.name == "step-00000004.ckpt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(checkpoint_io, content, half, path)

    monkeypatch.setattr(checkpoint, "_write_file", full_disk)
    checkpoints = Checkpoints(every=2, asynchronous=True)
    with pytest.raises(OSError, match=r"No space left on device: .*step-00000004\.ckpt"):
        run(tmp_path, checkpoints, max_steps=1000)
    assert [p.name for p in checkpoints.directory.iterdir()] == ["step-00000002.ckpt"]


def test_an_error_in_training_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    write = checkpoint._write_file

    def write_late(*args):
        time.sleep(0.2)
        write(*args)

    class Fails(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                raise ValueError("in training")

    monkeypatch.setattr(checkpoint, "_write_file", write_late)
    checkpoints = Checkpoints(every=3, asynchronous=True)
    with pytest.raises(ValueError, match="in training"):
        run(tmp_path, checkpoints, before=[Fails()], limit_val_batches=0)
    assert [p.name for p in checkpoints.directory.iterdir()] == ["step-00000003.ckpt"]


def test_an_export_waits_for_the_best_weights(tmp_path, monkeypatch):
    write, present = checkpoint._write_file, []

    def write_late(*args):
        time.sleep(0.3)
        write(*args)

    class Exports(export.Export):
        def write(self, trainer, pl_module, folder, metrics):
            present.append({path.name for path in (folder / "checkpoints").iterdir()})

    monkeypatch.setattr(checkpoint, "_write_file", write_late)
    monkeypatch.setattr(export, "run_directory", lambda trainer: tmp_path)
    monkeypatch.setattr(export, "is_due", lambda *_: True)
    monkeypatch.setattr(export, "completed", lambda *_: None)
    run(tmp_path, Checkpoints(every=9, monitor="val/loss", asynchronous=True), before=[Exports()], max_steps=1)
    assert ["best.ckpt" in names for names in present] == [True]


def test_work_that_failed_is_raised_once_and_ends_the_work_after_it():
    background, done = Background(), []

    def fail():
        raise OSError("first")

    background.start(fail)
    background.start(lambda: done.append("second"))
    with pytest.raises(OSError, match="first"):
        background.wait()
    background.start(lambda: done.append("third"))
    background.wait()
    assert done == ["third"]


def test_a_snapshot_shares_memory_where_the_original_does(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    content = {"tied": [weight.detach(), weight.detach()[1]], "state": (weight.detach().t(), {"step": 3}), "n": {1, 2}}
    copied = snapshot(content)
    with torch.no_grad():
        weight.add_(100)
    assert copied["tied"][0][1, 0] == copied["tied"][1][0] == copied["state"][0][0, 1] == 3
    copied["tied"][0][1, 0] = -1
    assert copied["tied"][1][0] == copied["state"][0][0, 1] == -1
    assert content["n"] == copied["n"]
    assert background._on_host(torch.eye(2).to_sparse(), {}).to_dense().equal(torch.eye(2))


def test_strategies_that_write_in_their_own_way_are_refused(tmp_path):
    class Other(L.pytorch.strategies.SingleDeviceStrategy):
        def save_checkpoint(self, *args, **kwargs):
            pass

    with pytest.raises(UserError, match=r"checkpoint.asynchronous: Other writes .* strategy ddp or fsdp2"):
        run(tmp_path, Checkpoints(asynchronous=True), strategy=Other(device="cpu"))
