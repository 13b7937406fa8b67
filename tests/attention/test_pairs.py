"""Pairs of responses that share one prompt, in one row, against two sequences each."""

import pytest
import torch

from oumi_pl.attention import NAME, packed, why_not_shared
from oumi_pl.attention.blocks import Block, pair_blocks
from oumi_pl.errors import UserError

from .test_documents import ARCHITECTURES, RECURRENT, VOCAB, assert_close, body, gradients, make, project, registered

__all__ = ["registered"]  # the fixture

PAIRS = [(5, 4, 7), (1, 1, 3), (9, 6, 1), (3, 2, 2)]
EXACT = [name for name in ARCHITECTURES if name != "llama4_text"]


def pieces():
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(3, VOCAB, (1, n), generator=generator) for n in lengths] for lengths in PAIRS]


def shared(model):
    """Hidden states of all pairs in one row, `[1, seq, hidden]`."""
    positions = [p for n, c, r in PAIRS for p in (*range(n + c), *range(n, n + r))]
    ids = torch.cat([piece for pair in pieces() for piece in pair], 1)
    with packed(pair_lengths=PAIRS):
        return body(model)(input_ids=ids, position_ids=torch.tensor([positions]), use_cache=False).last_hidden_state


def separate(model):
    """The same of two sequences per pair, each run alone."""
    states = []
    for prompt, chosen, rejected in pieces():
        states.append(body(model)(torch.cat([prompt, chosen], 1), use_cache=False).last_hidden_state)
        other = body(model)(torch.cat([prompt, rejected], 1), use_cache=False).last_hidden_state
        states.append(other[:, prompt.shape[1] :])
    return torch.cat(states, 1)


@pytest.mark.parametrize("name", EXACT)
def test_shared_equals_separate(name):
    model, reference = make(name), make(name, "eager")
    ours, theirs = shared(model), separate(reference)
    assert_close([ours], [theirs])
    # the prompt's gradient comes from both responses: weigh its states once on either side
    assert_close(gradients(model, project(ours)), gradients(reference, project(theirs)))
    assert why_not_shared(body(model)) is None


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_rejected_response_does_not_see_the_chosen_one(name, monkeypatch):
    model = make(name).eval()
    before = shared(model)
    changed = pieces()
    changed[2][1] = (changed[2][1] + 1) % VOCAB
    monkeypatch.setitem(globals(), "pieces", lambda: changed)
    after = shared(model)
    start = sum(map(sum, PAIRS[:2])) + PAIRS[2][0]
    same = (before == after).all(-1)[0]
    assert not same[start : start + PAIRS[2][1]].any()
    assert same[:start].all()
    assert same[start + PAIRS[2][1] :].all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_own_attention_loses_the_prompt(implementation):
    """Without our attention, positions that don't rise by one are taken for a new document."""
    model = make("llama", implementation)
    assert (shared(model) - separate(model)).norm() > 0.05 * separate(model).norm()
    assert "mixes responses" in why_not_shared(model)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_architectures_cannot_share(name):
    model = make(name, None if name.startswith("mamba") else NAME, **RECURRENT[name])
    assert why_not_shared(model)


def test_chunks_cannot_be_shared():
    model = make("llama4_text")
    with pytest.raises(UserError, match="shared prompts"), packed(pair_lengths=[(2, 2, 2)]):
        model.model(torch.arange(6)[None], position_ids=torch.tensor([[0, 1, 2, 3, 2, 3]]), use_cache=False)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_checkpointing_recomputes_outside_of_packed(name):
    model = make(name).train()
    expected = gradients(model, project(shared(model)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(gradients(model, project(shared(model))), expected)


def test_blocks_cover_the_row_and_name_what_they_see():
    blocks = pair_blocks([(5, 4, 7), (1, 1, 3)])
    assert blocks == (Block(0, 9), Block(9, 7, 0, 5), Block(16, 2), Block(18, 3, 16, 1))
    assert list(blocks[3].key_positions()) == [16, 18, 19, 20]
    assert [b.keys for b in blocks] == [9, 12, 2, 4]


def test_the_work_is_that_of_the_branches(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **keywords):
        calls.append((query.shape[2], key.shape[2], attn_mask is not None))
        return real(query, key, value, attn_mask=attn_mask, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    shared(make("llama", num_hidden_layers=1, num_key_value_heads=4))
    expected = [call for n, c, r in PAIRS for call in ((n + c, n + c, False), (r, n + r, True))]
    assert calls == expected
