"""Datasets as sources, and the formats that read the rows of those that Oumi registers."""

import pytest

from oumi_pl.core.recipe import formats
from oumi_pl.data.sources import Source, rows
from oumi_pl.errors import UserError
from tests.core.oumi import recipe, section
from tests.tiny import write_jsonl


def source(name, **fields):
    return section(recipe({"dataset_name": name, **fields}), "data")["train"]


def test_sources():
    questions = "oumi_pl.core.recipe.formats.prompt_response"
    assert source("org/unknown") == "org/unknown"
    assert source("org/unknown", subset="en", split="test[:9]") == {
        "path": "org/unknown",
        "config": "en",
        "split": "test[:9]",
    }
    assert source("text_sft_jsonl", dataset_path="a.jsonl", split="validation") == {
        "path": "a.jsonl",
        "format": "oumi_pl.core.recipe.formats.text_sft",
    }
    assert source("CohereForAI/aya_dataset") == {
        "path": "CohereForAI/aya_dataset",
        "format": f"{questions}_or_nothing",
        "columns": {"prompt": "inputs", "response": "targets"},
    }
    kwargs = {"hf_dataset_path": "GAIR/LIMO", "prompt_column": "question", "response_column": "solution"}
    assert source("promptresponsedataset", dataset_kwargs=kwargs) == {
        "path": "GAIR/LIMO",
        "format": questions,
        "columns": {"prompt": "question", "response": "solution"},
    }
    kwargs = {"hf_dataset_path": "org/x", "messages_column": "turns", "exclude_final_assistant_message": True}
    assert source("HuggingFaceDataset", dataset_kwargs=kwargs) == {
        "path": "org/x",
        "format": "oumi_pl.core.recipe.formats.without_final_answer",
        "columns": {"messages": "turns"},
    }


def test_taking_rows():
    assert source("org/x", sample_count=5) == {"path": "org/x", "sample": 5}
    assert source("org/x", sample_count=5, shuffle=True, seed=3) == {"path": "org/x", "sample": 5, "sample_seed": 3}
    assert source("org/x", sample_count=5, shuffle=True)["sample_seed"] == 42
    assert source("org/x", shuffle=True, seed=3) == "org/x"  # the run draws its own order


def test_mixtures():
    made = recipe(
        [{"dataset_name": "a/b", "mixture_proportion": 0.25}, {"dataset_name": "c/d", "mixture_proportion": 0.75}]
    )
    assert section(made, "data")["train"] == [{"path": "a/b", "weight": 0.25}, {"path": "c/d", "weight": 0.75}]
    assert any("an epoch" in text for text in made.comments["data.init_args.train"])
    one = recipe(
        [{"dataset_name": "a/b", "mixture_proportion": 1.0}, {"dataset_name": "c/d", "mixture_proportion": 0.0}]
    )
    assert section(one, "data")["train"] == {"path": "a/b", "weight": 1.0}


def test_the_text_column_of_unregistered_data():
    made = recipe({"dataset_name": "a/b"}, training__trainer_kwargs='{"dataset_text_field": "story"}')
    assert section(made, "data")["train"] == {"path": "a/b", "columns": {"text": "story"}}
    assert section(made, "data")["train_on"] == "completion_or_all"
    only = recipe({"dataset_name": "a/b"}, training__trainer_kwargs='{"assistant_only_loss": true, "packing": true}')
    assert (section(only, "data")["train_on"], section(only, "data")["packing"]) == ("assistant", True)


def test_sampled_rows_are_those_of_datasets(tmp_path):
    import datasets

    made = [{"text": str(i)} for i in range(10)]
    path = write_jsonl(tmp_path / "rows.jsonl", made)
    expected = sorted(int(t) for t in datasets.Dataset.from_list(made).shuffle(3).take(4)["text"])
    assert [int(row["text"]) for _, row in rows(Source(path, sample=4, sample_seed=3))] == expected


def turns(record):
    return [(message["role"], message["content"]) for message in record.messages]


def test_text_sft_reads_three_layouts():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = [("user", "a"), ("assistant", "b")]
    assert turns(formats.text_sft({"messages": said})) == expected
    assert turns(formats.text_sft({"conversation": {"messages": said}})) == expected
    assert turns(formats.text_sft({"instruction": "a", "input": "", "output": "b"})) == expected
    with pytest.raises(UserError, match="columns conversations; text_sft reads"):
        formats.text_sft({"conversations": []})


def test_the_final_answer_is_left_out():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert turns(formats.without_final_answer({"messages": said})) == [("user", "a")]
    assert turns(formats.without_final_answer({"messages": said[:1]})) == [("user", "a")]
    with pytest.raises(UserError, match="nothing but an answer"):
        formats.without_final_answer({"messages": said[1:]})
