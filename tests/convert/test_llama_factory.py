"""LLaMA-Factory's YAML, of the trainers that it has had for long and of `v1`."""

import json
from contextlib import suppress

import pytest
import yaml

from oumi_pl.convert import llama_factory_v1
from oumi_pl.convert.llama_factory import KEYS
from oumi_pl.errors import UserError
from tests.convert import samples
from tests.convert.helpers import assert_fits, at, changed_by_null, converted, refuse_in_one_message, silent_keys

INFO = {
    "instructions": {"file_name": "instructions.json"},
    "chats": {
        "hf_hub_url": "org/chats",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "pairs": {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}},
    "thumbs": {"file_name": "thumbs.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "good"}},
    "texts": {"file_name": "texts.json", "columns": {"prompt": "body"}},
    "pictures": {"file_name": "p.json", "columns": {"images": "images"}},
    "odd": {"file_name": "odd.json", "formatting": "sharegpt", "tags": {"user_tag": "me"}},
    "elsewhere": {"cloud_file_name": "s3://x"},
}
SFT = {
    "model_name_or_path": "org/base",
    "stage": "sft",
    "finetuning_type": "full",
    "dataset": "instructions",
    "template": "llama3",
    "learning_rate": 1e-4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("factory")
    (path / "data").mkdir()
    (path / "data/dataset_info.json").write_text(json.dumps(INFO))
    table = {"one": {"path": "data/a.json", "source": "local", "converter": "alpaca", "size": 5}}
    (path / "data/v1.yaml").write_text(yaml.safe_dump(table))
    (path / "data/v1_pairs.yaml").write_text(yaml.safe_dump({"two": {"path": "org/pairs", "converter": "pair"}}))
    (path / "examples/deep").mkdir(parents=True)
    return path / "examples/deep"


@pytest.mark.parametrize(
    ("more", "place", "value"),
    [
        # what LLaMA-Factory takes where nothing is said
        ({"finetuning_type": None}, "model.lora", {"r": 8, "lora_alpha": 16}),
        ({}, "data.max_length", 2048),
        ({}, "model.schedule", {"class_path": "Linear"}),
        ({}, "model.optimizer", {"class_path": "AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.0}}),
        ({"learning_rate": None}, "model.optimizer.lr", 5e-5),
        ({}, "trainer.max_epochs", 3),
        ({}, "data.batch_size", 8),
        ({}, "model.gradient_checkpointing", True),
        ({}, "data.overflow", "keep_start"),
        # keys of the model
        ({"finetuning_type": "lora", "lora_rank": 4}, "model.lora", {"r": 4, "lora_alpha": 8}),
        (
            {"finetuning_type": "lora", "lora_target": "q_proj, v_proj"},
            "model.lora.target_modules",
            ["q_proj", "v_proj"],
        ),
        ({"finetuning_type": "lora", "bf16": True}, "model.dtype", "bfloat16"),
        ({"bf16": True}, "model.dtype", None),
        ({"bf16": True}, "trainer.precision", "bf16-mixed"),
        ({"pure_bf16": True}, "trainer.precision", "bf16-true"),
        ({"finetuning_type": "lora", "quantization_bit": 4}, "model.quantization", "nf4"),
        ({"finetuning_type": "lora", "loraplus_lr_ratio": 16.0}, "model.groups", {"*lora_B*": {"lr_factor": 16.0}}),
        ({"use_muon": True}, "model.optimizer.class_path", "MuonAdamW"),
        ({"disable_gradient_checkpointing": True}, "model.gradient_checkpointing", None),
        ({"adapter_name_or_path": "saves/mine", "finetuning_type": "lora"}, "model.model", "saves/mine"),
        # rows
        ({}, "data.train.format", "oumi_pl.convert.formats.joined_alpaca"),
        ({"max_samples": 10}, "data.train.split", "train[:10]"),
        (
            {"dataset": "chats"},
            "data.train",
            {"path": "org/chats", "format": "messages", "ignore": ["system", "tools"]},
        ),
        ({"val_size": 0.1}, "data.validation", 0.1),
        ({"mask_history": True}, "data.train_on", "last_turn"),
        ({"train_on_prompt": True}, "data.train_on", "all"),
        ({"packing": True}, "data.packing", True),
        ({"template": "qwen3_nothink"}, "data.template", "chatml"),
        ({"template": "glm4"}, "data.template", None),
        ({"enable_thinking": False}, "data.template_variables", {"enable_thinking": False}),
        # objectives
        ({"stage": "dpo", "dataset": "pairs"}, "model.loss", {"class_path": "Sigmoid", "init_args": {"beta": 0.1}}),
        (
            {"stage": "dpo", "dataset": "pairs"},
            "data.train.columns",
            {"instruction": "q", "chosen": "c", "rejected": "r"},
        ),
        ({"stage": "dpo", "dataset": "pairs", "pref_loss": "simpo"}, "model.loss.gamma", 0.5),
        ({"stage": "dpo", "dataset": "pairs", "pref_ftx": 0.5}, "model.loss.weights", [1.0, 0.5]),
        ({"stage": "dpo", "dataset": "pairs", "pref_loss": "orpo", "pref_ftx": 0.5}, "model.loss.weights", [1.0, 0.5]),
        ({"stage": "kto", "dataset": "thumbs", "ref_model": "org/ref"}, "model.reference", "org/ref"),
        (
            {"stage": "kto", "dataset": "thumbs"},
            "data.train.columns",
            {"instruction": "q", "output": "a", "label": "good"},
        ),
        ({"stage": "kto", "dataset": "thumbs", "kto_chosen_weight": 2}, "model.desirable_weight", 2.0),
        ({"stage": "rm", "dataset": "pairs"}, "model.loss.class_path", "BradleyTerry"),
        ({"stage": "pt", "dataset": "texts"}, "data.train.columns", {"text": "body"}),
        ({"use_dft_loss": True}, "model.loss.class_path", "oumi_pl.convert.losses.ProbabilityWeighted"),
        ({"use_eaft_loss": True}, "model.loss.init_args", {"alpha": 1.0, "scale": 3.0}),
        # the loop
        ({"deepspeed": "ds_z3_config.json"}, "trainer.strategy", "fsdp2"),
        ({"max_steps": 5}, "trainer.max_steps", 5),
        ({"output_dir": "saves/x/sft"}, "runs_dir", "saves/x"),
        ({"report_to": "wandb"}, "logger", "wandb"),
        ({"report_to": "none"}, "logger", None),
    ],
)
def test_a_key_becomes_the_one_that_means_the_same(folder, more, place, value):
    tree, settings = converted({k: v for k, v in (SFT | more).items() if v is not None}, folder=folder)
    assert at(tree, place) == value
    assert {key for key, one in more.items() if one is not None} <= set(settings.notes.became)
    assert_fits(tree)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_galore": True}, "use_galore: this method changes what is trained"),
        ({"image_max_pixels": 9}, "image_max_pixels: images, video and audio are not trained on"),
        ({"stage": "ppo"}, "stage: ppo has no counterpart"),
        ({"dataset": "nothing"}, "dataset: nothing is not in"),
        ({"dataset": "pictures"}, "dataset_info.pictures.columns.images: images, video and audio"),
        ({"dataset": "odd"}, "odd: turns with user_tag 'me' need a format of your own"),
        ({"dataset": "elsewhere"}, "elsewhere: only files and data sets of the hub are read"),
        ({"dataset_dir": "nowhere"}, "add --dataset_dir FOLDER"),
        ({"template": "alpaca"}, "template: alpaca has no counterpart; write it as a .jinja file"),
        ({"lora_rnk": 3}, "lora_rnk is unknown here; did you mean 'lora_rank'"),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_bit: 4"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(folder, more, message):
    with pytest.raises(UserError) as error:
        converted(SFT | more, folder=folder)
    assert message in str(error.value)


def test_no_key_has_two_meanings():
    both = set(KEYS.translated) & set(KEYS.without_effect) | set(KEYS.translated) & set(KEYS.refused)
    assert not both | set(KEYS.without_effect) & set(KEYS.refused)


SAMPLES = {key: samples.TRAINING.get(key) for key in KEYS.translated if key in samples.TRAINING} | samples.LLAMA_FACTORY
PAIRS = SFT | {"stage": "dpo", "dataset": "pairs"}
KINDS = {
    "SFT": SFT,
    "LoRA": SFT | {"finetuning_type": "lora"},
    "QLoRA": SFT | {"finetuning_type": "lora", "quantization_bit": 4},
    "freeze": SFT | {"finetuning_type": "freeze"},
    "DPO": PAIRS,
    "SimPO": PAIRS | {"pref_loss": "simpo"},
    "KTO": SFT | {"stage": "kto", "dataset": "thumbs"},
    "reward": SFT | {"stage": "rm", "dataset": "pairs"},
    "texts": SFT | {"stage": "pt", "dataset": "texts"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_changes_the_recipe_or_is_named_with_a_reason(folder, kind):
    off = ["packing"] if kind in ("SFT", "LoRA", "QLoRA", "freeze") else []  # false is its default there
    assert silent_keys(KINDS[kind], SAMPLES, KEYS, folder=folder) == off


@pytest.mark.parametrize("kind", ["QLoRA", "freeze", "DPO", "texts"])
def test_values_of_any_type_are_converted_or_refused(folder, kind):
    refuse_in_one_message(KINDS[kind], KEYS, folder=folder)


@pytest.mark.parametrize("value", [3, "x", [], {"columns": 3}, {"file_name": 3}, {"file_name": "a", "columns": []}])
def test_an_entry_of_any_type_is_converted_or_refused(tmp_path, value):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"one": value}))
    for values in (SFT | {"dataset": "one", "dataset_dir": {"one": value}}, V1 | {"train_dataset": "t.yaml"}):
        with suppress(UserError):
            converted(values, folder=tmp_path)


def test_null_is_the_default_but_where_llama_factory_reads_it_otherwise(folder):
    assert changed_by_null(KINDS["SFT"], SAMPLES, KEYS, folder=folder) == {"max_grad_norm"}
    assert changed_by_null(KINDS["QLoRA"], SAMPLES, KEYS, folder=folder) == {"max_grad_norm", "double_quantization"}
    assert at(converted(SFT | {"max_grad_norm": None}, folder=folder)[0], "trainer.gradient_clip_val") is None


@pytest.mark.parametrize(
    ("entry", "stage", "unused"),
    [
        ({"file_name": "a.json", "ms_hub_url": "org/a"}, "sft", {"ms_hub_url"}),
        ({"hf_hub_url": "org/a", "file_name": "a.json"}, "sft", {"file_name"}),
        ({"file_name": "a.json", "columns": {"prompt": "q", "kto_tag": "good", "title": "t"}}, "sft",
         {"columns.kto_tag", "columns.title"}),
        ({"file_name": "a.json", "tags": {"user_tag": "user"}}, "sft", {"tags"}),
        ({"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m", "query": "q"}}, "sft",
         {"columns.query"}),
        ({"file_name": "a.json", "ranking": True, "columns": {"prompt": "q", "response": "r"}}, "dpo",
         {"ranking", "columns.response"}),
        ({"file_name": "a.json", "columns": {"prompt": "body", "query": "q"}}, "pt", {"columns.query"}),
    ],
)  # fmt: skip
def test_a_key_of_a_data_set_that_is_not_read_is_named(tmp_path, entry, stage, unused):
    values = SFT | {"stage": stage, "dataset": "one", "dataset_dir": {"one": entry}}
    became = converted(values, folder=tmp_path)[1].notes.became
    names = {name for name in became if name.startswith("dataset_info.")}
    assert names == {f"dataset_info.one.{name}" for name in unused}
    assert all(became[name].startswith("nothing: ") for name in names)


@pytest.mark.parametrize(
    ("entry", "ignored"),
    [
        ({"file_name": "a.json"}, None),
        ({"file_name": "a.json", "columns": {"prompt": "q", "response": "r"}}, ["input", "history", "system", "tools"]),
        (
            {"file_name": "a.json", "columns": {"prompt": "q", "query": None, "system": "s"}},
            ["input", "history", "tools"],
        ),
        ({"file_name": "a.json", "columns": {"prompt": "input", "history": "h"}}, ["system", "tools"]),
        ({"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m", "tools": "t"}}, ["system"]),
    ],
)
def test_columns_that_are_not_named_beside_others_are_left_out(tmp_path, entry, ignored):
    values = SFT | {"dataset": "one", "dataset_dir": {"one": entry}}
    assert at(converted(values, folder=tmp_path)[0], "data.train.ignore") == ignored


def test_a_folder_of_a_data_set_is_refused_by_name(tmp_path):
    values = SFT | {"dataset": "one", "dataset_dir": {"one": {"hf_hub_url": "org/a", "folder": "en"}}}
    with pytest.raises(UserError, match=r"dataset_info\.one\.folder: "):
        converted(values, folder=tmp_path)


def test_the_smaller_number_of_samples_is_used(tmp_path):
    entry = {"file_name": "a.json", "num_samples": 9}
    values = SFT | {"dataset": "one", "dataset_dir": {"one": entry}, "max_samples": 5}
    assert at(converted(values, folder=tmp_path)[0], "data.train.sample") == 5


V1 = {"model": "org/base", "train_dataset": "data/v1.yaml", "model_class": "llm", "max_steps": 3}


@pytest.mark.parametrize(
    ("more", "place", "value"),
    [
        ({}, "model.optimizer", {"class_path": "AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.01}}),
        ({}, "model.schedule", None),
        ({}, "trainer.precision", "bf16-mixed"),
        ({}, "data.train.format", "oumi_pl.convert.formats.concatenated_alpaca"),
        ({}, "data.train.sample", 5),
        ({"train_dataset": "data/v1_pairs.yaml"}, "model.class_path", "DPO"),
        ({"peft_config": {"name": "lora", "r": 4}}, "model.lora", {"r": 4, "lora_alpha": 16, "lora_dropout": 0.05}),
        (
            {"peft_config": {"name": "lora"}, "quant_config": {"name": "bnb", "quantization_bit": 4}},
            "model.quantization",
            "nf4",
        ),
        ({"dist_config": {"name": "fsdp2"}}, "trainer.strategy", "fsdp2"),
        ({"optim_config": {"name": "muon", "wd": 0.2}}, "model.optimizer.weight_decay", 0.2),
        ({"micro_batch_size": 2, "global_batch_size": 8}, "trainer.accumulate_grad_batches", 4),
    ],
)
def test_a_key_of_v1_becomes_the_one_that_means_the_same(folder, more, place, value):
    tree, _ = converted(V1 | more, folder=folder)
    assert at(tree, place) == value
    assert_fits(tree)


SAMPLES_V1 = {
    key: (samples.TRAINING | samples.LLAMA_FACTORY)[key]
    for key in llama_factory_v1.KEYS.translated
    if key in samples.TRAINING | samples.LLAMA_FACTORY
} | samples.LLAMA_FACTORY_V1
KINDS_V1 = {
    "SFT": V1,
    "epochs": {key: value for key, value in V1.items() if key != "max_steps"},
    "LoRA": V1 | {"peft_config": {"name": "lora"}},
    "QLoRA": V1 | {"peft_config": {"name": "lora"}, "quant_config": {"name": "bnb"}},
    "DPO": V1 | {"train_dataset": "data/v1_pairs.yaml"},
    "FSDP": V1 | {"dist_config": {"name": "fsdp2"}},
}


@pytest.mark.parametrize("kind", ["QLoRA", "DPO"])
def test_values_of_any_type_are_converted_or_refused_in_v1(folder, kind):
    refuse_in_one_message(KINDS_V1[kind], llama_factory_v1.KEYS, folder=folder)


@pytest.mark.parametrize("kind", KINDS_V1)
def test_every_key_of_v1_changes_the_recipe_or_is_named_with_a_reason(folder, kind):
    assert silent_keys(KINDS_V1[kind], SAMPLES_V1, llama_factory_v1.KEYS, folder=folder) == []


def test_null_turns_off_what_is_on_by_default_in_v1(folder):
    changed = changed_by_null(V1, SAMPLES_V1, llama_factory_v1.KEYS, folder=folder)
    assert changed == {"bf16", "enable_activation_checkpointing"}


@pytest.mark.parametrize(
    ("more", "name", "why"),
    [
        ({"peft_config": {"name": "lora", "infer_dtype": "auto"}}, "peft_config.infer_dtype", "it decides on exports"),
        ({"peft_config": {"name": "freeze", "r": 4}}, "peft_config.r", "it has no effect beside the other keys"),
        ({"quant_config": {"name": "bnb", "compute_dtype": "x"}}, "quant_config.compute_dtype", "layers compute in"),
        ({"dist_config": {"name": "fsdp2", "dcp_path": "x"}}, "dist_config.dcp_path", "the model is loaded from"),
        ({"optim_config": {"name": "muon", "lr": 1}}, "optim_config.lr", "learning_rate overrides it"),
    ],
)
def test_a_key_of_a_plug_in_that_is_not_read_is_named(folder, more, name, why):
    assert why in converted(V1 | more, folder=folder)[1].notes.became[name]


@pytest.mark.parametrize("message", ["peft_config.rank is unknown here", "train_dataset.one.columns is unknown here"])
def test_an_unknown_key_within_a_key_is_refused_by_name(folder, tmp_path, message):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"one": {"path": "a.json", "columns": {}}}))
    more = {"peft_config": {"name": "lora", "rank": 3}} if "rank" in message else {"train_dataset": "t.yaml"}
    with pytest.raises(UserError) as error:
        converted(V1 | more, folder=folder if "rank" in message else tmp_path)
    assert message in str(error.value)


