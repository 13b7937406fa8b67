"""Killed at any moment and resumed: the same samples in the same order, bit-identical weights, as if never killed."""

import contextlib
import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.stopping import LastStep
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.modules.sft import SFT
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from tests.models.test_lora import pretrained
from tests.tiny import conversations, data, module, trainer, weights, write_jsonl

DROPOUT = {"attention_dropout": 0.2}
ROWS, BATCH, MICRO = 14, 2, 2  # updates of 4 rows: 4 in an epoch, the last one short


class Kill(L.Callback):
    """Ends training after so many micro-batches, in the middle of whatever is going on."""

    def __init__(self, after):
        self.after = after
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(self.seen) == self.after:
            raise InterruptedError
        self.seen.append(batch["sample_ids"])


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def run(
    tmp_path, directory, kill=10**9, every=3, resume=None, seed=1, workers=0, validation=0.2, callbacks=(), **kwargs
):
    checkpoints = Checkpoints(every=every, keep=1)
    checkpoints.directory = directory
    directory.mkdir(exist_ok=True)
    killer = Kill(kill)
    sft = module(adamw, DROPOUT)
    L.seed_everything(seed)
    loop = trainer(
        **{"max_epochs": 3, "accumulate_grad_batches": MICRO, "enable_checkpointing": True} | kwargs,
        callbacks=[killer, LastStep(), checkpoints],
        plugins=[AtomicCheckpointIO()],
    )
    sft_data = data(tmp_path, ROWS, batch_size=BATCH, workers=workers, validation=validation)
    loop.callbacks[:0] = callbacks
    with contextlib.suppress(InterruptedError):
        loop.fit(sft, sft_data, ckpt_path=resume, weights_only=True)
    return sft, killer.seen


def newest(directory):
    return max(directory.glob("step-*.ckpt"), default=None)


class Epochs(L.Callback):
    """Keeps the epochs that were logged, by step."""

    def __init__(self):
        self.by_step = {}

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.by_step[trainer.global_step] = float(trainer.callback_metrics["epoch"])


@pytest.mark.parametrize("validation", [None, 0.2])
def test_a_run_resumed_at_the_end_of_an_epoch_and_again_within_the_next_counts_its_epochs(tmp_path, validation):
    whole, resumed = Epochs(), Epochs()
    _, seen = run(tmp_path, tmp_path / "whole", every=1, validation=validation, callbacks=[whole])
    for kill in (len(seen) // 3, 3, 10**9):  # at the end of the first epoch, after an update of the second, and never
        resume = newest(tmp_path / "killed")
        run(tmp_path, tmp_path / "killed", kill, 1, resume, validation=validation, callbacks=[resumed])
    assert resumed.by_step == whole.by_step


class MetricsAtEpochEnds(L.Callback):
    """Keeps the metrics that a callback sees at the end of each epoch."""

    def __init__(self):
        self.metrics = {}

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics[trainer.current_epoch] = {
            name: float(value) for name, value in trainer.callback_metrics.items() if "second" not in name
        }


@pytest.mark.parametrize("epochs", [1, 2])
def test_callbacks_see_the_metrics_of_the_killed_process_at_the_end_of_an_epoch(tmp_path, epochs):
    whole, resumed = MetricsAtEpochEnds(), MetricsAtEpochEnds()
    _, seen = run(tmp_path, tmp_path / "whole", every=1, callbacks=[whole])
    run(tmp_path, tmp_path / "killed", epochs * len(seen) // 3, every=1)
    # it reads the metric at the end of the epoch, before this process has validated
    stopping = EarlyStopping("val/loss", patience=9, check_on_train_epoch_end=True)
    run(tmp_path, tmp_path / "killed", every=1, resume=newest(tmp_path / "killed"), callbacks=[stopping, resumed])
    assert [*resumed.metrics] == [*range(epochs - 1, 3)]
    assert all(metrics == whole.metrics[epoch] for epoch, metrics in resumed.metrics.items())
    assert "val/loss" in resumed.metrics[epochs - 1]


@pytest.mark.parametrize("kill", [1, 5, 6, 7, 8, 11, 12, 13, 17])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, kill):
    whole, seen = run(tmp_path, tmp_path / "whole")
    _, before = run(tmp_path, tmp_path / "killed", kill)
    assert before == seen[:kill]
    checkpoint = newest(tmp_path / "killed")
    # another seed: whatever is drawn anew instead of restored shows
    resumed, after = run(tmp_path, tmp_path / "killed", resume=checkpoint, seed=1 if checkpoint is None else 2)
    step = 0 if checkpoint is None else int(checkpoint.stem.split("-")[1])
    assert after == seen[step * MICRO :]
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(whole).values(), strict=True))


