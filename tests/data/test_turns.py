"""Turns in the shapes that published data have, and what they become."""

import json

import numpy as np
import pytest

from oumi_pl.data.formats import gemini, messages, sharegpt
from oumi_pl.data.preferences import prompt_preference
from oumi_pl.data.turns import read_turns
from oumi_pl.errors import UserError


def turn(role, content, **rest):
    return {"role": role, "content": content, **rest}


def call(name="tide", arguments=None, **rest):
    return {**rest, "type": "function", "function": {"name": name, "arguments": arguments or {}}}


def read(*turns):
    return list(read_turns(list(turns), "messages"))


BREST = {"port": "Brest"}
BREST_TEXT = json.dumps(BREST)


@pytest.mark.parametrize(
    "given",
    [
        turn("assistant", None, tool_calls=[call(arguments=BREST)]),
        turn("assistant", "", tool_calls=[call(arguments=BREST_TEXT)]),
        turn("assistant", None, tool_calls=[call(arguments=json.dumps(BREST_TEXT))]),  # encoded twice
        turn("assistant", None, tool_calls=json.dumps([call(arguments=BREST)])),
        turn("assistant", None, tool_calls=[{"name": "tide", "arguments": BREST}]),
        turn("assistant", None, tool_calls={"function": {"name": "tide", "arguments": BREST_TEXT}}),
        turn("assistant", None, function_call={"name": "tide", "arguments": BREST_TEXT}),
        turn("assistant", None, function_call=json.dumps({"name": "tide", "parameters": BREST})),
        turn("assistant", np.nan, tool_calls=np.array([call(arguments=BREST)])),
        turn("function_call", json.dumps({"name": "tide", "arguments": BREST})),
        {"from": "function_call", "value": json.dumps({"name": "tide", "arguments": BREST_TEXT})},
        {
            "from": "tool_call",
            "value": f"<tool_call>\n{json.dumps({'name': 'tide', 'arguments': BREST})}\n</tool_call>",
        },
        {"from": "Function-Call", "value": json.dumps([{"name": "tide", "arguments": BREST}])},
        {"from": "tool_calls", "value": {"name": "tide", "arguments": BREST}},
        {"role": "model", "parts": [{"functionCall": {"name": "tide", "args": BREST}}]},
        {"role": "model", "parts": [{"text": None, "function_call": {"name": "tide", "args": BREST}}]},
        turn("assistant", [{"type": "tool_use", "name": "tide", "input": BREST}]),
    ],
)
def test_a_call_is_the_same_message_in_every_shape(given):
    assert read(given) == [turn("assistant", None, tool_calls=[call(arguments=BREST)])]


@pytest.mark.parametrize(
    ("arguments", "parsed"), [("", {}), ("{}", {}), (None, {}), ("null", {}), ('{"a": null}', {"a": None})]
)
def test_arguments_are_a_mapping(arguments, parsed):
    function = {"name": "tide", "arguments": arguments}
    assert read(turn("assistant", None, function_call=function))[0]["tool_calls"] == [call(arguments=parsed)]


def test_calls_keep_their_ids_their_order_and_the_order_of_their_keys():
    given = [call("a", BREST, id="1"), {"type": "function", "id": "2", "function": {"name": "b", "arguments": "{}"}}]
    (kept,) = read(turn("assistant", "Both.", tool_calls=given))
    assert [json.dumps(each) for each in kept["tool_calls"]] == [
        json.dumps(call("a", BREST, id="1")),
        json.dumps({"type": "function", "id": "2", "function": {"name": "b", "arguments": {}}}),
    ]
    assert kept["content"] == "Both."


def test_calls_in_turns_of_their_own_belong_to_the_words_before_them():
    one, two = (json.dumps({"name": name, "arguments": {}}) for name in "ab")
    turns = [("human", "q"), ("gpt", "I'll look."), ("function_call", one), ("tool_call", two), ("observation", "1")]
    assert read(*({"from": role, "value": value} for role, value in turns)) == [
        turn("user", "q"),
        turn("assistant", "I'll look.", tool_calls=[call("a"), call("b")]),
        turn("tool", "1", name="a"),
    ]


