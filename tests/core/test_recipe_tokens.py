"""Converted recipes on tiny local data: the tokens and the masks are those that Oumi's description gives, by hand."""

import json
from itertools import pairwise

import numpy as np
import pytest

from oumi_pl.config.cli import instantiate
from oumi_pl.models.build import build_model
from tests.core.oumi import recipe, section, tiny_model
from tests.tiny import write_jsonl

WITH = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hello there"},
]
CHAT = [
    {
        "messages": [
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c?"},
            {"role": "assistant", "content": "dd"},
        ]
    }
]
TRAIN_ALL = {"dataset_name": "text_sft_jsonl"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def data_of(tmp_path, model, rows, dataset=None, **changes):
    """The data of a converted recipe that reads rows from a file."""
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    made = recipe({**(dataset or TRAIN_ALL), "dataset_path": path}, model__model_name=model, **changes)
    module, data = instantiate(made.tree)
    data.tokenizer_spec = data.tokenizer_spec or module.model_name
    return data


def texts(data):
    """Each example as [(text, carries loss)]."""
    found = []
    for example in data.examples("train"):
        ids, mask = np.array(example.input_ids), np.array(example.loss_mask)
        cuts = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1), len(ids)]
        found.append([(data.tokenizer.decode(ids[a:b]), bool(mask[a])) for a, b in pairwise(cuts)])
    return found


def whole(text):
    """All of a row is trained but for its first token, which nothing predicts."""
    start = "<|im_start|>"
    assert text.startswith(start)
    return [(start, False), (text.removeprefix(start), True)]


def test_alpaca_trains_on_everything(tmp_path, model):
    data = data_of(tmp_path, model, ROWS, {"dataset_name": "yahma/alpaca-cleaned"}, model__model_max_length=512)
    assert texts(data) == [
        whole(turn("system", WITH) + turn("user", "Add.\n\n### Input:\n1 and 2") + turn("assistant", "3")),
        whole(turn("system", WITHOUT) + turn("user", "Greet.") + turn("assistant", "Hello there")),
    ]


def test_alpaca_without_system_turn(tmp_path, model):
    dataset = {"dataset_name": "tatsu-lab/alpaca", "dataset_kwargs": {"include_system_prompt": False}}
    data = data_of(tmp_path, model, ROWS, dataset)
    assert texts(data)[1] == whole(turn("user", "Greet.") + turn("assistant", "Hello there"))


def test_the_same_rows_as_text_sft_are_other_texts(tmp_path, model):
    assert texts(data_of(tmp_path, model, ROWS)) == [
        whole(turn("user", "Add.\n\n1 and 2") + turn("assistant", "3")),
        whole(turn("user", "Greet.") + turn("assistant", "Hello there")),
    ]


def test_rows_lose_their_end(tmp_path, model):
    data = data_of(tmp_path, model, ROWS, model__model_max_length=10)
    assert texts(data)[0] == whole("<|im_start|>user\nAdd.")


COMPLETIONS = {"data__train__collator_name": "text_completions_only_with_padding"}


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({**COMPLETIONS, "data__train__train_target": "ALL_ASSISTANT_TURNS"}, ["b<|im_end|>", "dd<|im_end|>"]),
        ({**COMPLETIONS, "data__train__train_target": "FINAL_ASSISTANT_TURN"}, ["dd<|im_end|>"]),
        ({**COMPLETIONS, "data__train__collator_kwargs": '{"response_template": "x"}'}, ["dd<|im_end|>"]),
        (
            {
                **COMPLETIONS,
                "data__train__collator_kwargs": '{"response_template": "x", "instruction_template": "y"}',
            },
            ["b<|im_end|>", "dd<|im_end|>"],
        ),
    ],
)
def test_only_what_the_assistant_says(tmp_path, model, changes, trained):
    (example,) = texts(data_of(tmp_path, model, CHAT, **changes))
    assert [text for text, carries in example if carries] == trained


