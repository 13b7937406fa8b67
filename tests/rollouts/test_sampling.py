"""Tokens are drawn from the requested distribution, with its log-probabilities."""

import functools

import numpy as np
import pytest
import torch

from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.rollouts.sampling import Draw, Sampling, draw, sample, truncated, uniforms
from tests.tiny import LLAMA


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer().build()


@pytest.fixture(scope="module")
def hf(tokenizer):
    torch.manual_seed(0)
    return build_model(None, config=LLAMA | {"initializer_range": 0.2}, tokenizer=tokenizer)


def numbers(rows, tokens=8):
    return np.stack([uniforms((0, row), tokens) for row in range(rows)])


def test_a_grid_of_numbers_draws_each_token_by_its_share():
    probabilities = torch.tensor([0.1, 0.0, 0.35, 0.05, 0.5])
    grid = (torch.arange(1000) + 0.5) / 1000
    drawn = draw(probabilities.log().expand(1000, -1), grid.double())
    counts = torch.bincount(drawn.flatten(), minlength=5)
    assert counts.tolist() == [100, 0, 350, 50, 500]
    edges = draw(torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]), torch.tensor([1 - 1e-16, 0.0]))
    assert edges.flatten().tolist() == [0, 1]


TRUNCATIONS = {
    "top_k": (Sampling(top_k=2), [4, 2]),
    "top_p": (Sampling(top_p=0.6), [4, 2]),
    "a small top_p": (Sampling(top_p=0.01), [4]),
    "min_p": (Sampling(min_p=0.2), [4, 2, 0]),
}


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncation_keeps_the_likeliest_tokens(name):
    sampling, kept = TRUNCATIONS[name]
    logits = torch.tensor([[0.11, 0.04, 0.3, 0.05, 0.5]]).log()
    assert sampling.is_truncated
    assert sorted(torch.nonzero(truncated(logits, sampling)[0] > -torch.inf).flatten().tolist()) == sorted(kept)
    processor = Draw(sampling, torch.full((1, 1), 0.3, dtype=torch.float64))
    (token,) = processor(torch.zeros(1, 1, dtype=torch.long), logits).argmax(-1)
    shares = logits.exp()[0, kept] / logits.exp()[0, kept].sum()
    assert float(processor.logps[0]) == pytest.approx(float(shares[kept.index(int(token))].log()), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_log_probabilities_are_those_of_the_model(hf, tokenizer, temperature):
    prompts = [[65, 66, 67], [65], [70, 71, 72, 73, 74]]
    sampling = Sampling(max_new_tokens=8, temperature=temperature)
    for prompt, completion in zip(
        prompts, sample(hf, tokenizer, prompts, numbers=numbers(3), sampling=sampling, ends=[]), strict=True
    ):
        ids = torch.tensor([*prompt, *completion.ids], dtype=torch.long)
        logits = hf.eval()(ids[None]).logits[0, len(prompt) - 1 : -1].detach() / (temperature or 1)
        expected = logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None]).squeeze(-1)
        assert np.abs(completion.logps - expected.numpy()).max() < 1e-5
        if not temperature:
            assert torch.equal(logits.argmax(-1), ids[len(prompt) :])
        assert len(completion.ids) == 8
        assert not completion.is_finished


def test_settings_of_the_models_own_change_no_probability(hf, tokenizer, monkeypatch):
    arguments = {"numbers": numbers(1), "sampling": Sampling(max_new_tokens=8), "ends": []}
    (plain,) = sample(hf, tokenizer, [[65, 66]], **arguments)
    for name, value in {"suppress_tokens": list(range(200)), "min_new_tokens": 8, "repetition_penalty": 3.0}.items():
        monkeypatch.setattr(hf.generation_config, name, value)
    (again,) = sample(hf, tokenizer, [[65, 66]], **arguments)
    assert np.array_equal(again.ids, plain.ids)
    assert np.array_equal(again.logps, plain.logps)


def test_a_completion_does_not_depend_on_the_others_of_its_batch(hf, tokenizer):
    prompts, sampling = [[65, 66, 67], [65], [70, 71, 72, 73, 74]], Sampling(max_new_tokens=8)
    drawn = numbers(3)
    together = sample(hf, tokenizer, prompts, numbers=drawn, sampling=sampling, ends=[])
    for i, prompt in enumerate(prompts):
        (alone,) = sample(hf, tokenizer, [prompt], numbers=drawn[i : i + 1], sampling=sampling, ends=[])
        assert np.array_equal(alone.ids, together[i].ids)


def test_ends(hf, tokenizer):
    prompts, sampling, drawn = [[65, 66]] * 4, Sampling(max_new_tokens=8), numbers(4)
    free = sample(hf, tokenizer, prompts, numbers=drawn, sampling=sampling, ends=[])
    end = int(free[0].ids[3])
    ended = sample(hf, tokenizer, prompts, numbers=drawn, sampling=sampling, ends=[end])
    for before, after in zip(free, ended, strict=True):
        hits = np.flatnonzero(before.ids == end)
        length = hits[0] + 1 if len(hits) else 8
        assert np.array_equal(after.ids, before.ids[:length])
        assert np.allclose(after.logps, before.logps[:length], atol=1e-6)
        assert after.is_finished == bool(len(hits))
    text = tokenizer.decode(free[1].ids[2:4])
    stopped = sample(
        hf, tokenizer, prompts, numbers=drawn, sampling=Sampling(max_new_tokens=8, stop=(text,)), ends=[]
    )  # fmt: skip
    assert tokenizer.decode(stopped[1].ids).count(text) == 1
    assert len(stopped[1].ids) <= 4
    assert stopped[1].is_finished


def test_the_training_mode_is_left_as_it_was(hf, tokenizer):
    for training in (True, False):
        hf.train(training)
        sample(hf, tokenizer, [[65]], numbers=numbers(1), sampling=Sampling(max_new_tokens=8), ends=[])
        assert hf.training == training


@pytest.mark.parametrize(
    "setting", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 1}, {"max_new_tokens": 0}]
)
def test_ranges(setting):
    with pytest.raises(UserError, match=f"sampling.{next(iter(setting))} is"):
        Sampling(**setting)


def test_a_static_cache_and_prompts_of_repeating_lengths_sample_the_same_completions(hf, tokenizer, monkeypatch):
    prompts, sampling, drawn = [[65, 66, 67], [65], list(range(20))], Sampling(max_new_tokens=8), numbers(3)
    free = sample(hf, tokenizer, prompts, numbers=drawn, sampling=sampling, ends=list(range(40)))
    widths, forward = [], hf.forward

    @functools.wraps(forward)
    def watched(*args, **kwargs):
        widths.append((kwargs["input_ids"].shape[1], kwargs["attention_mask"].shape[-1]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(hf, "forward", watched)
    before = set(vars(hf))
    for rows in ([0, 1, 2], [0, 1]):
        kept = {"numbers": drawn[rows], "sampling": sampling, "ends": list(range(40)), "bucket": 32}
        static = sample(hf, tokenizer, [prompts[i] for i in rows], **kept)
        for row, completion in zip(rows, static, strict=True):
            assert completion.ids.tolist() == free[row].ids.tolist()
            assert np.abs(completion.logps - free[row].logps).max() < 1e-5
    assert set(vars(hf)) == before  # a resumed run doesn't know the lengths of earlier calls
    assert len({width for width, _ in widths}) == 2  # of prompts and of single tokens
    assert len({length for _, length in widths}) == 1
