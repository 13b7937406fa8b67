"""KTO as a whole: where training starts, what an update is, and that nothing depends on how rows were batched."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oumi_pl.data.kto import KTOData
from oumi_pl.errors import UserError
from oumi_pl.losses import devices, linear_head
from oumi_pl.losses.responses import APOZeroUnpaired, KTOLoss
from oumi_pl.models.build import build_model
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.kto import KTO
from oumi_pl.types import ResponseLoss
from tests.conftest import free_port
from tests.models.test_lora import pretrained
from tests.modules.test_dpo import Record, epoch_of, log_probabilities
from tests.tiny import LLAMA, conversations, distance, fit, kto, kto_data, trainer, weights, write_jsonl

DROPOUT = {"attention_dropout": 0.3}
LORA = {"r": 4, "lora_dropout": 0.3}
ROWS = 11  # an update of 8 rows and a short one of 3
BETA, LR = 0.3, 0.2
WEIGHTS = {"desirable_weight": 0.7, "undesirable_weight": 1.3}
LOGGED = (
    *("loss", "kl", "rewards/sign_accuracy", "rewards/margins"),
    *("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"),
)


def sgd(params):
    return torch.optim.SGD(params, lr=LR)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A reference that is not where training starts, so that the rows of the first update weigh differently."""
    return pretrained(tmp_path_factory.mktemp("other") / "model", initializer_range=0.2)


# ---- the first step


def first_updates(tmp_path, model, precision="32-true", **kwargs):
    record, module = Record(), kto(model, sgd, DROPOUT, **kwargs)
    fit(
        module,
        kto_data(tmp_path, 12, batch_size=3),
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
    ],
    ids=["cached", "online", "lora"],
)
def test_training_starts_where_policy_and_reference_are_equal(tmp_path, base, precision, kwargs, reference):
    module, (first, second) = first_updates(tmp_path, base, precision, **kwargs)
    assert reference in module.notes[0]
    assert (first["loss"], first["kl"], first["rewards/sign_accuracy"]) == (0.5, 0.0, 0.5)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0
    assert first["grad_norm"] > 0
    assert second["kl"] > 0


def test_dropout_that_survives_is_reported(tmp_path, base, monkeypatch):
    monkeypatch.setattr("oumi_pl.modules.base.disable_dropout", lambda model: None)
    with pytest.raises(UserError, match=r"before the first update the policy has to equal its reference.*dropout"):
        first_updates(tmp_path, base)


def test_a_loss_that_is_not_what_it_says_is_reported(tmp_path, base):
    class Doubled(KTOLoss):
        def __call__(self, responses):
            return 2 * super().__call__(responses)

    with pytest.raises(UserError, match=r"Doubled is 1 for equal policy and reference, not 0\.5"):
        first_updates(tmp_path, base, loss=Doubled())


class Summed(ResponseLoss):
    def __call__(self, responses):
        return responses.logratios.sum()


class Detached(ResponseLoss):
    def __call__(self, responses):
        return responses.logratios.detach()


@pytest.mark.parametrize(
    ("loss", "message"),
    [(Summed(), r"Summed returned a tensor of shape \[\] for 3 responses"), (Detached(), "without a gradient")],
)
def test_a_loss_of_another_shape_or_without_gradient_is_reported(tmp_path, base, loss, message):
    with pytest.raises(UserError, match=message):
        first_updates(tmp_path, base, loss=loss)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_estimating_the_divergence_does_not_change_the_first_gradient(tmp_path, base, precision):
    """Policy and reference are equal, so both losses are too. Under autocast, casts without gradient are not reused."""
    (with_kl, *_), (without, *_) = (first_updates(tmp_path, base, precision, kl=kl)[1] for kl in (True, False))
    assert with_kl["grad_norm"] == pytest.approx(without["grad_norm"], rel=1e-6)
    assert "kl" not in without


# ---- an update


