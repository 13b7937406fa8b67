"""What users of Oumi's Python API call: `train(config)`, the builders, and the libraries' arguments of a config."""

import dataclasses
from typing import Any

import pytest
import torch

from oumi_pl.builders import (
    build_chat_template,
    build_model,
    build_optimizer,
    build_peft_model,
    build_tokenizer,
    build_trainer,
)
from oumi_pl.core.configs import (
    BackwardPrefetch,
    BaseParams,
    GkdParams,
    GrpoParams,
    LoraWeightInitialization,
    ModelParams,
    PeftParams,
    ShardingStrategy,
    StateDictType,
    TrainerType,
    TrainingParams,
)
from oumi_pl.errors import UserError
from tests.core.oumi import config, tiny_model
from tests.tiny import conversations, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def test_train_is_imported_from_the_package_as_in_oumi(tmp_path, monkeypatch, model):
    from oumi_pl import train

    monkeypatch.chdir(tmp_path)
    rows = write_jsonl(tmp_path / "rows.jsonl", conversations(8))
    tree = {
        "model": {"model_name": model, "model_max_length": 128, "torch_dtype_str": "float32"},
        "data": {"train": {"datasets": [{"dataset_name": "text_sft", "dataset_path": str(rows)}]}},
        "training": {
            **{"trainer_type": "TRL_SFT", "enable_tensorboard": False, "output_dir": "out", "max_steps": 1},
            **{"per_device_train_batch_size": 2, "save_steps": 0},
        },
    }
    train(config(tree))
    assert (tmp_path / "out/model.safetensors").is_file()


def test_the_builders_give_what_a_run_trains(model):
    built = build_model(ModelParams(model_name=model, torch_dtype_str="bfloat16", freeze_layers=["model.embed_tokens"]))
    assert built.dtype == torch.bfloat16
    assert not built.get_input_embeddings().weight.requires_grad
    tokenizer = build_tokenizer(
        ModelParams(model_name=model, tokenizer_pad_token="<|endoftext|>", chat_template="zephyr", model_max_length=99)
    )
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("<|endoftext|>", 99)
    assert "<|user|>" in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def test_the_other_builders(model):
    built = build_peft_model(build_model(ModelParams(model_name=model)), False, PeftParams(lora_r=2))
    trained = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = build_optimizer(built, TrainingParams(optimizer="sgd", learning_rate=0.25))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert "<|assistant|>" in build_chat_template("phi3-instruct")
    with pytest.raises(UserError, match="did you mean 'oumi/zephyr'"):
        build_chat_template("zephyrr")
    assert callable(build_trainer(TrainerType.OUMI))


def test_enums_and_sections_become_those_of_the_libraries():
    fsdp = torch.distributed.fsdp
    assert ShardingStrategy.HYBRID_SHARD_ZERO2.to_torch() is fsdp.ShardingStrategy._HYBRID_SHARD_ZERO2
    assert StateDictType.FULL_STATE_DICT.to_torch() is fsdp.StateDictType.FULL_STATE_DICT
    assert BackwardPrefetch.BACKWARD_PRE.to_torch() is fsdp.BackwardPrefetch.BACKWARD_PRE
    assert BackwardPrefetch.NO_PREFETCH.to_torch() is None
    assert GkdParams(beta=0.25).to_hf_trainer_kwargs()["beta"] == 0.25
    assert "vllm_mode" not in GrpoParams(num_generations=4).to_hf_trainer_kwargs()
    assert GrpoParams(num_generations=4).to_hf_trainer_kwargs()["num_generations"] == 4


def test_peft_params_become_the_configs_of_the_libraries():
    lora = PeftParams(
        lora_r=4, lora_target_modules=["all-linear"], lora_exclude_modules=["a", "b"],
        lora_init_weights=LoraWeightInitialization.RANDOM,
    ).to_lora()  # fmt: skip
    assert (lora.r, lora.target_modules, lora.exclude_modules, lora.init_lora_weights) == (
        *(4, "all-linear", "(a)|(b)", False),
    )
    quantized = PeftParams(q_lora_bits=8, llm_int8_skip_modules=["lm_head"]).to_bits_and_bytes()
    assert (quantized.load_in_8bit, quantized.load_in_4bit) == (True, False)
    assert quantized.llm_int8_skip_modules == ["lm_head"]


def test_training_params_become_the_arguments_of_a_trainer(tmp_path):
    params = TrainingParams(trainer_type=TrainerType.HF, output_dir=str(tmp_path), learning_rate=0.25)
    params.enable_tensorboard = False
    assert params.to_hf().learning_rate == 0.25


@dataclasses.dataclass
class Positive(BaseParams):
    value: Any = 1

    def __finalize_and_validate__(self):
        if isinstance(self.value, int) and self.value <= 0:
            raise ValueError("not positive")


@dataclasses.dataclass
class Nested(BaseParams):
    one: Any
    several: list
    named: dict


@pytest.mark.parametrize("place", ["one", "several", "named", ""])
def test_validation_reaches_sections_in_attributes_lists_and_mappings(place):
    wrong = Positive(-5)
    values = {"one": Positive(), "several": [Positive(), "text"], "named": {"a": Positive(), "b": 3}}
    wrongs = {"one": wrong, "several": [Positive(), wrong], "named": {"a": wrong}}
    nested = Nested(**(values | ({place: wrongs[place]} if place else {})))
    if not place:
        nested.finalize_and_validate()
        return
    with pytest.raises(ValueError, match="not positive"):
        nested.finalize_and_validate()


def test_sections_that_hold_each_other_are_validated_once():
    first, second = Positive(), Positive()
    first.value, second.value = second, first
    first.finalize_and_validate()
