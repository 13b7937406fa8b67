"""Rows are drawn by weights of a column or its classes, and ordered by a column."""

from collections import Counter

import numpy as np
import pytest
import yaml

from oumi_pl.callbacks.start import data_lines
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.draws import Draws, drawn
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests import tiny
from tests.data.corpora import as_saved
from tests.data.test_splitting import turns
from tests.tiny import write_jsonl

OPTIONS = {"tokenizer": ByteTokenizer(), "template": "chatml", "max_length": 256, "seed": 0}
LANGUAGES = ("de", "en", "en", "en")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """40 rows: 10 German, 30 English; `level` is a permutation of 0 to 19, each twice; `quality` 0 to 3."""
    rows = [
        {
            "messages": turns(f"Question {i}?", "Yes." * (1 + i % 7)),
            "lang": LANGUAGES[i % 4],
            "level": i * 7 % 20,
            "quality": i % 4,
        }
        for i in range(40)
    ]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


def sft(train, **kwargs):
    data = SFTData(train, **(OPTIONS | kwargs))
    data.setup("fit")
    return data


def column(data, name, epoch=0):
    """The column of the rows of an epoch, in order."""
    values = data.column_values(name)
    return [values[i] for i in data.plan(epoch).example_ids.tolist()]


@pytest.mark.parametrize("packing", [False, True])
def test_rows_come_in_the_order_of_a_column(rows, packing):
    data = sft(rows, order_by="level", packing=packing)
    first, second = column(data, "level"), column(data, "level", 1)
    assert first == second == sorted(first)
    assert len(first) == 40
    ids = [data.plan(epoch).example_ids.tolist() for epoch in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2], "equal values are shuffled, alike after a resume"
    assert data.report()["train"]["order"] == "by level, from 0 to 19"
    assert ("order", "by level, from 0 to 19") in list(data_lines(data, data.report()))
    if packing:  # a pack holds neighbours
        sizes = np.diff(data.plan(0).row_starts)
        assert sizes.max() > 1
        assert data.lengths("train")[data.plan(0).row(0)].sum() <= data.max_length
    descending = column(sft(rows, order_by="-level"), "level")
    assert descending == sorted(descending, reverse=True)


def test_an_order_is_resumed_and_the_same_for_any_ranks(rows, tmp_path):
    def batches(data, layout, state=None):
        data.micro_batches = layout
        loader = data.make_train_loader()
        if state:
            loader.load_state_dict(state)
        found = []
        for batch in loader:
            found.append(batch["sample_ids"])
            if len(found) == 4 and state is None:
                state = as_saved(loader.state_dict(), tmp_path / "state")
        return found, state

    whole, state = batches(sft(rows, order_by="level", batch_size=4), 1)
    rest, _ = batches(sft(rows, order_by="level", batch_size=4), 1, state)
    assert rest == whole[4:]
    halves, _ = batches(sft(rows, order_by="level", batch_size=2), 2)
    assert [i for batch in halves for i in batch] == [i for batch in whole for i in batch]
    ordered, shuffled = sft(rows, order_by="level"), sft(rows)
    with pytest.raises(UserError, match=r"data\.train: the rows, how they are tokenized, or their shares have changed"):
        ordered.refuse_changed(shuffled.made_from(), ordered.made_from())


@pytest.mark.parametrize(
    ("sample_by", "shares"),
    [({"lang": {"de": 0.7, "en": 0.3}}, {"de": 28, "en": 12}), ({"lang": "balanced"}, {"de": 20, "en": 20})],
)
def test_classes_have_their_shares_in_every_epoch(rows, sample_by, shares):
    data = sft(rows, sample_by=sample_by)
    for epoch in range(3):
        assert Counter(column(data, "lang", epoch)) == shares
        times = np.bincount(data.plan(epoch).example_ids, minlength=40)
        of_german = times[[value == "de" for value in data.column_values("lang")]]
        assert of_german.max() - of_german.min() <= 1, "rows of a class are drawn equally often"
    assert data.plan(0).example_ids.tolist() != data.plan(1).example_ids.tolist()
    assert data.report()["train"]["drawn"] == {f"lang {name}": n for name, n in shares.items()}
    assert any(name == "drawn" and "lang de" in text for name, text in data_lines(data, data.report()))