def by_hand(hf, reference, data, ids, kl=True):
    """One big batch on full logits: the losses and metrics of rows `[rows]`, and the divergence."""
    examples, rows = data.examples("train"), {"loss": [], "reward": [], "logp": [], "good": []}
    n = len(data.lengths("train"))

    def log_ratio(example):
        ids, mask = torch.tensor(example.input_ids, dtype=torch.long), torch.tensor(example.loss_mask)
        own = log_probabilities(hf, ids, mask).sum()
        with torch.no_grad():
            compared = log_probabilities(reference, ids, mask).sum()
        return own, own - compared

    z = 0.0
    if kl:
        with torch.no_grad():
            z = torch.stack([log_ratio(examples[n + int(i)])[1] for i in ids]).mean().clamp(min=0)
    for i in ids:
        example = examples[int(i)]
        logp, log = log_ratio(example)
        good = example.fields["desirable"] == 1.0
        value = BETA * (log - z)
        weight = WEIGHTS["desirable_weight" if good else "undesirable_weight"]
        rows["loss"].append(weight * (1 - torch.sigmoid(value if good else -value)))
        rows["reward"].append((BETA * log).detach())
        rows["logp"].append(logp.detach())
        rows["good"].append(good)
    return {name: torch.tensor(v) if name == "good" else torch.stack(v) for name, v in rows.items()} | {"kl": z}


def means(rows):
    good, rewards, logps = rows["good"], rows["reward"].double(), rows["logp"].double()
    actual = {
        "loss": rows["loss"].detach().double().mean(),
        "kl": rows["kl"],
        "rewards/sign_accuracy": (0.5 + 0.5 * torch.where(good, 1, -1) * rewards.sign()).mean(),
        "rewards/chosen": rewards[good].mean(),
        "rewards/rejected": rewards[~good].mean(),
        "logps/chosen": logps[good].mean(),
        "logps/rejected": logps[~good].mean(),
    }
    actual["rewards/margins"] = actual["rewards/chosen"] - actual["rewards/rejected"]
    return {name: float(value) for name, value in actual.items() if not math.isnan(value)}


def plain_loop(hf, reference, data, updates, **kwargs):
    """SGD written out; the means of each update."""
    optimizer, logged = torch.optim.SGD(hf.parameters(), lr=LR), []
    for ids in updates:
        rows = by_hand(hf, reference, data, ids, **kwargs)
        optimizer.zero_grad()
        rows["loss"].mean().backward()
        optimizer.step()
        logged.append(means(rows))
    return logged


@pytest.fixture(scope="module")
def plain(base, other, tmp_path_factory):
    """The plain loop over updates of so many rows, against the base as it was or another model."""
    folder, done = tmp_path_factory.mktemp("plain"), {}

    def loop(size=8, reference=None, **kwargs):
        key = (size, reference, *kwargs.items())
        if key not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OUMI_PL_CACHE", str(folder / "cache"))
                data = kto_data(folder, ROWS, batch_size=size)
                hf, compared = (build_model(name).double() for name in (base, reference or base))
                logged = plain_loop(hf, compared, data, epoch_of(data), **kwargs)
            done[key] = {name: p.detach().float() for name, p in hf.named_parameters()}, logged
        return done[key]

    return loop


def trained(tmp_path, model, batch_size, micro_batches=1, data=None, loss=None, **kwargs):
    record = Record()
    module = kto(model, sgd, loss=loss or KTOLoss(BETA), **WEIGHTS | kwargs)
    rows = kto_data(tmp_path, ROWS, batch_size=batch_size, **data or {})
    fit(module, rows, max_epochs=1, accumulate_grad_batches=micro_batches, callbacks=[record])
    return module, record.updates


def assert_logged(updates, expected):
    assert len(updates) == len(expected)
    for ours, theirs in zip(updates, expected, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "micro_batches", "reference"),
    [(1, 8, True), (2, 4, True), (8, 1, True), (3, 3, False)],
)
def test_equals_a_plain_loop_with_any_micro_batches(tmp_path, base, other, plain, batch_size, micro_batches, reference):
    expected, logged = plain(batch_size * micro_batches, other if reference else None)
    assert len(logged) == 2
    assert not reference or logged[0]["kl"] > 0.1, "the divergence would not matter"
    kwargs = {"reference": other} if reference else {}
    module, updates = trained(tmp_path, base, batch_size, micro_batches, **kwargs)
    assert distance(weights(module), expected) < 1e-6
    assert_logged(updates, logged)
    assert set(LOGGED) <= set(updates[0])


