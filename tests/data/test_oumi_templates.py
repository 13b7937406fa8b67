"""The chat templates that Oumi's recipes name: texts by hand, spans by their markers, no token added."""

import pytest

from oumi_pl.data.template import BUILT_IN, OUMI, apply_template, load_template
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation
from tests.data.byte_level import byte_tokenizer, prompt_of, spans_of, turn

TURNS = (
    turn("system", " Be brief. "),
    turn("user", "Hi"),
    turn("assistant", " Ho "),
    turn("user", "1+1?"),
    turn("assistant", "2"),
)
EXPECTED = {
    "oumi/default": ("SYSTEM: Be brief.\nUSER: Hi\nASSISTANT: Ho\nUSER: 1+1?\nASSISTANT: 2\n", "Ho\n", "2\n"),
    "oumi/chat_ml": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n",
        "Ho<|im_end|>",
        "2<|im_end|>",
    ),
    "oumi/llama3-instruct": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>",
        "Ho<|eot_id|>",
        "2<|eot_id|>",
    ),
    "oumi/gemma2-it": (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
        "<start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n2<end_of_turn>\n",
        "Ho<end_of_turn>",
        "2<end_of_turn>",
    ),
    "oumi/phi3-instruct": (
        "<|system|>\n Be brief. <|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n Ho <|end|>\n"
        "<|user|>\n1+1?<|end|>\n<|assistant|>\n2<|end|>\n",
        " Ho <|end|>",
        "2<|end|>",
    ),
    "oumi/zephyr": (
        "<|system|>\nBe brief.<eos>\n<|user|>\nHi<eos>\n<|assistant|>\nHo<eos>\n"
        "<|user|>\n1+1?<eos>\n<|assistant|>\n2<eos>\n",
        "Ho<eos>",
        "2<eos>",
    ),
    "oumi/gpt2": (" Be brief. <eos>Hi<eos> Ho <eos>1+1?<eos>2<eos>", " Ho <eos>", "2<eos>"),
}


def tokenizer_with(name):
    tokenizer = byte_tokenizer(bos_token="<s>")
    before = len(tokenizer)
    assert apply_template(tokenizer, load_template(tokenizer, name)) == []
    assert len(tokenizer) == before
    return tokenizer


def test_all_are_here():
    assert set(EXPECTED) == set(OUMI)
    assert not set(OUMI) & set(BUILT_IN)


@pytest.mark.parametrize("name", OUMI)
def test_texts_and_spans(name):
    expected, *said = EXPECTED[name]
    text, spans = spans_of(tokenizer_with(name), Conversation(TURNS), [2, 4])
    assert text == expected
    assert [text[start:end] for start, end in spans] == said


@pytest.mark.parametrize("name", OUMI)
def test_a_prompt_ends_where_the_answer_begins(name):
    tokenizer = tokenizer_with(name)
    text, ((start, _),) = spans_of(tokenizer, Conversation(TURNS[:3]), [2])
    assert prompt_of(tokenizer, TURNS[:2], None) == text[:start]


@pytest.mark.parametrize("name", ["oumi/chat_ml", "oumi/gemma2-it", "oumi/zephyr"])
@pytest.mark.parametrize("wrong", [(TURNS[1], TURNS[1]), (TURNS[2],), (TURNS[1], TURNS[0])])
def test_roles_have_to_alternate(name, wrong):
    with pytest.raises(UserError, match="have to alternate"):
        spans_of(tokenizer_with(name), Conversation(tuple(wrong)), [])


def test_the_nearest_is_offered():
    with pytest.raises(UserError, match="did you mean 'oumi/zephyr'"):
        load_template(byte_tokenizer(), "oumi/zephr")
