"""Filters: which rows an expression or a function leaves out, that they are counted, and what mistakes say."""

import json

import pytest

from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source, fingerprint, rows
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.data.where import Where
from oumi_pl.errors import UserError
from oumi_pl.preview.examples import numbered
from oumi_pl.types import Text
from tests.data.test_pretrain import pretrain_data
from tests.data.test_splitting import write

OPTIONS = {"tokenizer": ByteTokenizer(), "template": "chatml", "max_length": 256}
ROW = {"lang": "en", "quality": 3, "text": "Hello there", "meta": {"tags": ["a", "b"]}, "my score": 0.5, "none": None}


@pytest.mark.parametrize(
    ("expression", "is_used"),
    [
        ("lang == 'en' and quality >= 3", True),
        ("lang == 'en' and quality > 3", False),
        ("lang != 'en' or not quality < 3", True),
        ("1 < quality <= 3", True),
        ("lang in ['en', 'de']", True),
        ("lang not in ('en', 'de')", False),
        ("'there' in text", True),
        ("len(text) * 2 - 2 == 20", True),
        ("quality % 2 == 1", True),
        ("-quality < 0", True),
        ("meta['tags'][1] == 'b'", True),
        ("meta['nothing'] == 'b'", False),
        ("'a' in meta['tags']", True),
        ("text.lower().startswith('hello')", True),
        ("`my score` < 1", True),
        ("text != '`'", True),
        ("none is None and lang is not None", True),
        # what is missing is neither greater nor less
        ("none > 1", False),
        ("none <= 1", False),
        ("none == 1", False),
        ("quality", True),
        ("none", False),
    ],
)
def test_an_expression_over_columns(expression, is_used):
    assert Where(expression)(ROW) is is_used


def test_cells_of_csv_files_count_as_what_they_hold(tmp_path):
    (tmp_path / "a.csv").write_text("text,quality,good\na,3,true\nb,12,false\nc,,true\nd,2.5,false\n")

    def texts(where):
        return [row["text"] for _, row in rows(Source(f"{tmp_path}/a.csv", where=where))]

    assert texts("quality >= 3") == ["a", "b"]
    assert texts("quality == 3") == ["a"]
    assert texts("good") == texts("good == True") == ["a", "c"]
    assert texts("quality < 3 or not good") == ["b", "d"]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("lang = 'en'", "where: \"lang = 'en'\" can't be read: "),
        ("lang == 'en", "can't be read: unterminated string"),
        ("__import__('os').system('ls')", "is not available in filters"),
        ("text.__class__ == 1", "'text.__class__' is not available in filters"),
        ("(lambda: 1)()", "is not available in filters"),
        ("[x for x in text]", "is not available in filters"),
        ("text.format(1)", "'text.format(1)' is not available in filters"),
        ("quality ** 9", "is not available in filters"),
        ("`my score` & 1", "'`my score` & 1' is not available in filters"),
        ("lang is 'en'", "`is` compares with None only; use =="),
    ],
)
def test_a_bad_expression_is_one_message_with_the_key(expression, message):
    with pytest.raises(UserError) as error:
        SFTData([Source("a.jsonl"), Source("b.jsonl", where=expression)], **OPTIONS)
    assert str(error.value).startswith("data.train: b.jsonl: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_column_that_no_row_has_is_named_with_the_nearest(tmp_path):
    few = write(tmp_path / "few.jsonl", [{"text": "a"}, {"text": "b", "quality": 3}])
    with pytest.raises(UserError, match=r"few.jsonl: where: no row has a column 'qualty'; did you mean 'quality'"):
        SFTData(Source(few, where="qualty != 3"), **OPTIONS).setup("fit")
    many = write(tmp_path / "many.jsonl", [{"text": "a"}] * 3000)
    read = rows(Source(many, where="lang != 'en'"))
    with pytest.raises(UserError, match="no row has a column 'lang'; known: 'text'"):
        assert sum(1 for _ in read) == 0
    # a column that only some rows have is fine
    assert [row["text"] for _, row in rows(Source(few, where="quality == 3"))] == ["b"]


def test_a_value_that_can_not_be_compared_is_a_bad_row(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "a", "quality": 4}, {"text": "b", "quality": "high"}])
    source = Source(file, where="quality >= 3")
    with pytest.raises(UserError, match=r"a.jsonl:2: where: 'high' is no number \(quality >= 3\)"):
        SFTData(source, **OPTIONS).setup("fit")
    data = SFTData(source, **OPTIONS, bad_rows="drop")
    data.setup("fit")
    assert data.report()["train"]["dropped"] == {"where: 'high' is no number (quality >= 3)": 1}


def messy(n=60):
    return [{"text": f"Text {i}.", "quality": i % 3} for i in range(n)]