def test_results_are_named_after_the_calls_in_turns_of_their_own():
    calls = [{"name": name, "arguments": {}} for name in "abc"]
    turns = [
        ("function_call", calls[0]),
        ("observation", "1"),
        ("function_call", calls[1:]),
        ("tool", "2"),
        ("tool", "3"),
    ]
    assert read(*({"from": role, "value": value} for role, value in turns)) == [
        turn("assistant", None, tool_calls=[call("a")]),
        turn("tool", "1", name="a"),
        turn("assistant", None, tool_calls=[call("b"), call("c")]),
        turn("tool", "2", name="b"),
        turn("tool", "3", name="c"),
    ]
    by_id = [turn("assistant", None, tool_calls=[call("a", id="1")]), turn("tool", "1", tool_call_id="1")]
    assert read(*by_id) == by_id


@pytest.mark.parametrize(
    "given",
    [
        turn("tool", "4.2 m", name="tide"),
        turn("function", "4.2 m", name="tide"),
        {"from": "tool_response", "value": "4.2 m", "name": "tide"},
        turn("tool", [{"type": "text", "text": "4.2 m"}], name="tide"),
        {"role": "user", "parts": [{"functionResponse": {"name": "tide", "response": "4.2 m"}}]},
    ],
)
def test_a_result_is_a_turn_of_the_tool(given):
    assert read(given) == [turn("tool", "4.2 m", name="tide")]


def test_results_that_are_no_text_become_json():
    response = {"height": 4.2, "unit": "m"}
    results = read({"role": "user", "parts": [{"functionResponse": {"name": n, "response": response}} for n in "ab"]})
    assert results == [turn("tool", json.dumps(response), name=name) for name in "ab"]
    assert read(turn("tool", response)) == [turn("tool", json.dumps(response))]
    blocks = [{"type": "tool_result", "tool_use_id": "7", "content": [{"type": "text", "text": "4"}]}, "and?"]
    assert read(turn("user", blocks)) == [turn("tool", "4", tool_call_id="7"), turn("user", "and?")]


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("user", "human", "User", "HUMAN"), "user"),
        (("assistant", "gpt", "bot", "model", "Assistant", "chatgpt"), "assistant"),
        (("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"),
        (("system", "System"), "system"),
        (("developer",), "developer"),
    ],
)
def test_roles_by_their_usual_names(names, role):
    for name in names:
        for given in (turn(name, "x"), {"from": name, "value": "x"}, {"role": name, "parts": [{"text": "x"}]}):
            assert read(given) == [turn(role, "x")]


@pytest.mark.parametrize("name", ["functioncall", "func_call", "assistant_call", "call", "fonction_call"])
def test_what_looks_like_a_call_is_never_called_a_result(name):
    with pytest.raises(UserError, match="unknown role") as raised:
        read({"from": name, "value": "{}"})
    assert "'function'" not in str(raised.value)
    assert "'tool_response'" not in str(raised.value)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_by_its_usual_names(key):
    assert read({"role": "assistant", "content": "4", key: "2 and 2."}) == [
        turn("assistant", "4", reasoning_content="2 and 2.")
    ]
    assert read({"role": "assistant", "content": None, key: "2 and 2."}) == [
        turn("assistant", None, reasoning_content="2 and 2.")
    ]


def test_reasoning_in_parts():
    thought = [{"type": "thinking", "thinking": "2 and 2."}, {"type": "text", "text": "4"}]
    gemini_thought = {"role": "model", "parts": [{"text": "2 and 2.", "thought": True}, {"text": "4"}]}
    assert (
        read(turn("assistant", thought))
        == read(gemini_thought)
        == [turn("assistant", "4", reasoning_content="2 and 2.")]
    )


def test_reasoning_under_two_names_is_one_if_it_is_equal():
    same = {"reasoning_content": "2 and 2.", "reasoning": "2 and 2."}
    assert read({**turn("assistant", "4"), **same}) == [turn("assistant", "4", reasoning_content="2 and 2.")]
    with pytest.raises(UserError, match=r"messages\[0\]: 'reasoning_content' and 'thinking' hold different texts"):
        read(turn("assistant", "4", reasoning_content="a", thinking="b"))


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        [{"type": "text", "value": "a"}, {"type": "text", "value": "b", "text": None}],
        [{"type": "output_text", "text": "ab", "annotations": []}],
        [{"text": "ab"}],
        ["a", "b"],
        np.array([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
    ],
)
def test_parts_of_text_are_joined(parts):
    assert read(turn("user", parts)) == [turn("user", "ab")]


TURNS = [turn("user", "2+2?"), turn("assistant", "4")]


