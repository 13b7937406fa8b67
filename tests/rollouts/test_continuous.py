"""Continuous batching samples the same completions as `generate`, leaves the model as it was, and hides no failure."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oumi_pl.attention import NAME
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.rollouts.continuous import ContinuousBatching, _draw
from oumi_pl.rollouts.environment import Environment
from oumi_pl.rollouts.sampling import Generate, Sampling
from tests.modules.test_grpo import Logged, grpo, run, same
from tests.tiny import LLAMA, distance, weights

PROMPTS = [[65, 66, 67], [65], [70, 71, 72, 73, 74], [65, 66, 67], list(range(100))]
ENDS = list(range(5, 13))


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer().build()


@pytest.fixture(scope="module")
def policy(tokenizer):
    torch.manual_seed(0)
    hf = build_model(None, config=LLAMA | {"initializer_range": 0.2}, tokenizer=tokenizer)
    return SimpleNamespace(causal_lm=SimpleNamespace(hf=hf, base=hf))


def sample(engine, policy, tokenizer, sampling):
    seeds = [(0, i, 0) for i in range(len(PROMPTS))]
    return engine.sample(policy, tokenizer, PROMPTS, seeds=seeds, sampling=sampling, ends=ENDS)


ENGINES = {
    "all at once": ContinuousBatching(page_size=8),
    "two at a time": ContinuousBatching(page_size=8, requests=2),
    "prompts prefilled in parts": ContinuousBatching(page_size=8, tokens=16),
    "few pages, so that some have to wait or to start again": ContinuousBatching(page_size=8, pages=17),
}
SAMPLINGS = {
    "all tokens": Sampling(20, temperature=0.7),
    "greedy": Sampling(20, temperature=0.0),
    "truncated, with a stop text": Sampling(20, top_p=0.9, top_k=50, stop=("Z", "z")),
}


@pytest.mark.parametrize(
    ("engine", "sampling"),
    [("all at once", name) for name in SAMPLINGS] + [(name, "all tokens") for name in ENGINES if name != "all at once"],
)
def test_completions_and_log_probabilities_are_those_of_generate(policy, tokenizer, engine, sampling):
    model, state = policy.causal_lm.hf.train(), torch.get_rng_state()
    before = [(p.dtype, p.requires_grad) for p in model.parameters()]
    ours = sample(ENGINES[engine], policy, tokenizer, SAMPLINGS[sampling])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert [(p.dtype, p.requires_grad) for p in model.parameters()] == before
    theirs = sample(Generate(), policy, tokenizer, SAMPLINGS[sampling])
    assert {completion.is_finished for completion in theirs} == {True, False} or sampling == "greedy"
    for a, b in zip(ours, theirs, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert np.abs(a.logps - b.logps).max() < 1e-5
        assert np.abs(a.entropies - b.entropies).max() < 1e-4
        assert a.is_finished == b.is_finished


def test_it_computes_in_the_precision_of_the_run(policy, tokenizer):
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (sample(e, policy, tokenizer, Sampling(1)) for e in (ContinuousBatching(), Generate()))
    exact = sample(Generate(), policy, tokenizer, Sampling(1))
    # bfloat16 rounds a row by itself and in a batch in different ways, but both near each other
    assert max(abs(a.logps[0] - b.logps[0]) for a, b in zip(ours, theirs, strict=True)) < 0.02
    assert min(abs(a.logps[0] - b.logps[0]) for a, b in zip(ours, exact, strict=True)) > 1e-5


LINES = Sampling(8, stop=("e", "E"))


class Lines(Environment):
    """Says a line end after the first turn."""

    def start(self, row, tokenizer, rng):
        replies = iter([[10], None])
        return lambda ids: next(replies)


@pytest.mark.parametrize(
    ("module", "data"),
    [
        pytest.param({}, {}, id="full"),
        pytest.param({"lora": {"r": 4}}, {}, id="lora", marks=pytest.mark.slow),
        pytest.param({}, {"environment": Lines(), "sampling": LINES}, id="turns", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_as_with_generate(tmp_path, module, data):
    trained, sampled = [], []
    for engine in (Generate(), ContinuousBatching(page_size=16)):
        logged = Logged()
        policy = grpo(**module)
        sampled.append(run(tmp_path, policy, data=data | {"engine": engine}, max_steps=1, callbacks=[logged]).sampled)
        assert max(update["train/sampling_difference"] for update in logged.updates) < 1e-5
        assert policy.causal_lm.base.config._attn_implementation == NAME
        trained.append(weights(policy))
    assert same(*sampled)
    assert distance(*trained) < 5e-6


def test_with_a_flash_kernel_log_probabilities_are_recomputed_and_importance_is_weighed(tmp_path):
    for flash in (True, False):
        logged = Logged()
        data = {"engine": ContinuousBatching(page_size=16, flash=flash), "iterations": 2}
        samples = run(tmp_path, grpo(), data=data, max_steps=1, callbacks=[logged])
        completions = [completion for group in samples.sampled[0] for completion in group.completions]
        assert all((completion.policy_logps is not None) == flash for completion in completions)
        assert ("train/importance/mean" in logged.updates[0]) == flash


def test_a_stop_text_is_searched_in_few_prefixes(tokenizer):
    calls = []

    def decode(ids):
        calls.append(len(ids))
        return tokenizer.decode(ids)

    text = "a" * 30 + "stop" + "b" * 30 + "stop"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for stop, length in (("top", 34), ("a", 1), ("bstop", len(ids)), ("no", len(ids))):
        drawing = _draw(Sampling(len(ids), stop=("never", stop)), np.zeros((1, len(ids))), [1])
        completion = drawing.completion(0, ids, SimpleNamespace(decode=decode), [])
        assert completion.ids.tolist() == ids[:length]
        assert completion.is_finished == (stop != "no")
    assert len(calls) <= 4 * 8


# ---- failures


def fails(*_, **__):
    raise RuntimeError("no such kernel")


def test_an_error_of_the_thread_that_samples_is_raised(policy, tokenizer, monkeypatch, caplog):
    model = policy.causal_lm.hf.train()
    monkeypatch.setattr(model.model, "forward", fails)
    with pytest.raises(UserError, match=r"data\.engine: continuous batching failed: no such kernel"):
        sample(ContinuousBatching(), policy, tokenizer, Sampling(4))
    assert model.training
    assert "_get_logits_processor" not in vars(model)


def test_completions_that_are_missing_are_noticed(policy, tokenizer, monkeypatch, caplog):
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    monkeypatch.setattr(ContinuousBatchingManager, "_run_generation_loop", lambda self, use_inference_mode: None)
    with pytest.raises(UserError, match="continuous batching ended after 0 of 5 completions"):
        sample(ContinuousBatching(), policy, tokenizer, Sampling(4))


@pytest.mark.parametrize("wrong", [{"page_size": 0}, {"tokens": 0}, {"requests": 0}, {"pages": 0}])
def test_values_are_checked(wrong):
    with pytest.raises(UserError, match=rf"data\.engine\.{next(iter(wrong))} is 0, but has to be at least 1"):
        ContinuousBatching(**wrong)
