"""Completions do not depend on the other prompts of a batch, and stop where they should."""

import math

import pytest
import torch

from oumi_pl import attention
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.models.build import build_model
from oumi_pl.models.generation import TextStreamer, complete
from tests.tiny import LLAMA


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer().build()


def build(tokenizer, attn=None, **kwargs):
    torch.manual_seed(0)
    hf = build_model(None, config=LLAMA, tokenizer=tokenizer, attn=attn, **kwargs)
    for p in hf.parameters():  # sharp enough that rounding decides nothing
        p.data.mul_(3)
    return hf


def prompts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in ("a", "bc de fg hi", "jklm", "the longest of all these prompts")]


def steps(hf, prompt, n):
    """Greedy by hand: the whole sequence anew for each token, no cache and no padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("attn", [None, "eager", attention.NAME])
def test_batched_answers_equal_those_of_single_prompts(tokenizer, attn):
    hf = build(tokenizer, attn)
    together = complete(hf, tokenizer, prompts(tokenizer), max_new_tokens=12)
    for prompt, answer in zip(prompts(tokenizer), together, strict=True):
        assert answer == complete(hf, tokenizer, [prompt], max_new_tokens=12)[0]
        ids = steps(hf.eval(), prompt, 12)
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        assert answer == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(together)) > 1, "the same answer to all would hide what a neighbour does"


def test_a_streamed_answer_comes_in_whole_characters(tokenizer):
    hf, count = build(tokenizer), 0
    for prompt in prompts(tokenizer):
        pieces = []
        (answer,) = complete(hf, tokenizer, [prompt], max_new_tokens=40, on_text=pieces.append)
        assert answer == complete(hf, tokenizer, [prompt], max_new_tokens=40)[0]
        assert "".join(pieces) == answer
        assert all(pieces)
        count += len(pieces)
    assert count > 20


def test_bytes_of_a_character_are_held_back_until_it_is_whole(tokenizer):
    pieces = []
    stream = TextStreamer(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt, which is not passed on
    for byte in "aé€\ufffd😀!".encode()[:-2]:
        stream.put(torch.tensor([byte]))
    assert pieces == ["a", "é", "€"]  # a replacement character of the text's own waits for what follows it
    stream.end()
    assert "".join(pieces) == tokenizer.decode(stream.ids)
    assert pieces[-1].startswith("\ufffd")


def test_greedy_answers_equal_those_of_transformers(tokenizer):
    hf = build(tokenizer).eval()
    for prompt in prompts(tokenizer):
        out = hf.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        expected = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        assert complete(hf, tokenizer, [prompt], max_new_tokens=12) == [expected]


def test_top_p_keeps_only_the_most_likely_tokens(tokenizer):
    hf = build(tokenizer)
    prompt = prompts(tokenizer)[0]
    greedy = complete(hf, tokenizer, [prompt], max_new_tokens=6)
    torch.manual_seed(0)
    assert complete(hf, tokenizer, [prompt], max_new_tokens=6, temperature=5.0, top_p=1e-6) == greedy
    assert complete(hf, tokenizer, [prompt], max_new_tokens=6, temperature=5.0) != greedy


def test_an_answer_ends_at_the_end_of_turn(tokenizer):
    hf = build(tokenizer)
    answers = {tuple(prompt): steps(hf.eval(), prompt, 12) for prompt in prompts(tokenizer)}
    prompt, ids = next((p, ids) for p, ids in answers.items() if tokenizer.eos_token_id not in ids[:6])
    stop = next(token for i, token in enumerate(ids[:6]) if i >= 2 and token not in ids[:i])
    (answer,) = complete(hf, tokenizer, [prompt], max_new_tokens=12, stop=[stop])
    assert answer == tokenizer.decode(ids[: ids.index(stop) + 1], skip_special_tokens=True)
    hf.generation_config.eos_token_id = [stop]  # what the model itself ends with counts beside the tokenizer's
    assert complete(hf, tokenizer, [prompt], max_new_tokens=12) == [answer]


def test_greedy_ignores_the_sampling_settings_of_the_model(tokenizer):
    hf = build(tokenizer)
    plain = complete(hf, tokenizer, prompts(tokenizer), max_new_tokens=12)
    hf.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, top_k=3)
    hf.generation_config.update(suppress_tokens=list(range(100)), num_return_sequences=2, min_new_tokens=12)
    hf.generation_config.output_hidden_states = math.inf
    own = hf.generation_config
    assert complete(hf, tokenizer, prompts(tokenizer), max_new_tokens=12) == plain
    assert hf.generation_config is own


def test_sampling_draws_from_all_tokens(tokenizer):
    hf = build(tokenizer)
    hf.generation_config.update(top_k=1, top_p=0.01)
    drawn = set()
    for seed in range(5):
        torch.manual_seed(seed)
        drawn.update(complete(hf, tokenizer, [prompts(tokenizer)[0]], max_new_tokens=6, temperature=5.0))
    assert len(drawn) == 5


def test_training_modes_are_left_as_they_were(tokenizer):
    hf = build(tokenizer, gradient_checkpointing=True)
    hf.model.layers[0].eval()
    modes = [module.training for module in hf.modules()]
    complete(hf, tokenizer, prompts(tokenizer), max_new_tokens=2)
    assert [module.training for module in hf.modules()] == modes
    with pytest.raises(IndexError):
        complete(hf, tokenizer, [[10**6]], max_new_tokens=2)
    assert [module.training for module in hf.modules()] == modes
    assert complete(hf, tokenizer, []) == []


def test_with_an_adapter_and_added_tokens(tokenizer):
    lora = {"r": 4, "trainable_token_indices": {"model.embed_tokens": [7], "lm_head": [7]}}
    hf = build(tokenizer, lora=lora)
    merged = complete(hf, tokenizer, prompts(tokenizer), max_new_tokens=8)
    assert complete(hf.merge_and_unload(), tokenizer, prompts(tokenizer), max_new_tokens=8) == merged
