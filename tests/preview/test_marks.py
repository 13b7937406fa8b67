"""What a preview marks is what is trained: the targets of the batches that the training loader hands out."""

import json

import numpy as np
import pytest

from oumi_pl.data.dpo import DPOData
from oumi_pl.data.packed_chat import PackedChatData
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.preview import examples, stream
from oumi_pl.preview.examples import walk
from oumi_pl.preview.pieces import Decoder
from oumi_pl.preview.shown import Mark
from oumi_pl.types import Example, Segment
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


SETTINGS = [
    {},
    {"max_length": 60},
    {"max_length": 60, "overflow": "keep_start"},
    {"train_on": "all"},
    {"packing": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sft(tmp_path, settings):
    data = made(tiny.data(tmp_path, batch_size=3, **settings))
    shown = everything(data)
    for batch in data.train_dataloader():
        predictors, owners, start = batch["predictors"].numpy(), batch["target_segments"].numpy(), 0
        for i, (number, segment) in enumerate(zip(batch["sample_ids"], batch["segments"], strict=True)):
            ids, marked = tokens(shown[number].sections[0])
            assert ids.tolist() == batch["input_ids"][0, start : start + segment.length].tolist()
            # what is marked is what the hidden states before it are trained to predict, and nothing else is
            assert (np.flatnonzero(marked) + start - 1).tolist() == predictors[owners == i].tolist()
            assert ids[marked].tolist() == batch["targets"].numpy()[owners == i].tolist()
            start += segment.length


def as_the_model_reads_it(batch, index):
    """The path of a segment, token by token, and which of its tokens are targets of it."""
    starts = np.cumsum([0, *(segment.length for segment in batch["segments"])])

    def path(i):
        length, parent, shared = batch["segments"][i]
        before = path(parent)[:shared] if parent >= 0 else []
        return [*before, *range(starts[i], starts[i] + length)]

    positions = path(index)
    own = batch["target_segments"] == index
    marked = np.isin(positions, batch["predictors"][own].numpy())
    return batch["input_ids"][0, positions].numpy(), np.concatenate([[False], marked[:-1]]), batch["targets"][own]


@pytest.mark.parametrize("settings", [{}, {"max_length": 70}, {"packing": True}], ids=str)
def test_pairs(tmp_path, settings):
    data = made(tiny.dpo_data(tmp_path, batch_size=3, **settings))
    shown = everything(data)
    for batch in data.train_dataloader():
        for pair, number in enumerate(batch["sample_ids"]):
            (prompt, unmarked), *responses = [tokens(section) for section in shown[number].sections]
            assert not unmarked.any()
            for branch, (ids, marked) in enumerate(responses):
                path, predicted, targets = as_the_model_reads_it(batch, 2 * pair + branch)
                assert [*prompt, *ids] == path.tolist()
                assert [*unmarked, *marked] == predicted.tolist()
                assert ids[marked].tolist() == targets.tolist()
        whole = [
            ids for number in batch["sample_ids"] for section in shown[number].sections for ids in tokens(section)[0]
        ]
        assert whole == batch["input_ids"][0].tolist()


class Trees(SFTData):
    """A conversation becomes a tree: two other answers, and a continuation of the first of these."""

    branching = True
    segment_names = ("asked", "other")

    def encode(self, records):
        examples = []
        for example in super().encode(records):
            ids, first = example.input_ids, int(example.loss_mask.argmax())
            segments = (Segment(len(ids)), Segment(3, 0, first), Segment(4, 0, first + 1), Segment(2, 1, first + 2))
            mask = np.concatenate([example.loss_mask, [True] * 3, [False, True, True, True], [True, False]])
            examples.append(Example(np.concatenate([ids, np.arange(20, 29)]), mask, segments, {"score": first / 2}))
        return examples


def test_trees(tmp_path):
    """What all segments share is shown once, then each segment; the path of each is marked as it is trained."""
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(7))
    data = made(Trees(rows, tokenizer=ByteTokenizer(), max_length=512, batch_size=3, seed=0))
    shown = everything(data)
    for batch in data.train_dataloader():
        for i, number in enumerate(batch["sample_ids"]):
            (prompt, _), asked, *others = [tokens(section) for section in shown[number].sections]
            first = len(prompt)
            titles = [section.title for section in shown[number].sections]
            assert titles == [
                "prompt, the same for all 4",
                f"asked ({len(asked[0]):,} tokens)",
                "other (3 tokens)",
                f"segment 3 (4 tokens, after {first + 1:,} tokens of segment 1)",
                f"segment 4 (2 tokens, after {first + 2:,} tokens of segment 2)",
            ]
            assert f"score {first / 2:g}" in shown[number].facts
            for branch, (ids, marked) in enumerate([asked, *others]):
                path, predicted, targets = as_the_model_reads_it(batch, 4 * i + branch)
                assert ids.tolist() == path[-len(ids) :].tolist()
                assert marked.tolist() == predicted[-len(ids) :].tolist()
                assert ids[marked].tolist() == targets.tolist()


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
        assert inputs == batch["input_ids"][0].tolist()
        assert marked == batch["targets"].tolist()
        flags = [piece.target for piece in pieces if not piece.label_only for _ in piece.ids]
        ends = np.cumsum([segment.length for segment in batch["segments"]])
        within = batch["predictors"][~np.isin(batch["predictors"] + 1, ends)]  # the others predict a label beyond
        assert np.flatnonzero(flags).tolist() == (within + 1).tolist()
        apart = [item for item in example.sections[0].items if isinstance(item, Mark) and item.text == stream.APART]
        assert len(apart) == len(batch["segments"]) - 1


def test_held_out_documents_are_marked_as_they_are_scored(tmp_path):
    file = documents(tmp_path)
    data = made(PretrainData(file, file, tokenizer=ByteTokenizer(), max_length=32, eval_stride=20, eval_batch_size=1))
    shown = stream.rows(data, "validation", Decoder(data.tokenizer), 99, None)
    marked = [[i for p in s.sections[0].pieces if p.target for i in p.ids] for s in shown]
    scored = [batch["targets"].tolist() for batch in data.val_dataloader()]
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
    (actual,) = examples.cut(data, "train", 1)
    prompt, chosen, rejected = examples.shown(data, "train", actual, Decoder(data.tokenizer)).sections
    marks = [[i.text for i in s.items if isinstance(i, Mark)] for s in (prompt, chosen, rejected)]
    # 40 + 61 tokens with EOS into 50: the prompt keeps its last 25, the chosen response its first 25
    assert marks == [["✂ 15 tokens cut off here"], ["✂ 36 tokens cut off here"], []]
    assert isinstance(prompt.items[0], Mark)
    assert isinstance(chosen.items[-1], Mark)


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    """Rows of two files, of which some are too long, and those rows."""
    monkeypatch.setattr("oumi_pl.preview.examples.AT_ONCE", 7)
    rows = tiny.conversations(40, longest=20)
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((rows[:25], rows[25:]))]
    data = made(SFTData(files, tokenizer=ByteTokenizer(), max_length=110, overflow="drop"))
    return data, rows, [f"{files[n > 24]}:{n + 1 - 25 * (n > 24)}" for n in range(40)]


def test_rows_keep_their_number_where_some_are_dropped(two_files):
    data, rows, origins = two_files
    actual = list(walk(data, "train", lambda row, index: True))
    assert [row.origin for row in actual] == origins
    assert [row.number for row in actual] == list(range(1, 41))
    kept = [row for row in actual if row.example is not None]
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
    (actual,) = examples.first(data, "train", 3)
    assert "margin 1.5" in examples.shown(data, "train", actual, Decoder(data.tokenizer)).facts