def test_rows_are_drawn_in_proportion_to_a_number(rows):
    data = sft(rows, sample_by="quality")
    times = sum(np.bincount(data.plan(epoch).example_ids, minlength=40) for epoch in range(60))
    quality = np.array(data.column_values("quality"))
    # 60 x 40 draws, of which a row has quality / 60
    assert np.abs(times - 40 * quality).max() <= 8
    assert times[quality == 0].sum() == 0
    assert sum(data.report()["train"]["drawn"].values()) == 40


def test_systematic_draws_are_exact_and_unbiased():
    """Compared with the expectation of each row; a planted fault, drawing independently, is far off."""
    rng = np.random.default_rng(1)
    weights = rng.random(50)
    expected = 80 * weights / weights.sum()
    classes = np.zeros(50, dtype=np.int64)
    epochs = [np.bincount(drawn([50], [80], (weights, classes), 3, e, together=True), minlength=50) for e in range(400)]
    assert all(((times == np.floor(expected)) | (times == np.ceil(expected))).all() for times in epochs)
    assert np.abs(np.mean(epochs, 0) - expected).max() < 0.1
    independent = np.bincount(rng.choice(50, 80, p=weights / weights.sum()), minlength=50)
    assert not ((independent == np.floor(expected)) | (independent == np.ceil(expected))).all()


def test_sources_keep_their_shares_and_classes_theirs_within_them(rows):
    sources = [Source(rows, weight=3.0, name="a"), Source(rows, weight=1.0, name="b", where="level < 10")]
    data = sft(sources, sample_by={"lang": "balanced"})
    first = len(data.stores("train")[0])
    ids, values = data.plan(0).example_ids, data.column_values("lang")
    total = len(ids)
    assert [int((ids < first).sum()), int((ids >= first).sum())] == [total * 3 // 4, total - total * 3 // 4]
    assert abs(Counter(values[i] for i in ids if i < first)["de"] - total * 3 / 8) <= 1


def test_columns_that_rows_are_drawn_by_are_no_part_of_what_is_trained(rows):
    plain, ordered = sft(rows), sft(rows, order_by="level", sample_by="quality")
    assert plain.report()["train"]["unread_columns"] == ["lang", "level", "quality"]
    assert ordered.report()["train"]["unread_columns"] == ["lang"]
    assert ordered.batch("train", [0])["fields"] == {}
    assert np.array_equal(plain.stores("train")[0].record_keys, ordered.stores("train")[0].record_keys)


def test_pairs_and_prompts_are_ordered_too(tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [p | {"level": -i} for i, p in enumerate(tiny.pairs(12))])
    data = DPOData(pairs, **OPTIONS, order_by="level")
    data.setup("fit")
    assert column(data, "level") == list(range(-11, 1))
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Q{i}", "level": str(-i), "k": i % 2} for i in range(12)])
    data = RolloutData(prompts, **OPTIONS, reward=len, order_by="-level", sample_by={"k": {1: 1, 0: 0}})
    data.all_prompts("train")
    assert [int(value) for value in column(data, "level")] == [-1, -1, -3, -3, -5, -5, -7, -7, -9, -9, -11, -11]
    assert data.report()["train"]["drawn"] == {"k 1": 12}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"order_by": "lvel"}, r"no column 'lvel'; did you mean 'level'"),
        ({"order_by": "messages"}, r"'messages' is \[.*has to be a number or a text"),
        ({"sample_by": "lang"}, r"'de' in the column 'lang' is no number .* \{lang: balanced\}"),
        ({"sample_by": {"lang": {"en": 1}}}, r"10 rows have lang 'de', which has no share"),
        ({"sample_by": {"lang": {"en": 1, "de": 1, "fr": 1}}}, r"no row has lang 'fr'"),
        ({"sample_by": {"lang": {"en": -1}}}, r"the share of 'en' is -1"),
        ({"sample_by": {"lang": "equal"}}, r"lang is 'equal'; name the share of each class"),
        ({"sample_by": {"lang": "balanced", "level": "balanced"}}, r"names 2 columns"),
    ],
)
def test_mistakes_are_one_message(rows, kwargs, message):
    with pytest.raises(UserError, match=message):
        sft(rows, **kwargs).plan(0)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("sample_by", [{"lang": {"de": 0.7, "en": 0.3}}, "quality"])
