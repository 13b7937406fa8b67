"""PassAtK: completions of held-out prompts during other training than online, scored by functions of the user."""

import itertools

import lightning as L
import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from oumi_pl.callbacks.pass_at_k import PassAtK, prompts_with_rows
from oumi_pl.data.reward_model import RewardModel
from oumi_pl.errors import UserError
from oumi_pl.rollouts.rewards import exact_match
from oumi_pl.rollouts.sampling import Sampling
from tests.data.test_reward_model import reward_model
from tests.modules.test_grpo import grpo, rollouts
from tests.tiny import conversations, data, fit, module, trainer, write_jsonl

SAMPLING = Sampling(max_new_tokens=4)


def early(completion, row):
    """Varies from one completion of a random model to the next."""
    return float(sum(map(ord, completion)) % 3 == 0)


class Validated(L.Callback):
    def __init__(self):
        self.updates = []

    def on_validation_end(self, trainer, *_):
        self.updates.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


@pytest.fixture
def held_out(tmp_path):
    return write_jsonl(tmp_path / "val.jsonl", conversations(6, seed=4))


def passes(**kwargs):
    return PassAtK(early, **{"completions": 4, "pass_at": [1, 2, 4], "sampling": SAMPLING, "metrics": [early]} | kwargs)


def test_it_logs_pass_at_k_and_each_function_at_each_validation(tmp_path, held_out):
    callback, logged, seen = passes(), Validated(), []
    callback.metrics.functions = {"early": lambda completion, row: seen.append((completion, row)) or len(completion)}
    fit(module(), data(tmp_path, validation=held_out), max_epochs=2, callbacks=[callback, logged])
    assert len(logged.updates) == 2
    for metrics, scored in zip(logged.updates, (seen[:24], seen[24:]), strict=True):
        assert metrics["val/early"] == pytest.approx(np.mean([len(text) for text, _ in scored]))
        solved = np.array([early(text, {}) for text, _ in scored]).reshape(6, 4)
        for k in (1, 2, 4):
            subsets = [[any(chosen) for chosen in itertools.combinations(row, k)] for row in solved.tolist()]
            assert metrics[f"val/pass@{k}"] == pytest.approx(np.mean(subsets), rel=1e-6)
    answers = [row["messages"][1]["content"] for row in conversations(6, seed=4)]
    assert [row["answer"] for _, row in seen[:24:4]] == answers
    assert callback.validation_metrics == ["val/pass@1", "val/pass@2", "val/pass@4", "val/early"]


def test_completions_do_not_depend_on_the_batch_size(tmp_path, held_out):
    scores = []
    for batch_size in (64, 3):
        runner = trainer(callbacks=[passes(batch_size=batch_size)])
        torch.manual_seed(0)
        runner.validate(module(), data(tmp_path, validation=held_out), verbose=False)
        scores.append({name: float(value) for name, value in runner.callback_metrics.items()})
    assert scores[0] == scores[1]
    assert 0 < scores[0]["val/pass@2"] < 1


def test_it_changes_nothing_in_training(tmp_path, held_out):
    dropout = {"attention_dropout": 0.3}
    plain = fit(module(config=dropout), data(tmp_path, validation=held_out), max_epochs=2)
    sampled = fit(module(config=dropout), data(tmp_path, validation=held_out), max_epochs=2, callbacks=[passes()])
    assert all(torch.equal(sampled[name], plain[name]) for name in plain)


def test_rows_of_any_format_get_their_answer_for_the_built_in_rewards(tmp_path):
    file = write_jsonl(tmp_path / "alpaca.jsonl", [{"instruction": "say a", "output": "a"}] * 2)
    (_, row, *_), _ = prompts_with_rows(data(tmp_path, validation=file))
    assert row == {"answer": "a", "instruction": "say a", "output": "a"}
    assert exact_match("a", row) == 1


def test_a_single_completion_is_greedy(tmp_path, held_out):
    greedy = [Sampling(max_new_tokens=4, temperature=temperature) for temperature in (0.5, 2.0)]
    scores = []
    for sampling in greedy:
        runner = trainer(callbacks=[PassAtK(early, completions=1, sampling=sampling, metrics=[early])])
        torch.manual_seed(0)
        runner.validate(module(), data(tmp_path, validation=held_out), verbose=False)
        scores.append({name: float(value) for name, value in runner.callback_metrics.items()})
    assert scores[0] == scores[1]
    assert scores[0]["val/pass@1"] == scores[0]["val/early"]


