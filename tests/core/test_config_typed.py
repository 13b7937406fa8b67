"""What is typed wins over the file, key by key."""

import pytest

from oumi_pl.core.configs import DatasetParams, OffloadConfig, TrainingConfig
from tests.core.oumi_yaml import HEAD, LEAST, refused


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="c.yaml"):
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return file

    return to_file


def typed(*args):
    return TrainingConfig.from_yaml_and_arg_list(None, [*LEAST, *args])


@pytest.mark.parametrize(
    "args",
    [
        ["--training.max_steps", "3"],
        ["--training.max_steps=3"],
        ["training.max_steps=3"],
        ["--training.max_steps=9", "--training.max_steps", "3"],
        ["--local-rank=0", "--training.max_steps", "3", "--local_rank", "1"],
        ["--training", "{max_steps: 3}"],
    ],
)
def test_what_is_typed_wins(write, args):
    config = TrainingConfig.from_yaml_and_arg_list(write(HEAD + "training: {max_steps: 1, seed: 7}"), args)
    assert (config.training.max_steps, config.training.seed) == (3, 7)


def test_lists_and_mappings_are_typed_as_yaml():
    config = typed("--peft.lora_target_modules", "[q_proj,v_proj]", "--data.train.datasets", "[{dataset_name: x}]")
    assert config.peft.lora_target_modules == ["q_proj", "v_proj"]
    assert config.data.train.datasets == [DatasetParams(dataset_name="x")]


@pytest.mark.parametrize("key", ["data.train.datasets[0].split", "data.train.datasets.0.split"])
def test_an_element_is_typed_by_its_number(key):
    assert typed(f"--{key}", "train[:8]").data.train.datasets == [DatasetParams(dataset_name="d", split="train[:8]")]


def test_keys_of_free_and_of_absent_sections_are_typed():
    config = typed("--training.trainer_kwargs.beta", "0.1", "deepspeed.zero_stage=ZERO_3")
    assert config.training.trainer_kwargs == {"beta": 0.1}
    offloaded = typed("deepspeed.zero_stage=ZERO_3", "--deepspeed.offload_param.buffer_count", "9")
    assert offloaded.deepspeed.offload_param == OffloadConfig(buffer_count=9)


def test_negative_numbers_and_null_are_values():
    config = typed("--training.max_steps", "-1", "--training.max_grad_norm", "null")
    assert (config.training.max_steps, config.training.max_grad_norm) == (-1, None)


def test_typed_references_are_resolved_those_of_the_file_are_not(write):
    args = ["--training.output_dir", "${training.seed}/${training.run_name}"]
    config = TrainingConfig.from_yaml_and_arg_list(write(HEAD + "training: {run_name: ok, logging_dir: '${a}'}"), args)
    assert (config.training.output_dir, config.training.logging_dir) == ("42/ok", "${a}")


TYPED = {
    "no value": (["--training.compile"], "--training.compile: a value is missing"),
    "no value, then a key": (["--training.compile", "--training.seed", "3"], "--training.compile: a value is missing"),
    "no key": (["recipe.yaml"], "'recipe.yaml' belongs to no key"),
    "unknown": (["--training.sed", "3"], "training.sed: unknown key; did you mean 'seed'?"),
    "unknown section": (["--trainig.seed", "3"], "trainig: unknown key; did you mean 'training'?"),
    "type": (["--training.seed", "x"], "training.seed: 'x' is not an int"),
    "no such element": (["--data.train.datasets[1].split", "x"], "data.train.datasets[1].split: there is no such elem"),
    "element by name": (["--data.train.datasets.first", "x"], "data.train.datasets.first: there is no such element"),
    "below a value": (["--training.seed.x", "3"], "training.seed: {'x': 3} is not an int"),
    "not YAML": (["--training.seed", "[1"], "training.seed: '[1': not valid YAML: did not find expected ',' or ']'"),
    "not a reference": (["--training.run_name", "${"], "training.run_name: '${': "),
    "reference to nothing": (["--training.run_name", "${x}"], "training.run_name: Interpolation key 'x' not found"),
}


@pytest.mark.parametrize(("args", "message"), TYPED.values(), ids=TYPED)
def test_wrong_override(args, message):
    said = refused(typed, *args)
    assert said.startswith(message)
    assert "\n" not in said
