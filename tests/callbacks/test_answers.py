"""Answers: the score is the share of equal answers, and answering leaves training as it was."""

import json

import pytest
import torch

from oumi_pl.callbacks import samples as answers_module
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.callbacks.samples import Answers
from oumi_pl.data.sft import SFTData
from tests.tiny import conversations, data, distance, fit, module, write_jsonl

ROWS = conversations(6, seed=4)


@pytest.fixture
def validation(tmp_path):
    return write_jsonl(tmp_path / "val.jsonl", ROWS)


def test_the_score_is_the_share_of_equal_answers(tmp_path, validation, monkeypatch, capsys):
    right = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in ROWS[:4]}

    def complete(model, tokenizer, prompts, **_):
        questions = [tokenizer.decode(ids, skip_special_tokens=True).split("\n")[1] for ids in prompts]
        return [right.get(question, "something else") for question in questions]

    monkeypatch.setattr(answers_module, "complete", complete)
    read, prompts = [], SFTData.prompts
    monkeypatch.setattr(SFTData, "prompts", lambda self, split: read.append(split) or prompts(self, split))
    callback = Answers(rows=6, show=6, batch_size=4)
    folder = RunFolder(tmp_path, "run", "run", "{}")
    fit(module(), data(tmp_path, validation=validation), max_epochs=1, callbacks=[folder, callback])
    assert callback.score == pytest.approx(4 / 6)
    assert read == ["validation"]  # tokenized once, however often they are answered
    shown = capsys.readouterr().out
    assert "exact match: 66.7% of 6 (before training: 66.7%)" in shown
    assert shown.count("✓") == 4
    assert shown.count("✗") == 2
    kept = [json.loads(line) for line in (folder.directory / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [0] * 6 + [2] * 6
    assert [line["reference"] for line in kept[:6]] == [row["messages"][1]["content"] for row in ROWS]
    assert [line["completion"] == line["reference"] for line in kept[6:]] == [True] * 4 + [False] * 2
    assert all(row["messages"][0]["content"] in line["prompt"] for row, line in zip(ROWS, kept, strict=False))


def test_answering_changes_nothing_in_training(tmp_path, validation):
    dropout = {"attention_dropout": 0.3}
    kwargs = {"max_epochs": 2, "limit_val_batches": 1.0}
    plain = fit(module(config=dropout), data(tmp_path, validation=validation), **kwargs)
    answering = [Answers(rows=3, max_new_tokens=4)]
    answered = fit(module(config=dropout), data(tmp_path, validation=validation), callbacks=answering, **kwargs)
    assert distance(answered, plain) == 0
    assert all(torch.equal(answered[name], plain[name]) for name in plain)


def test_a_resumed_run_shows_the_answers_before_training_as_well(tmp_path):
    whole, resumed = Answers(), Answers()
    whole.before, whole.score_before = ["a", "b"], 0.5
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (resumed.before, resumed.score_before) == (["a", "b"], 0.5)
