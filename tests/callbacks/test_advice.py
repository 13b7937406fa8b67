"""Each warning is given once where it belongs, says what to do, and stays away from runs that are as they should be."""

import io
import json
import random
import sys
import time
import warnings
from operator import itemgetter
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.optim import SGD, AdamW

from oumi_pl.callbacks import advice
from oumi_pl.callbacks.advice import STUCK_AFTER, Advice, LossWatch, Wait, other_tokenizer, usual_lr, warn
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.config import files as recipe_files
from oumi_pl.data import examples
from oumi_pl.data.template import load_template
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.optim.muon import MuonAdamW
from oumi_pl.terminal import screen
from tests.tiny import data, module, trainer

REPORT = {"train": {"kept": 200, "cut": 0}, "validation": {"kept": 10, "cut": 0}}
LARGE = 8_000_000_000
PAIRS = {"unit": "rows", "reference": object()}


def parts(
    weights=None, optimizer=AdamW, lr=2e-5, lora=None, model="org/model", unit="targets", reference=None, **kwargs
):
    """A trainer and a module with what the looks at settings read."""
    weights = torch.nn.Parameter(torch.ones(4, 4) if weights is None else weights)
    built = optimizer([{"params": [weights], "name": "matrices"}], lr=lr)
    built.param_groups[0]["initial_lr"] = lr
    whole = SimpleNamespace(numel=lambda: LARGE, requires_grad=False)
    held = {
        "report": lambda: REPORT,
        "max_length": 128,
        "sources": {"validation": "rows.jsonl"},
        "own_template": None,
        "template": None,
        "own_pad": "<pad>",
    }
    made_trainer = SimpleNamespace(optimizers=[built], datamodule=SimpleNamespace(**(held | kwargs)))
    made_module = SimpleNamespace(
        parameters=lambda: [weights, whole],
        lora=lora,
        model_name=model,
        unit=unit,
        units=itemgetter(unit),
        reference=reference,
    )
    return made_trainer, made_module


def test_half_precision_weights_that_adam_does_not_move_are_reported():
    weights = torch.tensor([[1e-4, 1.0], [0.5, -0.5]], dtype=torch.bfloat16)
    said = advice.rounded_away(*parts(weights))
    assert "bfloat16" in said
    assert "75% of the weights" in said
    assert "bf16-mixed" in said
    # what is said of them is so
    parameter = torch.nn.Parameter(weights.clone())
    parameter.grad = torch.ones_like(parameter)
    AdamW([parameter], lr=2e-5, weight_decay=0.0).step()
    assert (parameter == weights).float().mean() == 0.75


@pytest.mark.parametrize(
    "made", [parts(), parts(torch.ones(2, 2, dtype=torch.bfloat16), SGD)], ids=["float32", "not Adam"]
)
def test_other_weights_are_not(made):
    assert advice.rounded_away(*made) is None


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"lr": 2e-3}, "above"),
        ({"lr": 1e-8}, "below"),
        ({"lr": 2e-2, "lora": {"r": 8}}, "above"),
        ({"lr": 2e-6, "lora": {"r": 8}}, "below"),
        ({"lr": 1e-4} | PAIRS, "above"),
        ({"lr": 5e-2, "model": None}, "above"),
        ({"lr": 5e-2, "model": None, "optimizer": MuonAdamW}, "above"),
    ],
)
def test_a_learning_rate_far_from_the_usual_is_reported_with_the_usual(kwargs, word):
    said = advice.unusual_lr(*parts(**kwargs))
    assert f"the learning rate {kwargs['lr']:.2g} is {word} what is usual" in said
    assert "set model.optimizer.lr to" in said


@pytest.mark.parametrize(
    "kwargs",
    [
        {"lr": 2e-5},
        {"lr": 2e-4, "lora": {"r": 8}},
        {"lr": 5e-7} | PAIRS,
        {"lr": 5e-6, "lora": {"r": 8}} | PAIRS,
        {"lr": 4e-3, "model": None, "optimizer": MuonAdamW},
        {"lr": 10.0, "optimizer": SGD},
        {"lr": 10.0, "unit": "rows"},
    ],
)
def test_usual_learning_rates_are_not(kwargs):
    assert advice.unusual_lr(*parts(**kwargs)) is None


@pytest.mark.parametrize("name", recipe_files.names())
def test_no_shipped_recipe_has_an_unusual_learning_rate(name):
    model = yaml.safe_load((recipe_files.shipped() / f"{name}.yaml").read_text())["model"]
    args = model["init_args"]
    kind = "lora" if "lora" in args else "full" if "model" in args else "scratch"
    parameters = 500_000 if str(args.get("model")).startswith("recipe:") else LARGE
    low, high = usual_lr(model["class_path"] == "DPO", kind, parameters)
    assert low <= args["optimizer"]["init_args"]["lr"] <= high


