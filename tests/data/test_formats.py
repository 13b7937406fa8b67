"""Rows of every built-in format, the mistakes users make in them, and how a format is found."""

import json
import sys

import numpy as np
import pytest

from oumi_pl.data import formats
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Text


def turn(role, content, **rest):
    return {"role": role, "content": content, **rest}


EXCHANGE = (turn("user", "q"), turn("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": list(EXCHANGE)}, Conversation(EXCHANGE)),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, Conversation(EXCHANGE)),
        ({"conversations": list(EXCHANGE)}, Conversation(EXCHANGE)),
        ({"prompt": "q", "completion": "a"}, Text("a", prompt="q")),
        ({"prompt": [EXCHANGE[0]], "completion": [EXCHANGE[1]]}, Conversation(EXCHANGE, prompt_messages=1)),
        ({"prompt": "q", "response": "a"}, Conversation(EXCHANGE, prompt_messages=1)),
        ({"question": "q", "answer": "a"}, Conversation(EXCHANGE, prompt_messages=1)),
        ({"instruction": "q", "output": "a"}, Conversation(EXCHANGE, prompt_messages=1)),
        ({"instruction": "q", "input": "", "output": "a"}, Conversation(EXCHANGE, prompt_messages=1)),
        ({"instruction": "q", "input": None, "output": "a", "text": "all"}, Conversation(EXCHANGE, prompt_messages=1)),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            Conversation((turn("user", "q\n\ni"), EXCHANGE[1]), prompt_messages=1),
        ),
        ({"text": "words"}, Text("words")),
    ],
)
def test_each_format_is_found_by_its_columns_and_reads_its_row(row, expected):
    assert formats.find_format(row.keys())(row) == expected


def test_sharegpt_knows_the_names_of_tools():
    roles = ["system", "human", "gpt", "observation", "function", "tool"]
    row = {"conversations": [{"from": role, "value": role} for role in roles]}
    read = [message["role"] for message in formats.sharegpt(row).messages]
    assert read == ["system", "user", "assistant", "tool", "tool", "tool"]


def test_keys_that_arrow_added_disappear_at_every_depth():
    call = {
        "type": "function",
        "id": None,
        "function": {"name": "f", "arguments": {"x": 1, "y": None, "z": [{"w": None}]}},
    }
    row = {
        "messages": [
            turn("user", "q", tool_calls=None, name=None),
            turn("assistant", None, tool_calls=[call], reasoning_content=None),
            turn("tool", "1", tool_calls=[]),
        ],
        "tools": '[{"type": "function", "function": {"name": "f", "parameters": {"x": null, "enum": [1, null]}}}]',
    }
    read = formats.messages(row)
    assert read.messages == (
        turn("user", "q"),
        turn(
            "assistant",
            None,
            tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"x": 1, "z": [{}]}}}],
        ),
        turn("tool", "1"),
    )
    assert read.tools == ({"type": "function", "function": {"name": "f", "parameters": {"enum": [1, None]}}},)


def test_parts_of_text_are_joined_and_no_tools_are_none():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    for tools in (None, "", "[]", []):
        assert formats.messages({"messages": [turn("user", parts)], "tools": tools}) == Conversation(
            (turn("user", "ab"),)
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"'messages' holds no turns"),
        ({"messages": None}, r"'messages' holds nothing \(null\) instead of a list of turns"),
        ({"messages": "hi"}, r"'messages' holds text instead of a list of turns"),
        ({"messages": ["hi"]}, r"messages\[0\] is text instead of a mapping"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no role; keys: content"),
        (
            {"messages": [EXCHANGE[0], turn("asistant", "x")]},
            r"messages\[1\] .* 'asistant'; did you mean 'assistant'\?",
        ),
        ({"messages": [turn("assistant", None)]}, r"messages\[0\] \(assistant\) has no content"),
        ({"messages": [turn("assistant", None, tool_calls=[])]}, r"has no content"),
        ({"messages": [turn("user", 3)]}, r"content is a value of type int instead of text"),
        (
            {"messages": [turn("user", [{"type": "image_url", "image_url": "x"}])]},
            r"'image_url'.*images .* aren't supported",
        ),
        ({"messages": list(EXCHANGE), "tools": "{oops"}, r"'tools' holds text that isn't JSON"),
        ({"messages": list(EXCHANGE), "tools": '{"name": "f"}'}, r"'tools' must hold a list of mappings"),
        ({"conversations": [{"from": "humn", "value": "x"}]}, r"conversations\[0\] .* 'humn'; did you mean 'human'\?"),
        ({"conversations": [{"value": "x"}]}, r"conversations\[0\] has no role"),
        ({"conversations": ["x"]}, r"conversations\[0\] is text"),
        ({"prompt": "q", "completion": [EXCHANGE[1]]}, r"'prompt' holds text and 'completion' a list; both must be"),
        ({"prompt": None, "completion": "a"}, r"'prompt' holds nothing \(null\) instead of text or turns"),
        ({"question": "q", "answer": 42}, r"'answer' holds a value of type int instead of text"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, r"'input' holds a list instead of text"),
    ],
)
def test_a_wrong_row_is_one_error_message(row, message):
    with pytest.raises(UserError, match=message):
        formats.find_format(row.keys())(row)


