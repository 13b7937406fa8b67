"""DPO as a whole: where training starts, what an update is, and that nothing depends on how pairs were batched."""

import math
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses.preference import Sigmoid
from oumi_pl.models.build import build_model
from oumi_pl.models.lm import documents, forest
from oumi_pl.modules.dpo import DPO
from tests.conftest import free_port
from tests.models.test_lora import pretrained
from tests.tiny import LLAMA, distance, dpo, dpo_data, fit, trainer, weights

DROPOUT = {"attention_dropout": 0.3}
LORA = {"r": 4, "lora_dropout": 0.3}
ROWS = 11  # an update of 8 pairs and a short one of 3
BETA, LR = 0.3, 0.2
OF_PAIRS = (
    "loss",
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected"),
)
"""Metrics that are means over pairs."""


class Record(L.Callback):
    """What each update logged."""

    def __init__(self):
        self.updates = []

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.updates.append({k.removeprefix("train/"): float(v) for k, v in trainer.callback_metrics.items()})


def sgd(params):
    return torch.optim.SGD(params, lr=LR)


# ---- the first step


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """The folder of an adapter, as SFT exports it: trained, so that it changes what the base says."""
    torch.manual_seed(5)
    hf = build_model(base, lora={"r": 2, "init_lora_weights": False})
    folder = tmp_path_factory.mktemp("adapter")
    hf.save_pretrained(folder)
    ByteTokenizer().build().save_pretrained(folder)
    return str(folder)


def first_update(tmp_path, model, precision="32-true", **kwargs):
    record = Record()
    module = dpo(model, sgd, DROPOUT, **kwargs)
    fit(
        module,
        dpo_data(tmp_path, 12, batch_size=3),
        max_steps=2,
        accumulate_grad_batches=2,
        precision=precision,
        callbacks=[record],
    )
    return module, record.updates


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    ("kwargs", "reference"),
    [
        ({}, "computed before training"),
        ({"reference": "online"}, "a frozen copy"),
        ({"lora": LORA}, "adapters disabled"),
        ({"lora": LORA, "reference": "online"}, "a frozen copy"),
        ({"share_prompt": False}, "computed before training"),
    ],
    ids=["cached", "online", "lora", "lora-online", "documents"],
)
def test_training_starts_where_policy_and_reference_are_equal(tmp_path, base, precision, kwargs, reference):
    module, (first, second) = first_update(tmp_path, base, precision, **kwargs)
    assert reference in module.notes[0]
    assert first["loss"] == torch.tensor(math.log(2)).item()
    assert (first["rewards/margins"], first["rewards/accuracies"], first["kl"]) == (0.0, 0.5, 0.0)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["grad_norm"] > 0
    assert second["kl"] > 0


@pytest.mark.parametrize("kwargs", [{}, {"lora": LORA}, {"reference": "online"}], ids=["cached", "lora", "online"])
def test_the_reference_of_an_adapter_is_its_base_with_the_adapter(tmp_path, base, adapter, kwargs):
    """What SFT trained is where DPO starts from, not the model below it."""
    _, (first, _) = first_update(tmp_path, adapter, **kwargs)
    assert first["loss"] == torch.tensor(math.log(2)).item()
    assert (first["rewards/margins"], first["rewards/accuracies"]) == (0.0, 0.5)
    _, (below, _) = first_update(tmp_path, base, **kwargs)
    assert abs(first["logps/chosen"] - below["logps/chosen"]) > 0.1


def test_dropout_that_survives_is_reported(tmp_path, base, monkeypatch):
    monkeypatch.setattr("oumi_pl.modules.base.disable_dropout", lambda model: None)
    for kwargs in ({}, {"reference": "online"}, {"lora": LORA}):
        with pytest.raises(UserError, match=r"before the first update the policy has to equal its reference.*dropout"):
            first_update(tmp_path, base, **kwargs)


def test_adapters_that_do_not_start_at_zero_are_reported(tmp_path, base):
    with pytest.raises(UserError, match=r"has to equal its reference.*model\.lora\.init_lora_weights"):
        first_update(tmp_path, base, lora=LORA | {"init_lora_weights": False})
    # a copy in memory has them too: the model that training starts from
    _, (first, _) = first_update(tmp_path, base, lora=LORA | {"init_lora_weights": False}, reference="online")
    assert first["loss"] == torch.tensor(math.log(2)).item()


