"""Prompts for online training: which rows give one, and what is said of the others."""

import json

import lightning as L
import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.sft import SFTData
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


def test_prompts_are_rendered_with_the_templates_variables(tmp_path):
    template = tmp_path / "moody.jinja"
    template.write_text("{% for m in messages %}{{ m.role }} {{ m.content }}{{ mood }}\n{% endfor %}")
    options = {"template": str(template), "template_variables": {"mood": " happily"}}
    samples = data(tmp_path, {"prompt": "2 + 3"}, **options)
    (prompt,) = samples.all_prompts("train")
    assert samples.tokenizer.decode(prompt.ids).startswith("user 2 + 3 happily")
    assert samples.made_from() != data(tmp_path, {"prompt": "2 + 3"}, template=str(template)).made_from()


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


def test_the_system_turn_of_a_column_belongs_to_the_prompt(tmp_path):
    (prompt,) = data(tmp_path, {"prompt": "2 + 3", "system": "Be short."}).all_prompts("train")
    (turns,) = data(tmp_path, ROWS["turns"]).all_prompts("train")
    assert prompt.ids == turns.ids


# ---- predict


def predicted(data):
    """What `predict` reads: number, decoded prompt and columns of each row."""
    rows = []
    for batch in data.predict_dataloader():
        texts = [data.tokenizer.decode(ids) for ids in batch["prompts"]]
        rows += zip(batch["rows"], texts, batch["columns"], strict=True)
    return rows


def user(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_predict_makes_a_prompt_of_each_line_of_a_text_file(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("one\n\ntwo\n")
    chat = SFTData(predict=str(file), tokenizer=ByteTokenizer())
    assert predicted(chat) == [(1, user("one"), {"text": "one"}), (2, user("two"), {"text": "two"})]
    whole = SFTData(predict={"path": str(file), "documents": "file"}, tokenizer=ByteTokenizer())
    assert [text for _, text, _ in predicted(whole)] == ["one\n\ntwo\n"]
    pretrained = PretrainData(predict=str(file), tokenizer=ByteTokenizer(chat_template=False))
    assert [(number, columns) for number, _, columns in predicted(pretrained)] == [
        (1, {"text": "one"}),
        (2, {"text": "two"}),
    ]


def test_predict_reads_rows_that_have_only_a_prompt_and_keeps_their_columns(tmp_path):
    rows = [
        {"id": "a7", "prompt": "one", "label": "x"},
        {"id": "b2", "question": "two"},
        {"id": "c1", "instruction": "three"},
        {"id": "d5", "messages": [{"role": "user", "content": "four"}]},
    ]
    for row, text in zip(rows, ("one", "two", "three", "four"), strict=True):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row) + "\n")
        assert predicted(SFTData(predict=str(file), tokenizer=ByteTokenizer())) == [(1, user(text), row)]
    file.write_text(json.dumps({"prompt": "one", "context": "which changes the answer"}) + "\n")
    with pytest.raises(UserError, match="context"):
        predicted(SFTData(predict=str(file), tokenizer=ByteTokenizer()))


def test_sampling_from_sharded_weights_is_refused(tmp_path):
    samples = data(tmp_path, {"prompt": "2 + 3"})
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    samples.trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False)
    with pytest.raises(UserError, match="can't be sampled from sharded weights; use ddp"):
        samples.setup("fit")
