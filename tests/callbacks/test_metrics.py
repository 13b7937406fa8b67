"""Metrics: functions that score greedy completions of held-out prompts while training, as `generate --metric` does."""

import json
import sys

import pytest
import torch

from oumi_pl.callbacks.metrics import Metrics
from oumi_pl.errors import UserError
from oumi_pl.rollouts.metrics import resolve_all, scores
from tests.command_line import GONE, CommandLine
from tests.tiny import conversations, data, module, sgd, trainer, write_jsonl

SCORES = """
def score(completion, row):
    assert row["messages"]
    return {"characters": sum(map(ord, completion)) % 97, "empty": not completion}
"""
CALLBACK = {"class_path": "Metrics", "init_args": {"metrics": ["held_out_scores.score", "chrf"], "max_new_tokens": 6}}
CHANGES = {
    "model.init_args.config.attention_dropout": 0.2,
    "model.init_args.optimizer.init_args.lr": 3e-2,
    "model.init_args.schedule": GONE,  # so that a run of 3 updates is the beginning of one of 6
    "data.init_args.validation": "val.jsonl",
    "trainer.callbacks": [CALLBACK],
    "trainer.max_steps": 6,
    "val_every": 2,
    "checkpoint": {"monitor": "val/score/characters", "mode": "max", "every": 3},
}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    (tmp_path / "held_out_scores.py").write_text(SCORES)
    cli = CommandLine(tmp_path, monkeypatch, capsys)
    write_jsonl(tmp_path / "val.jsonl", conversations(6, seed=4))
    cli.recipe(CHANGES)
    yield cli
    sys.modules.pop("held_out_scores", None)


def curve(cli, run, name="val/score/characters"):
    rows = (cli.directory / "runs" / run / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    steps = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]
    return {int(row["step"]): float(row[name]) for row in steps if row[name]}


def test_the_best_checkpoint_is_that_of_a_metric_also_after_a_resume(cli):
    cli.works("fit", "--config", "r.yaml", "--name", "whole")
    values = curve(cli, "whole")
    assert list(values) == [2, 4, 6]
    assert len(set(values.values())) > 1
    best = max(values, key=values.get)
    assert checkpoint(cli, "whole", "best.ckpt")["global_step"] == best
    # the same function scores the same rows of the exported best weights alike, in bulk
    cli.works("export", "--checkpoint", "runs/whole/checkpoints/best.ckpt", "--output", "best")
    bulk = ("--file", "val.jsonl", "--output", "out.jsonl", "--metric", "held_out_scores.score", "--metric", "chrf")
    cli.works("generate", "--model", "best", *bulk, "--max_new_tokens", "6")
    lines = [json.loads(line) for line in (cli.directory / "out.jsonl").read_text().splitlines()]
    assert sum(line["score/characters"] for line in lines) / 6 == pytest.approx(values[best], rel=1e-6)
    assert sum(line["chrf"] for line in lines) / 6 == pytest.approx(curve(cli, "whole", "val/chrf")[best], rel=1e-6)
    # stopped between two validations, and resumed
    cli.works("fit", "--config", "r.yaml", "--name", "cut", "--trainer.max_steps", "3")
    cli.works("fit", "--resume", "runs/cut", "--trainer.max_steps", "6")
    assert {step: value for step, value in curve(cli, "cut").items() if step in values} == values
    assert checkpoint(cli, "cut", "best.ckpt")["global_step"] == best
    # scoring changes nothing in training
    cli.recipe(CHANGES | {"trainer.callbacks": [], "checkpoint": {"every": 3}})
    cli.works("fit", "--config", "r.yaml", "--name", "plain")
    whole, cut, plain = (checkpoint(cli, run, "step-00000006.ckpt")["state_dict"] for run in ("whole", "cut", "plain"))
    assert all(torch.equal(value, cut[name]) and torch.equal(value, plain[name]) for name, value in whole.items())


def checkpoint(cli, run, name):
    return torch.load(cli.directory / "runs" / run / "checkpoints" / name, weights_only=True)


ROW = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "the cat sat on the mat"}]}


def test_built_in_metrics_are_those_of_the_literature():
    """Hand-computed: 5 of 6 words in common, in order; chrF of equal and of disjoint texts."""
    metrics = resolve_all(["exact_match", "rouge_l", "chrf", r"regex:the \w+ .*"], "--metric")
    values = scores(metrics, "the cat lay on the mat", ROW, "--metric", "row 1")
    assert values["rouge_l"] == pytest.approx(5 / 6)
    assert (values["exact_match"], values["matches"]) == (0, 1)
    assert 0 < values["chrf"] < 100
    same, other = (scores(metrics, text, ROW, "--metric", "row 1") for text in ("the cat sat on the mat", "xyz"))
    assert (same["exact_match"], same["rouge_l"], same["chrf"]) == (1, 1, pytest.approx(100))
    assert (other["rouge_l"], other["chrf"], other["matches"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("metrics", "package", "message"),
    [
        (["rouge_l"], "rouge_score.rouge_scorer", r"pip install 'oumi_pl\[metrics\]'"),
        (["chrf"], "sacrebleu.metrics", r"pip install 'oumi_pl\[metrics\]'"),
        (["regex:("], None, r"Metrics\.metrics: regex:\( is no regular expression"),
        (["exact_match", "exact_match"], None, "two metrics have the name exact_match"),
        (
            ["exact_mach"],
            None,
            r"Metrics\.metrics: no built-in reward or metric 'exact_mach'; did you mean 'exact_match'",
        ),
        ([], None, r"Metrics\.metrics: name at least one"),
    ],
)
def test_mistakes_are_one_message(metrics, package, message, monkeypatch):
    if package:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=message):
        Metrics(metrics)


@pytest.mark.parametrize("wrong", [lambda completion, row: completion, lambda completion: 1.0], ids=["text", "row"])
def test_a_mistake_in_a_metric_shows_before_the_first_update(tmp_path, wrong):
    sft = module(sgd)
    with pytest.raises(UserError, match=r"Metrics\.metrics: <lambda> (is|failed)"):
        trainer(max_epochs=1, callbacks=[Metrics([wrong])]).fit(sft, data(tmp_path, 6, validation=0.5))
    assert sft.global_step == 0


def test_a_metric_that_is_not_logged_can_not_be_monitored(cli):
    cli.recipe(CHANGES | {"checkpoint": {"monitor": "val/scores/characters"}})
    assert "checkpoint.monitor: unknown metric 'val/scores/characters'" in cli.fails("fit", "--config", "r.yaml")
