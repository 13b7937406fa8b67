"""LLaMA-Factory's YAML, of the trainers that it has had for long and of `v1`."""

import json

import pytest
import yaml

from oumi_pl.convert.llama_factory import KEYS
from oumi_pl.errors import UserError
from tests.convert.helpers import assert_fits, at, converted

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
        ({"dataset": "chats"}, "data.train", {"path": "org/chats", "format": "messages"}),
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
        ({"dataset": "pictures"}, "pictures: images, video and audio"),
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
