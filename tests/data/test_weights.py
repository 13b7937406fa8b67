"""How much each token counts in the loss: what rows and turns say of it, from the row to the batch."""

import json

import numpy as np
import pytest

from oumi_pl.data.collate import collate
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.formats import FORMATS, find_format
from oumi_pl.data.store import ExampleStore, write_store
from oumi_pl.data.tokenize import Dropped, Tokenize
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.preview import examples as preview
from oumi_pl.preview.pieces import Decoder
from oumi_pl.preview.report import tables
from oumi_pl.types import Example, Text
from tests.data.byte_level import byte_tokenizer, turn
from tests.tiny import data, write_jsonl

PREFIXES = (  # a template without markers
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
REWRITES = (  # a template that writes an answer differently once others follow
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}!{% endif %}{{ m.content }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]!{% endif %}"
)
ALPHABET = "abcdefghijklmnop"


def one(record, template="chatml", **kwargs):
    if isinstance(record, dict):
        record = find_format(record.keys(), FORMATS)(record)
    tokenizer = byte_tokenizer(template)
    (example,) = Tokenize(tokenizer, 1000, **kwargs)([record])
    return tokenizer, example


def weighed(record, template="chatml", **kwargs):
    """The text of each weight: {weight: its characters, in order}."""
    tokenizer, example = one(record, template, **kwargs)
    weights = np.ones(len(example.input_ids)) if example.weights is None else example.weights
    texts = {}
    for token, loss, weight in zip(example.input_ids.tolist(), example.loss_mask, weights.tolist(), strict=True):
        if loss:
            texts.setdefault(weight, []).append(token)
    return {weight: tokenizer.decode(tokens) for weight, tokens in texts.items()}


def asked_twice(**said):
    return {
        "messages": [
            turn("user", "q"),
            turn("assistant", "Lyon", **said),
            turn("user", "s"),
            turn("assistant", "Paris"),
        ]
    }


@pytest.mark.parametrize("said", [{"weight": 0}, {"loss": False}, {"train": False}, {"masked": True}, {"train": []}])
@pytest.mark.parametrize("template", ["chatml", PREFIXES])
def test_a_turn_of_weight_0_carries_no_loss(said, template):
    _, example = one(asked_twice(**said), template)
    assert example.weights is None
    end = "<|im_end|>" if template == "chatml" else "<eos>"
    assert weighed(asked_twice(**said), template) == {1.0: f"Paris{end}"}


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), (PREFIXES, "<eos>"), (REWRITES, "<eos>")])
def test_the_tokens_of_a_turn_have_its_weight(template, end):
    assert weighed(asked_twice(weight=0.25), template) == {0.25: f"Lyon{end}", 1.0: f"Paris{end}"}
    assert weighed(asked_twice(weight=0.25) | {"weight": 2}, template) == {0.5: f"Lyon{end}", 2.0: f"Paris{end}"}
    assert weighed(asked_twice(weight=3), template, train_on="last_turn") == {1.0: f"Paris{end}"}


def test_weights_of_1_are_no_weights():
    for row in (asked_twice(weight=1), asked_twice(loss=True) | {"weight": 1.0}, asked_twice(weight=0)):
        assert one(row)[1].weights is None


def test_a_row_of_weight_0_is_dropped():
    for row in (
        asked_twice() | {"weight": 0},
        {"text": "a", "weight": 0},
        {"prompt": "a", "completion": "b", "weight": 0},
    ):
        assert isinstance(one(row)[1], Dropped)
    assert isinstance(one({"messages": [turn("user", "q"), turn("assistant", "a", weight=0)]})[1], Dropped)


def test_texts_have_the_weight_of_their_row():
    assert weighed(Text("bc", "a", weight=0.5)) == {0.5: "bc<eos>"}
    assert weighed({"text": "abc", "weight": 2}) == {2.0: "bc<eos>"}


@pytest.mark.parametrize("template", ["chatml", PREFIXES, REWRITES])
def test_only_the_spans_of_a_turn_carry_loss(template):
    end = "<|im_end|>" if template == "chatml" else "<eos>"
    spans = {"messages": [turn("user", "q"), turn("assistant", ALPHABET, train=[[2, 4], [6, 9]]), turn("user", "r")]}
    assert weighed(spans, template) == {1.0: "cdghi"}
    spans["messages"] += [turn("assistant", ALPHABET, train=[[14, 16]], weight=2)]  # with what ends the turn
    assert weighed(spans, template) == {1.0: "cdghi", 2.0: f"op{end}"}


def test_spans_that_the_template_changes_are_refused():
    shouting = PREFIXES.replace("m.content", "m.content | upper")
    row = {"messages": [turn("user", "q"), turn("assistant", "a", reasoning_content="b", train=[[0, 1]])]}
    with pytest.raises(UserError, match=r"spans that carry loss can't be found|doesn't write"):
        one(row, shouting)


