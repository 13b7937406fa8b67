"""Rows of preference data in every published layout, and the errors for wrong rows."""

import pytest

from oumi_pl.data.formats import FORMATS, find_format, resolve_format
from oumi_pl.data.preferences import PREFERENCE_FORMATS, anthropic_hh, implicit_prompt, prompt_preference
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Preference, Text


def user(content):
    return {"role": "user", "content": content}


def said(content, **rest):
    return {"role": "assistant", "content": content, **rest}


def sharegpt(role, value):
    return {"from": role, "value": value}


def pair(prompt, chosen, rejected, margin=None, tools=None):
    """A preference of turns."""
    first, second = (Conversation((*prompt, *turns), tools, len(prompt)) for turns in (chosen, rejected))
    return Preference(first, second, margin)


def read(row):
    return find_format(row.keys(), PREFERENCE_FORMATS)(row)


Q, GOOD, BAD = user("q"), said("good"), said("bad")
SIMPLE = pair([Q], [GOOD], [BAD])
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # text with text: no template
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, Preference(Text("good", "q"), Text("bad", "q"))),
        # an explicit prompt
        ({"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}, SIMPLE),
        ({"prompt": [Q], "chosen": "good", "rejected": "bad"}, SIMPLE),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, SIMPLE),
        (
            {"prompt": [SYSTEM, Q], "chosen": [GOOD, Q, GOOD], "rejected": [BAD], "tools": [TOOL]},
            pair([SYSTEM, Q], [GOOD, Q, GOOD], [BAD], tools=(TOOL,)),
        ),
        # whole conversations beside a prompt, as turns and as text
        ({"prompt": [Q], "chosen": [Q, GOOD], "rejected": [Q, BAD]}, SIMPLE),
        ({"prompt": "q", "prompt_id": "7", "messages": [Q, GOOD], "chosen": [Q, GOOD], "rejected": [Q, BAD]}, SIMPLE),
        (
            {"prompt": "q2", "chosen": [Q, GOOD, user("q2"), GOOD], "rejected": [Q, GOOD, user("q2"), BAD]},
            pair([Q, GOOD, user("q2")], [GOOD], [BAD]),
        ),
        # an implicit prompt
        ({"chosen": [Q, GOOD], "rejected": [Q, BAD]}, SIMPLE),
        ({"chosen": [GOOD], "rejected": [BAD]}, pair([], [GOOD], [BAD])),
        ({"chosen": [Q, GOOD, Q, GOOD], "rejected": [Q, BAD]}, pair([Q], [GOOD, Q, GOOD], [BAD])),
        ({"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}, SIMPLE),
        # a prompt beside the responses
        (
            {"conversations": [sharegpt("human", "q")], "chosen": sharegpt("gpt", "good"), "rejected": "bad"},
            SIMPLE,
        ),
        (
            {
                "conversations": [sharegpt("system", "s"), sharegpt("human", "q")],
                "chosen": [sharegpt("gpt", "good")],
                "rejected": [sharegpt("gpt", "bad"), sharegpt("human", "q"), sharegpt("gpt", "bad")],
            },
            pair([SYSTEM, Q], [GOOD], [BAD, Q, BAD]),
        ),
        ({"messages": [Q], "chosen": GOOD, "rejected": BAD}, SIMPLE),
        ({"messages": [Q], "chosen": "good", "rejected": [BAD]}, SIMPLE),
        ({"messages": [Q], "chosen": [Q, GOOD], "rejected": [Q, BAD]}, SIMPLE),
        # a question as text
        ({"instruction": "q", "chosen": "good", "rejected": "bad"}, SIMPLE),
        ({"instruction": "q", "input": "", "chosen": [GOOD], "rejected": BAD}, SIMPLE),
        (
            {"instruction": "q", "input": "i", "chosen": "good", "rejected": "bad"},
            pair([user("q\n\ni")], [GOOD], [BAD]),
        ),
        (
            {"instruction": "q", "chosen": "good", "rejected": "bad", "history": [["a", "b"]], "system": "s"},
            pair([SYSTEM, user("a"), said("b"), Q], [GOOD], [BAD]),
        ),
        ({"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}, pair([SYSTEM, Q], [GOOD], [BAD])),
        # a system prompt beside turns
        ({"system_prompt": "s", "prompt": [Q], "chosen": [GOOD], "rejected": [BAD]}, pair([SYSTEM, Q], [GOOD], [BAD])),
        ({"system": "s", "chosen": [Q, GOOD], "rejected": [Q, BAD]}, pair([SYSTEM, Q], [GOOD], [BAD])),
        (
            {
                "system": "s",
                "conversations": [sharegpt("human", "q")],
                "chosen": sharegpt("gpt", "good"),
                "rejected": "bad",
            },
            pair([SYSTEM, Q], [GOOD], [BAD]),
        ),
    ],
)
def test_each_format_is_found_by_its_columns_and_reads_its_row(row, expected):
    assert read(row) == expected


def test_the_prompt_ends_between_turns_never_within_one():
    common = "The same first words, then "
    row = {"chosen": [Q, said(common + "good")], "rejected": [Q, said(common + "bad")]}
    assert read(row) == pair([Q], [said(common + "good")], [said(common + "bad")])
    hh = {key: f"\n\nHuman: q\n\nAssistant: {common}{key}" for key in ("chosen", "rejected")}
    assert read(hh) == pair([Q], [said(common + "chosen")], [said(common + "rejected")])


def test_dialogues_are_cut_into_turns_and_stripped():
    start = "\n\nHuman:  a: b\n\nc \n\nAssistant: d\n\nHuman: Human: e"
    read_row = anthropic_hh({"chosen": f"{start}\n\nAssistant: f ", "rejected": f"{start}\n\nAssistant:"})
    prompt = [user("a: b\n\nc"), said("d"), user("Human: e")]
    assert read_row == pair(prompt, [said("f")], [said("")])


def test_unusual_dialogues_are_read_unchanged():
    twice = anthropic_hh(
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nAssistant: d"}
    )
    assert twice == pair([user("a")], [said("b"), said("c")], [said("d")])


def test_identical_conversations_keep_their_last_answer_as_the_response():
    turns = [Q, GOOD, user("and?"), said("no")]
    assert implicit_prompt({"chosen": turns, "rejected": turns}) == pair(turns[:3], turns[3:], turns[3:])


@pytest.mark.parametrize("value", ["much", True, float("inf"), [1.0]])
def test_a_margin_is_a_number(value):
    with pytest.raises(UserError, match=r"column 'margin' holds .* instead of a number"):
        prompt_preference({"prompt": "q", "chosen": "good", "rejected": "bad", "margin": value})


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({"margin": 2}, 2.0),
        ({"margin": -0.5, "score_chosen": 9.0, "score_rejected": 1.0}, -0.5),
        ({"score_chosen": 8.5, "score_rejected": 6}, 2.5),
        ({"chosen_score": 1, "rejected_score": 4}, -3.0),
        ({"chosen_rating": 5.0, "rejected_rating": 4.0}, 1.0),
        ({"margin": None, "chosen_rating": 5.0, "rejected_rating": 4.0}, 1.0),
        ({"score_chosen": 8.5, "score_rejected": None}, None),
        ({"margin": float("nan")}, None),
        ({}, None),
    ],
)
def test_the_margin_is_kept_if_the_row_has_one(columns, margin):
    rows = [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"messages": [Q], "chosen": "good", "rejected": "bad"},
    ]
    assert [read(row | columns).margin for row in rows] == [margin] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [Q, GOOD], "rejected": [user("p"), BAD]}, r"chosen and rejected differ in turn 1 \('user' and 'us"),
        (
            {"chosen": [Q, GOOD, Q, GOOD], "rejected": [Q, GOOD, user("p"), BAD]},
            r"the prompts of chosen and rejected differ in turn 3 \('user' and 'user'\)",
        ),
        ({"chosen": [Q, GOOD], "rejected": [SYSTEM, Q, BAD]}, r"differ in turn 1 \('user' and 'system'\)"),
        (
            {"chosen": [Q], "rejected": [Q, BAD]},
            r"'chosen' ends after turn 1, where 'rejected' continues: its response",
        ),
        ({"chosen": [Q, GOOD], "rejected": [Q]}, r"'rejected' ends after turn 1, where 'chosen' continues"),
        ({"chosen": [Q], "rejected": [Q]}, r"'chosen' ends after turn 1"),
        ({"chosen": "good", "rejected": "bad"}, r"'chosen' .* doesn't begin with .*'Human:'.* e.g. \{prompt: my_col"),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"},
            r"column 'rejected' holds text that doesn't begin with an empty line and 'Human:'",
        ),
        ({"chosen": [Q, GOOD], "rejected": "bad"}, r"'rejected' holds text instead of a list of turns"),
        ({"chosen": [Q, GOOD], "rejected": None}, r"'rejected' holds nothing \(null\) instead of turns, or a dialogue"),
        ({"chosen": [Q, GOOD], "rejected": []}, r"'rejected' holds no turns"),
        ({"chosen": [Q, GOOD], "rejected": [Q, {"role": "asistant", "content": "x"}]}, r"rejected\[1\] .*'asistant'"),
        ({"prompt": "q", "chosen": "good", "rejected": [BAD]}, r"'chosen' holds text and 'rejected' a list; both must"),
        ({"prompt": 7, "chosen": "good", "rejected": "bad"}, r"'prompt' holds a value of type int"),
        ({"prompt": [Q], "chosen": [Q], "rejected": [BAD]}, r"chosen\[0\] is a turn of 'user', but a response begins"),
        ({"messages": [Q], "chosen": "good", "rejected": None}, r"'rejected' holds nothing \(null\)"),
        ({"messages": [], "chosen": "good", "rejected": "bad"}, r"'messages' holds no turns"),
        (
            {"prompt": "q", "chosen": "good", "rejected": "bad", "system": "s"},
            r"column 'system' needs a chat template.*`columns: \{question: prompt\}`.*`ignore: \[system\]`",
        ),
        ({"instruction": "q", "chosen": [Q], "rejected": "bad"}, r"chosen\[0\] is a turn of 'user'"),
        (
            {"conversations": [sharegpt("human", "q")], "chosen": sharegpt("gtp", "x"), "rejected": "bad"},
            r"chosen\[0\] has the unknown role 'gtp'; did you mean 'gpt'",
        ),
    ],
)
def test_a_wrong_row_is_one_error_message(row, message):
    with pytest.raises(UserError, match=message):
        read(row)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ["prompt", "chosen", "reject"],
            r"no column 'rejected'; did you mean 'reject'\?; .* \{rejected: my_column\}",
        ),
        (["prompt", "chosen"], r"no column 'rejected'; known: 'chosen', 'prompt'; say which of your columns"),
        (["question", "answer"], r"no column 'chosen'; known: 'answer', 'question'"),
    ],
)
def test_a_missing_column_is_an_error_before_any_format(columns, message):
    with pytest.raises(UserError, match=message):
        find_format(columns, PREFERENCE_FORMATS)


def test_formats_are_named_within_their_table():
    assert resolve_format("anthropic_hh", PREFERENCE_FORMATS) is anthropic_hh
    assert resolve_format("oumi_pl.data.preferences.anthropic_hh", FORMATS) is anthropic_hh
    with pytest.raises(UserError, match="unknown format 'antropic_hh'; did you mean 'anthropic_hh'"):
        resolve_format("antropic_hh", PREFERENCE_FORMATS)
    with pytest.raises(UserError, match="unknown format 'alpaca'"):
        resolve_format("alpaca", PREFERENCE_FORMATS)
