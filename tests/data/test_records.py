"""Columns that no format reads, labels, media, and rows that can't be used."""

import json

import pytest

from oumi_pl.data.feedback import FEEDBACK_FORMATS
from oumi_pl.data.records import BadRows, RecordReader
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenize import Dropped
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.preview import examples as preview
from oumi_pl.preview.report import tables
from oumi_pl.types import BadRow, Conversation, Feedback
from tests.tiny import data, write_jsonl

Q, A = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CHAT = {"messages": [Q, A]}
NAMELESS = {"messages": [Q, {"role": "asistant", "content": "4"}]}


def reader(tmp_path, *rows, **options):
    return RecordReader(Source(write_jsonl(tmp_path / "rows.jsonl", rows), **options))


def records(tmp_path, *rows, **options):
    return [record for _, record in reader(tmp_path, *rows, **options).records()]


def sft(tmp_path, *rows, source=None, **options):
    """A data module of some rows; texts are lines that are no JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    module = data(tmp_path, template="chatml", **options)
    module.sources["train"] = Source(str(tmp_path / "rows.jsonl"), **(source or {}))
    return module


# ---- columns


def test_columns_that_are_not_read_are_named_once(tmp_path):
    module = sft(tmp_path, CHAT | {"id": 1, "source": "web"}, CHAT | {"id": 2, "url": None}, CHAT)
    module.setup("fit")
    assert module.report()["train"]["unread_columns"] == ["id", "source", "url"]
    (table,) = tables(module)
    assert ["columns that no format reads", "id, source, url"] in table.rows


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("history", [["a", "b"]]),
        ("context", "A text."),
        ("input", "A text."),
        ("loss", False),
        ("reasoning", "2 and 2."),
        ("label", False),
        ("label", 0),
        ("kto_tag", True),
        ("images", ["cat.png"]),
        ("image", {"bytes": "", "path": "cat.png"}),
        ("audios", ["a.mp3"]),
        ("videos", ["a.mp4"]),
    ],
)
def test_columns_that_carry_meaning_stop_the_run_unless_they_are_ignored(tmp_path, name, value):
    with pytest.raises(UserError, match=rf"rows.jsonl:2: column '{name}'.*`ignore: \[{name}\]`"):
        records(tmp_path, CHAT, CHAT | {name: value})
    assert records(tmp_path, CHAT, CHAT | {name: value}, ignore=[name]) == [Conversation((Q, A))] * 2
    for nothing in (None, "", [], [None], float("nan")):
        assert records(tmp_path, CHAT | {name: nothing}) == [Conversation((Q, A))]


def test_an_ignored_column_is_not_read_either(tmp_path):
    row = CHAT | {"system": "s", "tools": [{"name": "f"}]}
    assert records(tmp_path, row)[0].messages[0]["role"] == "system"
    assert records(tmp_path, row, ignore=["system", "tools"]) == [Conversation((Q, A))]


def test_a_weight_beside_a_pair_is_refused(tmp_path):
    from oumi_pl.data.preferences import PREFERENCE_FORMATS

    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "weight": 2}])
    with pytest.raises(UserError, match="column 'weight' isn't read by the format prompt_preference"):
        list(RecordReader(Source(path), PREFERENCE_FORMATS).records())


def test_columns_of_a_users_format_are_his_own(tmp_path, monkeypatch):
    (tmp_path / "own_format_for_test.py").write_text(
        "from oumi_pl.data.formats import question_answer\ndef own(row):\n    return question_answer(row)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    row = {"question": "2+2?", "answer": "4", "label": True, "context": "c"}
    read = reader(tmp_path, row, format="own_format_for_test.own")
    assert [record for _, record in read.records()] == [Conversation((Q, A), prompt_messages=1)]
    assert not read.unread


# ---- labels


@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize(("good", "bad"), [(True, False), (1, 0), ("true", "False"), ("good", "bad"), (1.0, -1)])
def test_keep_good_uses_the_rows_with_good_answers(tmp_path, name, good, bad):
    rows = [CHAT | {name: bad}, CHAT | {name: good}]
    assert records(tmp_path, *rows, label="keep_good") == [Dropped("label: not good"), Conversation((Q, A))]
    module = sft(tmp_path, *rows, source={"label": "keep_good"})
    module.setup("fit")
    report = module.report()["train"]
    assert (report["rows"], report["kept"], report["dropped"]) == (2, 1, {"label: not good": 1})
    assert "unread_columns" not in report


def test_keep_good_needs_labels(tmp_path):
    with pytest.raises(UserError, match="needs a column 'label', and this row has none"):
        records(tmp_path, CHAT, label="keep_good")
    with pytest.raises(UserError, match="column 'label' holds 'maybe'; label: keep_good reads true and false"):
        records(tmp_path, CHAT | {"label": "maybe"}, label="keep_good")


def test_a_label_names_the_option_that_uses_it(tmp_path):
    with pytest.raises(UserError, match=r"column 'label' .*`label: keep_good`.*`ignore: \[label\]`"):
        records(tmp_path, CHAT | {"label": False})


# ---- media


@pytest.mark.parametrize(("name", "mark"), [("images", "<image>"), ("audio", "<audio>"), ("videos", "<video>")])
def test_a_text_that_refers_to_a_medium_is_refused(tmp_path, name, mark):
    row = {"messages": [{"role": "user", "content": f"{mark}What is this?"}, A], name: ["file"]}
    with pytest.raises(UserError, match=rf"column '{name}': images, audio and video can't be trained on yet"):
        records(tmp_path, row)
    with pytest.raises(UserError, match=f"turn 1 refers to what is left out: its text holds {mark}"):
        records(tmp_path, row, ignore=[name])
    assert len(records(tmp_path, row | {name: []})) == 1  # a text about HTML


# ---- bad rows


ODD = (
    CHAT,
    NAMELESS,
    "{oops",
    {"question": "2+2?", "answer": "4"},
    '["a list"]',
    {"messages": [Q, A, Q, A, {"role": "asistant", "content": "4"}]},
    CHAT | {"images": ["cat.png"]},
    CHAT,
)


def test_all_kinds_of_bad_rows_are_listed_at_once(tmp_path):
    with pytest.raises(UserError) as raised:
        sft(tmp_path, *ODD).setup("fit")
    head, *lines = str(raised.value).splitlines()
    assert "rows.jsonl: 6 of 8 rows can't be used; `data.bad_rows: drop` leaves such rows out" in head
    assert len(lines) == 5
    assert "2: messages[1] has the unknown role 'asistant'; did you mean 'assistant'?" in lines[0]
    assert lines[0].count("rows.jsonl:") == 2
    assert "rows.jsonl:2, " in lines[0]
    assert "rows.jsonl:6)" in lines[0]
    for part in ("not valid JSON", "a row of the format question_answer", "found a list", "column 'images'"):
        assert sum(part in line for line in lines) == 1


def test_one_bad_row_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^\S*rows.jsonl:2: messages\[1\] has the unknown role 'asistant'; [^\n]*$"):
        sft(tmp_path, CHAT, NAMELESS).setup("fit")
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: messages\[1\] has .* \(all 2 rows: .*rows.jsonl:2; `data.bad_r"
    ):
        sft(tmp_path, NAMELESS, NAMELESS).setup("fit")


def test_dropped_bad_rows_are_counted_by_reason(tmp_path):
    module = sft(tmp_path, *ODD, *[NAMELESS] * 6, bad_rows="drop")
    module.setup("fit")
    report = module.report()["train"]
    assert (report["rows"], report["kept"]) == (14, 2)
    assert sum(report["dropped"].values()) == 12
    role = "messages[1] has the unknown role 'asistant'; did you mean 'assistant'?"
    assert report["dropped"][role] == report["bad_rows"][role]["rows"] == 8
    origins = [origin.rpartition(":")[2] for origin in report["bad_rows"][role]["first"]]
    assert origins == ["2", "6", "9", "10", "11"]
    (table,) = tables(module)
    assert [f"dropped: {role}", "8 (57.1%)"] in table.rows


def test_rows_that_the_template_refuses_are_bad_rows(tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{%- for m in messages %}{%- if loop.index0 % 2 != (m.role == 'assistant') | int %}{{ raise_exception('roles "
        "must alternate') }}{%- endif %}{{ m.role }}: {{ m.content }}<|end|>\n{%- endfor %}"
        "{%- if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [{"messages": [A, Q, A]}, CHAT, {"messages": [Q, Q, A]}]
    module = sft(tmp_path, *rows)
    module.template_spec = str(template)
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*roles must alternate .*2 of 3 rows: .*:1, .*:3;"):
        module.setup("fit")
    module = sft(tmp_path, *rows, bad_rows="drop")
    module.template_spec = str(template)
    module.setup("fit")
    report = module.report()["train"]
    assert (report["kept"], sum(report["dropped"].values())) == (1, 2)
    shown = preview.dropped(module, "train", 9)
    assert [row.number for row in shown] == [1, 3]
    assert "roles must alternate" in shown[0].reason


def test_bad_rows_keep_their_numbers_in_the_preview(tmp_path):
    module = sft(tmp_path, CHAT, NAMELESS, "{oops", CHAT, bad_rows="drop")
    module.setup("fit")
    by_number = preview.numbered(module, "train", [1, 2, 3, 4])
    assert [row.example for row in by_number] == [0, None, None, 1]
    assert "unknown role" in by_number[1].reason
    assert "not valid JSON" in by_number[2].reason
    assert [row.number for row in preview.dropped(module, "train", 9)] == [2, 3]
    assert [row.number for row in preview.first(module, "train", 9)] == [1, 4]


def test_dropping_is_part_of_the_caches_key(tmp_path):
    sft(tmp_path, CHAT, NAMELESS, bad_rows="drop").setup("fit")
    with pytest.raises(UserError, match="unknown role 'asistant'"):
        sft(tmp_path, CHAT, NAMELESS).setup("fit")


def test_no_row_is_left_after_bad_ones(tmp_path):
    with pytest.raises(UserError, match=r"none of 2 rows is left \(2 messages\[1\] has the unknown role"):
        sft(tmp_path, NAMELESS, NAMELESS, bad_rows="drop").setup("fit")


def test_prompts_skip_bad_rows_if_they_are_dropped(tmp_path):
    assert len(list(sft(tmp_path, CHAT, NAMELESS, CHAT, bad_rows="drop").prompts("train"))) == 2
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*unknown role"):
        list(sft(tmp_path, CHAT, NAMELESS, CHAT).prompts("train"))


def test_an_unknown_choice_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data.bad_rows: unknown 'drp'; did you mean 'drop'"):
        sft(tmp_path, CHAT, bad_rows="drp").setup("fit")


def test_reasons_that_differ_in_numbers_are_one_kind():
    bad = BadRows()
    for i in range(1000):
        bad.add(f"f:{i}", f"messages[{i % 7}] holds {i} of kind {'ab'[i % 2]}")
    assert {reason: kind["rows"] for reason, kind in bad.report().items()} == {
        "messages[0] holds 0 of kind a": 500,
        "messages[1] holds 1 of kind b": 500,
    }
    assert bad.report()["messages[0] holds 0 of kind a"]["first"] == ["f:0", "f:2", "f:4", "f:6", "f:8"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.json", '[{"text": "a"}, 7, {"text": "b"}]', "expected an object"),
        ("rows.csv", "text,id\na,1\nb\nc,3\n", "1 cells under 2 column names"),
        ("rows.jsonl", '{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b"}\n', "not UTF-8"),
        ("rows.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n{"text": "b"}\n', "half of a surrogate"),
    ],
)
def test_every_kind_of_file_goes_on_after_a_bad_row(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    read = [record for _, record in RecordReader(Source(str(tmp_path / name))).records(strict=False)]
    assert [isinstance(record, BadRow) for record in read] == [False, True, False]
    assert reason in read[1].reason
    with pytest.raises(UserError, match=reason):
        list(RecordReader(Source(str(tmp_path / name))).records())


def test_feedback_on_media_is_refused_by_name(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "label": True}, {"instruction": "q", "output": "a", "kto_tag": False}]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for i, row in enumerate((*rows, pair)):
        path = write_jsonl(tmp_path / f"{i}.jsonl", [row])
        read = RecordReader(Source(path), FEEDBACK_FORMATS)
        assert all(isinstance(record, Feedback) for _, record in read.records())
        path = write_jsonl(tmp_path / f"{i}-images.jsonl", [row | {"images": ["cat.png"]}])
        with pytest.raises(UserError, match="column 'images': images, audio and video can't be trained on yet"):
            list(RecordReader(Source(path), FEEDBACK_FORMATS).records())


def test_a_source_has_variables_of_the_template_for_its_rows(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": turns, "chat_template_kwargs": {"mood": "sad", "own": 1}}]
    source = Source(write_jsonl(tmp_path / "rows.jsonl", rows), template_variables={"mood": "calm", "tone": "dry"})
    records = [record for _, record in RecordReader(source).records()]
    assert [dict(record.template_variables) for record in records] == [
        {"mood": "calm", "tone": "dry"},
        {"mood": "sad", "tone": "dry", "own": 1},
    ]


def test_characters_that_replace_bytes_are_counted_in_the_data_report(tmp_path):
    rows = b'{"prompt": "a\xff\xfe", "completion": "b"}\n{"prompt": "c", "completion": "d\xff"}\n'
    (tmp_path / "rows.jsonl").write_bytes(rows)
    source = {"path": str(tmp_path / "rows.jsonl"), "errors": "replace"}
    data = SFTData(source, tokenizer=ByteTokenizer())
    data.setup("fit")
    (note,) = data.report()["train"]["notes"].items()
    assert note == ("U+FFFD in place of bytes that aren't UTF-8 (characters, not rows)", 3)
