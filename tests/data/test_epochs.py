"""What an epoch and a run consist of under Lightning's flags: accumulation schedules, limits, overfitting."""

import contextlib
import itertools
import math
from collections import Counter

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.optim import Linear
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from tests.data.corpora import corpus, pretrain_data
from tests.modules.test_update import plain_loop
from tests.test_resume import Kill, newest
from tests.tiny import LLAMA, conversations, data, distance, dpo, dpo_data, module, sgd, trainer, weights, write_jsonl

ROWS = 10


def pretrain_module():
    return Pretrain(config=LLAMA, optimizer=sgd)


class Updates(L.Callback):
    """Records the examples of each update, by epoch."""

    def __init__(self):
        self.epochs = {}
        self._update = []
        self.validated = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._update += batch["sample_ids"]

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.epochs.setdefault(trainer.current_epoch, []).append(self._update)
            self._update = []

    def on_validation_batch_start(self, trainer, pl_module, batch, *_):
        self.validated.append(batch["sample_ids"])

    @property
    def all(self):
        return [update for updates in self.epochs.values() for update in updates]


def fit(sft, sft_data, *callbacks, ckpt_path=None, seed=1, **kwargs):
    seen = Updates()
    L.seed_everything(seed)
    # last: a killed run has not seen the batch that it was killed at
    loop = trainer(callbacks=[*callbacks, seen], **kwargs)
    with contextlib.suppress(InterruptedError):
        loop.fit(sft, sft_data, ckpt_path=ckpt_path, weights_only=True)
    return seen, loop


# ---- GradientAccumulationScheduler


def scheduler():
    return GradientAccumulationScheduler({1: 2, 2: 3})


@pytest.mark.parametrize("packing", [False, True])
def test_the_plan_follows_an_accumulation_schedule(tmp_path, packing):
    """Every row once in each epoch, in updates of 2, 4 and 6 rows, with the gradient of their mean."""
    sft = module(schedule=Linear())
    sft_data = data(tmp_path, ROWS, batch_size=2, packing=packing, max_length=256 if packing else 128)
    seen, loop = fit(sft, sft_data, scheduler(), max_epochs=3)
    for epoch, micro_batches in enumerate((1, 2, 3)):
        assert Counter(itertools.chain(*seen.epochs[epoch])) == Counter(range(ROWS))
        assert len(seen.epochs[epoch]) == math.ceil(sft_data.plan(0).rows / (2 * micro_batches))
    assert sft.total_steps() == len(seen.all) == loop.global_step
    if not packing:
        assert [len(update) for update in seen.all] == [2, 2, 2, 2, 2, 4, 4, 2, 6, 4]


def test_updates_of_a_schedule_equal_a_plain_loop(tmp_path):
    sft, sft_data = module(), data(tmp_path, ROWS, batch_size=2)
    seen, _ = fit(sft, sft_data, scheduler(), max_epochs=3)
    fresh = module()
    L.seed_everything(1)
    run = trainer(max_epochs=1)
    run.strategy.connect(fresh)
    fresh.model = fresh.build(sft_data.tokenizer)
    plain_loop(fresh, sft_data, seen.all)
    assert distance(weights(sft), weights(fresh)) < 1e-6


@pytest.mark.parametrize("kill", [7, 12, 16])
def test_a_run_with_a_schedule_is_resumed_exactly(tmp_path, kill):
    """Killed in epochs of 1, 2 and 3 micro-batches per update (5, 6 and 6 micro-batches long)."""

    def run(*more, **kwargs):
        sft = module(lambda params: torch.optim.AdamW(params, lr=1e-2), {"attention_dropout": 0.2})
        checkpoints = Checkpoints(every=1)
        checkpoints.directory = tmp_path / "checkpoints"
        checkpoints.directory.mkdir(exist_ok=True)
        seen, _ = fit(
            sft,
            data(tmp_path, ROWS, batch_size=2),
            scheduler(),
            *more,
            checkpoints,
            max_epochs=3,
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
            **kwargs,
        )
        return sft, seen

    whole, expected = run()
    for old in (tmp_path / "checkpoints").iterdir():
        old.unlink()
    _, before = run(Kill(kill))
    resumed, after = run(ckpt_path=newest(tmp_path / "checkpoints"), seed=2)
    assert before.all + after.all == expected.all
    assert distance(weights(resumed), weights(whole)) == 0


