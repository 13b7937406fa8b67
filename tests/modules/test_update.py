"""An update's gradient is (sum of the losses of all target tokens) / (number of target tokens), whatever the cut."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.sft import SFT
from tests.tiny import data, distance, fit, module, trainer, weights

ROWS = 11  # an update of 8 rows and a short one of 3
LAYOUTS = [(1, 8), (2, 4), (8, 1), (3, 3)]


def plain_loop(sft, sft_data, updates):
    """SGD written out: transformers' own logits, torch's cross-entropy, one division per update."""
    hf = sft.causal_lm.hf
    start = weights(sft)
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.1)
    losses = []
    for rows in updates:
        total, targets = 0.0, 0
        for i in rows:
            example = sft_data.examples("train")[i]
            ids = torch.tensor(example.input_ids, dtype=torch.long).unsqueeze(0)
            logits = hf(input_ids=ids).logits[0, :-1]
            mask = torch.tensor(example.loss_mask[1:])
            total = total + torch.nn.functional.cross_entropy(logits[mask], ids[0, 1:][mask], reduction="sum")
            targets += int(mask.sum())
        optimizer.zero_grad()
        (total / targets).backward()
        optimizer.step()
        losses.append(float(total / targets))
    return start, losses


def epoch_of(sft_data):
    return [
        [int(i) for rows in sft_data.plan(0).micro_batches(u, sft_data.layout) for row in rows for i in row]
        for u in range(len(sft_data.plan(0)))
    ]


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.values.append(float(trainer.callback_metrics["train/loss"]))


def trained(tmp_path, batch_size, micro_batches, packing=False):
    losses = Losses()
    sft = module()
    result = fit(
        sft,
        data(tmp_path, ROWS, batch_size=batch_size, group_by_length=False, packing=packing, max_length=256),
        max_epochs=1,
        accumulate_grad_batches=micro_batches,
        callbacks=[losses],
    )
    return result, losses.values


def reference(tmp_path):
    sft, sft_data = module(), data(tmp_path, ROWS, batch_size=8, group_by_length=False)
    L.seed_everything(1)
    run = trainer(max_epochs=1)
    run.strategy.connect(sft)
    sft.model = sft.build(sft_data.tokenizer)
    updates = epoch_of(sft_data)
    assert [len(u) for u in updates] == [8, 3]
    _, losses = plain_loop(sft, sft_data, updates)
    return weights(sft), losses


@pytest.mark.parametrize(("batch_size", "micro_batches"), LAYOUTS[:3])
def test_equals_a_plain_loop_with_any_micro_batches(tmp_path, batch_size, micro_batches):
    expected, expected_losses = reference(tmp_path)
    got, losses = trained(tmp_path, batch_size, micro_batches)
    assert distance(got, expected) < 1e-6
    assert losses == pytest.approx(expected_losses, rel=1e-6)


def test_a_mean_of_means_would_be_caught(tmp_path, monkeypatch):
    expected, _ = reference(tmp_path)
    monkeypatch.setattr(LanguageModule, "share", lambda self, batch: 1 / max(1, len(batch["targets"])))
    got, _ = trained(tmp_path, 2, 4)
    assert distance(got, expected) > 1e-4


def test_an_update_that_was_divided_by_a_wrong_count_is_an_error(tmp_path, monkeypatch):
    """The totals come from the plan, and what was trained on is counted: the two have to agree."""
    original = SFT.count
    monkeypatch.setattr(SFT, "count", lambda self, batch: original(self, batch) | {"targets": 1})
    with pytest.raises(RuntimeError, match=r"update 1 was divided by \d+ targets, and 4 were trained on"):
        trained(tmp_path, 2, 4)


WORKER = """
import sys, torch, lightning as L
from pathlib import Path
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from tests.tiny import data, fit, module, distance
from tests.modules.test_update import Losses, ROWS
strategy, batch_size, micro_batches, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
if strategy == "fsdp2":
    from lightning.pytorch.strategies import ModelParallelStrategy
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
losses = Losses()
sft = module()
result = fit(sft, data(out, ROWS, batch_size=batch_size, group_by_length=False), max_epochs=1, devices=2,
             accumulate_grad_batches=micro_batches, callbacks=[losses], strategy=strategy,
             gradient_clip_val=CLIP)
result = {{n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in result.items()}}
if sft.global_rank == 0:
    torch.save({{"weights": result, "losses": losses.values}}, out / "result.pt")