def test_a_loss_that_is_not_what_it_says_is_reported(tmp_path, base):
    class Doubled(Sigmoid):
        def __call__(self, pairs):
            return 2 * super().__call__(pairs)

    with pytest.raises(UserError, match=r"Doubled is 1\.38629 for equal policy and reference, not 0\.693147"):
        first_update(tmp_path, base, loss=Doubled())


# ---- an update


def log_probabilities(hf, ids, mask):
    """Of the tokens that carry loss, `[targets]`, from transformers' own logits."""
    logps = nn.functional.log_softmax(hf(input_ids=ids[None]).logits[0, :-1], -1)
    return logps.gather(-1, ids[1:, None])[:, 0][mask[1:]]


def responses(example):
    ids, mask = torch.tensor(example.input_ids, dtype=torch.long), torch.tensor(example.loss_mask)
    border, prompt = example.segments[0].length, example.segments[1].shared
    for rest in (slice(prompt, border), slice(border, None)):
        yield torch.cat([ids[:prompt], ids[rest]]), torch.cat([mask[:prompt], mask[rest]])


def by_hand(hf, reference, examples):
    """One big batch: the losses and metrics of pairs, `[pairs]` each."""
    actual = {name: [] for name in (*OF_PAIRS, "kl")}
    for example in examples:
        sequences = list(responses(example))
        logps = [log_probabilities(hf, *sequence) for sequence in sequences]
        with torch.no_grad():
            compared = [log_probabilities(reference, *sequence) for sequence in sequences]
        ratios = [own - other for own, other in zip(logps, compared, strict=True)]
        rewards = [BETA * ratio.sum() for ratio in ratios]
        margin = rewards[0] - rewards[1]
        values = (
            -nn.functional.logsigmoid(margin),
            *rewards,
            margin,
            torch.tensor(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0),
            *(own.sum() for own in logps),
            *(mask.sum().float() for _, mask in sequences),
            sum(0.5 * ratio.detach().square().sum() for ratio in ratios),
        )
        for name, value in zip(actual, values, strict=True):
            actual[name].append(value)
    return {name: torch.stack(values) for name, values in actual.items()}


def means(found):
    """Over pairs; of the squared log-ratios, which estimate the divergence, over tokens."""
    sums = {name: float(values.detach().double().sum()) for name, values in found.items()}
    tokens = sums["lengths/chosen"] + sums["lengths/rejected"]
    return {name: value / (tokens if name == "kl" else len(found["loss"])) for name, value in sums.items()}


def plain_loop(hf, reference, data, updates):
    """SGD written out; the means over the pairs of each update."""
    optimizer, logged = torch.optim.SGD(hf.parameters(), lr=LR), []
    for ids in updates:
        actual = by_hand(hf, reference, [data.examples("train")[i] for i in ids])
        optimizer.zero_grad()
        actual["loss"].mean().backward()
        optimizer.step()
        logged.append(means(actual))
    return logged