def test_train_on_all_keeps_the_weights_of_turns():
    row = asked_twice(weight=0)
    whole = weighed(asked_twice(), train_on="all")[1.0]
    assert weighed(row, train_on="all") == {1.0: whole.replace("Lyon<|im_end|>", "")}
    texts = weighed(asked_twice(weight=2) | {"weight": 3}, train_on="all")
    assert texts == {3.0: whole.replace("Lyon<|im_end|>", ""), 6.0: "Lyon<|im_end|>"}
    spans = weighed(asked_twice(train=[[1, 3]]), train_on="all")
    assert spans == {1.0: whole.replace("Lyon<|im_end|>", "yo")}


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>"), (PREFIXES, "<eos>")])
def test_a_user_turn_with_a_weight_carries_loss(template, end):
    row = {
        "messages": [turn("user", "q", train=True), turn("assistant", "a", train=False), turn("user", "r", weight=2)]
    }
    row["messages"] += [turn("assistant", "b")]
    assert weighed(row, template) == {1.0: f"q{end}b{end}", 2.0: f"r{end}"}
    row["messages"][0]["train"] = False
    assert weighed(row, template) == {1.0: f"b{end}", 2.0: f"r{end}"}
    whole = weighed(row, template, train_on="all")
    assert f"q{end}" not in whole[1.0]
    assert whole[2.0] == f"r{end}"


def test_a_users_turn_is_trained_with_the_answer_that_follows_it():
    """Also where each answer has a context of its own: once, and in that of the next answer."""
    row = {
        "messages": [
            turn("user", "one", train=True),
            turn("assistant", "Lyon"),
            turn("user", "two", weight=2.0),
            turn("assistant", "Paris", weight=0.5),
            turn("user", "three", train=True),
        ]
    }
    _, example = one({"messages": row["messages"][:4]}, REWRITES)
    assert len(example.segments) == 2
    actual = weighed({"messages": row["messages"][:4]}, REWRITES)
    assert actual == {1.0: "one<eos>Lyon<eos>", 2.0: "two<eos>", 0.5: "Paris<eos>"}
    with pytest.raises(UserError, match="turn 5, which is to be trained, is in none of them"):
        one(row, REWRITES)
    assert weighed(row, PREFIXES)[1.0] == "one<eos>Lyon<eos>three<eos>"


def test_everything_is_trained_as_one_text_whatever_the_template():
    row = asked_twice(weight=0.5)
    tokenizer, example = one(row, REWRITES, train_on="all")
    assert len(example.segments) == 1
    text = tokenizer.decode(example.input_ids)
    assert text == "[user]q<eos>[assistant]Lyon<eos>[user]s<eos>[assistant]!Paris<eos>"
    assert weighed(row, REWRITES, train_on="all") == {
        1.0: text[1:].replace("Lyon<eos>", ""),
        0.5: "Lyon<eos>",
    }
    first = {"messages": [turn("user", "q", weight=2.0), turn("assistant", "Lyon")]}
    assert weighed(first, REWRITES, train_on="all") == {1.0: "user][assistant]!Lyon<eos>", 2.0: "q<eos>"}
    greeting = {"messages": [turn("assistant", "Hello", weight=2.0), turn("user", "q"), turn("assistant", "Lyon")]}
    assert weighed(greeting, REWRITES, train_on="all")[2.0] == "Hello<eos>"


def test_weights_are_cut_with_their_tokens():
    tokenizer = byte_tokenizer("chatml")
    record = find_format(["messages"])(asked_twice(weight=0.5))
    (whole,) = Tokenize(tokenizer, 1000)([record])
    for length in range(20, len(whole.input_ids) + 1):
        (example,) = Tokenize(tokenizer, length)([record])
        ids, losses = example.input_ids[example.loss_mask].tolist(), example.weights[example.loss_mask].tolist()
        end = tokenizer("<|im_end|>")["input_ids"]
        lyon, paris = (tokenizer(city)["input_ids"] + end for city in ("Lyon", "Paris"))
        assert ids == (lyon + paris)[: len(ids)]
        assert losses == ([0.5] * len(lyon) + [1.0] * len(paris))[: len(ids)]


# ---- pairs