def test_filtered_rows_without_duplicates_in_shares_of_tokens_are_resumed(tmp_path, monkeypatch):
    rows = [row | {"quality": i % 3} for i, row in enumerate(conversations(30))]
    short = conversations(6, seed=1, longest=3)
    sources = [
        Source(write_jsonl(tmp_path / "a.jsonl", [*rows, *rows[:9]]), where="quality > 0", weight=2.0),
        Source(write_jsonl(tmp_path / "b.jsonl", [*short, *rows[:5]]), weight=1.0),
    ]

    def use(**options):
        chosen = {"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0, "duplicates": "drop"} | options
        monkeypatch.setattr(f"{__name__}.data", lambda path, n, **kwargs: SFTData(sources, **(chosen | kwargs)))

    use(weight_by="tokens")
    whole, seen = run(tmp_path, tmp_path / "whole", every=2)
    assert run(tmp_path, tmp_path / "killed", 7, every=2)[1] == seen[:7]
    checkpoint = newest(tmp_path / "killed")
    for changed in ({"weight_by": "rows"}, {"weight_by": "tokens", "duplicates": "keep"}):
        use(**changed)
        with pytest.raises(UserError, match=r"data\.train: the rows, .* or their shares have changed since"):
            run(tmp_path, tmp_path / "killed", resume=checkpoint)
    use(weight_by="tokens")
    resumed, after = run(tmp_path, tmp_path / "killed", resume=checkpoint, seed=2, every=2)
    assert after == seen[int(checkpoint.stem.split("-")[1]) * MICRO :]
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(whole).values(), strict=True))


def test_killed_in_the_middle_of_max_steps(tmp_path):
    limits = {"max_steps": 7, "max_epochs": None}
    whole, seen = run(tmp_path, tmp_path / "whole", **limits)
    run(tmp_path, tmp_path / "killed", 11, **limits)
    resumed, after = run(tmp_path, tmp_path / "killed", resume=newest(tmp_path / "killed"), seed=2, **limits)
    assert after == seen[3 * MICRO :]
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(whole).values(), strict=True))


@pytest.mark.parametrize("validation", [0.2, None])
@pytest.mark.parametrize("end", [4, 5, 6])
def test_an_extended_run_equals_one_that_was_planned_longer(tmp_path, end, validation):
    """Its last checkpoint stands in the middle of an epoch, or at the end of one (3 updates each)."""
    settings = {"every": 100, "max_epochs": None, "validation": validation}
    whole, seen = run(tmp_path, tmp_path / "whole", max_steps=8, **settings)
    run(tmp_path, tmp_path / "short", max_steps=end, **settings)
    last = newest(tmp_path / "short")
    longer, after = run(tmp_path, tmp_path / "short", resume=last, seed=2, max_steps=8, **settings)
    assert after == seen[end * MICRO :]
    assert all(torch.equal(a, b) for a, b in zip(weights(longer).values(), weights(whole).values(), strict=True))


def test_without_the_generators_it_would_differ(tmp_path, monkeypatch):
    whole, _ = run(tmp_path, tmp_path / "whole")
    run(tmp_path, tmp_path / "killed", 8)
    monkeypatch.setattr("oumi_pl.modules.update.set_rng_state", lambda state: None)
    resumed, _ = run(tmp_path, tmp_path / "killed", resume=newest(tmp_path / "killed"), seed=2)
    assert any(not torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(whole).values(), strict=True))


def test_resumes_with_another_layout_of_the_same_update(tmp_path):
    """Elastic: 2 x 2 rows become 1 x 4, and each update still sees the same rows."""
    _, seen = run(tmp_path, tmp_path / "whole")
    updates = [sorted(i for batch in seen[k : k + MICRO] for i in batch) for k in range(0, len(seen), MICRO)]
    run(tmp_path, tmp_path / "killed", 8)

    kill = Kill(10**9)
    sft_data = data(tmp_path, ROWS, batch_size=1, validation=0.2)
    loop = trainer(max_epochs=3, accumulate_grad_batches=4, callbacks=[kill])
    loop.fit(module(adamw, DROPOUT), sft_data, ckpt_path=newest(tmp_path / "killed"), weights_only=True)
    after = [sorted(i for batch in kill.seen[k : k + 4] for i in batch) for k in range(0, len(kill.seen), 4)]
    assert after == updates[3:]
    assert loop.global_step == len(updates)


