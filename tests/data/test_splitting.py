"""Holding out a fraction of the rows: no held-out prompt is also a training prompt."""

import json
import random

import pytest

from oumi_pl.data.dpo import DPOData
from oumi_pl.data.kto import KTOData
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.splitting import Side, is_held_out
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Preference, Text
from tests.data.test_pretrain import pretrain_data


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def messy(row_of, unique=600, repeated=400):
    """1,000 shuffled rows with ids; 400 of them repeat the content of another row."""
    rng = random.Random(0)
    contents = [*range(unique), *rng.choices(range(unique), k=repeated)]
    rng.shuffle(contents)
    return [row_of(content) | {"id": number} for number, content in enumerate(contents)]


SHAPES = {
    "sft": (SFTData, lambda i: {"messages": turns(f"Question {i}?", f"Answer {i}.")}),
    "other answers": (SFTData, lambda i: {"prompt": f"Question {i}?", "completion": f"{i} {random.random()}"}),
    "dpo": (DPOData, lambda i: {"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."}),
    "kto": (KTOData, lambda i: {"prompt": f"Question {i}?", "completion": f"Answer {i}.", "label": True}),
}  # fmt: skip


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("name", SHAPES)
def test_repeated_rows_are_on_one_side(tmp_path, name):
    kind, row_of = SHAPES[name]
    file = write(tmp_path / "rows.jsonl", messy(row_of))
    data = kind(file, 0.1, tokenizer=ByteTokenizer(), template="chatml", max_length=256)
    prompts = {split: {tuple(ids) for ids, _ in data.prompts(split)} for split in ("train", "validation")}
    assert 40 <= len(prompts["validation"]) <= 80  # a tenth of the 600
    assert len(prompts["train"]) + len(prompts["validation"]) == 600
    assert not prompts["train"] & prompts["validation"]


def test_prompts_of_online_training_are_split_too(tmp_path):
    file = write(tmp_path / "rows.jsonl", messy(lambda i: {"prompt": f"Question {i}?", "answer": i}))
    data = RolloutData(file, 0.1, reward=len, tokenizer=ByteTokenizer(), template="chatml", max_length=256)
    asked = [{prompt.row["prompt"] for prompt in data.all_prompts(split)} for split in ("train", "validation")]
    assert len(asked[0]) + len(asked[1]) == 600
    assert not asked[0] & asked[1]


def test_repeated_documents_are_on_one_side(tmp_path):
    file = write(tmp_path / "rows.jsonl", messy(lambda i: {"text": f"Document number {i} says so."}))
    data = pretrain_data(file, validation=0.1)
    texts = [set(part.texts()) for split in ("train", "validation") for part in data.parts(split)]
    assert len(texts[0]) + len(texts[1]) == 600
    assert not texts[0] & texts[1]


def test_a_group_stays_together(tmp_path):
    rows = [{"messages": turns(f"Question {i}?", "Yes."), "customer": i % 50} for i in range(500)]
    data = SFTData(
        write(tmp_path / "rows.jsonl", rows), 0.2, group="customer", tokenizer=ByteTokenizer(), template="chatml"
    )
    numbers = {split: {int(answer[9:-1]) % 50 for answer in asked(data, split)} for split in ("train", "validation")}
    assert len(numbers["train"]) + len(numbers["validation"]) == 50
    assert not numbers["train"] & numbers["validation"]
    assert 4 <= len(numbers["validation"]) <= 18


def asked(data, split):
    return [record.messages[0]["content"] for _, record in data.records(split)]


def test_mistakes_are_refused_with_the_key(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"messages": turns("a", "b"), "customer": 1}])
    options = {"tokenizer": ByteTokenizer(), "template": "chatml"}
    with pytest.raises(UserError, match=r"rows.jsonl:1: data.group: this row has no column 'costumer'.*'customer'"):
        SFTData(file, 0.5, group="costumer", **options).examples("train")
    with pytest.raises(UserError, match=r"data\.group keeps rows together when a fraction is held out"):
        SFTData(file, file, group="customer", **options)


def test_bad_rows_are_counted_on_one_side(tmp_path):
    rows = [{"messages": [{"role": "nobody", "content": f"{i}"}]} for i in range(60)]
    rows += [{"messages": turns(f"Question {i}?", "Yes.")} for i in range(60)]
    data = SFTData(
        write(tmp_path / "rows.jsonl", rows), 0.5, bad_rows="drop", tokenizer=ByteTokenizer(), template="chatml"
    )
    read = [data.stores(split)[0].report["rows"] for split in ("train", "validation")]
    assert sum(read) == 120
    assert min(read) > 30


def test_the_held_out_share_is_stable():
    held = [is_held_out(f"text {i}", 0.05) for i in range(20_000)]
    assert 0.045 < sum(held) / len(held) < 0.055
    assert all(is_held_out(f"text {i}", 0.1) for i in range(20_000) if held[i])
    # the very rows must not change between versions, or a resumed run would validate on what it trained on
    assert [i for i in range(20_000) if held[i]][:4] == PINNED
    assert is_held_out("Two  words", 0.5) == is_held_out("two words ", 0.5)


PINNED = [22, 31, 50, 77]


def test_each_row_is_on_exactly_one_side():
    sides = [Side(0.3, is_held_out=value) for value in (True, False)]
    records = [Text(f"document {i}") for i in range(100)]
    assert all(sides[0]({}, record) != sides[1]({}, record) for record in records)


def test_the_split_key_is_the_prompt():
    conversation = Conversation(tuple(turns("Why?", "Because.")))
    other = Conversation(tuple(turns("Why?", "No idea.")))
    assert conversation.split_key() == other.split_key() == Preference(conversation, other).split_key()
    assert Text("one", prompt="p").split_key() == Text("two", prompt="p").split_key()
    assert Text("one").split_key() != Text("two").split_key()
    # without a prompt, the answer
    alone = [Conversation(({"role": "assistant", "content": text},)).split_key() for text in "ab"]
    assert alone[0] != alone[1]