def test_a_missing_column_names_the_nearest():
    with pytest.raises(UserError, match="no column 'question'; did you mean 'questions'"):
        formats.question_answer({"questions": "q", "answer": "a"})


def test_no_format_lists_columns_and_needs():
    with pytest.raises(UserError, match=r"columns body, title; .*question_answer \(question, answer\).*text \(text\)"):
        formats.find_format(["title", "body"])


def test_resolve_format(tmp_path, monkeypatch):
    (tmp_path / "my_formats_for_test.py").write_text("def shout(row):\n    return row\nNUMBER = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert formats.resolve_format("alpaca") is formats.alpaca
    assert formats.resolve_format("my_formats_for_test.shout") is sys.modules["my_formats_for_test"].shout
    for name, message in {
        "alpacca": "did you mean 'alpaca'",
        "no_such_module.alpacca": "No module named 'no_such_module'; did you mean 'alpaca'",
        "my_formats_for_test.shoot": "has no function 'shoot'; did you mean 'shout'",
        "my_formats_for_test.NUMBER": "has no function 'NUMBER'",
    }.items():
        with pytest.raises(UserError, match=message):
            formats.resolve_format(name)


def test_rename_columns():
    row = {"q_text": "q", "answer": "a", "question": "old", "id": 7}
    assert formats.rename_columns(row, {"question": "q_text"}) == {"question": "q", "answer": "a", "id": 7}
    assert formats.rename_columns(row, {"question": "answer", "answer": "question"}) == {
        **{"question": "a", "answer": "old"},
        **{"q_text": "q", "id": 7},
    }
    with pytest.raises(UserError, match=r"no column 'q_txt' \(for 'question'\); did you mean 'q_text'"):
        formats.rename_columns(row, {"question": "q_txt"})


PIRATE = turn("system", "Talk like a pirate.")


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": list(EXCHANGE)},
        {"prompt": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"question": "q", "response": "a"},
        {"prompt": [EXCHANGE[0]], "completion": [EXCHANGE[1]]},
    ],
)
def test_a_system_column_becomes_the_first_turn(row, name):
    find = formats.find_format(row.keys())
    plain, system = find(row), find(row | {name: PIRATE["content"]})
    assert system.messages == (PIRATE, *plain.messages)
    assert (system.prompt_messages is None) == (plain.prompt_messages is None)
    if plain.prompt_messages is not None:
        assert system.prompt_messages == plain.prompt_messages + 1
    for nothing in ("", None, float("nan")):
        assert find(row | {name: nothing}) == plain


def test_a_system_column_beside_a_system_turn():
    row = {"messages": [PIRATE, *EXCHANGE], "system": PIRATE["content"]}
    assert formats.messages(row).messages == (PIRATE, *EXCHANGE)
    with pytest.raises(UserError, match="the first turn is a system turn, and a column holds another system prompt"):
        formats.messages(row | {"system": "Be brief."})
    with pytest.raises(UserError, match="'system' and 'system_prompt' hold different system prompts"):
        formats.messages({"messages": list(EXCHANGE), "system": "a", "system_prompt": "b"})
    with pytest.raises(UserError, match="column 'system' holds a list instead of text"):
        formats.messages({"messages": list(EXCHANGE), "system": ["a"]})


