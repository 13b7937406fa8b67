"""The DataModule: the cache is used only as long as nothing changes; the report counts all rows."""

import json
from dataclasses import replace

import pytest

from oumi_pl.callbacks import start
from oumi_pl.data import base
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.preview import report as preview
from oumi_pl.types import Text
from tests.tiny import conversations, write_jsonl


@pytest.fixture
def tokenized(monkeypatch):
    """Counts the records that are tokenized."""
    counted = []
    original = SFTData.encode
    monkeypatch.setattr(SFTData, "encode", lambda self, records: counted.extend(records) or original(self, records))
    return counted


def make(file, **kwargs):
    sft_data = SFTData(str(file), **({"tokenizer": ByteTokenizer(), "max_length": 256, "seed": 0} | kwargs))
    sft_data.prepare_data()
    return sft_data


def test_the_second_run_tokenizes_nothing(tmp_path, tokenized):
    file = write_jsonl(tmp_path / "rows.jsonl", conversations(20))
    first = make(file)
    assert len(tokenized) == 20
    second = make(file)
    assert len(tokenized) == 20
    assert second.report() == first.report()
    assert [e.input_ids.tolist() for e in map(second.examples("train").__getitem__, range(20))] == [
        e.input_ids.tolist() for e in map(first.examples("train").__getitem__, range(20))
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 128},
        {"template": "plain"},
        {"tokenizer": ByteTokenizer(chat_template=False), "template": "chatml"},
        {"train_on": "all"},
        {"overflow": "drop"},
        {"validation": 0.5},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_changed_setting_tokenizes_again(tmp_path, tokenized, change):
    file = write_jsonl(tmp_path / "rows.jsonl", conversations(20))
    make(file)
    before = len(tokenized)
    make(file, **change)
    assert len(tokenized) > before


def test_a_changed_file_or_format_function_tokenizes_again(tmp_path, tokenized, monkeypatch):
    file = write_jsonl(tmp_path / "rows.jsonl", conversations(20))
    make(file)
    write_jsonl(tmp_path / "rows.jsonl", conversations(19) + conversations(1, seed=9))
    make(file)
    assert len(tokenized) == 40
    monkeypatch.syspath_prepend(tmp_path)
    source = "from oumi_pl.data import formats\ndef mine(row):\n    return formats.messages(row)\n"
    (tmp_path / "own_format_a.py").write_text(source)
    (tmp_path / "own_format_b.py").write_text(source + "# changed\n")
    sources = [base.Source(str(file), format=f"own_format_{x}.mine") for x in "ab"]
    for own in (sources[0], sources[0], sources[1]):
        SFTData(own, tokenizer=ByteTokenizer(), max_length=256).prepare_data()
    assert len(tokenized) == 80


def test_formats_in_another_order_tokenize_again(tmp_path, tokenized, monkeypatch):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a", "text": "t"}])
    make(file)
    monkeypatch.setattr(SFTData, "formats", SFTData.formats[::-1])
    make(file)
    assert [type(record).__name__ for record in tokenized] == ["Conversation", "Text"]


def test_held_out_rows_are_disjoint_from_training_and_do_not_depend_on_the_order(tmp_path):
    rows = conversations(200)
    built = make(write_jsonl(tmp_path / "rows.jsonl", rows), validation=0.2)
    train, held = built.report()["train"], built.report()["validation"]
    assert train["rows"] + held["rows"] == 200
    assert 20 <= held["rows"] <= 60
    references = [reference for _, reference in built.prompts("validation")]
    again = make(write_jsonl(tmp_path / "again.jsonl", rows[::-1]), validation=0.2)
    assert sorted(reference for _, reference in again.prompts("validation")) == sorted(references)


def test_the_report_counts_what_became_of_all_rows(tmp_path):
    rows = conversations(30, longest=40)
    rows[3]["messages"] = rows[3]["messages"][:1]  # no answer: no target tokens
    built = make(write_jsonl(tmp_path / "rows.jsonl", rows), max_length=96, batch_size=4, packing=True)
    report = built.report()["train"]
    assert report["rows"] == 30 == report["kept"] + sum(report["dropped"].values())
    assert report["dropped"] == {"no target tokens": 1}
    lengths = built.lengths("train")
    assert report["cut"] == int((lengths == 96).sum()) > 0
    assert report["tokens"] == lengths.sum()
    examples = [built.examples("train")[i] for i in range(29)]
    assert report["target_tokens"] == sum(e.target_tokens for e in examples)
    assert report["lengths"]["p0"] == lengths.min() and report["lengths"]["p100"] == 96
    assert report["fill"] == pytest.approx(lengths.sum() / (report["rows_planned"] * 96), abs=1e-6)
    json.dumps(report)