def test_many_cut_rows_are_reported():
    report = {"train": {"kept": 200, "cut": 3}}
    said = advice.cut_rows(*parts(report=lambda: report))
    assert said.startswith("1.5% of the train rows are cut to data.max_length 128 (3 of 200)")
    assert "data.overflow: drop" in said
    assert advice.cut_rows(*parts(report=lambda: {"train": {"kept": 200, "cut": 2}})) is None
    assert advice.cut_rows(*parts(report=lambda: {"train": {"kept": 0, "cut": 0}})) is None


def test_a_template_that_is_not_the_models_own_is_reported():
    tokenizer = ByteTokenizer().build()
    own = tokenizer.chat_template
    plain = load_template(tokenizer, "plain")
    said = advice.other_template(*parts(own_template=own, template=plain))
    assert "the chat template is built-in plain" in said
    assert "org/model" in said
    for silent in (
        {"own_template": own, "template": load_template(tokenizer, None)},
        {"own_template": None, "template": plain},
        {"own_template": own, "template": plain, "model": None},
        {"own_template": own, "template": None},
    ):
        assert advice.other_template(*parts(**silent)) is None


def test_a_missing_pad_token_is_reported_with_its_substitute():
    tokenizer = SimpleNamespace(pad_token="<end>")
    assert "no pad token, so <end> is used instead" in advice.no_pad_token(*parts(own_pad=None, tokenizer=tokenizer))
    assert advice.no_pad_token(*parts()) is None


def test_missing_validation_is_reported():
    assert "set data.validation" in advice.no_validation(*parts(sources={"train": "rows.jsonl", "validation": None}))
    assert advice.no_validation(*parts()) is None


# ---- the course of a run


def course(losses, lr=lambda step: 1e-3):
    watch = LossWatch()
    return [said for step, loss in enumerate(losses) if (said := watch.update(loss, lr(step), 1e-3))]


def noisy(mean, seed=0, size=0.1):
    rng = random.Random(seed)
    return lambda step: mean(step) + rng.gauss(0, size)


@pytest.mark.parametrize("loss", [lambda step: 2.5, noisy(lambda step: 2.5)], ids=["constant", "noisy"])
def test_a_loss_that_stands_still_is_reported_once(loss):
    (said,) = course([loss(step) for step in range(500)])
    assert "the loss does not move: 2." in said
    assert "learning rate (0.001)" in said


def test_a_loss_that_rises_is_reported_once():
    (said,) = course([noisy(lambda step: 2.0 + 0.01 * step)(step) for step in range(300)])
    assert "the loss rises: 2." in said


@pytest.mark.parametrize(
    "losses",
    [
        [noisy(lambda step: 2.5 - 0.003 * step)(step) for step in range(STUCK_AFTER)],  # slowly
        [0.6931 - 1e-4 * step for step in range(STUCK_AFTER)],  # as preferences with small steps
        [2.5] * (STUCK_AFTER - 1),  # too early to tell
        [5.0] + [2.5] * (STUCK_AFTER - 1),  # at once
    ],
    ids=["slowly", "pairs", "early", "at once"],
)
def test_a_loss_that_moves_is_not(losses):
    assert course(losses) == []


def test_nothing_is_expected_of_a_warm_up():
    losses = [2.5] * 200 + [2.5 - 0.01 * step for step in range(STUCK_AFTER)]
    assert course(losses, lr=lambda step: 1e-3 if step >= 200 else 1e-4) == []


def test_a_loss_that_stays_no_number_is_reported_once():
    nan = float("nan")
    (said,) = course([2.0, *[nan] * 30])
    assert "the loss has been nan for 10 updates" in said
    assert course([2.0, *[nan] * 5]) == []
    assert "float16" not in said


def test_only_what_is_no_number_in_a_row_counts_and_float16_is_named_where_it_is():
    nan, watch = float("nan"), LossWatch()
    watch.in_float16 = True
    said = [watch.update(loss, 1e-3, 1e-3) for loss in (2.0, *[nan] * 9) * 3]
    assert said == [None] * 30
    assert "in float16, large activations overflow" in watch.update(nan, 1e-3, 1e-3)
    assert [watch.update(loss, 1e-3, 1e-3) for loss in (2.0, *[nan] * 20)] == [None] * 21


