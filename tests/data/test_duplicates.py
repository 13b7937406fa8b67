"""Rows that say the same are counted: within training, and between training and what is held out."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from oumi_pl.callbacks.start import summary
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.duplicates import REPEATED
from oumi_pl.data.formats import messages
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.shards import Shards
from oumi_pl.data.sources import Source
from oumi_pl.data.splitting import content_hash
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.preview.examples import numbered
from oumi_pl.types import Record, Text
from tests import tiny
from tests.data.test_pretrain import pretrain_data
from tests.data.test_splitting import messy, turns, write

OPTIONS = {"tokenizer": ByteTokenizer(), "template": "chatml", "max_length": 256}


def sft(train, *args, **kwargs):
    return SFTData(train, *args, **(OPTIONS | kwargs))


def row(i, answer="Yes."):
    return {"messages": turns(f"Question {i}?", answer)}


def opened(data):
    data.setup("fit")
    return data.report()


def test_rows_that_repeat_an_earlier_one_are_counted_with_the_first_of_them(tmp_path):
    rows = [row(0), row(1), row(0) | {"id": 7}, row(1, "No."), row(1), row(2)]
    train = opened(sft(write(tmp_path / "rows.jsonl", rows)))["train"]
    name = f"{tmp_path}/rows.jsonl"
    assert train["duplicates"] == {
        "rows": 2,
        "first": [[f"{name}:3", f"{name}:1"], [f"{name}:5", f"{name}:2"]],
    }
    assert "2 repeat an earlier row" in summary(train)
    assert train["kept"] == 6


def test_a_thousand_rows_with_repeated_renumbered_and_reordered_ones(tmp_path):
    """600 contents, 400 rows repeat one of them."""
    rows = messy(lambda i: {"id": i} | row(i))
    random.Random(1).shuffle(rows)
    data = sft(write(tmp_path / "rows.jsonl", rows), 0.1)
    report = opened(data)
    assert sum(part["duplicates"]["rows"] for part in report.values()) == 400
    assert "prompts_in_training" not in report["validation"]  # the split keeps equal prompts together
    dropped = opened(sft(write(tmp_path / "rows.jsonl", rows), 0.1, duplicates="drop"))
    assert sum(part["dropped"][REPEATED] for part in dropped.values()) == 400
    assert sum(part["kept"] for part in dropped.values()) == 600


def test_rows_dropped_as_repeated_are_those_after_the_first_also_across_sources(tmp_path):
    first = write(tmp_path / "a.jsonl", [row(0), row(1), row(0)])
    second = write(tmp_path / "b.jsonl", [row(2), row(1), row(3), row(2)])
    data = sft([first, second], duplicates="drop")
    train = opened(data)["train"]
    assert train["dropped"] == {REPEATED: 3}
    assert train["duplicates"]["rows"] == 3
    assert train["duplicates"]["first"][1] == [f"{second}:2", f"{first}:2"]
    assert [origin.rpartition("/")[2] for store in data.stores("train") for origin in store.origins] == [
        "a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:3"
    ]  # fmt: skip
    assert "3 dropped (repeats an earlier row)" in summary(train)
    assert "repeat an earlier row," not in summary(train)


def test_rows_of_a_file_that_is_named_twice_are_repeated(tmp_path):
    file = write(tmp_path / "a.jsonl", [row(0), row(1)])
    assert opened(sft([file, file]))["train"]["duplicates"]["rows"] == 2
    dropped = opened(sft([file, file], duplicates="drop"))["train"]
    assert (dropped["kept"], dropped["dropped"]) == (2, {REPEATED: 2})


def test_dropping_changes_what_a_checkpoint_belongs_to(tmp_path):
    file = write(tmp_path / "rows.jsonl", [row(0), row(1), row(0)])
    kept, dropped = (sft(file, duplicates=value) for value in ("keep", "drop"))
    assert kept.made_from() != dropped.made_from()
    with pytest.raises(UserError, match="have changed since the checkpoint"):
        dropped.refuse_changed(kept.made_from(), dropped.made_from())
    # what an earlier source holds decides which rows of a later one are left
    other = sft([write(tmp_path / "a.jsonl", [row(9)]), file], duplicates="drop")
    assert other.made_from()[1] != dropped.made_from()[0]


def test_a_row_that_sample_repeats_is_no_duplicate(tmp_path):
    file = write(tmp_path / "rows.jsonl", [row(0), row(1), row(1)])
    assert opened(sft(Source(file, sample=7)))["train"]["duplicates"]["rows"] == 2  # the last row, read twice
    assert opened(sft(Source(file, sample=6), duplicates="drop"))["train"]["kept"] == 4


def test_held_out_rows_with_a_prompt_of_training_are_counted_per_source(tmp_path):
    train = write(tmp_path / "train.jsonl", [row(i) for i in range(10)])
    same = write(tmp_path / "same.jsonl", [row(3), row(4, "No."), row(20)])
    other = write(tmp_path / "other.jsonl", [row(30)])
    validation = opened(sft(train, [same, other]))["validation"]
    shared = validation["prompts_in_training"]
    assert (shared["rows"], shared["identical"]) == (2, 1)
    assert shared["first"] == [[f"{same}:1", f"{train}:4"], [f"{same}:2", f"{train}:5"]]
    assert [source["prompts_in_training"] for source in validation["sources"]] == [2, 0]
    assert "2 with a prompt that is in training too" in summary(validation)


def test_texts_overlap_by_what_they_say_and_pairs_by_their_prompt(tmp_path):
    texts = write(tmp_path / "a.jsonl", [{"text": "One text."}, {"text": "Another."}])
    held_out = write(tmp_path / "b.jsonl", [{"text": "one  text."}, {"text": "A third."}])
    shared = opened(sft(texts, held_out))["validation"]["prompts_in_training"]
    assert (shared["rows"], shared["identical"]) == (1, 0)  # its case differs
    pairs = tiny.pairs(6)
    changed = [pairs[2] | {"chosen": [{"role": "assistant", "content": "other"}]}]
    data = DPOData(write(tmp_path / "c.jsonl", pairs), write(tmp_path / "d.jsonl", changed), **OPTIONS)
    assert opened(data)["validation"]["prompts_in_training"]["rows"] == 1


def test_rows_are_named_by_the_file_that_they_are_in_now(tmp_path):
    rows = [row(0), row(0), {"messages": [{"role": "nobody", "content": "x"}]}]
    before = opened(sft(write(tmp_path / "a.jsonl", rows), bad_rows="drop"))["train"]
    (tmp_path / "a.jsonl").rename(tmp_path / "moved.jsonl")
    train = opened(sft(f"{tmp_path}/moved.jsonl", bad_rows="drop"))["train"]
    assert train["duplicates"]["first"] == [[f"{tmp_path}/moved.jsonl:2", f"{tmp_path}/moved.jsonl:1"]]
    assert [kind["first"] for kind in train["bad_rows"].values()] == [[f"{tmp_path}/moved.jsonl:3"]]
    assert before["duplicates"]["rows"] == 1


class Note(Record):
    """A record of a user, without a representation of its own."""

    def __init__(self, text):
        self.text = text


def test_records_without_a_representation_are_equal_if_they_hold_the_same():
    assert Note("a").content_key() == Note("a").content_key() != Note("b").content_key()
    assert Note("a").split_key() == Note("a").split_key()
    assert Text("a").content_key() != Text("a", weight=2.0).content_key()


def test_fields_are_part_of_what_is_trained(tmp_path):
    rows = [row(0) | {"score": score} for score in (1, 2, 1)]
    data = sft(write(tmp_path / "rows.jsonl", rows), duplicates="drop", fields=["score"])
    assert opened(data)["train"]["dropped"] == {REPEATED: 1}
    # the preview reads rows again, and finds the same examples
    shown = numbered(data, "train", [1, 2, 3])
    assert [(one.example, one.reason) for one in shown] == [(0, ""), (1, ""), (None, REPEATED)]


def test_the_preview_finds_examples_across_sources_with_repeated_rows(tmp_path):
    first = write(tmp_path / "a.jsonl", [row(0), row(0), row(1)])
    second = write(tmp_path / "b.jsonl", [row(1), row(2)])
    data = sft([first, second], duplicates="drop")
    assert [one.example for one in numbered(data, "train", [1, 2, 3, 4, 5])] == [0, None, 1, None, 2]
    assert [len(store) for store in data.stores("train")] == [2, 1]


def test_rows_of_a_separate_validation_file_are_not_dropped(tmp_path):
    file = write(tmp_path / "rows.jsonl", [row(0), row(0)])
    report = opened(sft(file, write(tmp_path / "held.jsonl", [row(5), row(5)]), duplicates="drop"))
    assert report["train"]["kept"] == 1
    assert report["validation"]["kept"] == 2


def test_files_whose_names_are_not_utf_8_are_named(tmp_path):
    """Their bytes are kept, as in all that Python says about such files, and a carriage return ends no line."""
    folder = tmp_path / "rows"
    folder.mkdir()
    name = os.fsdecode(os.fsencode(folder) + b"/caf\xe9\r.jsonl")
    rows = [row(i % 9) | {"text": f"Document {i % 9}."} for i in range(30)]
    try:
        write(Path(name), rows)
    except OSError:
        pytest.skip("this file system has no such names")
    data = sft(str(folder), 0.3)
    report = opened(data)
    origins = [origin for split in ("train", "validation") for store in data.stores(split) for origin in store.origins]
    assert {*origins} == {f"{name}:{i}" for i in range(1, 31)}
    assert report["train"]["duplicates"]["first"][0][0].startswith(name)
    assert all(origin.startswith(name) for _, origin in data.held_out_rows())
    # and by a second process, from the cache
    assert opened(sft(str(folder), 0.3)) == report
    documents = pretrain_data(Source(str(folder), ignore=["messages"]), validation=0.3)
    assert len({*documents.shards("train")[0].origins} | {origin for _, origin in documents.held_out_rows()}) == 30
    assert all(origin.startswith(name) for _, origin in documents.held_out_rows())


def test_an_unknown_value_is_refused():
    with pytest.raises(UserError, match=r"data\.duplicates: unknown 'dorp'; did you mean 'drop'"):
        sft("x.jsonl", duplicates="dorp")


def test_any_number_of_processes_writes_the_same_keys(tmp_path):
    file = write(tmp_path / "rows.jsonl", messy(row, 300, 150))
    stores = [sft(file, processes=processes).stores("train")[0] for processes in (1, 2)]
    keys = [messages(one).content_key() for one in map(json.loads, (tmp_path / "rows.jsonl").open())]
    assert len(set(keys)) == len(np.unique(stores[0].record_keys)) == 300
    assert stores[0].record_keys.tolist() == stores[1].record_keys.tolist()


def test_prompts_of_online_training_are_counted_and_dropped_by_what_they_ask(tmp_path):
    rows = [{"prompt": f"Question {i % 3}?", "id": i} for i in range(7)]
    options = OPTIONS | {"reward": len}
    file, held_out = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [{"prompt": "question 1?"}])
    kept, dropped = (RolloutData(file, held_out, **options, duplicates=value) for value in ("keep", "drop"))
    report = opened(kept)
    assert report["train"]["duplicates"] == {
        "rows": 4,
        "first": [[f"{file}:{i}", f"{file}:{(i - 1) % 3 + 1}"] for i in (4, 5, 6, 7)],
    }
    assert report["validation"]["prompts_in_training"]["first"] == [[f"{held_out}:1", f"{file}:2"]]
    assert opened(dropped)["train"]["dropped"] == {REPEATED: 4}
    assert len(dropped.all_prompts("train")) == 3
    assert kept.made_from() != dropped.made_from()


def test_held_out_rows_are_named_by_file_and_line(tmp_path):
    file = write(tmp_path / "rows.jsonl", messy(row, 60, 40))
    data = sft(file, 0.2)
    named = list(data.held_out_rows())
    assert {source for source, _ in named} == {file}
    assert [origin for _, origin in named] == [origin for origin, _ in data.records("validation")]
    assert 5 < len(named) == len(data.examples("validation")) < 40


def test_held_out_prompts_and_documents_are_named_by_file_and_line(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"prompt": f"Question {i}?"} for i in range(40)])
    data = RolloutData(file, 0.3, **OPTIONS, reward=len)
    held_out = [row for _, row in data.held_out_rows()]
    assert held_out == [prompt.origin for prompt in data.all_prompts("validation")]
    texts = write(tmp_path / "texts.jsonl", [{"text": f"Document {i}."} for i in range(40)])
    data = pretrain_data(texts, validation=0.3)
    lines = [int(row.removeprefix(f"{texts}:")) for _, row in data.held_out_rows()]
    assert [f"Document {line - 1}." for line in lines] == list(data.parts("validation")[0].texts())
    assert not list(sft(file, file).held_out_rows())


def test_documents_that_repeat_others_are_counted_and_dropped(tmp_path):
    """Of shards, prepared or cached; across sources, and between training and what is held out."""
    texts = [{"id": i, "text": f"Document number {i % 5} of the corpus."} for i in range(8)]
    first = write(tmp_path / "first.jsonl", texts)
    second = write(tmp_path / "second.jsonl", [{"text": "Something else."}, texts[2], {"text": "  "}])
    held_out = write(
        tmp_path / "held_out.jsonl", [{"text": "DOCUMENT number 3  of the corpus."}, texts[1], {"text": "x"}]
    )
    kept = pretrain_data([first, second], validation=held_out)
    report = kept.report()
    assert report["train"]["duplicates"] == {
        "rows": 4,
        "first": [*([f"{first}:{i}", f"{first}:{i - 5}"] for i in (6, 7, 8)), [f"{second}:2", f"{first}:3"]],
    }
    assert "4 repeat an earlier row" in summary(report["train"])
    shared = {"rows": 2, "identical": 1, "first": [[f"{held_out}:{i}", f"{first}:{j}"] for i, j in ((1, 4), (2, 2))]}
    assert report["validation"]["prompts_in_training"] == shared
    dropped = pretrain_data([first, second], validation=held_out, duplicates="drop")
    report = dropped.report()
    assert report["train"]["dropped"] == {"empty": 1, REPEATED: 4}
    assert [source["documents"] for source in report["train"]["sources"]] == [5, 1]
    assert report["train"]["rows"] == 11 == report["train"]["kept"] + 5
    assert report["validation"]["prompts_in_training"] == shared
    assert kept.made_from() != dropped.made_from()


def test_streamed_documents_are_dropped_alike(tmp_path):
    texts = write(tmp_path / "rows.jsonl", [{"text": f"Document number {i % 7}."} for i in range(30)])
    batches = [
        [batch["input_ids"].tolist() for batch in pretrain_data(texts, duplicates="drop", **how).train_dataloader()]
        for how in ({}, {"streaming": True}, {"streaming": True, "workers": 2})
    ]
    assert batches[0] == batches[1] == batches[2]
    with pytest.raises(UserError, match=r"data\.duplicates: of several sources, .* leave out data\.streaming"):
        _ = pretrain_data([texts, texts], duplicates="drop", streaming=True).documents


def test_the_keys_of_a_corpus_are_written_beside_its_tokens(tmp_path):
    texts = [f"Document number {i % 9} {'long ' * i}" for i in range(40)]
    file = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    (shards,) = pretrain_data(file).shards("train")
    assert list(shards.origins) == [f"{file}:{i}" for i in range(1, 41)]
    assert shards.record_keys.tolist() == [content_hash(Text(text).content_key()) for text in texts]
    (shards.directory / "keys.bin").write_bytes(b"")
    shards = Shards(shards.directory, shards.manifest["tokenizer"])
    with pytest.raises(UserError, match=r"keys\.bin: missing or damaged; prepare it again"):
        _ = shards.prompt_keys