def epoch_of(data):
    plan = data.plan(0)
    return [
        [int(i) for rows in plan.micro_batches(u, data.layout) for row in rows for i in row] for u in range(len(plan))
    ]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A reference that is not where training starts, so that the pairs of the first update weigh differently."""
    return pretrained(tmp_path_factory.mktemp("other") / "model", initializer_range=0.05)


@pytest.fixture(scope="module")
def plain(base, other, tmp_path_factory):
    """The plain loop over updates of so many pairs, against the base as it was or another model."""
    folder, done = tmp_path_factory.mktemp("plain"), {}

    def loop(size=8, reference=None):
        if (size, reference) not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OUMI_PL_CACHE", str(folder / "cache"))
                data = dpo_data(folder, ROWS, batch_size=size)
                hf, compared = (build_model(name).double() for name in (base, reference or base))
                logged = plain_loop(hf, compared, data, epoch_of(data))
            done[size, reference] = {name: p.detach().float() for name, p in hf.named_parameters()}, logged
        return done[size, reference]

    return loop


def trained(tmp_path, model, batch_size, micro_batches=1, data=None, **kwargs):
    record, module = Record(), dpo(model, sgd, loss=Sigmoid(BETA), **kwargs)
    pairs = dpo_data(tmp_path, ROWS, batch_size=batch_size, **data or {})
    fit(module, pairs, max_epochs=1, accumulate_grad_batches=micro_batches, callbacks=[record])
    return module, record.updates


def assert_logged(updates, expected):
    assert len(updates) == len(expected)
    for ours, theirs in zip(updates, expected, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "micro_batches", "share", "reference"),
    [(1, 8, "auto", True), (2, 4, "auto", True), (8, 1, "auto", True), (2, 4, False, True), (3, 3, "auto", False)],
)
def test_equals_a_plain_loop_with_any_micro_batches(
    tmp_path, base, other, plain, batch_size, micro_batches, share, reference
):
    size = batch_size * micro_batches
    expected, logged = plain(size, other if reference else None)
    assert len(logged) == 2
    kwargs = {"reference": other} if reference else {}
    module, updates = trained(tmp_path, base, batch_size, micro_batches, share_prompt=share, **kwargs)
    assert module.causal_lm.layout is (forest if share == "auto" else documents)
    assert distance(weights(module), expected) < 1e-6
    assert_logged(updates, logged)


@pytest.mark.parametrize("share", ["auto", False])
def test_packed_training_equals_unpacked(tmp_path, base, other, plain, share):
    """All pairs in one update: one row of several packs, the same weights and metrics afterwards."""
    expected, logged = plain(ROWS, other)
    packs = {"packing": True, "max_length": 256}
    module, updates = trained(tmp_path, base, ROWS, data=packs, reference=other, share_prompt=share)
    plan = module.trainer.datamodule.plan(0)
    assert 1 < plan.rows < ROWS, "nothing was packed"
    assert distance(weights(module), expected) < 1e-6
    assert_logged(updates, logged)


def test_gradient_checkpointing_changes_nothing(tmp_path, base, plain, other):
    expected, _ = plain(8, other)
    module, _ = trained(tmp_path, base, 2, 4, reference=other, gradient_checkpointing=True)
    assert module.causal_lm.base.is_gradient_checkpointing
    assert distance(weights(module), expected) < 1e-6


class Seen(Sigmoid):
    """Takes note of the pairs that it is asked about."""

    def __init__(self):
        super().__init__()
        self.tokens = []

    def __call__(self, pairs):
        self.tokens += zip(*(pairs.sums(torch.ones_like(pairs.logps))), strict=True)
        return super().__call__(pairs)


def test_a_loss_sees_every_pair_and_no_stand_in(tmp_path, base):
    """The last update has 3 pairs in 4 micro-batches of 2."""
    loss = Seen()
    fit(dpo(base, loss=loss), dpo_data(tmp_path, ROWS, batch_size=2), max_epochs=1, accumulate_grad_batches=4)
    at_the_start = 1 if loss.loss_at_start is not None else 0
    assert min(min(map(int, tokens)) for tokens in loss.tokens) >= 1
    assert len(loss.tokens) == ROWS + 2 * at_the_start


def test_the_router_loss_is_weighed_by_pairs(tmp_path):
    """Each micro-batch's router loss counts as often as it has pairs; metrics are without it."""
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "router_aux_loss_coef": 0.1}
    gradients, losses = [], []
    for routed in (False, True):
        module = DPO(config=config | {"output_router_logits": routed}, optimizer=sgd)
        record = Record()
        pairs = dpo_data(tmp_path, 3, batch_size=2)
        fit(module, pairs, max_epochs=1, accumulate_grad_batches=2, callbacks=[record])
        losses.append(record.updates[0]["loss"])
        gradients.append(weights(module))
    assert losses[0] == losses[1] == torch.tensor(math.log(2)).item()

    L.seed_everything(1)
    module = DPO(config=config | {"output_router_logits": True})
    policy = module.build(pairs.tokenizer, branching=True)
    start = {name: p.detach().clone() for name, p in policy.hf.named_parameters()}
    for batch in pairs.train_dataloader():
        n = len(batch["sample_ids"])
        (policy(batch, lambda states: states.router_loss) * n / 3).backward()
    for name, p in policy.hf.named_parameters():
        moved = gradients[0][name] - gradients[1][name]  # SGD: the difference of the gradients, times the rate
        expected = torch.zeros_like(p) if p.grad is None else LR * p.grad
        assert (moved - expected).norm() < 1e-5 * start[name].norm().clamp(min=1), name
    assert policy.hf.model.layers[0].mlp.gate.weight.grad.norm() > 1e-3


