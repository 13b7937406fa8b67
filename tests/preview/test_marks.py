"""What a preview marks is what is trained: the labels of the batches that the training loader hands out."""

import json

import numpy as np
import pytest

from oumi_pl.data.dpo import DPOData
from oumi_pl.data.packed_chat import PackedChatData
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.preview import examples, stream
from oumi_pl.preview.pieces import Decoder
from oumi_pl.preview.rows import walk
from oumi_pl.preview.shown import Mark
from oumi_pl.types import IGNORE_INDEX
from tests import tiny


def everything(data):
    """All examples of the training split as they are shown, by their number in it."""
    decoder = Decoder(data.tokenizer)
    rows = list(walk(data, "train", lambda row, index: index is not None))
    return {row.example: examples.shown(data, "train", row, decoder) for row in rows}


def tokens(section):
    """Ids and marks of a section, token by token."""
    flat = [(i, piece.target) for piece in section.pieces for i in piece.ids]
    return np.array([i for i, _ in flat]), np.array([target for _, target in flat])


def made(data):
    data.prepare_data()
    data.setup("fit")
    return data


SETTINGS = [{}, {"max_length": 60}, {"max_length": 60, "overflow": "keep_start"}, {"train_on": "all"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sft_padded(tmp_path, settings):
    data = made(tiny.data(tmp_path, batch_size=3, **settings))
    shown = everything(data)
    for batch in data.train_dataloader():
        for row, number in enumerate(batch["sample_ids"]):
            ids, marked = tokens(shown[number].sections[0])
            labels = batch["labels"][row].numpy()
            assert ids.tolist() == batch["input_ids"][row, : len(ids)].tolist()
            assert not marked[0]
            assert marked[1:].tolist() == (labels[: len(ids) - 1] != IGNORE_INDEX).tolist()
            assert ids[marked].tolist() == labels[labels != IGNORE_INDEX].tolist()


def test_sft_packed(tmp_path):
    data = made(tiny.data(tmp_path, batch_size=2, packing=True))
    shown = everything(data)
    for batch in data.train_dataloader():
        start = 0
        for number, length in zip(batch["sample_ids"], batch["document_lengths"], strict=True):
            ids, marked = tokens(shown[number].sections[0])
            labels = batch["labels"][0, start : start + length].numpy()
            assert ids.tolist() == batch["input_ids"][0, start : start + length].tolist()
            assert np.flatnonzero(marked).tolist() == (np.flatnonzero(labels != IGNORE_INDEX) + 1).tolist()
            start += length


@pytest.mark.parametrize("settings", [{}, {"max_length": 70}, {"packing": True}], ids=str)
def test_pairs(tmp_path, settings):
    data = made(tiny.dpo_data(tmp_path, batch_size=3, **settings))
    shown = everything(data)
    for batch in data.train_dataloader():
        targets, branches, start = batch["targets"].numpy(), batch["branches"].numpy(), 0
        for pair, (number, lengths) in enumerate(zip(batch["sample_ids"], batch["pair_lengths"], strict=True)):
            parts = [tokens(section) for section in shown[number].sections]
            assert tuple(len(ids) for ids, _ in parts) == lengths
            assert not parts[0][1].any()
            for branch, (ids, marked) in enumerate(parts[1:]):
                assert ids[marked].tolist() == targets[branches == 2 * pair + branch].tolist()
            laid_out = np.concatenate([ids for ids, _ in parts])
            assert laid_out.tolist() == batch["input_ids"][0, start : start + sum(lengths)].tolist()
            start += sum(lengths)


def documents(tmp_path):
    texts = ["one two three", "a much longer document, " * 12, "x", "yes and no", "tail " * 9]
    return tiny.write_jsonl(tmp_path / "documents.jsonl", [{"text": text} for text in texts])


STREAMS = [
    {},
    {"isolate": True},
    {"packing": "best_fit"},
    {"packing": "best_fit", "isolate": True},
    {"streaming": True, "shuffle_buffer": 4},
]


@pytest.mark.parametrize("settings", STREAMS, ids=str)
def test_rows_of_pretraining(tmp_path, settings):
    data = PretrainData(documents(tmp_path), tokenizer=ByteTokenizer(), max_length=32, batch_size=1, seed=3, **settings)
    same_as_trained(made(data))


def test_rows_of_joined_conversations(tmp_path):
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(4))
    same_as_trained(made(PackedChatData(rows, tokenizer=ByteTokenizer(), max_length=64, batch_size=1, seed=0)))


def same_as_trained(data):
    batches = list(data.train_dataloader())
    shown = stream.rows(data, "train", Decoder(data.tokenizer), len(batches), None)
    assert len(shown) == len(batches) > 2
    for batch, example in zip(batches, shown, strict=True):
        pieces = example.sections[0].pieces
        inputs = [i for piece in pieces if not piece.label_only for i in piece.ids]
        marked = [i for piece in pieces if piece.target for i in piece.ids]
        labels = batch["labels"][0]
        assert inputs == batch["input_ids"][0, : len(inputs)].tolist()
        assert marked == labels[labels != IGNORE_INDEX].tolist()
        if "document_lengths" in batch:
            apart = [item for item in example.sections[0].items if isinstance(item, Mark) and item.text == stream.APART]
            assert len(apart) == len(batch["document_lengths"]) - 1


def test_held_out_documents_are_marked_as_they_are_scored(tmp_path):
    file = documents(tmp_path)
    data = made(PretrainData(file, file, tokenizer=ByteTokenizer(), max_length=32, eval_stride=20, eval_batch_size=1))
    shown = stream.rows(data, "validation", Decoder(data.tokenizer), 99, None)
    marked = [[i for p in s.sections[0].pieces if p.target for i in p.ids] for s in shown]
    scored = [batch["labels"][batch["labels"] != IGNORE_INDEX].tolist() for batch in data.val_dataloader()]
    assert sorted(marked) == sorted(scored)


def test_a_cut_is_marked_where_it_is(tmp_path):
    words = [{"messages": [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "a" * 30}]}]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", words)
    whole = made(SFTData(file, tokenizer=ByteTokenizer(), max_length=512))
    length = len(whole.examples("train")[0].input_ids)
    data = made(SFTData(file, tokenizer=ByteTokenizer(), max_length=length - 20))
    (row,) = examples.cut(data, "train", 5)
    shown = examples.shown(data, "train", row, Decoder(data.tokenizer))
    first, *rest = shown.sections[0].items
    assert (first.kind, first.text) == ("cut", "✂ 20 tokens cut off here")
    assert not any(isinstance(item, Mark) for item in rest)
    assert "cut: 20 tokens removed" in shown.facts