def test_rows_that_are_left_out_are_counted_once_also_if_a_fraction_is_held_out(tmp_path):
    data = SFTData(Source(write(tmp_path / "a.jsonl", messy()), where="quality > 0"), 0.3, **OPTIONS)
    data.setup("fit")
    report = data.report()
    assert report["train"]["dropped"] == {"where: quality > 0": 20}
    assert report["validation"]["dropped"] == {}
    assert report["train"]["kept"] + report["validation"]["kept"] == 40
    assert report["train"]["rows"] + report["validation"]["rows"] == 60
    assert [row.example for row in numbered(data, "train", [1, 2])] == [0, 1]


def test_documents_and_samples_are_filtered_too(tmp_path):
    file = write(tmp_path / "a.jsonl", messy())
    data = pretrain_data(Source(file, where="quality > 0"))
    data.setup("fit")
    train = data.report()["train"]
    assert (train["rows"], train["documents"], train["dropped"]) == (60, 40, {"where: quality > 0": 20})
    # `sample` counts rows that are used; a second pass over the source is not counted again
    for seed in (None, 1):
        data = SFTData(Source(file, where="quality > 0", sample=50, sample_seed=seed), **OPTIONS)
        data.setup("fit")
        train = data.report()["train"]
        assert (train["kept"], train["dropped"]) == (50, {"where: quality > 0": 20})


def test_a_filter_is_part_of_what_a_checkpoint_belongs_to(tmp_path):
    file = write(tmp_path / "a.jsonl", messy())
    sources = [Source(file), Source(file, where="quality > 0"), Source(file, where="quality > 1")]
    assert len({fingerprint(source) for source in sources}) == 3
    assert len({*(SFTData(source, **OPTIONS).made_from()[0] for source in sources)}) == 3
    low, high = (Source(file, where=lambda row, least=least: row["quality"] > least) for least in (0, 1))
    assert fingerprint(low) != fingerprint(high)


def good(row):
    return row["quality"] == 2


def test_a_function_filters_and_its_mistakes_name_the_row(tmp_path):
    file = write(tmp_path / "a.jsonl", messy(6))
    named = [row["text"] for _, row in rows(Source(file, where=f"{__name__}.good"))]
    assert named == [row["text"] for _, row in rows(Source(file, where=good))] == ["Text 2.", "Text 5."]
    with pytest.raises(UserError, match=r"a.jsonl:1: where: .*<lambda> raised KeyError: 'x' \(.*test_where.py line"):
        list(rows(Source(file, where=lambda row: row["x"])))
    with pytest.raises(UserError, match=r"a.jsonl:1: where: .*returned None for this row; it returns True or False"):
        list(rows(Source(file, where=lambda row: None)))
    for name, message in (
        ("no_module.keep", "where 'no_module.keep' can't be imported: No module named 'no_module'"),
        ("json.lods", "'json' has no function 'lods'; did you mean 'loads'"),
    ):
        data = SFTData(Source(file, where=name), **OPTIONS)  # nothing is imported before rows are read
        with pytest.raises(UserError, match=message):
            data.make("train")
    with pytest.raises(UserError, match=r"a.jsonl: where is a int"):
        Source(file, where=3)


def test_a_filter_that_leaves_nothing_says_so(tmp_path):
    file = write(tmp_path / "a.jsonl", messy(6))
    with pytest.raises(UserError, match=r"a.jsonl: where: none of 6 rows fits 'quality > 7'"):
        SFTData(Source(file, where="quality > 7"), **OPTIONS).setup("fit")


def long_ones(row):
    return Text(row["text"]) if row["quality"] else None


def test_a_format_that_returns_none_leaves_the_row_out(tmp_path):
    file = write(tmp_path / "a.jsonl", messy(30))
    reason = "the format long_ones returned None"
    data = SFTData(Source(file, format=long_ones), **OPTIONS)
    data.setup("fit")
    assert data.report()["train"]["dropped"] == {reason: 10}
    documents = pretrain_data(Source(file, format=long_ones))
    documents.setup("fit")
    assert documents.report()["train"]["dropped"] == {reason: 10}
    empty = SFTData(Source(file, format=lambda row: [Text(row["text"])] * row["quality"]), **OPTIONS)
    empty.setup("fit")
    train = empty.report()["train"]
    assert (train["kept"], *train["dropped"].values()) == (30, 10)
    assert json.dumps(train)


def test_a_column_that_a_filter_reads_is_not_unread(tmp_path):
    """`label` would stop the run otherwise, as a column with a meaning that the format doesn't read."""
    file = write(tmp_path / "a.jsonl", [{"text": f"Text {i}.", "label": i % 2, "other": 1} for i in range(4)])
    data = SFTData(Source(file, where="label == 1"), **OPTIONS)
    data.setup("fit")
    assert data.report()["train"]["unread_columns"] == ["other"]


def test_the_message_of_a_run_names_the_key(tmp_path):
    file = write(tmp_path / "a.jsonl", messy())
    data = SFTData(Source(file, where="qualty > 1"), **OPTIONS)
    with pytest.raises(UserError, match=r"^data.train: .*a.jsonl: where: no row has a column 'qualty'"):
        data.prepare_data()