"""


def on_two_processes(tmp_path, strategy, batch_size, micro_batches, clip=None):
    root = str(Path(__file__).parents[2])
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=root).replace("CLIP", repr(clip)))
    environment = os.environ | {"OUMI_PL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    data(tmp_path, ROWS).stores("train")  # both processes find it in the cache
    done = subprocess.run(
        [sys.executable, str(script), strategy, str(batch_size), str(micro_batches), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / "result.pt", weights_only=True)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_equals_a_plain_loop_on_two_processes(tmp_path, strategy):
    expected, expected_losses = reference(tmp_path)
    got = on_two_processes(tmp_path, strategy, 2, 2)
    assert distance(got["weights"], expected) < 1e-6
    assert got["losses"] == pytest.approx(expected_losses, rel=1e-6)


class Gradients(L.Callback):
    """The norm of the gradient that callbacks see, and the norm that is logged of the same update."""

    def __init__(self):
        self.seen, self.logged = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.seen.append(float(torch.nn.utils.get_total_norm(grads)))

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.logged.append(float(trainer.callback_metrics["train/grad_norm"]))


@pytest.mark.parametrize(("batch_size", "micro_batches"), LAYOUTS[:3])
def test_callbacks_see_the_gradient_of_the_mean(tmp_path, batch_size, micro_batches):
    sft, sft_data = module(), data(tmp_path, ROWS, batch_size=8, group_by_length=False)
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(sft)
    sft.model = sft.build(sft_data.tokenizer)
    expected = []
    for rows in epoch_of(sft_data):
        before = weights(sft)
        plain_loop(sft, sft_data, [rows])
        steps = [(before[n] - w).flatten() / 0.1 for n, w in weights(sft).items()]  # SGD: the rate times the gradient
        expected.append(float(torch.cat(steps).norm()))
    gradients = Gradients()
    cut = data(tmp_path, ROWS, batch_size=batch_size, group_by_length=False)
    fit(module(), cut, max_epochs=1, accumulate_grad_batches=micro_batches, callbacks=[gradients])
    assert gradients.seen == pytest.approx(gradients.logged, rel=1e-6)
    assert gradients.seen == pytest.approx(expected, rel=1e-4)


def test_lightning_clips_the_gradient_of_the_mean(tmp_path):
    """The plain loop with torch's own clipping, at a third of the norm of the first update."""
    gradients = Gradients()
    cut = {"batch_size": 2, "group_by_length": False}
    fit(module(), data(tmp_path, ROWS, **cut), max_epochs=1, accumulate_grad_batches=4, callbacks=[gradients])
    clip = gradients.logged[0] / 3
    sft, sft_data = module(), data(tmp_path, ROWS, batch_size=8, group_by_length=False)
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(sft)
    sft.model = sft.build(sft_data.tokenizer)
    for rows in epoch_of(sft_data):
        before = weights(sft)
        plain_loop(sft, sft_data, [rows])
        steps = {n: before[n] - w for n, w in weights(sft).items()}
        norm = torch.cat([step.flatten() for step in steps.values()]).norm() / 0.1
        with torch.no_grad():
            for name, parameter in sft.causal_lm.hf.named_parameters():
                parameter.copy_(before[name] - steps[name] * min(1.0, float(clip / (norm + 1e-6))))
    settings = {"max_epochs": 1, "accumulate_grad_batches": 4, "gradient_clip_val": clip}
    got = fit(module(), data(tmp_path, ROWS, **cut), **settings)
    assert distance(got, weights(sft)) < 1e-5


@pytest.mark.parametrize("limit", [3, 0.7])
def test_an_update_cut_short_by_limit_train_batches_is_the_mean_over_what_is_left(tmp_path, limit):
    """Of four micro-batches of two rows, the first update has three, or the second none."""
    cut = {"batch_size": 2, "group_by_length": False}
    losses = Losses()
    settings = {"max_epochs": 1, "accumulate_grad_batches": 4, "limit_train_batches": limit, "callbacks": [losses]}
    got = fit(module(), data(tmp_path, ROWS, **cut), **settings)
    sft, sft_data = module(), data(tmp_path, ROWS, batch_size=8, group_by_length=False)
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(sft)
    sft.model = sft.build(sft_data.tokenizer)
    rows = [i for update in epoch_of(sft_data) for i in update]
    micro_batches = 3 if limit == 3 else int(0.7 * 8)
    trained_on = [rows[: 2 * micro_batches]] if micro_batches < 4 else [rows[:8], rows[8 : 2 * micro_batches]]
    _, expected = plain_loop(sft, sft_data, trained_on)
    assert losses.values == pytest.approx(expected, rel=1e-6)
    assert distance(got, weights(sft)) < 1e-6


def test_clipping_at_0_is_none_as_lightning_has_it(tmp_path):
    plain = fit(module(), data(tmp_path), max_steps=2)
    assert distance(fit(module(), data(tmp_path), max_steps=2, gradient_clip_val=0.0), plain) == 0
