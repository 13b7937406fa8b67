"""What is looked at when a configuration is complete, and how Python is told its mistakes."""

import pytest

from oumi_pl.core.configs import (
    DataParams,
    DatasetParams,
    DatasetSplit,
    DatasetSplitParams,
    MixedPrecisionDtype,
    ModelParams,
    OumiConfigError,
    TrainerType,
    TrainingConfig,
    TrainingParams,
)
from oumi_pl.errors import UserError
from tests.core.oumi_yaml import load, refused

FINAL = {
    "dataset_path": (
        ["data.train.datasets[0].dataset_path=gone.jsonl"],
        "data.train.datasets[0].dataset_path: there is no 'gone.jsonl'",
    ),
    "no dataset": (["data.train.datasets=[]"], "data.train.datasets: empty, but there has to be a dataset to train on"),
    "two collators": (
        ["data.train.collator_name=text_with_padding", "data.test.collator_name=vision_language_sft"],
        "data.test.collator_name: 'vision_language_sft' differs from train.collator_name, 'text_with_padding'",
    ),
    "collator of validation alone": (
        ["data.validation.collator_name=text_with_padding"],
        "data.validation.collator_name: 'text_with_padding' differs from train.collator_name, null; all splits share",
    ),
    "no name": (["model.model_name=''"], "model.model_name: missing, and there is no default"),
    "length": (["model.model_max_length=0"], "model.model_max_length is 0, but has to be at least 1"),
    "nothing to evaluate": (
        ["training.eval_strategy=steps"],
        "training.eval_strategy: 'steps' needs a dataset in data.validation, and there is none",
    ),
    "deepspeed file": (
        ["deepspeed.enable_deepspeed=true", "deepspeed.deepspeed_config_path=gone.json"],
        "deepspeed.deepspeed_config_path: there is no file 'gone.json'",
    ),
    "storage": (
        ["training.use_peft=true", "peft.q_lora=true", "fsdp.enable_fsdp=true", "model.torch_dtype_str=bfloat16"],
        "peft.bnb_4bit_quant_storage: 'uint8' differs from model.torch_dtype_str, 'bfloat16'",
    ),
    "storage of auto": (
        ["training.use_peft=true", "peft.q_lora=true", "fsdp.enable_fsdp=true"],
        "peft.bnb_4bit_quant_storage: 'uint8' differs from model.torch_dtype_str, 'auto'",
    ),
}


@pytest.mark.parametrize(("typed", "message"), FINAL.values(), ids=FINAL)
def test_what_is_refused_at_the_end(tmp_path, monkeypatch, typed, message):
    monkeypatch.chdir(tmp_path)
    config = load(*typed)
    assert refused(config.finalize_and_validate).startswith(message)


def test_flash_attention_has_to_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load("model.attn_implementation=flash_attention_2")
    assert refused(config.finalize_and_validate).startswith("model.attn_implementation: flash_attention_2 needs")


def adapters(folder, config='{"base_model_name_or_path": "base"}'):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config)
    return ModelParams(model_name=str(folder))


def test_a_folder_of_adapters_stands_for_its_base_with_them(tmp_path):
    model = adapters(tmp_path / "a")
    model.finalize_and_validate()
    assert (model.model_name, model.adapter_model) == ("base", str(tmp_path / "a"))


def test_a_folder_of_both_stays_the_model(tmp_path):
    model = adapters(tmp_path / "a")
    (tmp_path / "a/config.json").write_text("{}")
    model.finalize_and_validate()
    assert model.model_name == model.adapter_model == str(tmp_path / "a")


def test_adapters_that_are_named_are_not_looked_for(tmp_path):
    model = adapters(tmp_path / "a")
    model.adapter_model = "other"
    model.finalize_and_validate()
    assert (model.model_name, model.adapter_model) == (str(tmp_path / "a"), "other")


@pytest.mark.parametrize(("config", "message"), [("{}", "does not name its base model"), ("{", "is not valid JSON")])
def test_adapters_without_a_base_are_refused(tmp_path, config, message):
    said = refused(adapters(tmp_path / "a", config).finalize_and_validate)
    assert said.startswith("model_name: ")
    assert message in said


PYTHON = {
    "length": (
        lambda: TrainingParams(max_steps=0, num_train_epochs=0),
        "max_steps is 0 and num_train_epochs 0, so there is nothing to train; one of them has to be positive",
    ),
    "type": (lambda: TrainingParams(max_steps="many"), "max_steps: 'many' is not an int"),
    "trainer type": (
        lambda: TrainingParams(trainer_type="trl_dpo"),
        "trainer_type: 'trl_dpo' is not a valid value; did you mean 'TRL_DPO'?",
    ),
    "section": (
        lambda: TrainingConfig(training={"max_steps": 3}),
        "training: {'max_steps': 3} is not an object of TrainingParams",
    ),
    "no section": (lambda: TrainingConfig(model=None), "model: null is given, but an object of ModelParams is needed"),
    "together": (
        lambda: TrainingConfig(training=TrainingParams(mixed_precision_dtype=MixedPrecisionDtype.BF16)),
        "training.mixed_precision_dtype: BF16 needs float32 weights",
    ),
}


@pytest.mark.parametrize(("make", "message"), PYTHON.values(), ids=PYTHON)
def test_python_raises_the_same_message(make, message):
    assert refused(make).startswith(message)


def test_names_may_be_given_later_in_python():
    config = TrainingConfig(training=TrainingParams(trainer_type=TrainerType.TRL_SFT))
    assert refused(config.finalize_and_validate).startswith("data.train.datasets: empty")
    config.data = DataParams(train=DatasetSplitParams(datasets=[DatasetParams()]))
    assert refused(config.finalize_and_validate) == (
        "data.train.datasets[0].dataset_name: missing, and there is no default"
    )
    config.data.get_split(DatasetSplit.TRAIN).datasets[0].dataset_name = "d"
    assert refused(config.finalize_and_validate) == "model.model_name: missing, and there is no default"
    config.model.model_name = "m"
    config.finalize_and_validate()


def test_what_was_assigned_is_checked_at_the_end():
    config = load()
    config.training.max_steps = "7"
    config.finalize_and_validate()
    assert config.training.max_steps == 7
    config.training.max_grad_norm = -1
    assert refused(config.finalize_and_validate).startswith("training.max_grad_norm is -1")


def test_it_is_a_mistake_of_the_user():
    assert issubclass(OumiConfigError, UserError)