def test_assistant_only_of_the_dataset(tmp_path, model):
    (example,) = texts(
        data_of(tmp_path, model, CHAT, {"dataset_name": "text_sft", "dataset_kwargs": {"assistant_only": True}})
    )
    assert [text for text, carries in example if carries] == ["b<|im_end|>", "dd<|im_end|>"]


def test_a_row_that_is_cut_before_the_answer_is_left_out(tmp_path, model):
    changes = {**COMPLETIONS, "data__train__train_target": "FINAL_ASSISTANT_TURN", "model__model_max_length": 12}
    data = data_of(tmp_path, model, [*CHAT, {"messages": CHAT[0]["messages"][:2]}], **changes)
    assert texts(data) == []
    assert data.report()["train"]["dropped"] == {"no target tokens once cut": 2}


def test_prompt_and_response_columns(tmp_path, model):
    dataset = {
        "dataset_name": "PromptResponseDataset",
        "dataset_kwargs": {"prompt_column": "q", "response_column": "r"},
    }
    data = data_of(tmp_path, model, [{"q": "hi", "r": "ho"}], dataset)
    assert texts(data) == [whole(turn("user", "hi") + turn("assistant", "ho"))]


@pytest.mark.parametrize(
    ("kwargs", "row", "expected"),
    [
        ("{}", {"prompt": "Q: a", "completion": " b"}, [("Q: a", False), (" b<|im_end|>", True)]),
        (
            "{}",
            {
                "prompt": [{"role": "user", "content": "a?"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            [(turn("user", "a?") + "<|im_start|>assistant\n", False), ("b<|im_end|>", True), ("\n", False)],
        ),
        ("{}", {"text": "a b"}, [("a", False), (" b<|im_end|>", True)]),
        ("{}", CHAT[0], whole("".join(turn(m["role"], m["content"]) for m in CHAT[0]["messages"]))),
        (
            '{"completion_only_loss": false}',
            {"prompt": "Q: a", "completion": " b"},
            [("Q", False), (": a b<|im_end|>", True)],
        ),
        (
            '{"completion_only_loss": true}',
            {"prompt": "Q: a", "completion": " b"},
            [("Q: a", False), (" b<|im_end|>", True)],
        ),
    ],
)
def test_rows_of_unregistered_data_carry_loss_where_trl_puts_it(tmp_path, model, kwargs, row, expected):
    (tmp_path / "org").mkdir()
    write_jsonl(tmp_path / "org/train.jsonl", [row])
    made = recipe({"dataset_name": str(tmp_path / "org")}, model__model_name=model, training__trainer_kwargs=kwargs)
    module, data = instantiate(made.tree)
    data.tokenizer_spec = module.model_name
    assert texts(data) == [expected]


def pair(tmp_path, model, row, dataset="mlabonne/orpo-dpo-mix-40k", **changes):
    data = data_of(tmp_path, model, [row], {"dataset_name": dataset}, training__trainer_type="TRL_DPO", **changes)
    (example,) = data.examples("train")
    chosen, rejected = example.segments
    cuts = [0, rejected.shared, chosen.length, len(example.input_ids)]
    return [data.tokenizer.decode(example.input_ids[a:b]) for a, b in pairwise(cuts)]


PAIR = (turn("user", "hi") + "<|im_start|>assistant\n", "yes<|im_end|>\n", "no<|im_end|>\n")


def test_pairs_of_text_become_turns(tmp_path, model):
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    assert pair(tmp_path, model, row) == list(PAIR)


def test_whole_conversations_have_their_prompt_once(tmp_path, model):
    asked, answers = {"role": "user", "content": "hi"}, ({"role": "assistant", "content": c} for c in ("yes", "no"))
    chosen, rejected = ([asked, answer] for answer in answers)
    assert pair(tmp_path, model, {"prompt": "hi", "chosen": chosen, "rejected": rejected}) == list(PAIR)


def test_rendered_pairs_are_tokenized_as_they_stand(tmp_path, model):
    row = {"prompt": "Q: hi\nA:", "chosen": " yes", "rejected": " no<|im_end|>"}
    assert pair(tmp_path, model, row, "text_dpo_jsonl") == ["Q: hi\nA:", " yes<|im_end|>", " no<|im_end|>"]


def test_pairs_lose_their_ends(tmp_path, model):
    row = {"prompt": "Q: hi\nA:", "chosen": " yes, certainly", "rejected": " no"}
    got = pair(tmp_path, model, row, "text_dpo_jsonl", model__model_max_length=12)
    assert got == ["Q: hi\nA:", " yes", " no<|im_end|>"]


def test_packed_conversations_are_one_stream_of_windows(tmp_path, model):
    rows = [{"messages": CHAT[0]["messages"][:2]}, {"messages": CHAT[0]["messages"][2:]}]
    data = data_of(tmp_path, model, rows, data__train__pack=True, model__model_max_length=16)
    stream = "".join(
        turn("user", user) + turn("assistant", answer) + "<|im_end|>" for user, answer in (("a?", "b"), ("c?", "dd"))
    )
    ids = data.tokenizer(stream, add_special_tokens=False)["input_ids"]
    batches = list(data.train_dataloader())
    labels = [target for batch in batches for target in batch["targets"].tolist()]
    first = int(batches[0]["input_ids"][0, 0])
    assert [first, *labels] == ids


def test_documents_end_with_eos_and_come_in_order(tmp_path, model):
    texts_ = [{"text": "one"}, {"text": "two!"}, {"text": "three"}]
    dataset = {"dataset_name": "roneneldan/tinystories", "dataset_kwargs": {"seq_length": 4}}
    data = data_of(tmp_path, model, texts_, dataset, data__train__stream=True, training__max_steps=2)
    ids = [i for row in texts_ for i in [*row["text"].encode(), data.tokenizer.eos_token_id]]
    batches = list(data.train_dataloader())
    labels = [target for batch in batches for target in batch["targets"].tolist()]
    assert labels == ids[1:]


def without_template(folder, model_type=None):
    """A model whose tokenizer has no chat template."""
    place = tiny_model(folder)
    (folder / "chat_template.jinja").unlink()
    if model_type is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return place


def test_a_tokenizer_without_a_chat_template_gets_oumis_default_with_a_note(tmp_path):
    made = recipe(model__model_name=without_template(tmp_path))
    assert section(made, "data")["template"] == "oumi/default"
    assert any("has no chat template" in text for text in made.comments["data.init_args.template"])


def test_a_gpt2_is_known_by_its_model_type_and_not_by_the_name_of_its_folder(tmp_path, model):
    gpt2 = without_template(tmp_path / "mine", "gpt2")
    assert section(recipe(model__model_name=gpt2), "data")["template"] == "oumi/gpt2"
    llama = without_template(tmp_path / "not-gpt2-at-all", "llama")
    assert section(recipe(model__model_name=llama), "data")["template"] == "oumi/default"
    assert "template" not in section(recipe(model__model_name=model), "data")


@pytest.mark.parametrize(
    "changes", [{"model__tokenizer_pad_token": "<x>"}, {"model__tokenizer_kwargs": '{"pad_token": "<x>"}'}]
)
def test_the_pad_token_reaches_the_tokenizer(tmp_path, model, changes):
    data = data_of(tmp_path, model, ROWS, **changes)
    assert data.tokenizer.pad_token == "<x>"
    hf = build_model(model, tokenizer=data.tokenizer, added_tokens=data.added_tokens)
    assert len(hf.get_input_embeddings().weight) == len(data.tokenizer) == data.tokenizer.pad_token_id + 1


def test_a_pad_token_of_the_vocabulary_needs_no_row(tmp_path, model):
    data = data_of(tmp_path, model, ROWS, model__tokenizer_pad_token="<|endoftext|>")
    assert data.tokenizer.pad_token == "<|endoftext|>"
    assert len(build_model(model, tokenizer=data.tokenizer).get_input_embeddings().weight) == len(data.tokenizer)