def test_refuses_another_size_of_update(tmp_path):
    run(tmp_path, tmp_path / "killed", 8)
    loop = trainer(max_epochs=3, accumulate_grad_batches=4)
    with pytest.raises(Exception, match="made with 4 rows per update, this run has 8"):
        loop.fit(
            module(adamw, DROPOUT),
            data(tmp_path, ROWS, batch_size=BATCH, validation=0.2),
            ckpt_path=newest(tmp_path / "killed"),
            weights_only=True,
        )


def test_settings_of_the_recipe_win_over_the_checkpoint(tmp_path):
    run(tmp_path, tmp_path / "killed", 8)
    sft = module(lambda params: torch.optim.AdamW(params, lr=5e-4, weight_decay=0.3), DROPOUT)
    loop = trainer(max_epochs=3, accumulate_grad_batches=MICRO)
    sft_data = data(tmp_path, ROWS, batch_size=BATCH, validation=0.2)
    loop.fit(sft, sft_data, ckpt_path=newest(tmp_path / "killed"), weights_only=True)
    assert {group["lr"] for group in loop.optimizers[0].param_groups} == {5e-4}
    assert {group["weight_decay"] for group in loop.optimizers[0].param_groups} == {0.3, 0.0}


class State(L.Callback):
    """Records the moments of the optimizer at the start of training, by name of their weight."""

    def on_train_start(self, trainer, pl_module):
        state = trainer.optimizers[0].state
        self.moments = {name: state[p]["exp_avg"].clone() for name, p in pl_module.named_parameters() if p in state}
        self.trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("before", "now"),
    [([], ["model.layers.0"]), (["model.layers.0"], []), (["model.layers.0"], ["model.embed_tokens"])],
    ids=str,
)
def test_resumes_with_other_frozen_weights(tmp_path, before, now):
    """The state of the optimizer goes with the weights: those that are trained for the first time start anew."""

    def fit(freeze, *callbacks, resume=None, **kwargs):
        sft = module(adamw, freeze=freeze)
        plugins = [AtomicCheckpointIO()]
        loop = trainer(callbacks=[*callbacks], plugins=plugins, enable_checkpointing=resume is None, **kwargs)
        loop.fit(sft, data(tmp_path, ROWS, batch_size=BATCH), ckpt_path=resume, weights_only=True)
        return sft

    checkpoints = Checkpoints(every=2)
    checkpoints.directory = tmp_path / "checkpoints"
    checkpoints.directory.mkdir()
    first = fit(before, checkpoints, max_steps=2)
    saved = torch.load(newest(checkpoints.directory), weights_only=True)["optimizer_states"][0]["state"]
    assert saved.keys() == {name for name, p in first.named_parameters() if p.requires_grad}
    state = State()
    resumed = fit(now, state, resume=newest(checkpoints.directory), max_steps=4)
    assert state.moments.keys() == saved.keys() & state.trained
    assert state.trained == {n for n, _ in resumed.named_parameters() if not any(frozen in n for frozen in now)}
    assert all(torch.equal(value, saved[name]["exp_avg"]) for name, value in state.moments.items())
    after, start = dict(resumed.named_parameters()), dict(first.named_parameters())
    assert {name for name in after if not torch.equal(after[name], start[name])} == state.trained


@pytest.mark.parametrize(
    ("before", "now"),
    [([], ["model.layers.0"]), (["model.layers.0"], []), (["model.layers.0"], ["model.layers.1"])],
    ids=str,
)
def test_resumes_lora_with_other_frozen_weights(tmp_path, before, now):
    """Adapters that are frozen since keep what they have learned, also in the next checkpoint."""

    def fit(freeze, *callbacks, resume=None, steps):
        sft = SFT(base, lora={"r": 2, "init_lora_weights": "gaussian"}, freeze=freeze, optimizer=adamw)
        checkpoints = Checkpoints(every=2, keep=9)
        checkpoints.directory = tmp_path / "checkpoints"
        checkpoints.directory.mkdir(exist_ok=True)
        settings = {"plugins": [AtomicCheckpointIO()], "enable_checkpointing": True, "max_steps": steps}
        loop = trainer(callbacks=[checkpoints, *callbacks], **settings)
        loop.fit(sft, data(tmp_path, ROWS, batch_size=BATCH), ckpt_path=resume, weights_only=True)
        return sft, torch.load(newest(checkpoints.directory), weights_only=True)

    base, state = pretrained(tmp_path), State()
    first, saved = fit(before, steps=2)
    adapters = {name for name, _ in first.named_parameters() if "lora_" in name}
    assert saved["state_dict"].keys() == adapters
    assert saved["optimizer_states"][0]["state"].keys() == {n for n in adapters if not any(f in n for f in before)}
    resumed, later = fit(now, state, resume=newest(tmp_path / "checkpoints"), steps=4)
    trained = {name for name in adapters if not any(frozen in name for frozen in now)}
    assert state.trained == trained
    assert state.moments.keys() == saved["optimizer_states"][0]["state"].keys() & trained
    assert later["state_dict"].keys() == adapters
    after = dict(resumed.named_parameters())
    assert {n for n in adapters if not torch.equal(after[n], saved["state_dict"][n])} == trained
    assert all(torch.equal(after[name], later["state_dict"][name]) for name in adapters)
    whole, _ = fit(
        now, resume=tmp_path / "checkpoints/step-00000004.ckpt", steps=5
    )  # all are frozen or trained as before
    assert {n for n in adapters if not torch.equal(dict(whole.named_parameters())[n], after[n])} == trained