def test_the_cuts_of_a_pair_are_marked_in_each_part(tmp_path):
    row = {"prompt": "p" * 40, "chosen": "c" * 60, "rejected": "r" * 10}
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    data = made(DPOData(file, tokenizer=ByteTokenizer(), max_length=50))
    (found,) = examples.cut(data, "train", 1)
    prompt, chosen, rejected = examples.shown(data, "train", found, Decoder(data.tokenizer)).sections
    marks = [[i.text for i in s.items if isinstance(i, Mark)] for s in (prompt, chosen, rejected)]
    # 40 + 61 tokens with EOS into 50: the prompt keeps its last 25, the chosen response its first 25
    assert marks == [["✂ 15 tokens cut off here"], ["✂ 36 tokens cut off here"], []]
    assert isinstance(prompt.items[0], Mark)
    assert isinstance(chosen.items[-1], Mark)


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    """Rows of two files, of which some are too long, and those rows."""
    monkeypatch.setattr("oumi_pl.preview.rows.AT_ONCE", 7)
    rows = tiny.conversations(40, longest=20)
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((rows[:25], rows[25:]))]
    data = made(SFTData(files, tokenizer=ByteTokenizer(), max_length=110, overflow="drop"))
    return data, rows, [f"{files[n > 24]}:{n + 1 - 25 * (n > 24)}" for n in range(40)]


def test_rows_keep_their_number_where_some_are_dropped(two_files):
    data, rows, origins = two_files
    found = list(walk(data, "train", lambda row, index: True))
    assert [row.origin for row in found] == origins
    assert [row.number for row in found] == list(range(1, 41))
    kept = [row for row in found if row.example is not None]
    assert [row.example for row in kept] == list(range(len(data.examples("train"))))
    assert 0 < len(kept) < 40
    for row in kept:
        text = data.tokenizer.decode(data.examples("train")[row.example].input_ids)
        assert rows[row.number - 1]["messages"][1]["content"] in text
    assert [row.number for row in examples.numbered(data, "train", [39, 2, 39])] == [39, 2]


def test_dropped_rows_say_why(two_files):
    data, rows, origins = two_files
    gone = examples.dropped(data, "train", 99)
    assert len(gone) == 40 - len(data.examples("train"))
    shown = examples.shown(data, "train", gone[-1], Decoder(data.tokenizer))
    assert shown.facts == [origins[gone[-1].number - 1], "dropped: longer than max_length"]
    text = "".join(piece.text for piece in shown.sections[0].pieces)
    assert rows[gone[-1].number - 1]["messages"][0]["content"] in text
    assert not any(piece.target for piece in shown.sections[0].pieces)


def test_the_longest_come_first(two_files):
    data, _, _ = two_files
    lengths = [len(data.examples("train")[row.example].input_ids) for row in examples.longest(data, "train", 4)]
    assert lengths == sorted(data.lengths("train").tolist(), reverse=True)[:4]


def test_margins_are_shown(tmp_path):
    rows = [row | {"margin": 1.5} for row in tiny.pairs(1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = made(DPOData(str(tmp_path / "rows.jsonl"), tokenizer=ByteTokenizer()))
    (found,) = examples.first(data, "train", 3)
    assert "margin 1.5" in examples.shown(data, "train", found, Decoder(data.tokenizer)).facts