def test_empty_answers_are_trained_and_counted_and_refused_if_all_are_empty(tmp_path):
    rows = conversations(4)
    for row in rows[:3]:
        row["messages"][-1]["content"] = " "
    built = make(write_jsonl(tmp_path / "rows.jsonl", rows))
    report = built.report()["train"]
    assert (report["kept"], report["empty_answers"], report["dropped"]) == (4, 3, {})
    assert "4 rows, all kept, 3 with an empty answer, " in start.summary(report)
    (table,) = preview.tables(built)
    assert ["an empty answer", "3 (75.0%)"] in table.rows
    silent = write_jsonl(tmp_path / "empty.jsonl", rows[:3])
    with pytest.raises(UserError, match=r"data\.train: the answers of all 3 rows are empty"):
        make(silent).setup("fit")
    make(silent, train_on="all").setup("fit")


@pytest.mark.parametrize("packing", [False, True])
def test_batches_hold_the_tokens_of_their_rows_without_padding(tmp_path, packing):
    built = make(write_jsonl(tmp_path / "rows.jsonl", conversations(10)), batch_size=4, packing=packing)
    batches = list(built.train_dataloader())
    assert sum(batch["input_ids"].numel() for batch in batches) == built.report()["train"]["tokens"]
    assert "padding" not in built.report()["train"]
    for batch in batches:
        examples = [built.examples("train")[i] for i in batch["sample_ids"]]
        assert batch["input_ids"].tolist() == [[token for e in examples for token in e.input_ids.tolist()]]


class Scored(SFTData):
    """Rows that may come with a score."""

    formats = ((lambda row: Text(row["text"], f"score {row['score']}" if "score" in row else "q"), ("text",)),)

    def encode(self, records):
        fields = [{"score": float(r.prompt[6:])} if r.prompt.startswith("score ") else {} for r in records]
        return [replace(e, fields=f) for e, f in zip(super().encode(records), fields, strict=True)]


def test_sources_with_different_fields_are_refused(tmp_path):
    with_score = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "score": 1}, {"text": "b", "score": 0.5}])
    without = write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}])
    built = Scored(with_score, tokenizer=ByteTokenizer())
    built.prepare_data()
    assert sorted(next(iter(built.train_dataloader()))["fields"]["score"].tolist()) == [0.5, 1.0]
    with pytest.raises(UserError, match=r"data.train: the examples of its sources have different fields"):
        Scored([with_score, without], tokenizer=ByteTokenizer()).prepare_data()


def test_a_mixture_keeps_its_proportions_and_changes_with_the_epoch(tmp_path):
    sources = [
        base.Source(write_jsonl(tmp_path / "a.jsonl", conversations(30)), weight=3),
        base.Source(write_jsonl(tmp_path / "b.jsonl", conversations(10, seed=1)), weight=1),
    ]
    built = SFTData(sources, tokenizer=ByteTokenizer(), max_length=256, seed=0)
    built.prepare_data()
    ids = [built.plan(epoch).example_ids for epoch in range(2)]
    assert [(epoch < 30).sum() for epoch in ids] == [30, 30]
    assert ids[0].tolist() != ids[1].tolist()
    assert built.updates(2) == 10


def test_an_error_says_why_no_row_is_left(tmp_path):
    built = SFTData(
        write_jsonl(tmp_path / "rows.jsonl", conversations(5)), tokenizer=ByteTokenizer(), max_length=4, overflow="drop"
    )
    with pytest.raises(UserError, match=r"none of 5 rows is left \(5 longer than max_length\)"):
        built.setup("fit")


def test_an_error_in_a_row_names_file_and_line(tmp_path):
    rows = conversations(3)
    rows[1]["messages"][0]["role"] = "asistant"
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*asistant.*did you mean 'assistant'"):
        make(file)
    assert not list((tmp_path / "cache").rglob("*.bin")), "half a store was left"
