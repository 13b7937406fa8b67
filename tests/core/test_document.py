"""What Oumi's documents show, as they show it: a config in Python, a trainer by hand, and configs that can't be."""

import json
import math

import pytest
import transformers
import yaml

from oumi_pl.config.files import merge
from oumi_pl.core.configs import (
    DataParams,
    DatasetParams,
    DatasetSplitParams,
    ModelParams,
    TrainerType,
    TrainingConfig,
    TrainingParams,
)
from oumi_pl.core.trainers import Trainer
from oumi_pl.train import train
from tests.command_line import CommandLine
from tests.core.battery import COMMON, SFT
from tests.core.oumi import tiny_model


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    tiny_model(tmp_path / "tiny")
    return CommandLine(tmp_path, monkeypatch, capsys)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics_rank0000.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "train/loss") if name in row]


def test_a_config_in_python(cli):
    config = TrainingConfig(
        data=DataParams(
            train=DatasetSplitParams(datasets=[DatasetParams(dataset_name="text_sft", dataset_path="rows.jsonl")])
        ),
        model=ModelParams(model_name="tiny"),
        training=TrainingParams(trainer_type=TrainerType.TRL_SFT),
    )
    train(config)
    out = cli.directory / "output"
    assert len(losses(out)) == 6  # 16 rows in batches of 8, three times
    assert all(map(math.isfinite, losses(out)))
    assert transformers.AutoModelForCausalLM.from_pretrained(out).num_parameters() == 35232
    assert TrainingConfig.from_yaml(out / "telemetry/training_config.yaml") == config


@pytest.mark.parametrize("keyword", ["tokenizer", "processing_class"])
def test_a_trainer_by_hand(cli, keyword):
    model = transformers.AutoModelForCausalLM.from_pretrained("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained("tiny")
    dataset = [tokenizer(f"document {number}") for number in range(8)]
    params = TrainingParams(max_steps=2, logging_steps=1, output_dir="by_hand", enable_tensorboard=False)
    trainer = Trainer(model=model, **{keyword: tokenizer}, args=params, train_dataset=dataset)
    trainer.train()
    trainer.save_state()
    trainer.save_model(config=TrainingConfig(model=ModelParams(model_name="tiny"), training=params))
    assert len(losses(cli.directory / "by_hand")) == 2
    assert (cli.directory / "by_hand/model.safetensors").exists()


RULES = {
    "compile of the model": ("model: {compile: true}", "model.compile: for training, it is training.compile"),
    "compile and sharded parameters": (
        "training: {compile: true}\nfsdp: {use_orig_params: false}",
        "fsdp.use_orig_params: has to be true, or left out, when training.compile is true",
    ),
    "sharded twice": (
        "fsdp: {enable_fsdp: true}\ndeepspeed: {enable_deepspeed: true}",
        "deepspeed.enable_deepspeed: fsdp.enable_fsdp is true as well; keep one",
    ),
    "a batch size of DeepSpeed's": (
        "deepspeed: {enable_deepspeed: true, train_batch_size: 8}",
        "deepspeed.train_batch_size is 8, but has to be 'auto' for TRL_SFT",
    ),
    "mixed precision of half weights": (
        "model: {torch_dtype_str: bfloat16}\ntraining: {mixed_precision_dtype: BF16}",
        "training.mixed_precision_dtype: BF16 needs float32 weights",
    ),
    "conversations that are not returned": (
        "data: {train: {collator_name: vision_language_sft, datasets: "
        "[{dataset_name: hf_vision, dataset_kwargs: {return_conversations: false}}]}}",
        "data.train.datasets[0].dataset_kwargs.return_conversations: has to be true",
    ),
    "columns that are left out": (
        "data: {train: {collator_name: vision_language_sft}}\n"
        "training: {trainer_kwargs: {remove_unused_columns: true}}",
        "training.trainer_kwargs.remove_unused_columns: has to be false",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_sections_that_contradict_each_other(cli, name):
    text, message = RULES[name]
    written(cli, text)
    assert cli.fails("train", "-c", "oumi.yaml").startswith(f"error: {message}")  # with exit code 2


def test_two_lengths_of_which_the_models_wins(cli):
    written(cli, "model: {model_max_length: 64}\ntraining: {trainer_kwargs: {max_length: 32}}")
    with pytest.warns(UserWarning, match="max_length is 32, and model.model_max_length 64, which wins"):
        cli.works("train", "-c", "oumi.yaml")
    config = yaml.safe_load((cli.directory / "out/run/config.yaml").read_text())
    assert config["data"]["init_args"]["max_length"] == 64


def test_liger_is_handed_on(cli):
    written(cli, "model: {enable_liger_kernel: true}")
    cli.works("train", "-c", "oumi.yaml")
    saved = TrainingConfig.from_yaml(cli.directory / "out/run/telemetry/training_config.yaml")
    assert saved.training.trainer_kwargs["use_liger_kernel"] is True
    assert saved.model.enable_liger_kernel is False


def written(cli, text):
    """A config that would run, and over it what the text says."""
    cli.write("oumi.yaml", yaml.safe_dump(merge(merge(COMMON, yaml.safe_load(SFT)), yaml.safe_load(text))))
