"""Rows with values that no one expects: each is an example or a bad row with its line, for every kind of data."""

import json

import numpy as np
import pytest

from oumi_pl.data.documents import texts
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.kto import KTOData
from oumi_pl.data.prompts import PROMPT_FORMATS, PromptsWithRows
from oumi_pl.data.records import RowCounts
from oumi_pl.data.reward import RewardData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.types import BadRow
from tests.crash.damage import changed, paths

VALUES = (None, True, -1, 0.5, 10**400, 1e308, -1e308, float("inf"), float("nan"), "", " ", "nan", "\0", "\x1b[31m")
CONTAINERS = ([], {}, [[]], [None], {"a": {"b": 1}}, [{"role": "user"}], '{"a": 1, "a": 2}', "[" * 5000, "[-" * 50_000)
DEEP = json.loads("[" * 90 + "]" * 90)
QUESTION = {"role": "user", "content": "a question"}
ANSWER = {"role": "assistant", "content": "an answer"}
OTHER = {"role": "assistant", "content": "another"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it", "n": 2}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"n": {}}}}}
CASES = {
    "messages": (SFTData, {"messages": [QUESTION | {"weight": 1}, ANSWER | {"train": [[0, 2]]}], "weight": 2}),
    "calls": (
        SFTData,
        {
            "messages": [QUESTION, {"role": "assistant", "tool_calls": [CALL], "content": None}, ANSWER],
            "tools": [TOOL],
            "system": "be brief",
        },
    ),
    "sharegpt": (SFTData, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    "gemini": (SFTData, {"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": ["b"]}]}),
    "alpaca": (SFTData, {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}),
    "texts": (SFTData, {"prompt": "a", "completion": "b"}),
    "response": (SFTData, {"prompt": "a", "response": "b", "tools": json.dumps([TOOL])}),
    "text": (SFTData, {"text": "a"}),
    "pairs": (DPOData, {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [OTHER], "margin": 1.5}),
    "scores": (
        DPOData,
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER], "score_chosen": 2, "score_rejected": 1},
    ),
    "dialogues": (DPOData, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}),
    "feedback": (KTOData, {"prompt": [QUESTION], "completion": [ANSWER], "label": True}),
    "rated": (RewardData, {"messages": [QUESTION, ANSWER], "label": 1}),
}


def odd_rows(row):
    """The row with each of its values replaced by each odd one, or left out; and rows that are something else."""
    for path in paths(row):
        for value in (*VALUES, *CONTAINERS, DEEP):
            yield changed(row, path, value)
        yield changed(row, path, None, removed=True)
    yield from (*VALUES[:1], *CONTAINERS)


def written(tmp_path, row):
    rows = [*[row] * 3, *odd_rows(row)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return Source(str(tmp_path / "rows.jsonl")), len(rows)


@pytest.mark.parametrize("name", CASES)
def test_every_value_of_a_row_may_be_odd(name, tmp_path):
    kind, row = CASES[name]
    source, rows = written(tmp_path, row)
    further = {"threshold": 0.5} if kind is KTOData else {}
    data = kind(source, tokenizer=ByteTokenizer(), max_length=64, seed=0, bad_rows="drop", **further)
    data.prepare_data()
    data.setup("fit")
    report = data.report()["train"]
    assert report["kept"] >= 3
    assert report["kept"] + sum(report["dropped"].values()) == report["rows"]
    assert report["rows"] >= rows  # a pair of KTO counts as two
    for example in data.examples("train"):
        assert not np.isinf(list(example.fields.values())).any()
        assert example.weights is None or np.isfinite(example.weights).all()


def test_every_text_of_a_corpus_may_be_odd(tmp_path):
    source, rows = written(tmp_path, {"text": "a"})
    counts = RowCounts()
    kept = list(texts(source, counts=counts, bad_rows="drop"))
    assert "a" in kept
    assert len(kept) + counts["empty"] + counts.bad.count == rows


@pytest.mark.parametrize("name", [name for name, (kind, _) in CASES.items() if kind in (SFTData, DPOData)])
def test_every_value_of_a_prompt_may_be_odd(name, tmp_path):
    source, rows = written(tmp_path, CASES[name][1])
    tokenize = SFTData(source, tokenizer=ByteTokenizer(), max_length=64, seed=0).tokenize
    results = [
        record if isinstance(record, BadRow) else tried(tokenize.prompt_ids, record.record)
        for _, record in PromptsWithRows(source, PROMPT_FORMATS, mixed=True).records(strict=False)
    ]
    assert len(results) >= rows
    assert sum(not isinstance(result, BadRow) for result in results) >= 3


def tried(function, record):
    try:
        return function(record)
    except UserError as error:
        return BadRow(str(error))
