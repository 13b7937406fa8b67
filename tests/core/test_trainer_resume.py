"""Killed and resumed equals uninterrupted, to the bit."""

import json
import random

import datasets
import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from oumi_pl.core.trainers import Trainer
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.runs.checksums import DamagedError
from tests.core.test_trainer import Points, Regression, Stream, Worse, llama, logged, params, rows_of, token_rows


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class Noisy(Points):
    """Draws from torch's and Python's generators with each row."""

    def __getitem__(self, i):
        row = super().__getitem__(i)
        return row | {"x": row["x"] + 0.1 * torch.randn(3) + 0.1 * random.random()}


class Resumable(IterableDataset):
    """Knows where it is, and counts what it reads."""

    def __init__(self, rows):
        self.rows = rows
        self.at = self.read = 0

    def __iter__(self):
        while self.at < len(self.rows):
            self.at, self.read = self.at + 1, self.read + 1
            yield self.rows[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def points():
    return [Points(11)[i] for i in range(11)]


def shuffled():
    rows = [{"input_ids": row["input_ids"]} for row in token_rows(11)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=0, buffer_size=4)


KINDS = {
    "map-style": (Regression, lambda: Points(), {}),
    "rows that draw from the generators": (Regression, lambda: Noisy(), {}),
    "read by workers": (Regression, lambda: Points(), {"dataloader_num_workers": 1}),
    "iterable": (Regression, lambda: Stream(points()), {}),
    "iterable, read by a worker": (Regression, lambda: Stream(points()), {"dataloader_num_workers": 2}),
    "iterable with a state": (Regression, lambda: Resumable(points()), {}),
    "transformers": (lambda: llama(attention_dropout=0.2), lambda: token_rows(10), {}),
    "a shuffled stream of datasets": (llama, lambda: shuffled(), {}),
}


def ended(folder):
    """Weights, and all else that training goes on from."""
    state = torch.load(folder / "training_state.pt", weights_only=True)
    return load_file(folder / "model.safetensors"), state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def run(path, kind, killed_after=None, **extra):
    make, data, more = KINDS[kind]
    values = {
        "max_steps": 9,
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 3,
        "learning_rate": 0.01,
    }
    values |= {"warmup_steps": 2, "lr_scheduler_type": "cosine"} | more | extra
    callbacks = [Kill(killed_after)] if killed_after is not None else []
    tokenizer = None if make is Regression else ByteTokenizer().build()
    return Trainer(make(), tokenizer, params(path, **values), data(), callbacks=callbacks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("killed_after", [3, 5, 7])  # two of them within an epoch of 3 updates, one at its end
def test_killed_and_resumed_equals_uninterrupted(tmp_path, kind, killed_after):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, kind).train()
    with pytest.raises(Killed):
        run(cut, kind, killed_after).train()
    torch.manual_seed(99)
    resumed = run(cut, kind, try_resume_from_last_checkpoint=True)
    resumed.train()
    assert same(ended(cut / "checkpoint-9"), ended(whole / "checkpoint-9"))
    exact = ("train/loss", "train/grad_norm", "learning_rate", "epoch", "global_step", "total_tokens_seen")
    for name in exact:
        assert logged(cut, name) == logged(whole, name)
    histories = [json.loads((p / "trainer_state.json").read_text())["log_history"][:-1] for p in (whole, cut)]
    assert histories[0] == histories[1]


def test_from_checkpoints_that_are_written_after_epochs(tmp_path):
    for kind in ("map-style", "iterable with a state"):
        folder, rare = tmp_path / kind, {"save_steps": 0, "save_epoch": True}
        run(folder / "whole", kind, **rare).train()
        with pytest.raises(Killed):
            run(folder / "cut", kind, 7, **rare).train()
        run(folder / "cut", kind, **rare).train(resume_from_checkpoint=str(folder / "cut"))
        assert same(ended(folder / "cut" / "checkpoint-9"), ended(folder / "whole" / "checkpoint-9"))


def test_an_update_that_a_callback_breaks_off_is_done_again(tmp_path):
    class Breaks(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 4

    def trainer(path, kind):
        made = run(path, kind)
        made.model.dropout.p = 0  # what the broken update has drawn is drawn
        return made

    for kind in ("map-style", "iterable with a state"):
        whole, cut = tmp_path / kind / "whole", tmp_path / kind / "cut"
        trainer(whole, kind).train()
        broken = trainer(cut, kind)
        broken._flow.handler.add_callback(Breaks())
        broken.train()
        assert broken.state.global_step == 4
        trainer(cut, kind).train(resume_from_checkpoint=str(cut))
        assert logged(cut) == logged(whole)
        assert same(load_file(cut / "model.safetensors"), load_file(whole / "model.safetensors"))


@pytest.mark.parametrize("step", [2, 3, 5, 6])
def test_from_the_end_of_an_epoch_too(tmp_path, step):
    """10 rows by 4 are epochs of 3 updates."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, "map-style", save_steps=1).train()
    with pytest.raises(Killed):
        run(cut, "map-style", step, save_steps=1).train()
    run(cut, "map-style", save_steps=1).train(resume_from_checkpoint=str(cut / f"checkpoint-{step}"))
    assert same(ended(cut / "checkpoint-9"), ended(whole / "checkpoint-9"))


def test_a_dataset_with_a_state_is_not_read_again(tmp_path):
    def trained(killed_after, **values):
        dataset = Resumable([Points(40)[i] for i in range(40)])
        values = params(tmp_path, save_steps=2, gradient_accumulation_steps=2, **values)
        callbacks = [Kill(killed_after)]
        with pytest.raises(Killed):
            Trainer(Regression(), args=values, train_dataset=dataset, callbacks=callbacks).train()
        return dataset.read

    assert trained(7, max_steps=9) >= 28
    # from row 24 on: the update of 4 rows that ends before the second kill, and three that are fetched ahead
    assert trained(7, max_steps=9, try_resume_from_last_checkpoint=True) <= 16


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path):
    run(tmp_path, "map-style", max_steps=4, lr_scheduler_type="constant").train()
    run(tmp_path, "map-style", lr_scheduler_type="constant", try_resume_from_last_checkpoint=True).train()
    run(tmp_path / "whole", "map-style", lr_scheduler_type="constant").train()
    assert same(ended(tmp_path / "checkpoint-9"), ended(tmp_path / "whole" / "checkpoint-9"))


def test_a_finished_run_that_is_resumed_does_nothing(tmp_path):
    run(tmp_path, "map-style").train()
    before, rows = ended(tmp_path / "checkpoint-9"), rows_of(tmp_path)
    run(tmp_path, "map-style", try_resume_from_last_checkpoint=True).train()
    assert same(ended(tmp_path / "checkpoint-9"), before)
    assert rows_of(tmp_path) == rows
    assert same(load_file(tmp_path / "model.safetensors"), before[0])


def test_callbacks_of_lightning_go_on_from_their_state(tmp_path):
    class Counts(L.Callback):
        updates = 0

        def on_train_batch_end(self, *_):
            self.updates += 1

        def state_dict(self):
            return {"updates": self.updates}

        def load_state_dict(self, state):
            self.updates = state["updates"]

    for steps in (2, 6):
        counts = Counts()
        values = params(tmp_path, max_steps=steps, save_steps=2, try_resume_from_last_checkpoint=steps == 6)
        Trainer(Regression(), args=values, train_dataset=Points(), callbacks=[counts]).train()
    assert counts.updates == 6


def test_only_checkpoints_that_fit_are_gone_on_from(tmp_path):
    run(tmp_path, "map-style", max_steps=2).train()
    with pytest.raises(UserError, match="is not there; name a checkpoint-N folder"):
        run(tmp_path, "map-style").train("nowhere")
    with pytest.raises(UserError, match="4 rows per update, this run has 2"):
        run(tmp_path, "map-style", gradient_accumulation_steps=1).train(str(tmp_path))
    other = Trainer(torch.nn.Linear(1, 1), args=params(tmp_path), train_dataset=Points())
    with pytest.raises(UserError, match="the weights are of another model"):
        other.train(str(tmp_path))


def flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_taken(tmp_path, caplog, name):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, "map-style", max_steps=6).train()
    run(cut, "map-style", max_steps=4).train()
    flip(cut / "checkpoint-4" / name)
    with pytest.raises(DamagedError, match=rf"checkpoint-4 is damaged: its file {name} is not what its checksum says"):
        run(cut, "map-style", max_steps=6).train(str(cut / "checkpoint-4"))
    run(cut, "map-style", max_steps=6, try_resume_from_last_checkpoint=True).train()
    assert f"checkpoint-4 is damaged (its file {name} is not what its checksum says)" in caplog.text
    assert same(ended(cut / "checkpoint-6"), ended(whole / "checkpoint-6"))
    for folder in cut.glob("checkpoint-?"):
        flip(folder / name)
    with pytest.raises(UserError, match=r"training\.resume_from_checkpoint: all checkpoints in .* are damaged"):
        run(cut, "map-style", max_steps=8).train(str(cut))


def test_damaged_weights_of_a_finished_run_are_not_built_upon(tmp_path):
    trainer = run(tmp_path, "transformers", max_steps=2)
    trainer.train()
    trainer.save_model()
    tokenizer = ByteTokenizer().build()
    build_model(str(tmp_path), tokenizer=tokenizer)
    flip(tmp_path / "model.safetensors")
    with pytest.raises(DamagedError, match=r"its file model\.safetensors is not what its checksum says"):
        build_model(str(tmp_path), tokenizer=tokenizer)
    trainer._written = None
    trainer.save_model()  # into the same folder: the checksums are those of the new files
    build_model(str(tmp_path), tokenizer=tokenizer)


def test_a_checkpoint_of_other_trained_weights_is_refused(tmp_path):
    run(tmp_path, "map-style", max_steps=2).train()
    model = Regression()
    model.layer.bias.requires_grad_(False)
    other = Trainer(model, args=params(tmp_path, gradient_accumulation_steps=2), train_dataset=Points())
    with pytest.raises(UserError, match=r"another optimizer or model: 2 weights were trained, in groups of \[1, 1\]"):
        other.train(str(tmp_path))


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    extra = {"save_total_limit": 2, "metric_for_best_model": "loss"}
    values = params(tmp_path, max_steps=5, save_steps=1, eval_strategy="steps", eval_steps=1, trainer_kwargs=extra)
    Trainer(Worse(), args=values, train_dataset=Points(), eval_dataset=Points(8)).train()
    assert logged(tmp_path, "val/loss") == [1, 0, 1, 2, 3]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
