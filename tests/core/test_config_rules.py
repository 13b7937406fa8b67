"""What one section says for another, and the order in which contradictions are told."""

import json
from pathlib import Path

import pytest

from oumi_pl.core.configs import TrainingParams
from tests.core.oumi_yaml import load, refused

SEVEN_WRONGS = [
    ("model.compile=true", "model.compile: for training, it is training.compile"),
    (
        "training.compile=true",
        "fsdp.use_orig_params: has to be true, or left out, when training.compile is true",
    ),
    ("deepspeed.enable_deepspeed=true", "deepspeed.enable_deepspeed: fsdp.enable_fsdp is true as well; keep one"),
    (
        "deepspeed.train_batch_size=8",
        "deepspeed.train_batch_size is 8, but has to be 'auto' for TRL_SFT, which counts the rows itself",
    ),
    (
        "training.mixed_precision_dtype=BF16",
        "training.mixed_precision_dtype: BF16 needs float32 weights, and model.torch_dtype_str is 'auto'",
    ),
    (
        "data.train.datasets[0].dataset_kwargs.return_conversations=false",
        "data.train.datasets[0].dataset_kwargs.return_conversations: has to be true, or left out",
    ),
    (
        "training.trainer_kwargs.remove_unused_columns=true",
        "training.trainer_kwargs.remove_unused_columns: has to be false, or left out",
    ),
]
AROUND = ("training.trainer_type=TRL_SFT", "fsdp.use_orig_params=false", "data.train.collator_name=vision_language_sft")


@pytest.mark.parametrize("first", range(len(SEVEN_WRONGS)))
def test_of_several_wrongs_the_first_is_reported(first):
    """Each hides those after it; two shardings contradict each other only as long as both are on."""
    typed = [wrong for wrong, _ in SEVEN_WRONGS[first:]] + ["deepspeed.enable_deepspeed=true"]
    sharded = f"fsdp.enable_fsdp={str(first <= 2).lower()}"
    assert refused(load, *AROUND, sharded, *typed).startswith(SEVEN_WRONGS[first][1])


def test_without_the_wrongs_it_loads():
    assert load(*AROUND, "fsdp.enable_fsdp=true").fsdp.enable_fsdp


@pytest.mark.parametrize("dtype", ["float32", "f32", "float"])
def test_mixed_precision_over_float32_weights(dtype):
    assert load("training.mixed_precision_dtype=FP16", f"model.torch_dtype_str={dtype}").model.dtype == "float32"


@pytest.mark.parametrize("trainer_type", ["TRL_SFT", "TRL_DPO"])
def test_max_length_is_handed_on_to_trl(trainer_type):
    config = load(f"training.trainer_type={trainer_type}", "model.model_max_length=128")
    assert config.training.trainer_kwargs == {"max_length": 128}


@pytest.mark.parametrize("trainer_type", ["HF", "OUMI", "SFT", "DPO", "PRETRAIN"])
def test_max_length_is_handed_on_to_no_other(trainer_type):
    assert load(f"training.trainer_type={trainer_type}", "model.model_max_length=128").training.trainer_kwargs == {}


def test_max_length_of_the_model_wins_with_a_warning():
    typed = ("training.trainer_type=TRL_SFT", "model.model_max_length=128", "training.trainer_kwargs.max_length=64")
    with pytest.warns(UserWarning, match="max_length is 64, and model.model_max_length 128, which wins"):
        config = load(*typed)
    assert config.training.trainer_kwargs["max_length"] == 128


@pytest.mark.parametrize(("trainer_type", "moved"), [("HF", True), ("TRL_DPO", True), ("OUMI", False), ("SFT", False)])
def test_liger_is_an_argument_of_the_trainers_that_know_it(trainer_type, moved):
    config = load(f"training.trainer_type={trainer_type}", "model.enable_liger_kernel=true")
    assert config.training.trainer_kwargs.get("use_liger_kernel", False) == moved
    assert config.model.enable_liger_kernel == (not moved)


def test_the_vision_collator_takes_conversations_of_all_splits():
    validation = "data.validation.datasets=[{dataset_name: v}]"
    config = load(AROUND[0], AROUND[2], validation, "training.trainer_kwargs.dataset_kwargs.add_special_tokens=false")
    for split in (config.data.train, config.data.validation):
        assert split.datasets[0].dataset_kwargs == {"return_conversations": True}
    assert config.training.trainer_kwargs == {
        "remove_unused_columns": False,
        "dataset_kwargs": {"add_special_tokens": False, "skip_prepare_dataset": True},
    }


@pytest.mark.parametrize("trainer_type", ["HF", "TRL_DPO", "OUMI"])
def test_only_trl_prepares_conversations_itself(trainer_type):
    assert load(f"training.trainer_type={trainer_type}", AROUND[2]).training.trainer_kwargs == {}


def test_datasets_with_the_models_processor_load_it_alike():
    datasets = [
        {"dataset_name": "a", "dataset_kwargs": {"processor_name": "m"}},
        {"dataset_name": "b", "dataset_kwargs": {"processor_name": "other"}},
        {"dataset_name": "c", "dataset_kwargs": {"processor_name": "m", "processor_kwargs": {}}},
        {"dataset_name": "d"},
    ]
    config = load("model.processor_kwargs.size=3", f"data.train.datasets={json.dumps(datasets)}")
    given = [dataset.dataset_kwargs.get("processor_kwargs") for dataset in config.data.train.datasets]
    assert given == [{"size": 3}, None, {}, None]


def test_a_revision_among_the_models_arguments_is_moved():
    with pytest.warns(DeprecationWarning, match="model.model_revision"):
        config = load("model.model_kwargs={revision: abc, vocab_size: 8}")
    assert config.model.model_revision == "abc"
    assert config.model.model_kwargs == {"vocab_size": 8}


def test_target_col_is_deprecated():
    with pytest.warns(DeprecationWarning, match="target_col"):
        load("data.train.target_col=text")


@pytest.mark.parametrize(
    ("name", "fit"),
    [("a b/c:d", "a_b_c_d"), ("v1.2_x-y", "v1.2_x-y"), ("x" * 100, "x" * 100), ("", ""), (None, None)],
)
def test_names_of_runs_fit_trackers(name, fit):
    assert TrainingParams(run_name=name).run_name == fit


def test_long_names_of_runs_stay_different():
    one, other = (TrainingParams(run_name="x" * 200 + end).run_name for end in "ab")
    assert len(one) == 100
    assert "..." in one
    assert one != other


def test_telemetry_lies_in_the_output_directory():
    assert load("training.output_dir=out").training.telemetry_dir == Path("out/telemetry")
    assert load("training.telemetry.telemetry_dir=/tel").training.telemetry_dir == Path("/tel")
    assert load("training.telemetry.telemetry_dir=null").training.telemetry_dir is None