def test_pairs_take_weights_of_0_and_1(tmp_path):
    q, a = turn("user", "q"), turn("assistant", "a")
    rows = [{"prompt": [q], "chosen": [turn("assistant", "x", weight=0), q, a], "rejected": [turn("assistant", "b")]}]
    pairs = DPOData(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer=ByteTokenizer(), template="chatml")
    pairs.setup("fit")
    (example,) = pairs.examples("train")
    decoded = pairs.tokenizer.decode(example.input_ids[example.loss_mask])
    assert decoded == "a<|im_end|>b<|im_end|>"
    rows[0]["chosen"][0]["weight"] = 0.5
    pairs = DPOData(write_jsonl(tmp_path / "q.jsonl", rows), tokenizer=ByteTokenizer(), template="chatml")
    with pytest.raises(UserError, match=r"q.jsonl:1: a turn has the weight 0.5, and pairs count whole responses"):
        pairs.setup("fit")


# ---- store and batch


def example(weights=None, tokens=4):
    mask = np.arange(tokens) > 0
    return Example(np.arange(tokens, dtype=np.int32), mask, weights=weights)


def test_a_store_keeps_weights(tmp_path):
    some = np.array([0, 2, 0.5, 1], dtype=np.float32)
    plain = write_store(tmp_path / "plain", [example(), example()], {})
    assert plain.weights is None
    assert plain.target_weights is None
    assert plain[1].weights is None
    assert not (tmp_path / "plain" / "weights.bin").exists()
    write_store(tmp_path / "weighed", [example(), example(tokens=2), example(some), example(tokens=3)], {})
    store = ExampleStore(tmp_path / "weighed")
    assert [store[i].weights.tolist() for i in range(4)] == [[1] * 4, [1] * 2, some.tolist(), [1] * 3]
    assert store.target_weights.tolist() == [3, 1, 3.5, 2]
    assert store.targets.tolist() == [3, 1, 3, 2]


@pytest.mark.parametrize("wrong", [np.ones(3, dtype=np.float32), np.array([0, 1, 0, 1]), np.array([0, 1, np.nan, 1])])
def test_a_store_refuses_weights_that_fit_no_tokens(tmp_path, wrong):
    with pytest.raises(ValueError, match="weight"):
        write_store(tmp_path / "wrong", [example(wrong)], {})


def test_a_batch_carries_weights_only_if_some_are_not_1():
    some = np.array([0, 2, 0.5, 1], dtype=np.float32)
    batch = collate([([0], [example()]), ([1, 2], [example(some), example(tokens=2)])], 0)
    assert batch["weights"].tolist() == [1, 1, 1, 2, 0.5, 1, 1]
    assert batch["weight"] == 7.5
    assert len(batch["weights"]) == len(batch["targets"])
    assert not {"weights", "weight"} & collate([([0], [example()]), ([1], [example(np.ones(4))])], 0).keys()
    assert "weights" not in collate([], 0)


def test_a_data_module_knows_the_weight_of_each_update(tmp_path):
    rows = [asked_twice(weight=i / 4) | {"weight": 1 + i % 2} for i in range(7)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for options in ({"batch_size": 2}, {"batch_size": 1, "packing": True, "max_length": 256}):
        module = data(tmp_path, template="chatml", **options)
        module.sources["train"] = path
        module.micro_batches = 2
        module.setup("fit")
        batches = list(module.train_dataloader())
        for first in range(0, len(batches), 2):
            update = batches[first : first + 2]
            total = sum(batch.get("weight", len(batch["targets"])) for batch in update)
            assert {batch["update"].weight for batch in update} == {total}
            assert {batch["update"].targets for batch in update} == {sum(len(batch["targets"]) for batch in update)}
    plain = data(tmp_path)
    assert next(iter(plain.train_dataloader()))["update"].weight is None


def test_every_spelling_gives_the_same_tokens(tmp_path):
    spellings = [{"weight": 0.0}, {"loss": 0}, {"train": False}, {"masked": 1}, {"weight": 5, "loss": False}]
    path = write_jsonl(tmp_path / "rows.jsonl", [asked_twice(**said) for said in spellings])
    module = data(tmp_path, template="chatml")
    module.sources["train"] = path
    module.setup("fit")
    shown = {json.dumps([e.input_ids.tolist(), e.loss_mask.tolist()]) for e in module.examples("train")}
    assert len(shown) == 1


def test_the_preview_shows_weights(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [asked_twice(weight=0.25), asked_twice()])
    module = data(tmp_path, template="chatml")
    module.sources["train"] = path
    module.setup("fit")
    decoder = Decoder(module.tokenizer)
    facts = [preview.shown(module, "train", row, decoder).facts for row in preview.first(module, "train", 2)]
    assert "with weights 0.25, 1" in facts[0]
    assert not any("with weights" in fact for fact in facts[1])
    lyon, paris = (len(module.tokenizer(f"{city}<|im_end|>")["input_ids"]) for city in ("Lyon", "Paris"))
    assert module.report()["train"]["target_weight"] == 1.25 * lyon + 2 * paris
    (table,) = tables(module)
    assert ["their weight in the loss", f"{1.25 * lyon + 2 * paris:,.2f}"] in table.rows
