"""Which tokens carry loss: by hand for each template, and against what Transformers and TRL make of the same rows."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken, models
from transformers import AutoTokenizer

from oumi_pl.attention.segments import path_positions
from oumi_pl.data import tokenize
from oumi_pl.data.formats import question_answer
from oumi_pl.data.template import BUILT_IN, apply_template, load_template
from oumi_pl.data.tokenize import Dropped, Tokenize
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Example, Text
from tests.data.byte_level import WORDS, byte_tokenizer, chat, pieces, spans_of, turn, wrap

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data (GPT-2's tokenizer, GSM8K)")


def one(tokenizer, record, max_length=1000, **kwargs):
    (example,) = Tokenize(tokenizer, max_length, **kwargs)([record])
    return example


# --- golden masks -----------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
LONG = Conversation(
    (
        turn("system", "Be brief."),
        turn("user", "Hi"),
        turn("assistant", "Ho"),
        turn("user", "1+1?"),
        turn("assistant", None, tool_calls=[CALL]),
        turn("tool", "2"),
        turn("assistant", "Two 🙂"),
    )
)
GOLDEN = {
    "chatml": [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Ho<|im_end|>", True),
        ("\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", False),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>', True),
        ("\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n", False),
        ("Two 🙂<|im_end|>", True),
        ("\n", False),
    ],
    "llama3": [
        (
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("Ho<|eot_id|>", True),
        (
            "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ('{"name": "add", "parameters": {"a": 1}}<|eot_id|>', True),
        (
            "<|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            False,
        ),
        ("Two 🙂<|eot_id|>", True),
    ],
    "plain": [
        ("System: Be brief.\nUser: Hi\nAssistant:", False),
        (" Ho<eos>", True),
        ("\nUser: 1+1?\nAssistant:", False),
        (' Call: {"name": "add", "arguments": {"a": 1}}<eos>', True),
        ("\nTool: 2\nAssistant:", False),
        (" Two 🙂<eos>", True),
        ("\n", False),
    ],
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_golden_masks_of_the_built_in_templates(name):
    tokenizer, golden = byte_tokenizer(name), GOLDEN[name]
    assert pieces(tokenizer, one(tokenizer, LONG)) == golden
    assert pieces(tokenizer, one(tokenizer, LONG, train_on="assistant")) == golden
    whole = "".join(text for text, _ in golden)

    # The last turn only, and the completion after a border before the third user turn's answer.
    last = [("".join(text for text, _ in golden[:5]), False), *golden[5:]]
    assert pieces(tokenizer, one(tokenizer, LONG, train_on="last_turn")) == last
    bordered = Conversation(LONG.messages, prompt_messages=4)
    completion = [("".join(text for text, _ in golden[:3]), False), *golden[3:]]
    assert pieces(tokenizer, one(tokenizer, bordered)) == completion
    assert pieces(tokenizer, one(tokenizer, bordered, train_on="assistant")) == golden

    everything = one(tokenizer, LONG, train_on="all")
    assert everything.loss_mask.tolist() == [False] + [True] * (len(everything.input_ids) - 1)
    assert tokenizer.decode(everything.input_ids) == whole


@pytest.mark.parametrize("name", BUILT_IN)
def test_prefixes_find_what_the_markers_mark(name):
    marked, bare = byte_tokenizer(name), byte_tokenizer(name)
    bare.chat_template = re.sub(r"\{%-? (end)?generation %\}", "", marked.chat_template)
    assert "generation %" not in bare.chat_template
    for record in (LONG, chat("a", "b"), chat("q", " a \n", "q", ""), Conversation(LONG.messages, ({"name": "f"},))):
        for train_on in ("assistant", "last_turn"):
            expected = one(marked, record, train_on=train_on)
            actual = one(bare, record, train_on=train_on)
            assert pieces(bare, actual) == pieces(marked, expected)


@pytest.mark.parametrize("name", BUILT_IN)
def test_transformers_agrees(name):
    tokenizer = byte_tokenizer(name)
    records = [LONG, chat("hi", "ho", "hi", "ho"), chat("x", "x"), chat("é🙂", "🙂é")]
    for record, example in zip(records, Tokenize(tokenizer, 1000)(records), strict=True):
        theirs = tokenizer.apply_chat_template(
            list(record.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert example.input_ids.tolist() == theirs["input_ids"]
        assert example.loss_mask.tolist() == [bool(m) for m in theirs["assistant_masks"]]


def test_plain_text_and_completion_end_in_a_trained_eos():
    tokenizer = byte_tokenizer()
    assert pieces(tokenizer, one(tokenizer, Text("abc"))) == [("a", False), ("bc<eos>", True)]
    assert pieces(tokenizer, one(tokenizer, Text("abc<eos>"))) == [("a", False), ("bc<eos>", True)]
    assert pieces(tokenizer, one(tokenizer, Text("bc", prompt="a"))) == [("a", False), ("bc<eos>", True)]
    assert pieces(tokenizer, one(tokenizer, Text("bc", prompt="xa"), train_on="all")) == [
        ("x", False),
        ("abc<eos>", True),
    ]
    with pytest.raises(UserError, match="texts would have no end to learn"):
        one(byte_tokenizer("chatml", eos_token=None, pad_token="<pad>"), Text("abc"))


# --- what fools masks made from ids -----------------------------------------------------------------------------------


def test_pad_and_end_of_turn_equal_to_eos_are_harmless():
    tokenizer = byte_tokenizer("plain")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = one(tokenizer, chat("say <eos>", "<eos>", "<eos>", "no"))
    assert pieces(tokenizer, example) == [
        ("User: say <eos>\nAssistant:", False),
        (" <eos><eos>", True),
        ("\nUser: <eos>\nAssistant:", False),
        (" no<eos>", True),
        ("\n", False),
    ]


def test_an_answer_that_repeats_the_question_is_masked_correctly():
    tokenizer = byte_tokenizer("chatml")
    record = chat("<|im_start|>assistant\nyes<|im_end|>", "yes", "yes", "yes")
    assert pieces(tokenizer, one(tokenizer, record)) == [
        ("<|im_start|>user\n<|im_start|>assistant\nyes<|im_end|><|im_end|>\n<|im_start|>assistant\n", False),
        ("yes<|im_end|>", True),
        ("\n<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n", False),
        ("yes<|im_end|>", True),
        ("\n", False),
    ]
    assert pieces(tokenizer, one(tokenizer, Text("aa", prompt="aa"))) == [("aa", False), ("aa<eos>", True)]


@pytest.mark.parametrize("trim_offsets", [True, False, None])
def test_a_token_over_the_border_is_trained_and_noticed(trim_offsets):
    tokenizer = wrap(models.BPE(), WORDS, trim_offsets=trim_offsets)
    clean = one(tokenizer, Text(" answer is 42", prompt="the"))
    assert (pieces(tokenizer, clean), clean.straddled) == ([("the", False), (" answer is 42<eos>", True)], False)
    crossed = one(tokenizer, Text("answer is 42", prompt="the "))
    assert (pieces(tokenizer, crossed), crossed.straddled) == ([("the", False), (" answer is 42<eos>", True)], True)
    assert not one(tokenizer, Text("answer is 42", prompt="the "), train_on="all").straddled


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_space_at_a_tokens_end_stays_with_it(trim_offsets):
    # With trimmed offsets, the newline of ".\n" would seem to belong to the next token, which is the user's.
    tokenizer = wrap(models.BPE(), [".\n"] * 50, use_regex=False, trim_offsets=trim_offsets)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert len(tokenizer(".\n")["input_ids"]) == 1
    example = one(tokenizer, chat("q.\n", "a.\n", "q", "b"))
    assert not example.straddled
    assert pieces(tokenizer, example) == [("q.\nA", False), ("a.\n", True), ("qA", False), ("b", True)]


def test_a_special_token_that_swallows_spaces_does_not_cross_borders():
    tokenizer = byte_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>\n"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n{% endfor %}"
    )
    names = ("<|assistant|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(name, rstrip=True, special=True) for name in names], special_tokens=True)
    record = Conversation((turn("assistant", "  hi"), turn("assistant", "ho")))
    example = one(tokenizer, record)
    assert pieces(tokenizer, example) == [
        *[("<|assistant|>", False), ("hi<|end|>", True)],
        *[("<|assistant|>", False), ("ho<|end|>", True)],
    ]
    assert not example.straddled


# --- templates without markers ----------------------------------------------------------------------------------------

THINKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
REFUSES = "{% if messages | length % 2 %}{{ raise_exception('turns must alternate') }}{% endif %}" + (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
OTHER_PROMPT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>{% endif %}"
)


def as_texts(tokenizer, example):
    """The paths of an example as text, each as [(text, carries loss)] with the loss of its own tokens only."""
    actual = []
    for i, segment in enumerate(example.segments):
        path = path_positions(example.segments, i)
        mask = np.concatenate([np.zeros(segment.shared, bool), example.loss_mask[path[segment.shared :]]])
        actual.append(pieces(tokenizer, Example(example.input_ids[path], mask)))
    return actual


def test_a_template_that_inserts_a_think_block_trains_it_in_every_turn():
    tokenizer = byte_tokenizer(THINKS)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    expected = [("<think>\n\n</think>\n\nho<|im_end|>", True), ("\n", False)]
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert pieces(tokenizer, one(tokenizer, chat("hi", "ho"))) == [(prompt, False), *expected]
    last = one(tokenizer, chat("hi", "ho", "hi", "ho"), train_on="last_turn")
    assert pieces(tokenizer, last) == [(f"{prompt}ho<|im_end|>\n{prompt}", False), *expected]
    # The earlier turn is written without the block once it isn't last: each turn is trained as it is generated.
    both = one(tokenizer, chat("hi", "ho", "hi", "ho"))
    assert as_texts(tokenizer, both) == [
        [(prompt, False), expected[0]],
        [(f"{prompt}ho<|im_end|>\n{prompt}", False), expected[0]],
    ]
    assert both.segments[1].shared == len(tokenizer(prompt)["input_ids"])
    assert len(both.segments) == 2
    with pytest.raises(UserError, match=r"together is not exact.*writes turn 2 .*differently.*train_on: last_turn"):
        Tokenize(tokenizer, 1000, turns="together")([chat("hi", "ho", "hi", "ho")])


def test_a_turn_that_cannot_be_rendered_alone_is_found_in_the_whole():
    tokenizer = byte_tokenizer(REFUSES)
    assert pieces(tokenizer, one(tokenizer, chat("hi", "ho"))) == [("user: hi\nassistant: ", False), ("ho\n", True)]
    # the turn's text may also be elsewhere
    both = [("user: o\nassistant: ", False), ("o\n", True), ("user: o\nassistant: ", False), ("o\n", True)]
    assert pieces(tokenizer, one(tokenizer, chat("o", "o", "o", "o"))) == both
    with pytest.raises(UserError, match="the chat template refuses this conversation: turns must alternate"):
        one(tokenizer, chat("hi"))


def test_a_generation_prompt_that_goes_on_is_left_where_the_turn_differs():
    tokenizer = byte_tokenizer(OTHER_PROMPT)
    assert pieces(tokenizer, one(tokenizer, chat("hi", "ho"))) == [("user: hi\nassistant: ", False), ("ho\n", True)]
    # an empty block is what inference feeds; a turn that brings its own is kept as the template writes it
    closed = byte_tokenizer(OTHER_PROMPT.replace("<think>", "<think></think>"))
    assert pieces(closed, one(closed, chat("hi", "ho"))) == [
        ("user: hi\nassistant: <think></think>", False),
        ("ho\n", True),
    ]


def test_a_newline_that_ends_the_turn_itself_is_trained():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    example = one(byte_tokenizer(template), chat("hi", "ho"))
    assert pieces(byte_tokenizer(template), example) == [("user: hi\nassistant:", False), (" ho\n", True)]


def test_a_template_that_never_ends_a_turn_is_refused():
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    for answer in ("ho", "ho "):
        with pytest.raises(UserError, match=r"writes nothing at the turn's end.*helps: a template with"):
            one(byte_tokenizer(template), chat("hi", answer))


def test_a_template_that_leaves_the_answer_out_is_refused():
    # Templates for images and text expect lists of parts, and write nothing of a string.
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}\n{% endfor %}"
    )
    with pytest.raises(UserError, match=r"doesn't write the text of turn 2"):
        one(tokenizer, chat("hi", "ho"))
    # Markers inside a captured block point to the wrong place.
    block = "{% set t %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}"
    tokenizer = byte_tokenizer("{% for m in messages %}" + block + "{{ m.role }}: {{ t }}\n{% endfor %}")
    with pytest.raises(UserError, match=r"marks 2 spans|doesn't write the text"):
        one(tokenizer, Conversation((turn("user", "hi"), turn("assistant", "a long answer"))), train_on="last_turn")


def test_markers_that_cannot_be_counted_to_turns():
    skips = "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    with pytest.raises(UserError, match=r"marks 1 spans .* of 2 assistant turns"):
        one(byte_tokenizer(skips + "{% endfor %}"), chat("a", "b", "c", "d"))
    # Two spans a turn are fine where all of them are trained.
    twice = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A{% generation %}{{ m.content }}{% endgeneration %}|"
        "{% generation %}.{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    expected = [("aA", False), ("b", True), ("|", False), (".", True)]
    assert pieces(byte_tokenizer(twice), one(byte_tokenizer(twice), chat("a", "b"))) == expected
    with pytest.raises(UserError, match=r"marks 4 spans .* of 2 assistant turns"):
        one(byte_tokenizer(twice), chat("a", "b", "c", "d"), train_on="last_turn")


# --- settings ---------------------------------------------------------------------------------------------------------


def test_train_on_that_does_not_fit_the_row():
    tokenizer = byte_tokenizer("chatml")
    with pytest.raises(
        UserError, match=r"completion needs rows of prompt and completion.*assistant, last_turn and all"
    ):
        one(tokenizer, chat("a", "b"), train_on="completion")
    for train_on in ("assistant", "last_turn"):
        with pytest.raises(UserError, match=f"train_on: {train_on} needs conversations.*completion and all fit"):
            one(tokenizer, Text("a"), train_on=train_on)


def test_wrong_settings():
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match="unknown train_on 'asistant'; did you mean 'assistant'"):
        Tokenize(tokenizer, 10, "asistant")
    with pytest.raises(UserError, match="unknown overflow 'truncat'; did you mean 'truncate'"):
        Tokenize(tokenizer, 10, overflow="truncat")
    with pytest.raises(UserError, match="max_length is 1"):
        Tokenize(tokenizer, 1)
    with pytest.raises(UserError, match="use a fast tokenizer"):
        Tokenize(object(), 10)


# --- BOS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BUILT_IN, "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ bos_token }}x"])
def test_exactly_one_bos_where_the_tokenizer_adds_it(name):
    tokenizer = byte_tokenizer(name, bos_token="<s>", adds_bos=True)
    tokenize = Tokenize(tokenizer, 1000, train_on="all")
    records = [chat("hi", "ho"), Text("hi"), Text("<s>hi"), Text("hi", prompt="<s>ho"), Text("")]
    for record, example in zip(records, tokenize(records), strict=True):
        assert (example.input_ids == tokenizer.bos_token_id).nonzero()[0].tolist() == [0], record
        assert example.loss_mask.tolist() == [False] + [True] * (len(example.input_ids) - 1)
    for record in records:
        assert tokenize.prompt_ids(record)[0].count(tokenizer.bos_token_id) == 1


def test_no_bos_where_the_tokenizer_adds_none():
    tokenizer = byte_tokenizer("chatml", bos_token="<s>")
    for example in Tokenize(tokenizer, 1000)([chat("hi", "ho"), Text("hi")]):
        assert tokenizer.bos_token_id not in example.input_ids


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "max_length", "expected"),
    [
        (Text("789", prompt="123456"), 10, [("123456", False), ("789<eos>", True)]),
        # The answer fits: the context makes room.
        (Text("789", prompt="123456"), 9, [("23456", False), ("789<eos>", True)]),
        (Text("789", prompt="123456"), 5, [("6", False), ("789<eos>", True)]),
        # It doesn't: the context keeps half at most, and the answer's end goes.
        (Text("789", prompt="123456"), 4, [("56", False), ("78", True)]),
        (Text("3456789", prompt="12"), 8, [("12", False), ("345678", True)]),
        # Nothing before the answer: the end goes.
        (Text("123456"), 4, [("1", False), ("234", True)]),
    ],
)
def test_truncation(record, max_length, expected):
    tokenizer = byte_tokenizer()
    example = one(tokenizer, record, max_length)
    assert pieces(tokenizer, example) == expected
    assert example.cut == (max_length < 10)


def test_truncation_keeps_bos():
    tokenizer = byte_tokenizer(bos_token="<s>", adds_bos=True)
    record = Text("789", prompt="123456")
    assert pieces(tokenizer, one(tokenizer, record, 8)) == [("<s>456", False), ("789<eos>", True)]
    assert pieces(tokenizer, one(tokenizer, record, 5)) == [("<s>", False), ("789<eos>", True)]
    assert pieces(tokenizer, one(tokenizer, record, 4)) == [("<s>6", False), ("78", True)]
    assert pieces(tokenizer, one(tokenizer, record, 2)) == [("<s>", False), ("7", True)]
    assert pieces(tokenizer, one(tokenizer, record, 8, train_on="all")) == [("<s>", False), ("1234567", True)]


def test_drop_and_error():
    tokenizer = byte_tokenizer("plain")
    record = Text("789", prompt="123456")
    assert one(tokenizer, record, 9, overflow="drop") == Dropped("longer than max_length")
    assert not one(tokenizer, record, 10, overflow="drop").cut
    with pytest.raises(UserError, match="10 tokens, but max_length is 9"):
        one(tokenizer, record, 9, overflow="error")
    nothing = [Text(""), chat("hi"), chat("a", "b", "c", border=2)]
    assert Tokenize(tokenizer, 9)(nothing) == [Dropped("no target tokens")] * 3


def test_a_text_whose_tokens_would_fill_the_memory_is_no_row(monkeypatch):
    tokenizer = byte_tokenizer("plain")
    monkeypatch.setattr(tokenize, "LONGEST", 10)
    for record in (Text("789", prompt="12345678"), chat("hi", "0123456789")):
        with pytest.raises(UserError, match=r"a text of 1[12] characters, and at most 10 are tokenized as one"):
            one(tokenizer, record, 9)
        assert one(tokenizer, record, 9, overflow="drop") == Dropped("longer than max_length")
    with pytest.raises(UserError, match="tokenized as one"):
        Tokenize(tokenizer, 9).prompt_ids(Text("", prompt="x" * 11))


def test_long_texts_are_tokenized_one_after_the_other(monkeypatch):
    records = [Text("x" * n) for n in range(1, 9)]
    whole = Tokenize(byte_tokenizer("plain"), 20)(records)
    monkeypatch.setattr(tokenize, "CHARACTERS", 5)
    encoded = Tokenize(byte_tokenizer("plain"), 20)
    sizes = []
    backend = encoded._backend
    encoded._backend = SimpleNamespace(
        encode_batch=lambda texts, **how: sizes.append(len(texts)) or backend.encode_batch(texts, **how)
    )
    assert [e.input_ids.tolist() for e in encoded(records)] == [e.input_ids.tolist() for e in whole]
    assert sizes == [3, 2, 1, 1, 1]


def test_an_empty_answer_trains_the_end_of_turn_and_is_reported():
    tokenizer = byte_tokenizer("plain")
    silent = [Text("", prompt="q"), chat("a", ""), chat("a", "b", "c", "", border=3)]
    for example in Tokenize(tokenizer, 99)(silent):
        assert example.empty_answer
        assert "".join(text for text, carries in pieces(tokenizer, example) if carries) in ("<eos>", " <eos>")
    assert Tokenize(tokenizer, 99)([Text("  ", prompt="q")])[0].empty_answer
    speaking = [chat("a", "b", "c", ""), Text("x", prompt="q"), Text("x")]
    assert not any(example.empty_answer for example in Tokenize(tokenizer, 99)(speaking))
    assert not any(example.empty_answer for example in Tokenize(tokenizer, 99, "all")(silent))


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        (chat("a", "b", "c", "d"), "User: a\nAssistant: b<eos>\nUser: c\nAssistant:", "d"),
        (chat("a", "b", "c", "d", border=1), "User: a\nAssistant:", "b\nd"),
        (chat("a", "b", "c"), "User: a\nAssistant: b<eos>\nUser: c\nAssistant:", ""),
        (Text("answer", prompt="question"), "question", "answer"),
        (Text("once upon"), "once upon", ""),
    ],
)
def test_prompts_for_generation(record, prompt, answer):
    tokenizer = byte_tokenizer("plain")
    ids, reference = Tokenize(tokenizer, 1000).prompt_ids(record)
    assert (tokenizer.decode(ids), reference) == (prompt, answer)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_prompt_is_what_training_saw_before_the_last_answer(name):
    tokenizer = byte_tokenizer(name, bos_token="<s>", adds_bos=True)
    tokenize = Tokenize(tokenizer, 1000, train_on="last_turn")
    (example,) = tokenize([LONG])
    assert tokenize.prompt_ids(LONG)[0] == example.input_ids[: example.loss_mask.argmax()].tolist()


# --- real data, and TRL -----------------------------------------------------------------------------------------------


def gpt2(template):
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2-tokenizer")
    apply_template(tokenizer, load_template(tokenizer, template))
    return tokenizer


def gsm8k(count):
    (path,) = (DATA / "gsm8k").glob("train*")
    with path.open() as lines:
        return [question_answer(json.loads(line)) for _, line in zip(range(count), lines, strict=False)]


@needs_data
@pytest.mark.parametrize("name", BUILT_IN)
def test_gsm8k_with_gpt2(name):
    tokenizer, records = gpt2(name), gsm8k(100)
    for record, example in zip(records, Tokenize(tokenizer, 2048)(records), strict=True):
        theirs = tokenizer.apply_chat_template(
            list(record.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert example.input_ids.tolist() == theirs["input_ids"]
        assert example.loss_mask.tolist() == [bool(m) for m in theirs["assistant_masks"]]
        assert not example.straddled
        end = load_template(tokenizer, name).end_of_turn or tokenizer.eos_token
        answer = ("" if name != "plain" else " ") + record.messages[1]["content"] + end
        assert tokenizer.decode(example.input_ids[example.loss_mask]) == answer


@needs_data
@pytest.mark.filterwarnings("ignore")
def test_trl_agrees_on_prompt_and_completion(tmp_path):
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    tokenizer, records = gpt2("chatml"), gsm8k(20)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=len(tokenizer)))
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=None, disable_tqdm=True)
    texts = [Text(" " + r.messages[1]["content"], prompt=r.messages[0]["content"] + "\nAnswer:") for r in records]
    texts.append(Text("42", prompt="The answer is "))
    chats = [{"prompt": list(r.messages[:1]), "completion": list(r.messages[1:])} for r in records]
    for rows, ours in ((chats, records), ([{"prompt": t.prompt, "completion": t.text} for t in texts], texts)):
        trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        for theirs, example in zip(trainer.train_dataset, Tokenize(tokenizer, 2048)(ours), strict=True):
            assert example.input_ids.tolist() == theirs["input_ids"]
            labels = np.where(example.loss_mask, example.input_ids, -100).tolist()
            if ours is records:
                # TRL also trains the newline after the end of the turn, where generation has already stopped.
                assert (theirs["labels"].pop(), labels.pop()) == (tokenizer.convert_tokens_to_ids("Ċ"), -100)
            assert labels == theirs["labels"]


def test_rendering_does_not_change_the_record():
    before = json.dumps(LONG.messages)
    spans_of(byte_tokenizer("chatml"), LONG, [2, 4, 6])
    assert json.dumps(LONG.messages) == before


# --- only the end is cut ----------------------------------------------------------------------------------------------


def test_keep_start_cuts_the_end_whatever_that_is():
    tokenizer = byte_tokenizer("chatml")
    record = chat("question", "answer")
    whole = one(tokenizer, record, train_on="all")
    cut = one(tokenizer, record, max_length=20, train_on="all", overflow="keep_start")
    assert cut.cut
    assert np.array_equal(cut.input_ids, whole.input_ids[:20])
    assert np.array_equal(cut.loss_mask, whole.loss_mask[:20])
    fits = one(tokenizer, record, max_length=len(whole.input_ids), train_on="all", overflow="keep_start")
    assert not fits.cut


def test_keep_start_drops_rows_whose_answer_is_cut_away():
    tokenizer = byte_tokenizer("chatml")
    record = chat("question", "answer")
    whole = one(tokenizer, record)
    first = int(whole.loss_mask.argmax())
    assert one(tokenizer, record, max_length=first, overflow="keep_start") == Dropped("no target tokens once cut")
    assert one(tokenizer, record, max_length=first + 1, overflow="keep_start").target_tokens == 1
