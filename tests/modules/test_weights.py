"""With weights, an update's gradient is that of (sum of weight x loss) / (sum of weights), whatever the cut."""

import random
from functools import partial

import lightning as L
import pytest
import torch

from oumi_pl.data.collate import collate
from oumi_pl.data.loader import PlanLoader
from oumi_pl.data.plan import Layout, plan_in_order
from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy, token_loss_sum
from oumi_pl.modules.sft import SFT
from oumi_pl.types import TokenLoss
from tests.modules import test_update
from tests.modules.test_update import Losses, epoch_of
from tests.tiny import LLAMA, conversations, data, distance, fit, module, sgd, trainer, weights, write_jsonl

ROWS = 11
LAYOUTS = [(1, 8), (4, 2), (8, 1)]
WEIGHTS = (0, 0.25, 1, 3)


def weighed(tmp_path, factor=1.0, n=ROWS, name="weighed", **options):
    """Conversations of two exchanges whose answers have weights, in rows that have weights."""
    rng, file = random.Random(0), tmp_path / f"{name}-{factor}.jsonl"
    rows = []
    for first, second in zip(conversations(n, 1), conversations(n, 2), strict=True):
        turns = [*first["messages"], *second["messages"]]
        turns[1]["weight"] = factor * rng.choice(WEIGHTS)
        turns[3]["weight"] = factor * rng.choice(WEIGHTS[1:])
        rows.append({"messages": turns, "weight": rng.choice((1, 0.5))})
    write_jsonl(file, rows)
    module = data(tmp_path, **options)
    module.sources["train"] = str(file)
    return module


