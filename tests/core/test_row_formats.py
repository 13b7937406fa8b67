"""Rows of the datasets that Oumi registers give the conversations that Oumi's own classes give.

The expected turns were printed by `transform_conversation` of the classes of `oumi.datasets.sft` at commit d8ed0777, on
the first row of a `pandas.DataFrame` of these rows. `None`: the class raises, and so do we.
"""

import pytest

from oumi_pl.core.configs import DatasetParams
from oumi_pl.core.recipe.notes import Notes
from oumi_pl.core.recipe.sources import source
from oumi_pl.data.formats import rename_columns, resolve_format
from oumi_pl.errors import UserError

ALPACA, DOLLY, QUESTIONS = "yahma/alpaca-cleaned", "argilla/databricks-dolly-15k-curated-en", "PromptResponseDataset"
HUB, CHATQA, ULTRA = "HuggingFaceDataset", "nvidia/ChatQA-Training-Data", "argilla/magpie-ultra-v0.1"
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
SINGLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
SHORT = "Answer the following question with a short span."
FULL = "Please give a full and complete answer for the question."
NUMBER = "Answer the following question with a number from context or the math arithmetic"
CONTEXT = "Only use the information from the user provided context to answer the question."
DOCUMENT = (("system", CONTEXT), ("user", "<context>d</document>"))
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def said(role, content, **rest):
    return {"role": role, "content": content, **rest}


def dolly(prefix, instruction, context, response, written=lambda text: text):
    columns = {"instruction": instruction, "context": context, "response": response}
    return {f"{prefix}-{name}": written(text) for name, text in columns.items()}


def annotated(text):
    return {"user_id": [None], "value": [text], "status": ["submitted"]}


ORIGINAL = dolly("original", "x", "y", "z")
AB = [said("user", "a"), said("assistant", "b")]
TURNS = [("user", "a"), ("assistant", "b")]

ROWS = [
    (
        ALPACA,
        {},
        {"instruction": "a", "input": "i", "output": "b"},
        [("system", PAIRED), ("user", "a\n\n### Input:\ni"), ("assistant", "b")],
    ),
    (ALPACA, {}, {"instruction": "a", "input": "", "output": "b"}, [("system", SINGLE), *TURNS]),
    (ALPACA, {}, {"instruction": "a", "output": "b"}, [("system", SINGLE), *TURNS]),
    (
        ALPACA,
        {"include_system_prompt": False},
        {"instruction": "a", "input": "i", "output": "b"},
        [("user", "a\n\n### Input:\ni"), ("assistant", "b")],
    ),
    (ALPACA, {}, {"instruction": "a", "input": "", "output": 3}, None),
    (DOLLY, {}, dolly("new", "a", "c", "b", annotated) | ORIGINAL, [("user", "a\n\nContext: c"), ("assistant", "b")]),
    (DOLLY, {}, dolly("new", "a", "", "b", annotated) | ORIGINAL, TURNS),
    (DOLLY, {}, dolly("new", "a", "c", "b"), [("user", "a\n\nContext: c"), ("assistant", "b")]),
    (
        DOLLY,
        {"use_new_fields": False},
        dolly("new", "a", "c", "b") | ORIGINAL,
        [("user", "x\n\nContext: y"), ("assistant", "z")],
    ),
    (DOLLY, {"use_new_fields": False}, dolly("original", "x", "", "z"), [("user", "x"), ("assistant", "z")]),
    (DOLLY, {}, ORIGINAL, None),
    (QUESTIONS, {}, {"instruction": "a", "output": "b"}, TURNS),
    (QUESTIONS, {}, {"instruction": "2+2?", "output": 4}, [("user", "2+2?"), ("assistant", "4")]),
    (QUESTIONS, {}, {"instruction": "Half?", "output": 0.5}, [("user", "Half?"), ("assistant", "0.5")]),
    (QUESTIONS, {}, {"instruction": "True?", "output": True}, [("user", "True?"), ("assistant", "True")]),
    (QUESTIONS, {"response_column": ""}, {"instruction": "a", "output": "b"}, [("user", "a")]),
    (QUESTIONS, {"prompt_column": "q", "response_column": "r"}, {"q": "a", "r": "b"}, TURNS),
    ("CohereForAI/aya_dataset", {}, {"inputs": "a", "targets": "b"}, TURNS),
    ("CohereForAI/aya_dataset", {}, {"inputs": "a", "targets": None}, [("user", "a"), ("assistant", "")]),
    (ULTRA, {}, {"instruction": "a", "response": "b"}, TURNS),
    (ULTRA, {}, {"instruction": "a", "response": None}, [("user", "a"), ("assistant", "")]),
    (HUB, {}, {"messages": AB}, TURNS),
    (HUB, {}, {"messages": [said("user", "a"), said("assistant", None)]}, [("user", "a"), ("assistant", "")]),
    (
        HUB,
        {"messages_column": "chat"},
        {"chat": [said("user", None), said("assistant", "b")]},
        [("user", ""), ("assistant", "b")],
    ),
    (HUB, {"exclude_final_assistant_message": True}, {"messages": AB}, [("user", "a")]),
    (HUB, {"exclude_final_assistant_message": True}, {"messages": [*AB, said("user", "c")]}, [*TURNS, ("user", "c")]),
    (
        "Magpie-Align/Magpie-Pro-300K-Filtered",
        {},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        TURNS,
    ),
    (
        "allenai/tulu-3-sft-mixture",
        {},
        {"messages": [said(" System", "s"), said(" User", "a"), said("ASSISTANT ", "b")]},
        [("system", "s"), *TURNS],
    ),
    ("HuggingFaceH4/ultrachat_200k", {}, {"prompt": "a", "messages": AB, "system": "no"}, TURNS),
    (
        "allenai/WildChat-1M",
        {},
        {"conversation": [said("user", "a", toxic=False), said("assistant", "b", toxic=False)]},
        TURNS,
    ),
    ("text_sft", {}, {"messages": [said("system", "s"), *AB]}, [("system", "s"), *TURNS]),
    (
        "text_sft",
        {},
        {"messages": [said("user", "a"), said("assistant", "b", weight=0)], "system": "no", "weight": 2},
        TURNS,
    ),
    ("text_sft", {}, {"conversation": {"messages": AB}}, TURNS),
    ("text_sft", {}, {"instruction": "a", "input": "", "output": "b"}, TURNS),
    ("text_sft", {}, {"instruction": "a", "input": "i", "output": "b"}, [("user", "a\n\ni"), ("assistant", "b")]),
    ("text_sft", {}, {"instruction": 5, "input": 7, "output": "b"}, [("user", "5\n\n7"), ("assistant", "b")]),
    (
        "text_sft",
        {},
        {
            "messages": [
                said("user", "a"),
                said("assistant", None, tool_calls=[CALL]),
                said("tool", "2", tool_call_id="1"),
                said("assistant", "b"),
            ]
        },
        [("user", "a"), ("assistant", None), ("tool", "2"), ("assistant", "b")],
    ),
    ("text_sft", {}, {"messages": [said("user", "a"), said("assistant", None)]}, None),
    ("text_sft", {}, {"conversations": [{"from": "human", "value": "a"}]}, None),
    (CHATQA, {}, {"messages": AB[:1], "document": None, "answers": ["b"]}, TURNS),
    (
        CHATQA,
        {"subset": "synthetic_convqa"},
        {"messages": AB[:1], "document": "d", "answers": ["b"]},
        [("system", FULL), *DOCUMENT, *TURNS],
    ),
    (
        CHATQA,
        {"subset": "tatqa"},
        {"messages": [*AB, said("user", "c")], "document": "d", "answers": ["4"]},
        [("system", NUMBER), *DOCUMENT, *TURNS, ("user", "c"), ("assistant", "4")],
    ),
    (
        CHATQA,
        {"subset": "narrativeqa"},
        {"messages": AB[:1], "document": "d", "answers": [["b", "c"]]},
        [("system", SHORT), *DOCUMENT, *TURNS],
    ),
    (
        CHATQA,
        {"subset": "squad1.1"},
        {"messages": AB[:1], "document": "d", "answers": [{"text": "b"}]},
        [("system", SHORT), *DOCUMENT, *TURNS],
    ),
]