# ---- validation


def validated(tmp_path, base, other, share="auto", **kwargs):
    module = dpo(base, loss=Sigmoid(BETA), reference=other, share_prompt=share)
    file = dpo_data(tmp_path, ROWS, seed=5).sources["train"]
    return trainer().validate(module, dpo_data(tmp_path, 4, validation=file, **kwargs), verbose=False)[0]


def test_validation_does_not_depend_on_batches_packing_or_layout(tmp_path, base, other):
    examples = dpo_data(tmp_path, ROWS, seed=5).examples("train")
    hf, reference = (build_model(name).double() for name in (base, other))
    with torch.no_grad():
        actual = by_hand(hf, reference, [examples[i] for i in range(ROWS)])
    expected = {f"val/{name}": value for name, value in means(actual).items()}
    for kwargs in (
        {"eval_batch_size": 1},
        {"eval_batch_size": 3},
        {"eval_batch_size": 20},
        {"eval_batch_size": 2, "packing": True, "max_length": 256},
        {"eval_batch_size": 3, "share": False},
    ):
        got = validated(tmp_path, base, other, **kwargs)
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6), kwargs
    assert set(got) == set(expected) == set(DPO.validation_metrics)


def test_validation_in_training_starts_at_the_reference(tmp_path, base):
    """Held-out pairs have log-probabilities of their own in the cache."""
    module, data = dpo(base, sgd), dpo_data(tmp_path, ROWS, batch_size=4, validation=0.3)
    seen = []

    class Validated(L.Callback):
        def on_validation_end(self, trainer, module):
            seen.append(float(trainer.callback_metrics["val/loss"]))

    fit(module, data, max_epochs=1, num_sanity_val_steps=-1, callbacks=[Validated()])
    assert seen[0] == pytest.approx(math.log(2), abs=1e-6)
    assert seen[1] != pytest.approx(math.log(2), abs=1e-4)


# ---- several processes

WORKER = """
import sys, torch, lightning as L
from pathlib import Path
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import oumi_pl.data.reference
from lightning.pytorch.strategies import ModelParallelStrategy
from oumi_pl.losses.preference import Sigmoid
from tests.modules.test_dpo import BETA, ROWS, Record, sgd
from tests.tiny import dpo, dpo_data, fit
oumi_pl.data.reference.CHUNK = 2
base, other, out = sys.argv[1:3] + [Path(sys.argv[3])]


def run(name, rows, strategy, **kwargs):
    record = Record()
    module = dpo(base, sgd, loss=Sigmoid(BETA), **kwargs)
    data = dpo_data(out, rows, batch_size=2, validation=dpo_data(out, 5, seed=5).sources["train"])
    result = fit(module, data, max_epochs=1, devices=2, accumulate_grad_batches=2, callbacks=[record],
                 strategy=strategy, gradient_clip_val=None)
    result = {{n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in result.items()}}
    if module.global_rank == 0:
        torch.save({{"weights": result, "updates": record.updates, "notes": module.notes}}, out / f"{{name}}.pt")


def fsdp2():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


run("ddp", ROWS, "ddp", reference=other)
run("fsdp2", ROWS, fsdp2())
run("few", 2, fsdp2())  # the second rank has no rows at all
"""


@pytest.fixture(scope="module")
def on_two_processes(base, other, tmp_path_factory):
    """What DDP and FSDP2 come to; the processes are started once, for starting them takes longest."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2])))
    environment = os.environ | {
        "OUMI_PL_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": free_port(),
    }
    done = subprocess.run(
        [sys.executable, str(script), base, other, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("ddp", "fsdp2", "few")}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_equals_a_plain_loop_on_two_processes(on_two_processes, plain, other, strategy):
    expected, logged = plain(8, other if strategy == "ddp" else None)
    got = on_two_processes[strategy]
    assert "computed" in got["notes"][0]
    assert distance(got["weights"], expected) < 1e-6
    assert_logged(got["updates"], logged)


def test_a_rank_without_rows_takes_part(on_two_processes):
    (update,) = on_two_processes["few"]["updates"]
    assert (update["loss"], update["rewards/accuracies"]) == (pytest.approx(math.log(2), abs=1e-7), 0.5)
