"""Rows in memory: lists of dicts, `datasets.Dataset`, pandas DataFrames, dicts of sources and functions as formats."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from oumi_pl.data import corpus, store
from oumi_pl.data.memory import Rows
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source, as_sources, rows
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.types import Text
from tests.tiny import conversations, write_jsonl

LIST = conversations(12)
HOLDERS = {
    "list": lambda rows: rows,
    "tuple": tuple,
    "Dataset": datasets.Dataset.from_list,
    "DataFrame": pd.DataFrame,
}


def sft(train, **kwargs):
    return SFTData(train, **({"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0} | kwargs))


def prepared(data):
    data.prepare_data()
    data.setup("fit")
    return data


def ids(data, split="train"):
    return [example.input_ids.tolist() for example in data.examples(split)]


@pytest.fixture
def written(monkeypatch):
    """Counts what is made because the cache lacks it."""
    counted = []
    for module, name in ((store, "write_store"), (corpus, "write_shards")):
        write = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, write=write, **kwargs: counted.append(1) or write(*a, **kwargs))
    return counted


def test_rows_in_memory_give_the_examples_of_the_same_rows_in_a_file_and_share_their_cache(tmp_path, written):
    from_file = ids(prepared(sft(write_jsonl(tmp_path / "rows.jsonl", LIST))))
    assert len(written) == 1
    for hold in HOLDERS.values():
        assert ids(prepared(sft(hold(LIST)))) == from_file
    assert len(written) == 2, "rows are identified by content, whatever holds them"
    changed = [*LIST[:-1], {"messages": [*LIST[-1]["messages"][:1], {"role": "assistant", "content": "other"}]}]
    assert ids(prepared(sft(changed))) != from_file
    assert len(written) == 3


def test_rows_are_identified_when_they_are_read(written):
    """A list may be changed between two runs of a notebook cell."""
    changing = [dict(row) for row in LIST]
    before = ids(prepared(sft(changing)))
    changing.pop()
    assert ids(prepared(sft(changing))) == before[:-1]
    assert len(written) == 2


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_splits_slices_and_samples_of_rows_in_memory(hold):
    source = Source(hold(LIST), split="train[2:5]")
    assert [row["messages"] for _, row in rows(source)] == [row["messages"] for row in LIST[2:5]]
    sampled = Source(hold(LIST), sample=30)
    assert len(list(rows(sampled))) == 30
    data = prepared(sft(hold(LIST), validation=0.4))
    assert len(ids(data)) + len(ids(data, "validation")) == len(LIST)


def test_messages_name_the_row_and_the_source():
    bad = [*LIST[:3], {"messages": []}]
    with pytest.raises(UserError, match=r"^list in memory row 4: column 'messages' holds no turns"):
        prepared(sft(bad))
    with pytest.raises(UserError, match=r"^chats row 4: column 'messages' holds no turns"):
        prepared(sft({"chats": pd.DataFrame(bad)}))
    with pytest.raises(UserError, match=r"^list in memory row 2 is a str instead of a dict"):
        prepared(sft([LIST[0], "text"]))
    with pytest.raises(UserError, match="no split 'test'"):
        prepared(sft(Source(LIST, split="test")))
    with pytest.raises(UserError, match="has no rows"):
        prepared(sft(pd.DataFrame([])))


def test_cells_of_a_table_are_plain_values_and_empty_ones_are_none():
    frame = pd.DataFrame(
        {"n": [1, 2], "x": [0.5, np.nan], "t": ["a", None], "turns": [np.array([{"k": np.int64(1)}]), []], 7: [1, 1]}
    )
    first, second = Rows(frame)
    assert first == {"n": 1, "x": 0.5, "t": "a", "turns": [{"k": 1}], "7": 1}
    assert type(first["turns"][0]["k"]) is int
    assert second == {"n": 2, "x": None, "t": None, "turns": [], "7": 1}


def test_values_without_a_json_type_are_identified_by_their_whole_content():
    arrays = [np.arange(5000), np.arange(5000)]
    arrays[1][2500] = -1
    first, again, other = (Rows([{"x": array}]).fingerprint() for array in (arrays[0], arrays[0].copy(), arrays[1]))
    assert first == again != other
    with pytest.raises(UserError, match="list in memory row 1: a column holds no plain value"):
        Rows([{"x": lambda: 0}]).fingerprint()


def test_a_dict_names_sources_in_reports(tmp_path):
    path = Path(write_jsonl(tmp_path / "rows.jsonl", conversations(3, seed=1)))
    data = prepared(sft({"memory": LIST, "file": path, "both": Source(pd.DataFrame(LIST), weight=None)}))
    assert [(s["source"], s["rows"]) for s in data.report()["train"]["sources"]] == [
        ("memory", 12),
        ("file", 3),
        ("both", 12),
    ]
    renamed = prepared(sft({"first": LIST, "second": path}))
    assert [s["source"] for s in renamed.report()["train"]["sources"]] == ["first", "second"]


def test_a_mapping_with_a_path_is_one_source_as_in_a_recipe(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", LIST)
    assert as_sources({"path": path, "weight": 2}) == [Source(path, weight=2)]
    assert as_sources([{"path": path}, path]) == [Source(path), Source(path)]
    with pytest.raises(UserError, match=r"data: a source has no 'wieght'; did you mean 'weight'"):
        as_sources({"path": path, "wieght": 2})


def test_weights_of_sources_in_memory_decide_their_shares():
    other = conversations(12, seed=1)
    data = prepared(sft([Source(LIST, weight=3), Source(other, weight=1)]))
    drawn = data.plan(0).example_ids
    assert ((drawn < 12).sum(), (drawn >= 12).sum()) == (18, 6)


REFUSED = {
    "a number": (0.5, "data.train is a float; name a file, a directory or a hub id, or pass rows: a list of dicts"),
    "a generator": ((row for row in LIST), "data.train is a generator; name a file"),
    "splits": (datasets.DatasetDict({"a": datasets.Dataset.from_list(LIST)}), r"pass one of them, for example data\["),
    "a stream": (datasets.Dataset.from_list(LIST).to_iterable_dataset(), "an IterableDataset can't be counted"),
    "columns": ({"text": ["a", "b"]}, r"data.train\['text'\]: a list of str is neither rows nor sources"),
    "nothing": ([], "data.train: a list of sources is empty"),
    "no names": ({}, "data.train: a dict of sources is empty"),
    "a list of numbers": ([1, 2], "data.train is a int; name a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_source_is_refused_when_the_data_are_constructed(case):
    value, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        SFTData(value)


def test_format_that_is_neither_a_name_nor_a_function_is_refused():
    with pytest.raises(UserError, match=r"rows.jsonl: format is a int; it is the name of a format, or a function"):
        Source("rows.jsonl", format=3)


# ---- functions as formats

FACTS = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]


def ending_with(ending):
    def read(row):
        return Text(row["a"] + ending, row["q"])

    return read


def test_a_function_is_a_format(written):
    plain = ids(prepared(sft(Source(FACTS, format=lambda row: Text(row["a"], row["q"])))))
    other = ids(prepared(sft(Source(FACTS, format=lambda row: Text(row["q"], row["a"])))))
    assert bytes(plain[0][:4]) == b"one1"
    assert bytes(other[0][:4]) == b"1one"
    assert len(written) == 2
    for ending in ".!.":
        built = ids(prepared(sft(Source(FACTS, format=ending_with(ending)))))
        assert bytes(built[0][:5]) == b"one1" + ending.encode()
    assert len(written) == 4, "what a function closes over is part of the key"


def test_a_mistake_in_a_function_is_reported_with_its_name_and_the_row():
    with pytest.raises(UserError, match=r"^list in memory row 1: .*wrong raised KeyError: 'missing' \(.* line \d+\)"):

        def wrong(row):
            return Text(row["missing"])

        prepared(sft(Source(FACTS, format=wrong)))
    with pytest.raises(UserError, match="row 1: <lambda> returned a str for this row; a format returns"):
        prepared(sft(Source(FACTS, format=lambda row: row["q"])))


def test_a_subclass_of_the_data_has_rows_of_its_own(written):
    class OnlyEnds(SFTData):
        def encode(self, records):
            return super().encode([Text(record.text[-1:], record.prompt) for record in records])

    class Cut(SFTData):
        def __init__(self, *args, letters, **kwargs):
            super().__init__(*args, **kwargs)
            self.letters = letters

        def encode(self, records):
            return super().encode([Text(record.text[: self.letters], record.prompt) for record in records])

    source = Source([{"q": "?", "a": "answer"}], format=lambda row: Text(row["a"], row["q"]))
    arguments = {"tokenizer": ByteTokenizer(), "max_length": 64}

    def targets(cls, **kwargs):
        return prepared(cls(source, **arguments, **kwargs)).targets("train").tolist()

    counts = [targets(SFTData), targets(OnlyEnds), targets(Cut, letters=2), targets(Cut, letters=3), targets(SFTData)]
    assert counts == [[7], [2], [3], [4], [7]]
    assert len(written) == 4


# ---- pretraining

TEXTS = [{"text": f"document {i} " * 20} for i in range(8)]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_in_memory(streaming, written):
    how = {"tokenizer": ByteTokenizer(False), "max_length": 32, "shuffle_buffer": 0, "streaming": streaming}
    data = prepared(PretrainData(TEXTS, {"held": pd.DataFrame(TEXTS[:2])}, **how))
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].numel() == 8 * 32
    assert data.source_names("validation") == ["held"]
    assert len(written) == (1 if streaming else 2)
    state = data.state_dict()
    other = PretrainData(TEXTS[1:], **how)
    other.load_state_dict(state)
    prepared(other)
    with pytest.raises(UserError, match="list in memory has changed since the checkpoint"):
        other.train_dataloader()