def test_waiting_is_measured_between_batches_and_reported_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(advice.time, "perf_counter", lambda: now[0])

    def run(waited, worked, between=0.0, updates=200):
        wait, output = Wait(), []
        for step in range(updates):
            wait.start_clock()
            now[0] += waited if step else 60.0  # processes start
            wait.batch_arrived()
            wait.start_clock()
            now[0] += worked
            wait.batch_ends()
            now[0] += between  # validation, saving
            output.append(wait.update_ends())
        return [actual for actual in output if actual]

    ((share, wait, step),) = run(waited=0.2, worked=0.6)
    assert share == pytest.approx(0.25)
    assert (wait, step) == pytest.approx((0.2, 0.8))
    assert run(waited=0.05, worked=0.6) == []
    assert run(waited=0.05, worked=0.6, between=10.0) == []
    assert run(waited=0.002, worked=0.004) == [], "nothing to gain"


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """A run whose loader sleeps, with other settings to warn of; `(warnings, run.json)`."""
    path = tmp_path_factory.mktemp("slow")
    sft_data = data(path, 12, batch_size=4, max_length=32)
    collate = examples.collate
    folder = RunFolder(path, "run", "run", "{}")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(examples, "collate", lambda rows, pad_id: time.sleep(0.1) or collate(rows, pad_id))
        patch.setattr(advice, "WAIT_WINDOW", 5)
        patch.setattr(advice, "WAIT_FIRST", 2)
        trainer(max_steps=20, callbacks=[folder, Advice()]).fit(module(), sft_data)
    return [str(w.message) for w in caught], json.loads((folder.directory / "run.json").read_text())


def test_a_loader_that_sleeps_is_found_out(slow_run):
    said, _ = slow_run
    (starved,) = [text for text in said if "waiting for data" in text]
    assert "Set data.workers to" in starved
    share = int(starved.split(", ")[1].partition("%")[0])
    assert 50 < share <= 100


def test_what_was_said_is_in_the_record_once(slow_run):
    said, state = slow_run
    assert [text.split()[0] for text in state["warnings"]] == ["100.0%", "no", "in"]
    assert all(said.count(text) == 1 for text in state["warnings"])


def test_a_warning_is_noted_once_in_a_run_that_is_resumed(tmp_path):
    folder = RunFolder(tmp_path, "run", "run", "{}")
    folder.directory = tmp_path
    with warnings.catch_warnings(record=True):
        for message in ("a", "b", "a"):
            warn(SimpleNamespace(callbacks=[folder]), message)
    assert json.loads((tmp_path / "run.json").read_text())["warnings"] == ["a", "b"]


def test_each_run_of_a_process_shows_where_its_warning_comes_from(monkeypatch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as Python has it: a text once per place
        for rank in (0, 0, 1):
            monkeypatch.setattr(advice.rank_zero_only, "rank", rank)
            warn(SimpleNamespace(callbacks=[]), "a")
    assert [(str(w.message), w.filename) for w in caught] == [("a", __file__)] * 2
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="a"):
        warnings.simplefilter("error")
        monkeypatch.setattr(advice.rank_zero_only, "rank", 0)
        warn(SimpleNamespace(callbacks=[]), "a")


def test_warnings_are_yellow_and_not_broken_within_words_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(screen, "terminal_width", lambda: 30)
    shown = screen._formatted("something is as it should not be, and so on")
    assert shown == "\033[33mwarning: something is as it\n  should not be, and so on\033[0m\n"
    monkeypatch.setattr(screen, "terminal_width", lambda: None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert screen._formatted("something is as it should not be") == "warning: something is as it should not be\n"


@pytest.mark.parametrize("has_own", [True, False])
def test_a_tokenizer_that_is_not_the_models_is_warned_of(tmp_path, has_own):
    own, used = ByteTokenizer().build(), ByteTokenizer().build()
    if has_own:
        own.save_pretrained(tmp_path)
        vocab = {token: 259 - i for token, i in used.get_vocab().items()}
        used = SimpleNamespace(get_vocab=lambda: vocab)
    embeddings = torch.nn.Embedding(50257, 1)
    base = SimpleNamespace(get_input_embeddings=lambda: embeddings)
    module = SimpleNamespace(model_name=str(tmp_path), causal_lm=SimpleNamespace(base=base))
    data = SimpleNamespace(tokenizer_spec="other", tokenizer=used, added_tokens=[])
    message = other_tokenizer(SimpleNamespace(datamodule=data), module)
    assert ("100% of its ids are other tokens" if has_own else "260 tokens and") in message
    data.tokenizer, embeddings.weight.data = own, torch.zeros(264, 1)
    assert other_tokenizer(SimpleNamespace(datamodule=data), module) is None
    data.tokenizer_spec = None
    assert other_tokenizer(SimpleNamespace(datamodule=data), module) is None