def test_packed_training_equals_unpacked(tmp_path, base, other, plain):
    """All rows in one update: one row of several packs, the same weights and metrics afterwards."""
    expected, logged = plain(ROWS, other)
    module, updates = trained(tmp_path, base, ROWS, data={"packing": True}, reference=other)
    assert 1 < module.trainer.datamodule.plan(0).rows < ROWS, "nothing was packed"
    assert distance(weights(module), expected) < 1e-6
    assert_logged(updates, logged)


@pytest.mark.parametrize("kwargs", [{"kl": False}, {"loss": "apo"}], ids=str)
def test_without_the_divergence(tmp_path, base, other, plain, kwargs):
    expected, logged = plain(8, other, kl=False)
    loss = APOZeroUnpaired(BETA) if "loss" in kwargs else KTOLoss(BETA)
    module, updates = trained(tmp_path, base, 2, 4, reference=other, loss=loss, kl=kwargs.get("kl", True))
    assert distance(weights(module), expected) < 1e-6
    assert_logged(updates, [{name: value for name, value in line.items() if name != "kl"} for line in logged])
    data = module.trainer.datamodule
    assert len(data.examples("train")) == len(data.lengths("train")), "mismatched rows were computed for nothing"
    assert "kl" not in updates[0]


def test_gradient_checkpointing_changes_nothing(tmp_path, base, plain, other):
    expected, _ = plain(8, other)
    module, _ = trained(tmp_path, base, 2, 4, reference=other, gradient_checkpointing=True)
    assert module.causal_lm.base.is_gradient_checkpointing
    assert distance(weights(module), expected) < 1e-6


# planted faults: the tests above can fail


def divergence_of_the_micro_batch(self, batch, split):
    return self.estimate(split, batch["sample_ids"])


def divergence_of_the_rows(monkeypatch):
    monkeypatch.setattr(KTOData, "mismatched_ids", lambda self, split, ids: [int(i) for i in ids])


FAULTS = {
    "of micro-batches": lambda patch: patch.setattr(KTO, "divergence", divergence_of_the_micro_batch),
    "of matched rows": divergence_of_the_rows,
    "mean of means": lambda patch: patch.setattr(
        LanguageModule, "share", lambda self, batch: 1 / max(1, len(batch["sample_ids"]))
    ),
    "labels swapped": lambda patch: patch.setattr(
        KTO, "responses", staticmethod(lambda batch, *args: swapped(RESPONSES(batch, *args)))
    ),
}
RESPONSES = KTO.responses


def swapped(responses):
    return replace(responses, desirable=~responses.desirable)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(tmp_path, base, other, plain, monkeypatch, fault):
    expected, _ = plain(9, other)
    FAULTS[fault](monkeypatch)
    # the last micro-batch of the first update has other rows than the others, and the second update is short
    module, _ = trained(tmp_path, base, 3, 3, reference=other)
    assert distance(weights(module), expected) > 1e-4