@pytest.mark.parametrize(
    "column",
    [
        TURNS,
        tuple(TURNS),
        json.dumps(TURNS),
        f"\n {json.dumps(TURNS, indent=1)}",
        repr(TURNS),  # what pandas writes into CSV files
        np.array(TURNS, dtype=object),
        {"role": ["user", "assistant"], "content": ["2+2?", "4"]},
        {"role": np.array(["user", "assistant"]), "content": np.array(["2+2?", "4"])},
        [{"from": "human", "value": "2+2?", "role": None}, {"from": "gpt", "value": "4", "weight": np.nan}],
        [{"role": "user", "parts": [{"text": "2+2?"}]}, {"role": "model", "parts": [{"text": "4"}]}],
    ],
)
def test_turns_as_text_arrays_and_lists(column):
    for row in ({"messages": column}, {"messages": column, "system": np.nan, "tools": None, "weight": float("nan")}):
        assert list(messages(row).messages) == TURNS
    assert list(sharegpt({"conversations": column}).messages) == TURNS


def test_turns_as_text_in_pairs():
    pair = prompt_preference(
        {key: json.dumps(TURNS[i : i + 1]) for key, i in {"prompt": 0, "chosen": 1, "rejected": 1}.items()}
    )
    assert list(pair.chosen.messages) == list(pair.rejected.messages) == TURNS
    text = prompt_preference({"prompt": "[1, 2]", "chosen": "[1]", "rejected": "[2]"})
    assert (text.chosen.prompt, text.chosen.text) == ("[1, 2]", "[1]")


def test_geminis_rows():
    row = {
        "systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]},
        "contents": [{"role": "user", "parts": [{"text": "2+2?"}]}, {"role": "model", "parts": [{"text": "4"}]}],
        "tools": [{"functionDeclarations": [{"name": "tide"}]}],
    }
    assert list(gemini(row).messages) == [turn("system", "Be brief."), *TURNS]
    assert gemini(row).tools == ({"type": "function", "function": {"name": "tide"}},)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weight": 0}, {"weight": 0.0}),
        ({"weight": 0.5}, {"weight": 0.5}),
        ({"weight": np.float64(2)}, {"weight": 2.0}),
        ({"loss": False}, {"weight": 0.0}),
        ({"train": True}, {"weight": 1.0}),
        ({"training": False}, {"weight": 0.0}),
        ({"masked": True}, {"weight": 0.0}),
        ({"masked": 0}, {"weight": 1.0}),
        ({"weight": 3, "loss": True}, {"weight": 3.0}),
        ({"weight": 3, "loss": False}, {"weight": 0.0}),
        ({"train": [[4, 6], [0, 2]]}, {"weight": 1.0, "spans": [(0, 2), (4, 6)]}),
        ({"train": [], "weight": 2}, {"weight": 2.0, "spans": []}),
        ({"weight": None, "loss": np.nan}, {}),
    ],
)
def test_how_much_a_turn_counts(given, said):
    assert read(turn("assistant", "Paris.", **given)) == [turn("assistant", "Paris.", **said)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": -1}, r"messages\[0\]\.weight is -1, but has to be"),
        ({"weight": "high"}, r"messages\[0\]\.weight is 'high'"),
        ({"weight": float("inf")}, r"messages\[0\]\.weight is inf"),
        ({"train": [[0, 9]]}, r"messages\[0\]\.train holds \[0, 9\].* characters of the content, which has 6"),
        ({"train": [[2, 2]]}, r"messages\[0\]\.train holds \[2, 2\]"),
        ({"train": [3, 4]}, r"messages\[0\]\.train holds 3"),
        ({"images": ["cat.png"]}, r"messages\[0\]\.images: images and other media can't be trained on yet"),
        ({"tool_calls": [{"id": "1"}]}, r"messages\[0\]: a call has no name; keys: id"),
        ({"tool_calls": "tide(Brest)"}, r"messages\[0\] is text that isn't JSON: a call is"),
        ({"tool_calls": [call(arguments="port=Brest")]}, r"the arguments of 'tide' are text that isn't JSON"),
        ({"tool_calls": [call(arguments=[1])]}, r"the arguments of 'tide' are a list instead of a mapping"),
    ],
)
def test_wrong_keys_are_named(given, message):
    with pytest.raises(UserError, match=message):
        read(turn("assistant", "Paris.", **given))


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video"])
def test_parts_that_are_no_text_are_named(kind):
    with pytest.raises(UserError, match=rf"messages\[0\]\.content has a part of type '{kind}'"):
        read(turn("user", [{"type": kind, kind: "cat.png"}]))
    with pytest.raises(UserError, match="has a part of type 'inlineData'"):
        read({"role": "user", "parts": [{"inlineData": {"mimeType": "image/png"}}]})
