"""Prompts for online training: which rows give one, and what is said of the others."""

import json

import pytest

from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.rollouts.sampling import Sampling

ROWS = {
    "a question and its answer": {"prompt": "2 + 3", "answer": "5", "level": 1},
    "turns": {"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 3"}]},
    "a whole conversation": {
        "messages": [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": "5"}],
        "label": True,
    },
    "prompt and completion": {"prompt": "2 + 3", "completion": "5"},
}


def data(tmp_path, *rows, **kwargs):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tokenizer": ByteTokenizer(), "max_length": 100, "sampling": Sampling(8), "template": "chatml"}
    return RolloutData(str(file), reward=len, **options | kwargs)


@pytest.mark.parametrize("name", ROWS)
def test_the_prompt_ends_before_the_answer(tmp_path, name):
    (prompt,) = data(tmp_path, ROWS[name]).all_prompts("train")
    turns = ROWS[name].get("messages", ROWS[name].get("prompt"))
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    tokenizer = data(tmp_path, ROWS[name]).tokenizer
    expected = tokenizer.apply_chat_template(
        [turn for turn in turns if turn["role"] != "assistant"], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(prompt.ids) == expected
    assert prompt.row == ROWS[name]  # the rewards see every column
    assert prompt.origin.endswith("prompts.jsonl:1")


def test_long_prompts_are_left_out_and_counted(tmp_path):
    samples = data(tmp_path, {"prompt": "short"}, {"prompt": "long " * 30})
    assert [prompt.row["prompt"] for prompt in samples.all_prompts("train")] == ["short"]
    assert samples.report()["train"]["dropped"] == {"prompt leaves no room for a completion": 1}
    assert (samples.report()["train"]["rows"], samples.report()["train"]["kept"]) == (2, 1)


def test_bad_rows_stop_the_run_or_are_counted(tmp_path):
    rows = {"prompt": "good"}, {"prompt": 3}, {"question": "which column?"}
    with pytest.raises(UserError, match=r"2 of 3 rows can't be used; `data.bad_rows: drop`"):
        data(tmp_path, *rows).all_prompts("train")
    samples = data(tmp_path, *rows, bad_rows="drop")
    assert len(samples.all_prompts("train")) == 1
    assert sum(kind["rows"] for kind in samples.report()["train"]["bad_rows"].values()) == 2


def test_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="column 'images': images, audio and video can't be trained on yet"):
        data(tmp_path, {"prompt": "What is this?", "images": ["cat.png"]}).all_prompts("train")