class Seen(KTOLoss):
    """Keeps the divergences and the number of rows of each call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __call__(self, responses):
        self.calls.append((float(responses.kl), len(responses.desirable)))
        return super().__call__(responses)


def test_a_loss_sees_every_row_once_with_one_divergence_per_update(tmp_path, base, other):
    """The last update has 3 rows in 4 micro-batches of 2; the stand-ins are not shown to the loss."""
    loss = Seen()
    module = kto(base, loss=loss, reference=other)
    fit(module, kto_data(tmp_path, ROWS, batch_size=2), max_epochs=1, accumulate_grad_batches=4)
    assert [rows for _, rows in loss.calls] == [2, 2, 2, 2, 2, 1]
    kls = [kl for kl, _ in loss.calls]
    assert len({*kls[:4]}) == len({*kls[4:]}) == 1
    assert kls[0] != kls[4]


def test_the_router_loss_is_weighed_by_rows(tmp_path):
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "router_aux_loss_coef": 0.1}
    record = Record()
    module = KTO(config=config | {"output_router_logits": True}, optimizer=sgd)
    fit(module, kto_data(tmp_path, 4, batch_size=2), max_steps=1, accumulate_grad_batches=2, callbacks=[record])
    assert record.updates[0]["loss"] == 0.5
    assert module.causal_lm.hf.model.layers[0].mlp.gate.weight.grad is None  # freed
    still = KTO(config=config, optimizer=sgd)
    fit(still, kto_data(tmp_path, 4, batch_size=2), max_steps=1, accumulate_grad_batches=2)
    assert distance(weights(module), weights(still)) > 1e-6


# ---- validation


def validated(tmp_path, base, other, **kwargs):
    module = kto(base, loss=KTOLoss(BETA), reference=other, **WEIGHTS)
    file = kto_data(tmp_path, ROWS, seed=5).sources["train"]
    return trainer().validate(module, kto_data(tmp_path, 4, validation=file, **kwargs), verbose=False)[0]


def test_validation_does_not_depend_on_batches_or_packing(tmp_path, base, other):
    data = kto_data(tmp_path, ROWS, seed=5)
    hf, reference = (build_model(name).double() for name in (base, other))
    with torch.no_grad():
        actual = by_hand(hf, reference, data, range(ROWS))
    expected = {f"val/{name}": value for name, value in means(actual).items()}
    for kwargs in (
        {"eval_batch_size": 1},
        {"eval_batch_size": 3},
        {"eval_batch_size": 20},
        {"eval_batch_size": 2, "packing": True},
    ):
        got = validated(tmp_path, base, other, **kwargs)
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6), kwargs
    assert set(got) == set(expected) == set(KTO.validation_metrics)


def test_validation_within_training(tmp_path, base):
    """Each pass has a divergence of its own, and leaves that of an unfinished update as it is."""
    seen = []

    class Validated(L.Callback):
        def on_validation_end(self, trainer, module):
            seen.append({name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("loss", "kl")})

    def run(**kwargs):
        module = kto(base, sgd)
        data = kto_data(tmp_path, ROWS, batch_size=2, validation=0.4)
        return fit(module, data, max_epochs=1, accumulate_grad_batches=2, callbacks=[Validated()], **kwargs)

    often = run(num_sanity_val_steps=-1, val_check_interval=1)
    assert seen[0] == {"loss": 0.5, "kl": 0.0}
    assert seen[-1]["kl"] > 0
    seen.clear()
    rarely = run()
    assert len(seen) == 1
    assert all(torch.equal(often[name], rarely[name]) for name in often)


def test_means_over_no_rows_are_left_out(tmp_path, base):
    rows = [
        {"prompt": f"{i}?", "response": row["messages"][1]["content"], "label": True}
        for i, row in enumerate(conversations(4))
    ]
    record, module = Record(), kto(base, sgd)
    data = KTOData(write_jsonl(tmp_path / "good.jsonl", rows), tokenizer=base, max_length=256, batch_size=2)
    fit(module, data, max_steps=2, callbacks=[record])
    assert "rewards/chosen" in record.updates[1]
    assert not {"rewards/rejected", "logps/rejected", "rewards/margins"} & set(record.updates[1])
    assert "all 4 training rows are desirable" in module.doubts[0]


# ---- advice


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (
            {},
            r"8 training rows are desirable and 4 are not, .* 2 to 1 .*set model.undesirable_weight to 1.5 to 2$",
        ),
        ({"undesirable_weight": 1.7}, None),
        ({"desirable_weight": 0.1}, r"weighted 0.2 to 1 .*set model.undesirable_weight to 0.15 to 0.2$"),
    ],
)
def test_advice_on_weights(tmp_path, base, arguments, advice):
    module = kto(base, **arguments)
    fit(module, kto_data(tmp_path, 12, batch_size=6), max_steps=1)
    assert len(module.doubts) == (advice is not None)
    if advice is not None:
        assert re.search(advice, module.doubts[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"desirable_weight": -1.0}, r"model\.desirable_weight is -1\.0, but has to be 0 or more"),
        ({"reference": "none"}, r"model\.reference: none, but KTOLoss compares with a reference"),
    ],
)
def test_refused_arguments(base, arguments, message):
    with pytest.raises(UserError, match=message):
        kto(base, **arguments)


def test_loaders_of_a_user_have_no_mismatched_rows(tmp_path, base):
    data = kto_data(tmp_path, 4, batch_size=4)
    data.prepare_data()
    batches = [data.batch("train", [0, 1, 2, 3])]
    for kl in (True, False):
        module = kto(base, sgd, lora=LORA, kl=kl)
        module.model = module.build(data.tokenizer)
        if kl:
            with pytest.raises(UserError, match=r"mismatched rows of KTOData; set kl: false"):
                trainer(max_steps=1).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        else:
            trainer(max_steps=1).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))


# ---- several processes

WORKER = """
import sys, torch, lightning as L
from pathlib import Path
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
import oumi_pl.data.reference
from lightning.pytorch.strategies import ModelParallelStrategy
from oumi_pl.losses.responses import KTOLoss
from tests.modules.test_dpo import Record
from tests.modules.test_kto import BETA, ROWS, WEIGHTS, sgd
from tests.tiny import fit, kto, kto_data
oumi_pl.data.reference.CHUNK = 2
base, other, out = sys.argv[1:3] + [Path(sys.argv[3])]