def plain_loop(sft, sft_data, updates, split="train"):
    """SGD written out, with the weights of each token; returns the initial weights and the losses."""
    hf = sft.causal_lm.hf
    start = weights(sft)
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.1)
    losses = []
    for rows in updates:
        total, weight = torch.zeros(()), 0.0
        for i in rows:
            example = sft_data.examples(split)[i]
            ids = torch.tensor(example.input_ids, dtype=torch.long)
            logps = hf(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            of_tokens = torch.tensor(example.loss_mask[1:]) * (
                torch.ones(len(ids) - 1) if example.weights is None else torch.tensor(example.weights[1:])
            )
            total = total - (of_tokens * logps.gather(-1, ids[1:, None])[:, 0]).sum()
            weight += float(of_tokens.sum())
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
        losses.append(float(total.detach() / weight))
    return start, losses


def built(rows):
    """A module with the weights that a run begins with."""
    sft = module()
    L.seed_everything(1)
    trainer(max_epochs=1).strategy.connect(sft)
    sft.model = sft.build(rows.tokenizer)
    rows.setup("fit")
    return sft


def trained(rows, micro_batches):
    sft, losses = module(), Losses()
    after = fit(sft, rows, max_epochs=1, accumulate_grad_batches=micro_batches, callbacks=[losses])
    return after, losses.values


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("batch_size", "micro_batches"), LAYOUTS)
def test_an_update_equals_a_plain_loop(tmp_path, batch_size, micro_batches, packing):
    options = {"batch_size": batch_size, "packing": packing, "max_length": 512 if packing else 256}
    ours, losses = trained(weighed(tmp_path, **options), micro_batches)
    rows = weighed(tmp_path, **options)
    rows.micro_batches = micro_batches
    sft = built(rows)
    _, expected = plain_loop(sft, rows, epoch_of(rows))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert distance(ours, weights(sft)) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_add_up_to_the_same_gradient(tmp_path, ranks):
    rows = weighed(tmp_path, batch_size=2)
    sft = built(rows)
    losses = dict.fromkeys(range(ranks), 0.0)
    for rank in range(ranks):
        layout = Layout(2, 6 // ranks, ranks, rank)
        loader = PlanLoader(
            rows.examples("train"),
            rows.targets("train"),
            lambda epoch, layout=layout: plan_in_order(rows.lengths("train"), layout.rows_per_update),
            layout,
            partial(collate, pad_id=0),
            weights=rows.target_weights("train"),
        )
        for batch in loader:  # one update: 12 rows of which 11 exist
            share = sft.share(batch) / layout.micro_batches
            losses[rank] = losses[rank] + sft.loss_sums(batch, "train")["loss"] * share
    (sum(losses.values()) / ranks).backward()
    ours = {name: p.grad.clone() for name, p in sft.causal_lm.hf.named_parameters()}
    plain_loop(sft, rows, [range(ROWS)])
    assert distance(ours, {name: p.grad for name, p in sft.causal_lm.hf.named_parameters()}) < 1e-5


@pytest.mark.slow
def test_two_processes_take_the_same_steps(tmp_path, monkeypatch):
    rows = weighed(tmp_path, batch_size=8, group_by_length=False)
    sft = built(rows)
    _, expected = plain_loop(sft, rows, epoch_of(rows))
    worker = test_update.WORKER.replace(
        "losses = Losses()", "from tests.modules.test_weights import weighed\nlosses = Losses()"
    )
    worker = worker.replace("data(out, ROWS, batch_size", "weighed(out, batch_size")
    monkeypatch.setattr(test_update, "WORKER", worker)
    actual = test_update.on_two_processes(tmp_path, "ddp", 2, 2)
    assert distance(actual["weights"], weights(sft)) < 1e-5
    assert actual["losses"] == pytest.approx(expected, rel=1e-5)


def test_any_cut_gives_the_same_update(tmp_path):
    results = [trained(weighed(tmp_path, batch_size=size), count) for size, count in LAYOUTS]
    for after, losses in results[1:]:
        assert distance(after, results[0][0]) < 1e-6
        assert losses == pytest.approx(results[0][1], rel=1e-6)


def test_weights_of_2_everywhere_change_nothing(tmp_path):
    (once, losses), (twice, others) = (trained(weighed(tmp_path, f, batch_size=4), 2) for f in (1.0, 2.0))
    assert distance(once, twice) < 1e-6
    assert losses == pytest.approx(others, rel=1e-6)
    plain = conversations(ROWS)
    for name, rows in {"plain": plain, "two": [row | {"weight": 2} for row in plain]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    results = []
    for name in ("plain", "two"):
        rows = data(tmp_path, batch_size=4)
        rows.sources["train"] = str(tmp_path / f"{name}.jsonl")
        results.append(trained(rows, 2))
    assert distance(results[0][0], results[1][0]) < 1e-6


def test_validation_is_the_mean_by_weight_of_all_rows(tmp_path):
    values = []
    for size, packing in ((1, False), (5, False), (2, True)):
        rows = weighed(tmp_path, eval_batch_size=size, packing=packing, max_length=256)
        rows.sources["validation"] = rows.sources["train"]
        L.seed_everything(1)
        (metrics,) = trainer().validate(module(), rows, verbose=False)
        values.append(metrics)
    rows = weighed(tmp_path)
    sft = built(rows)
    _, (expected,) = plain_loop(sft, rows, [range(ROWS)])
    for metrics in values:
        assert metrics["val/loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics["val/nll"] == pytest.approx(expected, rel=1e-5)
        assert metrics["val/mean_token_accuracy"] == pytest.approx(values[0]["val/mean_token_accuracy"], rel=1e-6)


class Stop(L.Callback):
    """Saves after the second update, in the middle of the epoch, and stops there."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def run(callbacks=(), **kwargs):
        L.seed_everything(1)
        sft = module()
        engine = trainer(accumulate_grad_batches=2, max_steps=5, callbacks=list(callbacks))
        engine.fit(sft, weighed(tmp_path, batch_size=2), **kwargs)
        return weights(sft)

    whole, path = run(), tmp_path / "two.ckpt"
    with pytest.raises(InterruptedError):
        run([Stop(path)])
    resumed = run(ckpt_path=path, weights_only=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_trainer_type_that_does_not_weigh_tokens_refuses_weights(tmp_path):
    class Other(SFT):
        weighs_targets = False

    with pytest.raises(UserError, match=r"Other doesn't weigh tokens.*`ignore: \[weight\]`"):
        trainer(max_steps=1).fit(Other(config=LLAMA, optimizer=sgd), weighed(tmp_path))


class Squared(TokenLoss):
    """A loss without a gradient of its own."""

    def __call__(self, logits, targets):
        return CrossEntropy()(logits, targets).square()


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(label_smoothing=0.1, z_loss=1e-3), Squared()])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("transform", [None, torch.tanh])
def test_a_weighted_loss_and_its_gradients(loss, wrapped, transform):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 13)
    called = torch.nn.Sequential(head) if wrapped else head
    hidden, targets = torch.randn(10, 8, requires_grad=True), torch.randint(13, (10,))
    factors = torch.rand(10) * 3
    factors[2] = 0
    out = token_loss_sum(hidden, targets, called, loss, weights=factors, transform=transform, chunk_size=3)
    ours = torch.autograd.grad(out.loss_sum * 0.5, [hidden, head.weight, head.bias])
    logits = head(hidden) if transform is None else transform(head(hidden))
    expected = (factors * loss(logits, targets)).sum()
    theirs = torch.autograd.grad(expected * 0.5, [hidden, head.weight, head.bias])
    assert float(out.loss_sum) == pytest.approx(float(expected), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        quiet = token_loss_sum(hidden, targets, called, loss, weights=factors, transform=transform, chunk_size=3)
    assert float(quiet.loss_sum) == pytest.approx(float(expected), rel=1e-6)
