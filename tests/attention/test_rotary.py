"""Frequencies that depend on a sequence's length, in every layout against each document alone in a fresh model."""

import copy

import pytest
import torch

from oumi_pl.attention import NAME, refuse_unless_isolating, separate_frequencies, why_not_isolating, why_not_shared
from oumi_pl.attention.probe import changes
from oumi_pl.errors import UserError
from oumi_pl.models.lm import LM, choose_layout, documents, forest, padded
from tests.attention.test_documents import VOCAB, assert_close, make, registered
from tests.trees import batch_of_rows

__all__ = ["registered"]  # the fixture

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "factor": 4.0,
}
KINDS = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": None}),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
}
LENGTHS = [9, 21, 16, 17, 5, 30]
"""Some documents within the original length of 16, and some beyond it."""


def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in LENGTHS]


def batch(rows):
    """All tokens but the first of each document are targets."""
    from tests.models.test_lm import of_texts

    return of_texts(rows)


def alone(kind):
    """Log-probabilities of each document, each in a model that has seen no other."""
    name, values = KINDS[kind]
    logps = []
    for ids in texts():
        logits = make(name, "eager", **values)(ids[None], use_cache=False).logits[0, :-1]
        logps.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    return torch.cat(logps)


def separated(kind, attention=NAME):
    name, values = KINDS[kind]
    model = make(name, attention, **values)
    separate_frequencies(model)
    return model


@pytest.mark.parametrize("layout", [forest, documents, padded])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_the_frequencies_of_their_own_length(kind, layout):
    model = LM(separated(kind, None if layout is padded else NAME), layout)
    assert_close([model(batch(texts()))], [alone(kind)])
    assert_close([model(batch(texts()))], [alone(kind)])  # nothing is remembered
    short = LM(separated(kind), layout)(batch(texts()[:1]))
    assert_close([short], [alone(kind)[: len(short)]])


@pytest.mark.parametrize("layout", [documents, padded])
@pytest.mark.parametrize("kind", KINDS)
def test_without_it_they_would_change_each_other(kind, layout):
    name, values = KINDS[kind]
    model = LM(make(name, None if layout is padded else NAME, **values), layout)
    with pytest.raises(AssertionError, match="off by"):
        assert_close([model(batch(texts()))], [alone(kind)])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_equal_length_after_longer_ones(kind):
    model = LM(separated(kind), documents)
    model(batch(texts()))
    ids = torch.stack([text[:9] for text in texts() if len(text) >= 9])
    expected = LM(separated(kind), documents)(batch_of_rows(ids, ids.roll(-1, 1)))
    assert torch.equal(model(batch_of_rows(ids, ids.roll(-1, 1))), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_probes_reach_the_length_at_which_frequencies_change(kind):
    name, values = KINDS[kind]
    model = make(name, **values)
    assert changes(model, 17) == [16]
    assert changes(model, 16) == []
    assert why_not_isolating(model) is None
    with pytest.raises(UserError, match="lets packed documents see each other"):
        refuse_unless_isolating(model, 17)
    assert why_not_isolating(separated(kind), 17) is None
    assert "depend on the length of each response" in why_not_shared(separated(kind))
    assert choose_layout(separated(kind), longest=40)[0] is documents


def test_probes_reach_llama_4s_floor():
    """Its attention is scaled by the position in the row, not in the document, from `floor_scale` tokens on."""
    values = {"no_rope_layers": [0, 0], "attn_temperature_tuning": True, "floor_scale": 24, "attn_scale": 1.0}
    model = make("llama4_text", **values | {"attention_chunk_size": 8, "num_local_experts": 2})
    assert changes(model, 100) == [8, 24]
    assert why_not_isolating(model, 20) is None
    assert "see each other" in why_not_isolating(model, 100)


def test_copies_and_generation_keep_their_own_state():
    model = separated("longrope")
    again = copy.deepcopy(model)
    ids = texts()[1][None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    rotary, other = (m.model.rotary_emb for m in (model, again))
    assert other.inv_freq.data_ptr() != rotary.inv_freq.data_ptr()
    plain = make("phi3", **KINDS["longrope"][1])
    greedy = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    prompt = texts()[0][None]
    assert torch.equal(model.generate(prompt, **greedy), plain.generate(prompt, **greedy))


def test_other_models_are_not_changed():
    model = make("llama")
    kind = type(model.model.rotary_emb)
    separate_frequencies(model)
    assert type(model.model.rotary_emb) is kind