RECIPE = """
model:
  class_path: SFT
  init_args:
    config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
             num_key_value_heads: 2, max_position_embeddings: 512, attention_dropout: 0.2}}
    optimizer: {{class_path: AdamW, init_args: {{lr: 1.0e-2}}}}
    schedule: {{class_path: Cosine, init_args: {{warmup: 2}}}}
data:
  class_path: SFTData
  init_args:
    train: rows.jsonl
    validation: 0.2
    tokenizer: {{class_path: ByteTokenizer}}
    max_length: 256
    batch_size: 2
    workers: {workers}
trainer:
  accelerator: cpu
  max_epochs: 3
  accumulate_grad_batches: 2
  callbacks: [{{class_path: kill.Kill}}]
checkpoint: {{every: 2}}
"""

KILL = """
import os, signal
from lightning.pytorch.callbacks import Callback

class Kill(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if str(trainer.fit_loop.epoch_loop.total_batch_idx) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), getattr(signal, os.environ["KILL_WITH"]))
"""


def command(folder, *args, **environment):
    return subprocess.run(
        [sys.executable, "-m", "oumi_pl", "fit", *args],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def final_weights(folder):
    return torch.load(newest(folder / "checkpoints"), weights_only=True)["state_dict"]


def prepare(folder, workers):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(textwrap.dedent(RECIPE.format(workers=workers)))
    (folder / "kill.py").write_text(KILL)
    write_jsonl(folder / "rows.jsonl", conversations(ROWS))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "work"
    prepare(folder, workers=0)
    done = command(folder, "--config", "recipe.yaml", OUMI_PL_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "recipe"


@pytest.mark.parametrize(
    ("workers", "kill_at", "kill_with", "exit_code"),
    [
        (0, "8", "SIGKILL", -9),  # right after the validation and the checkpoint that end the first epoch
        (2, "11", "SIGKILL", -9),  # in the second epoch, between checkpoints, in the middle of an update
        pytest.param(0, "11", "SIGTERM", 143, marks=pytest.mark.slow),
        pytest.param(0, "11", "SIGUSR1", 138, marks=pytest.mark.slow),
    ],
)
def test_the_command_killed_and_resumed_equals_uninterrupted(
    tmp_path, uninterrupted, workers, kill_at, kill_with, exit_code
):
    """Weights and metrics as if never killed, whatever the number of loader workers."""
    folder = tmp_path / "work"
    prepare(folder, workers)
    killed = command(folder, "--config", "recipe.yaml", KILL_AT=kill_at, KILL_WITH=kill_with)
    assert killed.returncode == exit_code, killed.stderr
    run_folder = folder / "runs" / "recipe"
    assert json.loads((run_folder / "run.json").read_text())["status"] == ("stopped" if exit_code > 0 else "running")
    resumed = command(folder, "--config", "recipe.yaml", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    assert [p.name for p in (folder / "runs").iterdir()] == ["recipe"]

    expected, got = final_weights(uninterrupted), final_weights(run_folder)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert losses(run_folder) == losses(uninterrupted)
    assert json.loads((run_folder / "run.json").read_text())["status"] == "finished"


def losses(run_folder):
    with (run_folder / "metrics.csv").open(newline="") as lines:
        return [
            (row["step"], row["train/loss"], row["train/num_tokens"], row["val/loss"]) for row in csv.DictReader(lines)
        ]