def run(name, rows, strategy, **kwargs):
    record = Record()
    module = kto(base, sgd, loss=KTOLoss(BETA), **WEIGHTS, **kwargs)
    data = kto_data(out, rows, batch_size=2, validation=kto_data(out, 5, seed=5).sources["train"])
    result = fit(module, data, max_epochs=1, devices=2, accumulate_grad_batches=2, callbacks=[record],
                 strategy=strategy, gradient_clip_val=None)
    result = {{n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in result.items()}}
    val = {{n: float(v) for n, v in module.trainer.callback_metrics.items() if n.startswith("val/")}}
    if module.global_rank == 0:
        torch.save({{"weights": result, "updates": record.updates, "val": val}}, out / f"{{name}}.pt")


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
def test_equals_a_plain_loop_on_two_processes(tmp_path, on_two_processes, plain, base, other, strategy):
    expected, logged = plain(8, other if strategy == "ddp" else None)
    got = on_two_processes[strategy]
    assert distance(got["weights"], expected) < 1e-6
    assert_logged(got["updates"], logged)
    # of 5 held-out rows in batches of 2 on two ranks, after the last update
    hf, reference = (build_model(name).double() for name in (base, other if strategy == "ddp" else base))
    hf.load_state_dict({name: value.double() for name, value in expected.items()}, strict=False)
    with torch.no_grad():
        held_out = means(by_hand(hf, reference, kto_data(tmp_path, 5, seed=5), range(5)))
    assert got["val"] == pytest.approx({f"val/{name}": value for name, value in held_out.items()}, rel=1e-4, abs=1e-5)


def test_a_rank_without_rows_takes_part(on_two_processes):
    (update,) = on_two_processes["few"]["updates"]
    weight = (WEIGHTS["desirable_weight"] + WEIGHTS["undesirable_weight"]) / 2
    assert (update["loss"], update["rewards/sign_accuracy"]) == (pytest.approx(0.5 * weight, abs=1e-7), 0.5)


class LargestLogits(TorchDispatchMode):
    """The most rows of logits that were alive in one tensor."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, out.numel() // self.vocabulary)
        return out


def test_no_tensor_of_all_logits_is_ever_alive(tmp_path, base, monkeypatch):
    """Neither of the rows nor of the mismatched ones, under policy or reference."""
    monkeypatch.setitem(devices.DEVICES, "cpu", replace(devices.CPU, chunk_elements=1))
    monkeypatch.setattr(linear_head, "MIN_ROWS", 40)
    module, data = kto(base, sgd, reference="online"), kto_data(tmp_path, 8, batch_size=8)
    with LargestLogits(build_model(base).lm_head.out_features) as logits:
        fit(module, data, max_steps=1)
    assert 0 < logits.rows <= 40 < data.targets("train").sum()