def test_a_stream_follows_an_accumulation_schedule(tmp_path):
    streamed = pretrain_data(corpus(tmp_path, 12), batch_size=2, shuffle_buffer=0)
    seen, loop = fit(pretrain_module(), streamed, scheduler(), max_epochs=3)
    rows = streamed.rows_per_pass
    for epoch, micro_batches in enumerate((1, 2, 3)):
        assert sorted(itertools.chain(*seen.epochs[epoch])) == list(range(rows))
        assert len(seen.epochs[epoch]) == math.ceil(rows / (2 * micro_batches))
    assert loop.global_step == streamed.updates(3)


# ---- the length of a run, which the learning rate follows


LENGTHS = {
    "max_epochs": ({"max_epochs": 3}, 9),
    "limit of whole updates": ({"max_epochs": 3, "limit_train_batches": 4}, 6),
    "limit within an update": ({"max_epochs": 3, "limit_train_batches": 3}, 6),
    "limit beyond an epoch": ({"max_epochs": 2, "limit_train_batches": 100}, 6),
    "a share": ({"max_epochs": 3, "limit_train_batches": 0.5}, 6),
    "max_steps within the limit": ({"max_epochs": 3, "max_steps": 4, "limit_train_batches": 4}, 4),
    "max_steps beyond the limit": ({"max_epochs": 3, "max_steps": 100, "limit_train_batches": 0.34}, 3),
    "overfit_batches": ({"max_epochs": 5, "overfit_batches": 2}, 5),
    "fast_dev_run": ({"fast_dev_run": 3}, 3),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_the_schedule_counts_the_updates_that_run(tmp_path, case):
    """3 updates of 2 micro-batches of 2 rows in an epoch; the rate falls in a straight line to 0 after the last."""
    limits, expected = LENGTHS[case]
    rates = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    accumulate = 1 if "fast_dev_run" in limits else 2
    sft = module(schedule=Linear())
    _, loop = fit(sft, data(tmp_path, ROWS, batch_size=2), Rates(), accumulate_grad_batches=accumulate, **limits)
    assert sft.total_steps() == loop.global_step == expected
    assert rates == pytest.approx([0.1 * (1 - step / expected) for step in range(expected)])


def test_a_restarted_stream_has_the_length_of_its_limit(tmp_path):
    streamed = pretrain_data(corpus(tmp_path, 12), batch_size=2, exhausted="restart")
    pretraining = pretrain_module()
    _, loop = fit(pretraining, streamed, max_epochs=2, limit_train_batches=3)
    assert pretraining.total_steps() == loop.global_step == 6


# ---- overfit_batches


@pytest.mark.parametrize("kind", ["padded", "packed", "pairs"])
def test_overfitting_trains_the_same_rows_in_each_epoch(tmp_path, kind):
    """Those that come first in the source; and validates on the same held-out rows."""
    validation = write_jsonl(tmp_path / "val.jsonl", conversations(8, seed=5))
    if kind == "pairs":
        run, built = dpo(), dpo_data(tmp_path, ROWS, batch_size=2)
    else:
        run = module()
        built = data(tmp_path, ROWS, batch_size=2, packing=kind == "packed", max_length=256, validation=validation)
    seen, _ = fit(run, built, max_epochs=3, overfit_batches=2)
    first, *others = seen.epochs.values()
    assert [first] * 2 == others
    assert 0 in first[0]
    if kind != "packed":
        assert first == [[0, 1], [2, 3]]
    if kind == "padded":
        assert len(seen.validated) == 6
        assert seen.validated[:2] * 3 == seen.validated


def test_overfitting_reads_a_stream_in_order(tmp_path):
    streamed = pretrain_data(corpus(tmp_path, 12), batch_size=2, shuffle_buffer=50)
    read = []

    class Read(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            read.append(batch["input_ids"].clone())

    fit(pretrain_module(), streamed, Read(), max_epochs=3, overfit_batches=2)
    assert len(read) == 6
    assert all(torch.equal(read[i], read[i % 2]) for i in range(6))
