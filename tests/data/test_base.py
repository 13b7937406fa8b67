"""The DataModule: the cache is hit when nothing has changed and missed when anything has; the report adds up."""

import json

import pytest

from oumi_pl.callbacks import start
from oumi_pl.data import base
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.preview import report as preview
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
def test_any_change_tokenizes_anew(tmp_path, tokenized, change):
    file = write_jsonl(tmp_path / "rows.jsonl", conversations(20))
    make(file)
    before = len(tokenized)
    make(file, **change)
    assert len(tokenized) > before


def test_a_changed_file_or_format_function_tokenizes_anew(tmp_path, tokenized, monkeypatch):
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


def test_another_table_of_formats_tokenizes_anew(tmp_path, tokenized, monkeypatch):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a", "text": "t"}])
    make(file)
    monkeypatch.setattr(SFTData, "formats", SFTData.formats[::-1])
    make(file)
    assert [type(record).__name__ for record in tokenized] == ["Conversation", "Text"]


def test_held_out_rows_are_disjoint_and_stable(tmp_path):
    rows = conversations(200)
    made = make(write_jsonl(tmp_path / "rows.jsonl", rows), validation=0.2)
    train, held = made.report()["train"], made.report()["validation"]
    assert train["rows"] + held["rows"] == 200
    assert 20 <= held["rows"] <= 60
    references = [reference for _, reference in made.prompts("validation")]
    again = make(write_jsonl(tmp_path / "again.jsonl", rows[::-1]), validation=0.2)
    assert sorted(reference for _, reference in again.prompts("validation")) == sorted(references)


def test_the_report_adds_up(tmp_path):
    rows = conversations(30, longest=40)
    rows[3]["messages"] = rows[3]["messages"][:1]  # no answer: no target tokens
    made = make(write_jsonl(tmp_path / "rows.jsonl", rows), max_length=96, batch_size=4, packing=True)
    report = made.report()["train"]
    assert report["rows"] == 30 == report["kept"] + sum(report["dropped"].values())
    assert report["dropped"] == {"no target tokens": 1}
    lengths = made.lengths("train")
    assert report["cut"] == int((lengths == 96).sum()) > 0
    assert report["tokens"] == lengths.sum()
    examples = [made.examples("train")[i] for i in range(29)]
    assert report["target_tokens"] == sum(e.target_tokens for e in examples)
    assert report["lengths"]["p0"] == lengths.min() and report["lengths"]["p100"] == 96
    assert report["fill"] == pytest.approx(lengths.sum() / (report["rows_planned"] * 96), abs=1e-6)
    json.dumps(report)


def test_empty_answers_are_trained_counted_and_told_and_refused_where_there_are_no_others(tmp_path):
    rows = conversations(4)
    for row in rows[:3]:
        row["messages"][-1]["content"] = " "
    made = make(write_jsonl(tmp_path / "rows.jsonl", rows))
    report = made.report()["train"]
    assert (report["kept"], report["empty_answers"], report["dropped"]) == (4, 3, {})
    assert "4 rows, all kept, 3 with an empty answer, " in start.summary(report)
    (table,) = preview.tables(made)
    assert ["an empty answer", "3 (75.0%)"] in table.rows
    silent = write_jsonl(tmp_path / "empty.jsonl", rows[:3])
    with pytest.raises(UserError, match=r"data\.train: the answers of all 3 rows are empty"):
        make(silent).setup("fit")
    make(silent, train_on="all").setup("fit")


def test_padding_is_that_of_the_batches(tmp_path):
    made = make(write_jsonl(tmp_path / "rows.jsonl", conversations(10)), batch_size=4)
    padded = total = 0
    for batch in made.train_dataloader():
        padded += int((batch["attention_mask"] == 0).sum())
        total += batch["attention_mask"].numel()
    assert made.report()["train"]["padding"] == pytest.approx(padded / total, abs=1e-6)


def test_a_mixture_keeps_its_proportions_and_changes_with_the_epoch(tmp_path):
    sources = [
        base.Source(write_jsonl(tmp_path / "a.jsonl", conversations(30)), weight=3),
        base.Source(write_jsonl(tmp_path / "b.jsonl", conversations(10, seed=1)), weight=1),
    ]
    made = SFTData(sources, tokenizer=ByteTokenizer(), max_length=256, seed=0)
    made.prepare_data()
    ids = [made.plan(epoch).example_ids for epoch in range(2)]
    assert [(epoch < 30).sum() for epoch in ids] == [30, 30]
    assert ids[0].tolist() != ids[1].tolist()
    assert made.updates(2) == 10


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    made = SFTData(
        write_jsonl(tmp_path / "rows.jsonl", conversations(5)), tokenizer=ByteTokenizer(), max_length=4, overflow="drop"
    )
    with pytest.raises(UserError, match=r"none of 5 rows is left \(5 longer than max_length\)"):
        made.setup("fit")


def test_an_error_in_a_row_names_file_and_line(tmp_path):
    rows = conversations(3)
    rows[1]["messages"][0]["role"] = "asistant"
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*asistant.*did you mean 'assistant'"):
        make(file)
    assert not list((tmp_path / "cache").rglob("*.bin")), "half a store was left"