def read(name, kwargs, row):
    """What the source of a registered dataset makes of a row."""
    kwargs = dict(kwargs)
    params = DatasetParams(dataset_name=name, subset=kwargs.pop("subset", None), dataset_kwargs=kwargs)
    if name == "text_sft":
        params.dataset_path = "rows.jsonl"
    elif name in (HUB, QUESTIONS):
        params.dataset_kwargs["hf_dataset_path"] = "org/x"
    tree = source(params, "data.train.datasets[0]", Notes(), seed=0)
    return resolve_format(tree["format"])(rename_columns(row, tree.get("columns", {})))


@pytest.mark.parametrize(("name", "kwargs", "row", "expected"), ROWS)
def test_a_row_gives_the_turns_that_oumi_makes_of_it(name, kwargs, row, expected):
    if expected is None:
        with pytest.raises(UserError):
            read(name, kwargs, row)
        return
    record = read(name, kwargs, row)
    assert [(turn["role"], turn["content"]) for turn in record.messages] == expected
    assert record.weight == 1
    assert not any("weight" in turn for turn in record.messages)


def test_a_null_answer_of_questions_is_refused_and_not_trained_as_the_word_none():
    with pytest.raises(UserError, match="'response' holds nothing"):
        read(QUESTIONS, {}, {"instruction": "a", "output": None})


def test_subsets_of_chatqa_that_are_single_files_are_read_from_the_cache(monkeypatch):
    with pytest.raises(UserError, match="tatqa-others is one file of the data set, and not in the cache; fetch it: hf"):
        read(CHATQA, {"subset": "tatqa-others"}, {})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name, **_: f"/cache/{repository}/{name}")
    row = {"messages": AB[:1], "document": None, "answers": ["b"]}
    record = read(CHATQA, {"subset": "tatqa-others"}, row)
    assert record.messages[0]["content"] == f"{SHORT[:-1]}, or a full and complete answer"
    params = DatasetParams(dataset_name=CHATQA, subset="tatqa-arithmetic")
    tree = source(params, "x", Notes(), seed=0)
    assert tree["path"] == f"/cache/{CHATQA}/tatqa/train_arithmetic.json"
    assert "config" not in tree
    assert source(DatasetParams(dataset_name=CHATQA), "x", Notes(), seed=0)["config"] == "sft"