def test_rows_that_are_drawn_by_one_column_come_in_the_order_of_another(rows, sample_by, packing):
    both, alone = (sft(rows, sample_by=sample_by, order_by=order, packing=packing) for order in ("-level", None))
    for epoch in (0, 1):
        levels = column(both, "level", epoch)
        assert levels == sorted(levels, reverse=True)
        times = [np.bincount(data.plan(epoch).example_ids, minlength=40).tolist() for data in (both, alone)]
        assert times[0] == times[1], "each row is drawn as often as without an order"
        assert max(times[0]) > 1
    report = both.report()["train"]
    assert report["drawn"] == alone.report()["train"]["drawn"]
    assert report["order"] == f"by level, from {column(both, 'level')[0]} to {column(both, 'level')[-1]}"
    assert both.made_from() != alone.made_from()


FAULTS = {
    "each row once": lambda sizes, counts, *args, **kwargs: np.arange(sum(sizes)),
    "in the order in which they are drawn": None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_draws_and_orders_would_be_caught(rows, monkeypatch, fault):
    if FAULTS[fault] is None:
        monkeypatch.setattr(Draws, "ranks", lambda self, values: np.zeros(len(values), dtype=np.int64))
    else:
        monkeypatch.setattr("oumi_pl.data.examples.drawn", FAULTS[fault])
    with pytest.raises(AssertionError):
        test_rows_that_are_drawn_by_one_column_come_in_the_order_of_another(rows, "quality", packing=False)


def test_rows_may_be_drawn_and_ordered_by_the_same_column(rows):
    languages = column(sft(rows, sample_by={"lang": "balanced"}, order_by="lang"), "lang")
    assert languages == ["de"] * 20 + ["en"] * 20


def shares_of(text, values):
    """The weight of each row by `sample_by` in YAML."""
    weights, _ = Draws(yaml.safe_load(text), None).weights(values, [len(values)], apart=False)
    return (weights / weights.sum()).round(6).tolist()


def test_classes_that_yaml_reads_as_something_else_are_found_as_the_rows_write_them():
    assert shares_of("{lang: {no: 0.2, sv: 0.8}}", ["no", "sv"]) == [0.2, 0.8]
    assert shares_of("{lang: {NO: 0.2, yes: 0.8}}", ["No", "yes"]) == [0.2, 0.8]
    assert shares_of("{passed: {no: 0.2, true: 0.8}}", [False, True]) == [0.2, 0.8]
    assert shares_of("{passed: {'true': 0.2, 'no': 0.8}}", [True, "no"]) == [0.2, 0.8]
    assert shares_of("{level: {1: 0.2, 2: 0.8}}", ["1", 2]) == [0.2, 0.8]
    assert shares_of("{day: {2024-01-31: 0.2, x: 0.8}}", ["2024-01-31", "x"]) == [0.2, 0.8]
    assert shares_of("{at: {2024-01-31T08:30:00: 0.2, x: 0.8}}", ["2024-01-31T08:30:00", "x"]) == [0.2, 0.8]
    assert Draws({"lang": {False: 1, "sv": 1.0}}, None).identity == ['sample_by: {"lang": {"false": 1, "sv": 1.0}}']


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("{lang: {no: 1}}", ["no", "off"], r"YAML reads no and off as false, .* in quotes, as 'no'"),
        ("{lang: {sv: 1}}", ["no", "sv"], r"1 rows have lang 'no', which has no share.* add it in quotes"),
        ("{lang: {no: 1}}", ["sv"], r"1 rows have lang 'sv', which has no share"),
        (
            "{lang: {no: 0.3, 'false': 0.2}}",
            ["no", "false"],
            r"lang has 2 shares for the class 'false'.* reads no and off as false",
        ),
        ("{level: {1: 0.3, '1': 0.2}}", [1, "1"], r"level has 2 shares for the class '1'$"),
        ("{on: balanced}", ["a"], r"YAML reads the column's name as true; put it in quotes"),
    ],
)
def test_classes_that_yaml_makes_ambiguous_are_one_message(text, values, message):
    with pytest.raises(UserError, match=message):
        shares_of(text, values)


def test_numbers_and_texts_are_not_ordered_together():
    assert Draws(None, "x").ranks(["10", "9", 9, 2.5]).tolist() == [2, 1, 1, 0]
    assert Draws(None, "-x").ranks(["2024-01-02", "2023-12-31"]).tolist() == [0, 1]
    with pytest.raises(UserError, match=r"data\.order_by: the column 'x' holds both numbers and text"):
        Draws(None, "x").ranks([1, "easy"])
