"""Oumi's base classes of data sets give the values of the file, and refuse what they don't know."""

import datetime
import json

import datasets
import numpy as np
import pandas as pd
import pytest

from oumi_pl.core.datasets import (
    BaseExperimentalGrpoDataset,
    BaseIterableDataset,
    BaseMapDataset,
    BasePretrainingDataset,
    BaseSftDataset,
)
from oumi_pl.core.types.conversation import Conversation
from oumi_pl.errors import UserError
from tests.command_line import jsonl


class Rows(BaseMapDataset):
    default_dataset = "rows"

    def __init__(self, *, greeting="", **kwargs):
        super().__init__(**kwargs)
        self._data = self._load_data()

    def transform(self, sample):
        return dict(sample)


class Chats(BaseSftDataset):
    default_dataset = "chats"

    def transform_conversation(self, example):
        return Conversation(messages=[{"role": "user", "content": example["text"]}])


class Prompts(BaseExperimentalGrpoDataset):
    default_dataset = "prompts"


def rows_of(path):
    dataset = Rows(dataset_path=str(path))
    return [dataset[number] for number in range(len(dataset))]


def test_a_line_ends_at_a_newline_alone(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    line = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(f"{line}\n\n{line}\r\n".encode())
    assert rows_of(tmp_path / "rows.jsonl") == [{"text": text}] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"rows\.jsonl:3: not valid JSON"),
        ("[1]", r"rows\.jsonl:3: expected an object"),
        ('{"text": "a\x0bb"}', r"rows\.jsonl:3: not valid JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / "rows.jsonl")


def test_values_of_json_are_those_of_the_file(tmp_path):
    rows = [
        {"number": 2**60 + 1, "share": 0.5, "day": "2020-01-01"},
        {"number": 3, "turns": [1, {"a": None}]},
        {"share": 2, "number": None},
    ]
    (tmp_path / "rows.jsonl").write_text(jsonl(*rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name in ("rows.jsonl", "rows.json"):
        read = rows_of(tmp_path / name)
        assert read == [{"number": None, "share": None, "day": None, "turns": None} | row for row in rows]
        assert [type(row["number"]) for row in read] == [int, int, type(None)]
        assert type(read[2]["share"]) is int
    assert isinstance(Rows(dataset_path=str(tmp_path / "rows.jsonl")).raw(0), pd.Series)


@pytest.mark.parametrize("source", ["parquet", "folder", "hub"])
def test_values_of_a_table_are_those_of_the_file(tmp_path, monkeypatch, source):
    columns = {
        "number": [2**60 + 1, None],
        "share": [None, 0.5],
        "text": ["a", None],
        "is_good": [True, None],
        "day": [datetime.datetime(2020, 1, 1), None],
        "turns": [[{"role": "user", "id": 2**60 + 1}, {"role": "user", "id": None}], None],
        "answer": [{"value": 2**60 + 1}, {"value": None}],
    }
    table = datasets.Dataset.from_dict(columns)
    if source == "parquet":
        table.to_parquet(tmp_path / "rows.parquet")
        first, second = rows_of(tmp_path / "rows.parquet")
    elif source == "folder":
        table.save_to_disk(tmp_path / "rows")
        first, second = rows_of(tmp_path / "rows")
    else:
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table.select([1, 0]).select([1, 0]))
        first, second = (Rows()[number] for number in range(2))
    assert second == dict.fromkeys(columns) | {"share": 0.5, "answer": {"value": None}}
    assert first["answer"] == columns["answer"][0]
    assert (type(first["number"]), first["number"]) == (int, 2**60 + 1)
    assert (first["share"], first["text"], first["is_good"]) == (None, "a", True)
    assert isinstance(first["turns"], np.ndarray)  # as in Oumi
    assert list(first["turns"]) == columns["turns"][0]


def test_columns_that_the_library_decodes_are_decoded(tmp_path):
    features = datasets.Features({"json": datasets.Json(), "image": datasets.Array2D((1, 2), "float32")})
    rows = [{"json": {"a": 1}, "image": [[0.0, 1.0]]}, {"json": None, "image": [[2.0, 3.0]]}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "rows")
    read = rows_of(tmp_path / "rows")
    assert [row["json"] for row in read] == [{"a": 1}, None]
    assert [row["image"].tolist() for row in read] == [row["image"] for row in rows]


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "rows.parquet").write_text("no")
    with pytest.raises(UserError, match=r"rows\.parquet: damaged"):
        rows_of(tmp_path / "rows.parquet")


def test_integers_of_a_users_table_stay_integers():
    class Own(Rows):
        def _load_data(self):
            return pd.DataFrame({"number": [2**60 + 1], "share": [0.5]})

    assert Own()[0] == {"number": 2**60 + 1, "share": 0.5}


def test_unknown_arguments_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(jsonl({"text": "a"}))
    path = str(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"^Chats has no argument 'asistant_only'; did you mean 'assistant_only'\?$"):
        Chats(dataset_path=path, asistant_only=True)
    Chats(dataset_path=path, assistant_only=True, task="sft")
    with pytest.warns(UserWarning, match=r"Rows has no argument 'greting'; did you mean 'greeting'\?"):
        Rows(dataset_path=path, greting="Hello")  # its **kwargs might read it


def test_a_prompt_keeps_all_columns_for_rewards(tmp_path):
    turns = [{"role": "user", "content": " a"}]
    rows = [{"prompt": " a \n", "target": 3}, {"prompt": turns, "completion": " b "}]
    (tmp_path / "rows.jsonl").write_text(jsonl(*rows))
    dataset = Prompts(dataset_path=str(tmp_path / "rows.jsonl"))
    assert dataset[0] == {"prompt": "a", "target": 3, "completion": ""}
    assert dataset[1] == {"prompt": turns, "target": None, "completion": "b"}
    (tmp_path / "rows.jsonl").write_text(jsonl({"prompt": "a", "target": 3}))
    assert Prompts(dataset_path=str(tmp_path / "rows.jsonl"))[0] == {"prompt": "a", "target": 3}
    (tmp_path / "rows.jsonl").write_text(jsonl({"question": "a"}))
    with pytest.raises(UserError, match="no column 'prompt'; there are question"):
        Prompts(dataset_path=str(tmp_path / "rows.jsonl"))[0]


def test_rows_of_the_hub_are_streamed_if_asked_for(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text(jsonl({"text": "a"}, {"text": "b"}))

    class Documents(BasePretrainingDataset):
        default_dataset = str(tmp_path / "data")

    streamed, read = Documents(stream=True, split="train"), Documents()
    assert isinstance(streamed.data, datasets.IterableDataset)
    assert list(streamed.documents()) == list(read.documents()) == [{"text": "a"}, {"text": "b"}]
    assert isinstance(read.data, pd.DataFrame)
    assert len(list(BaseIterableDataset(dataset_name=str(tmp_path / "data"), stream=True))) == 2
