"""Conversations as a stream of tokens: rendered by the template, each ended by EOS, cut into windows."""

import pytest

from oumi_pl.data.packed_chat import PackedChatData
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.tiny import write_jsonl

ROWS = [
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": "c?"}, {"role": "assistant", "content": "dd"}]},
]


def data(tmp_path, rows=ROWS, cls=PackedChatData, **kwargs):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return cls(path, **({"tokenizer": ByteTokenizer(), "max_length": 16, "shuffle_buffer": 0} | kwargs))


def stream(made):
    """All ids, in order: the first row's first one, and what each position predicts."""
    batches = list(made.train_dataloader())
    return [int(batches[0]["input_ids"][0, 0]), *(token for batch in batches for token in batch["targets"].tolist())]


def chatml(row):
    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in row["messages"])
    return "".join(turns) + "<|im_end|>"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_stream_is_the_rendered_conversations(tmp_path, streaming):
    built = data(tmp_path, streaming=streaming)
    expected = "".join(chatml(row) for row in ROWS)
    assert stream(built) == built.tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_another_template_is_another_stream(tmp_path):
    one = stream(data(tmp_path))
    other = data(tmp_path, template="oumi/gpt2")
    eos = "<|im_end|>"
    expected = "".join(f"{m['content']}{eos}" for row in ROWS for m in row["messages"])
    assert stream(other) == other.tokenizer(expected, add_special_tokens=False)["input_ids"] != one


def test_texts_are_not_rendered_by_the_template(tmp_path):
    built = data(tmp_path, [{"text": "hello"}, {"prompt": "a", "completion": "b"}])
    assert stream(built) == built.tokenizer("hello<|im_end|>ab<|im_end|>", add_special_tokens=False)["input_ids"]


def test_pretrain_data_refuses_conversations(tmp_path):
    with pytest.raises(UserError, match="this row is a conversation"):
        stream(data(tmp_path, cls=PretrainData))


def test_turns_that_the_template_refuses_are_an_error_with_file_and_line(tmp_path):
    wrong = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    with pytest.raises(UserError, match=r"rows\.jsonl:3: .*have to alternate"):
        stream(data(tmp_path, [*ROWS, wrong], template="oumi/zephyr"))


def test_columns_are_read_as_in_sft(tmp_path):
    turns = ROWS[0]["messages"]
    built = data(tmp_path, [{"messages": turns, "system": "s"}])
    expected = chatml({"messages": [{"role": "system", "content": "s"}, *turns]})
    assert stream(built) == built.tokenizer(expected, add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match="column 'images': images, audio and video can't be trained on yet"):
        stream(data(tmp_path, [{"messages": turns, "images": ["a.png"]}]))
    for row in ({"messages": turns, "weight": 2}, {"messages": [turns[0], turns[1] | {"weight": 0}]}):
        with pytest.raises(UserError, match="a stream of conversations trains on all tokens alike; use SFTData"):
            stream(data(tmp_path, [row]))


def test_keep_good_leaves_rows_out_and_counts_them(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0] | {"label": False}, ROWS[1] | {"label": True}])
    built = PackedChatData(Source(path, label="keep_good"), tokenizer=ByteTokenizer(), max_length=16, shuffle_buffer=0)
    assert stream(built) == built.tokenizer(chatml(ROWS[1]), add_special_tokens=False)["input_ids"]
    assert built.report()["train"]["dropped"] == {"label: not good": 1}


def test_bad_rows_are_all_listed_or_left_out_and_counted(tmp_path):
    rows = [ROWS[0], {"messages": [{"role": "wizard", "content": "?"}]}, ROWS[1], {"messages": []}]
    with pytest.raises(UserError) as error:
        data(tmp_path, rows).setup("fit")
    assert "2 of 4 rows can't be used; `data.bad_rows: drop` leaves such rows out" in str(error.value)
    assert "rows.jsonl:2" in str(error.value)
    assert "rows.jsonl:4" in str(error.value)
    built = data(tmp_path, rows, bad_rows="drop")
    assert stream(built) == built.tokenizer("".join(map(chatml, ROWS)), add_special_tokens=False)["input_ids"]
    built.setup("fit")
    report = built.report()["train"]
    assert (report["rows"], report["kept"]) == (4, 2)
    assert sorted(report["dropped"].values()) == [1, 1]
    assert [kind["first"][0].rpartition(":")[2] for kind in report["bad_rows"].values()] == ["2", "4"]
    streamed = data(tmp_path, rows, bad_rows="drop", streaming=True)
    assert stream(streamed) == stream(built)
    with pytest.raises(UserError, match=r"data\.bad_rows: unknown 'dorp'; did you mean 'drop'"):
        data(tmp_path, bad_rows="dorp")