MISTAKES = {
    r"PassAtK\.pass_at: 8 is not from 1 to 4, the completions": {"pass_at": [8]},
    "completions is 0": {"completions": 0},
    "greedy completions of a prompt are all the same": {"sampling": Sampling(temperature=0.0)},
    r"PassAtK\.metrics: no built-in reward or metric 'no_such'; known:": {"metrics": ["no_such"]},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_refused(message):
    with pytest.raises(UserError, match=message):
        passes(**MISTAKES[message])


def test_it_refuses_online_training_which_has_its_own_arguments(tmp_path):
    with pytest.raises(UserError, match=r"does not fit RolloutData: set data\.eval_completions"):
        trainer(max_steps=1, callbacks=[passes()]).fit(grpo(), rollouts(tmp_path))


# ---- reward models


def judged(path, judge, **kwargs):
    """Metrics of a validation in which a reward model scores completions."""
    file = write_jsonl(path / "val.jsonl", conversations(6, seed=4))
    callback = PassAtK(judge, **kwargs)
    runner = trainer(callbacks=[callback])
    torch.manual_seed(0)
    runner.validate(module(config={"initializer_range": 0.2}), data(path, validation=file), verbose=False)
    return callback, {name: float(value) for name, value in runner.callback_metrics.items()}


def test_a_reward_model_scores_completions_of_sft(tmp_path, monkeypatch):
    judge, seen = reward_model(tmp_path / "runs/judge/model"), []
    settings = {"completions": 3, "pass_at": [1, 3], "sampling": SAMPLING, "metrics": [judge], "success": 0.0}
    score = RewardModel.__call__
    monkeypatch.setattr(RewardModel, "__call__", lambda self, samples: seen.append(samples) or score(self, samples))
    callback, metrics = judged(tmp_path, judge, **settings)
    assert callback.validation_metrics == ["val/pass@1", "val/pass@3", "val/judge"]
    samples, again = seen
    assert [s.completion.ids.tolist() for s in samples] == [s.completion.ids.tolist() for s in again]
    model = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    ids = [[*s.prompt.ids, *s.completion.ids] for s in samples]
    assert not any(s.completion.is_finished for s in samples)
    with torch.no_grad():
        expected = np.array([float(model(input_ids=torch.tensor([row])).logits) for row in ids])
    assert metrics["val/judge"] == pytest.approx(expected.mean(), abs=1e-5)
    solved = (expected >= 0).reshape(6, 3)
    assert 0 < solved.mean() < 1
    assert metrics["val/pass@1"] == pytest.approx(solved.mean(), abs=1e-6)
    assert metrics["val/pass@3"] == pytest.approx(solved.any(1).mean(), abs=1e-6)


def test_prompts_that_a_reward_model_can_not_read_are_left_out(tmp_path):
    settings = {"completions": 2, "sampling": SAMPLING}
    lengths = sorted(len(p.ids) for p in prompts_with_rows(data(tmp_path, validation=write_jsonl(
        tmp_path / "val.jsonl", conversations(6, seed=4)
    ))))  # fmt: skip
    most = lengths[2] + SAMPLING.max_new_tokens + 1  # a token for the line end after a turn
    callback, _ = judged(tmp_path, reward_model(tmp_path / "short", max_position_embeddings=most), **settings)
    assert sorted(len(prompt.ids) for prompt in callback._prompts) == lengths[:3]
    with pytest.raises(UserError, match="no held-out prompt leaves room for 4 new tokens in the 8 positions"):
        judged(tmp_path, reward_model(tmp_path / "shorter", max_position_embeddings=8), **settings)


def test_a_folder_without_a_reward_model_is_refused_with_its_key(tmp_path):
    with pytest.raises(UserError, match=r"PassAtK\.metrics: there is no folder '.*/nowhere/model'"):
        judged(tmp_path, "exact_match", metrics=[str(tmp_path / "nowhere/model")], completions=2, sampling=SAMPLING)