def rows_of(tree, devices: int) -> int:
    """Rows of an update: those of each device that reads its own, times their number."""
    accumulated = at(tree, "trainer.accumulate_grad_batches") or 1
    return at(tree, "data.batch_size") * accumulated * devices // (at(tree, "trainer.strategy.tensor") or 1)


@pytest.mark.parametrize("rows", [8, 24])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_update_has_the_rows_of_global_batch_size_on_any_number_of_devices(folder, rows, size):
    more = {"micro_batch_size": size, "global_batch_size": rows}
    for devices in (None, 1, 2, 4, 8):
        tree, _ = converted(V1 | more, folder=folder, devices=devices)
        assert at(tree, "trainer.devices") == (devices or 1)  # so that no other number multiplies the rows
        assert rows_of(tree, devices or 1) == rows
        assert_fits(tree)


@pytest.mark.parametrize("shared", [2, 4])
@pytest.mark.parametrize("accumulated", [1, 2, 8])
def test_devices_that_share_rows_keep_the_rows_of_an_update(folder, shared, accumulated):
    more = {"micro_batch_size": 2, "cp_size": shared, "global_batch_size": 2 * accumulated * (8 // shared)}
    tree, _ = converted(V1 | more, folder=folder, devices=8)
    assert rows_of(tree, 8) == more["global_batch_size"]


def test_rows_that_can_not_be_divided_among_devices_are_refused(folder):
    with pytest.raises(UserError, match="global_batch_size: 6 rows are no multiple of the 4 devices"):
        converted(V1 | {"global_batch_size": 6}, folder=folder, devices=4)


def test_the_sizes_of_v1_become_those_of_the_strategy(folder):
    more = {"dist_config": {"name": "fsdp2", "offload_params": True}, "mp_shard_size": 4, "mp_replicate_size": 2}
    arguments = {"shards": 4, "replicas": 2, "offload": True}
    assert at(converted(V1 | more, folder=folder)[0], "trainer.strategy.init_args") == arguments
    assert (
        at(converted(V1 | {"dp_size": 4, "cp_size": 2, "micro_batch_size": 2}, folder=folder)[0], "trainer.devices")
        == 8
    )