@pytest.mark.parametrize("as_text", [False, True])
def test_alpacas_history_is_part_of_the_prompt(as_text):
    history = [["Say hello.", "Hello."], ["And again.", "Hello!"]]
    row = {"instruction": "And in French?", "input": "", "output": "Bonjour."}
    read = formats.alpaca(row | {"history": json.dumps(history) if as_text else history, "system": "s"})
    said = [("system", "s"), ("user", "Say hello."), ("assistant", "Hello."), ("user", "And again.")]
    said += [("assistant", "Hello!"), ("user", "And in French?"), ("assistant", "Bonjour.")]
    assert read == Conversation(tuple(turn(*each) for each in said), prompt_messages=6)
    turns = [turn(*each) for each in said[1:5]]
    assert formats.alpaca(row | {"history": turns, "system": "s"}) == read
    for nothing in (None, [], "[]", "", float("nan")):
        assert formats.alpaca(row | {"history": nothing}) == formats.alpaca(row)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"history": [["q"]]}, r"history\[0\] is a list instead of a question and its answer"),
        ({"history": [["q", "a"], "b"]}, r"history\[1\] is text instead of a question and its answer"),
        ({"history": {"q": "a"}}, r"'history' holds a mapping instead of pairs"),
        ({"history": "before"}, r"'history' holds text that isn't JSON"),
        ({"weight": "heavy"}, r"column 'weight' is 'heavy', but has to be"),
        ({"weight": -2}, r"column 'weight' is -2, but has to be"),
        ({"chat_template_kwargs": [1]}, r"'chat_template_kwargs' holds a list instead of a mapping"),
        ({"tools": ["oops"]}, r"'tools' must hold a list of mappings"),
    ],
)
def test_a_wrong_column_beside_the_turns_is_one_error_message(columns, message):
    with pytest.raises(UserError, match=message):
        formats.alpaca({"instruction": "q", "output": "a"} | columns)


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        json.dumps([{"name": "f", "parameters": {}}]),
        [json.dumps({"type": "function", "function": {"name": "f", "parameters": {}}})],
        [{"functionDeclarations": [{"name": "f", "parameters": {}}]}],
        np.array([{"type": "function", "function": {"name": "f", "parameters": {}, "strict": None}}], dtype=object),
    ],
)
def test_tools_are_described_in_one_shape(tools):
    expected = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    assert formats.messages({"messages": list(EXCHANGE), "tools": tools}).tools == expected
    assert formats.messages({"messages": list(EXCHANGE), "functions": tools}).tools == expected


@pytest.mark.parametrize("variables", [{"enable_thinking": False, "date": None}, '{"enable_thinking": false}'])
def test_template_variables_of_a_row(variables):
    read = formats.question_answer({"question": "q", "answer": "a", "chat_template_kwargs": variables})
    assert read == Conversation(EXCHANGE, prompt_messages=1, template_variables={"enable_thinking": False})


@pytest.mark.parametrize(
    ("value", "weight"), [(0, 0.0), (0.5, 0.5), ("2", 2.0), (None, 1.0), (float("nan"), 1.0), ("", 1.0)]
)
def test_the_weight_of_a_row(value, weight):
    for row in ({"text": "words"}, {"prompt": "q", "completion": "a"}, {"question": "q", "answer": "a"}):
        assert formats.find_format(row.keys())(row | {"weight": value}).weight == weight


@pytest.mark.parametrize("name", ["system", "tools", "chat_template_kwargs"])
def test_texts_without_a_template_refuse_what_only_a_template_renders(name):
    row = {"prompt": "q", "completion": "a", name: "[1]" if name == "tools" else "{}"}
    with pytest.raises(UserError, match=rf"column '{name}' needs a chat template.*columns: \{{response: completion\}}"):
        formats.prompt_completion(row)
    assert formats.prompt_completion(row | {name: None}) == Text("a", "q")


def test_a_missing_cell_of_a_table_is_nothing():
    nan = float("nan")
    assert formats.alpaca({"instruction": "q", "input": nan, "output": "a"}).messages == EXCHANGE
    with pytest.raises(UserError, match=r"'output' holds nothing \(NaN\) instead of text"):
        formats.alpaca({"instruction": "q", "output": nan})
