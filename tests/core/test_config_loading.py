"""How a configuration is read, what may be written for a value, and how wrong keys and values are told."""

import subprocess
import sys

import pytest

from oumi_pl.core.configs import TrainerType, TrainingConfig
from tests.core.oumi_yaml import HEAD, load, refused


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="c.yaml"):
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return file

    return to_file


UNKNOWN = {
    "top": ("trainig: {}", "trainig: unknown key; did you mean 'training'?"),
    "section": ("training: {max_step: 3}", "training.max_step: unknown key; did you mean 'max_steps'?"),
    "section in section": (
        "training: {profiler: {schedule: {wat: 3}}}",
        "training.profiler.schedule.wat: unknown key; did you mean 'wait'?",
    ),
    "optional section": (
        "deepspeed: {offload_param: {devise: CPU}}",
        "deepspeed.offload_param.devise: unknown key; did you mean 'device'?",
    ),
    "a section too high": ("max_steps: 3", "max_steps: unknown key; did you mean 'training.max_steps'?"),
    "another section": ("training: {lora_r: 8}", "training.lora_r: unknown key; did you mean 'peft.lora_r'?"),
    "dataset too high": (
        "dataset_name: d",
        "dataset_name: unknown key; did you mean 'data.train.datasets[0].dataset_name'?",
    ),
    "nothing like it": ("peft: {quux: 8}", "peft.quux: unknown key; known: "),
    "no text": ("1: 2", "1: unknown key; known: 'data', 'deepspeed', 'fsdp', 'model', 'peft', 'training'"),
    "reinforcement": ("training: {grpo: {temprature: 1}}", "training.grpo.temprature: unknown key; did you mean 'temp"),
}


@pytest.mark.parametrize(("text", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_key(write, text, message):
    assert refused(TrainingConfig.from_yaml, write(HEAD + text)).startswith(message)


def test_unknown_key_of_a_dataset(write):
    text = "data: {validation: {datasets: [{dataset_name: a}, {dataset_nam: b}]}}"
    assert refused(TrainingConfig.from_yaml, write(text)) == (
        "data.validation.datasets[1].dataset_nam: unknown key; did you mean 'dataset_name'?"
    )


FREE = ("training.trainer_kwargs", "model.model_kwargs", "data.train.collator_kwargs", "training.lr_scheduler_kwargs")


@pytest.mark.parametrize("key", FREE)
def test_free_mappings_take_anything(key):
    config = load(f"{key}={{of: {{any: [1, x, null]}}}}")
    for part in key.split("."):
        config = getattr(config, part)
    assert config == {"of": {"any": [1, "x", None]}}


REFUSED = {
    "whole float": ("training: {max_steps: 3.0}", "training.max_steps: 3.0 is not an int"),
    "exponent": ("training: {max_steps: 1e3}", "training.max_steps: 1000.0 is not an int"),
    "truth for int": ("training: {max_steps: true}", "training.max_steps: true is not an int"),
    "text for float": ("training: {learning_rate: fast}", "training.learning_rate: 'fast' is not a float"),
    "truth for float": ("training: {learning_rate: no}", "training.learning_rate: false is not a float"),
    "number for truth": ("training: {compile: 2}", "training.compile: 2 is not true or false"),
    "float for truth": ("training: {compile: 1.0}", "training.compile: 1.0 is not true or false"),
    "text for truth": ("training: {compile: maybe}", "training.compile: 'maybe' is not true or false"),
    "truth for text": (
        "training: {eval_strategy: no}",
        "training.eval_strategy: false is given, but text is needed; YAML reads no and off as false, so quote it",
    ),
    "list for text": ("model: {model_name: [m]}", "model.model_name: ['m'] is not text"),
    "text for list": ("peft: {lora_target_modules: q_proj}", "peft.lora_target_modules: 'q_proj' is not a list"),
    "null in list": ("model: {freeze_layers: [a, null]}", "model.freeze_layers[1]: null is given, but text is needed"),
    "text for mapping": ("training: {trainer_kwargs: x}", "training.trainer_kwargs: 'x' is not a mapping"),
    "number as key": (
        "training: {trainer_kwargs: {1: 2}}",
        "training.trainer_kwargs: the key 1 is not text; quote it",
    ),
    "float for int or text": (
        "training: {dataloader_num_workers: 2.0}",
        "training.dataloader_num_workers: 2.0 is not an int or text",
    ),
    "null": ("training: {max_steps: null}", "training.max_steps: null is given, but an int is needed"),
    "null for section": ("training: null", "training: null is given, but here is a mapping of keys to values"),
    "text for section": ("training: fast", "training: 'fast' is given, but here is a mapping of keys to values"),
    "list for section": ("training: [1]", "training: [1] is given, but here is a mapping of keys to values"),
    "text for datasets": ("data: {train: {datasets: d}}", "data.train.datasets: 'd' is given, but here is a list"),
    "value of an enum": (
        "training: {trainer_type: trl_sft}",
        "training.trainer_type: 'trl_sft' is not a valid value; did you mean 'TRL_SFT'?",
    ),
    "number of an enum": (
        "deepspeed: {zero_stage: 3}",
        "deepspeed.zero_stage: 3 is not a valid value; known: 'ZERO_0', 'ZERO_1', 'ZERO_2', 'ZERO_3'",
    ),
    "PiSSA": (
        "peft: {lora_init_weights: PISSA}",
        "peft.lora_init_weights: 'PISSA' is not a valid value; did you mean 'PISA'?",
    ),
    "long": ("training: {seed: [" + "1, " * 99 + "]}", "training.seed: [1, 1, "),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_value_of_a_wrong_type(write, text, message):
    said = refused(TrainingConfig.from_yaml, write(text))
    assert said.startswith(message)
    assert len(said) < 200


@pytest.mark.parametrize("name", ["TRL_GOLD", "trl_gold"])
def test_trainer_types_that_are_not_here_are_known(name):
    assert refused(load, f"training.trainer_type={name}") == (
        f"training.trainer_type: Oumi's {name.upper()} is not among the trainer types here: "
        "TRL_SFT, TRL_DPO, TRL_KTO, TRL_GKD, TRL_GRPO, VERL_GRPO, HF, OUMI, SFT, DPO, KTO, PRETRAIN"
    )


TAKEN = {
    "int": ("max_steps", "7", 7),
    "quoted int": ("max_steps", "'7'", 7),
    "float": ("learning_rate", "2e-5", 2e-5),
    "quoted float": ("learning_rate", "'2e-5'", 2e-5),
    "int for float": ("learning_rate", "1", 1.0),
    "int or float": ("eval_steps", "7", 7),
    "float for int or float": ("eval_steps", "0.25", 0.25),
    "true": ("compile", "true", True),
    "yes": ("compile", "yes", True),
    "quoted on": ("compile", "'on'", True),
    "1": ("compile", "1", True),
    "0": ("compile", "0", False),
    "quoted False": ("use_peft", "'False'", False),
    "number for text": ("run_name", "12", "12"),
    "one for text": ("run_name", "1", "1"),
    "quoted no": ("eval_strategy", "'no'", "no"),
    "null": ("run_name", "null", None),
    "enum": ("trainer_type", "TRL_DPO", TrainerType.TRL_DPO),
    "enum with its class": ("trainer_type", "TrainerType.SFT", TrainerType.SFT),
}


@pytest.mark.parametrize(("key", "text", "value"), TAKEN.values(), ids=TAKEN)
def test_what_may_be_written_for_a_value(write, key, text, value):
    taken = getattr(TrainingConfig.from_yaml(write(f"{HEAD}training: {{{key}: {text}}}")).training, key)
    assert taken == value
    assert type(taken) is type(value)


BROKEN = {
    "twice": ("a: 1\ntraining:\n  seed: 1\n  seed: 2", " line 4: the key seed is there twice; keep one"),
    "not YAML": ("training: [1\n", " line 2: not valid YAML: did not find expected ',' or ']'"),
    "object": ("a: !!python/object:os.x {}", " line 1: not valid YAML: could not determine a constructor"),
    "list": ("- a", ": a configuration is a mapping (model:, data:, training:), and this is a list"),
    "text": ("a word", ": a configuration is a mapping (model:, data:, training:), and this is text"),
    "null as key": ("null: 3", ": not valid YAML: Incompatible key type 'NoneType'"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_file(write, text, message):
    file = write(text)
    assert refused(TrainingConfig.from_yaml, file).startswith(f"{file}{message}")
    assert refused(TrainingConfig.from_str, text).startswith(f"the text{message}")


def test_no_file(write):
    beside = write(HEAD)
    said = refused(TrainingConfig.from_yaml, beside.with_name("d.yaml"))
    assert said == f"no file {str(beside.with_name('d.yaml'))!r}; did you mean {str(beside)!r}?"


def test_no_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"a: 1\nb: \xff")
    assert refused(TrainingConfig.from_yaml, tmp_path / "c.yaml").endswith("c.yaml line 2: not UTF-8 text")


MISSING = {
    "model": ("data: {train: {datasets: [{dataset_name: d}]}}", "model.model_name"),
    "dataset": ("model: {model_name: m}\ndata: {test: {datasets: [{split: x}]}}", "data.test.datasets[0].dataset_name"),
    "marked": ("model: {model_name: '???'}", "model.model_name"),
    "empty": ("", "model.model_name"),
}


@pytest.mark.parametrize(("text", "key"), MISSING.values(), ids=MISSING)
def test_names_are_needed_to_load(write, text, key):
    assert refused(TrainingConfig.from_yaml, write(text)) == f"{key}: missing, and there is no default"


REFERENCE = f"""{HEAD}
training:
  output_dir: out
  logging_dir: ${{training.output_dir}}/runs
  run_name: '${{model.model_name}}'
"""


def test_references_of_a_file_stay_text(write):
    training = TrainingConfig.from_yaml(write(REFERENCE)).training
    assert (training.logging_dir, training.output_dir) == ("${training.output_dir}/runs", "out")


def test_references_of_a_file_are_resolved_on_demand(write):
    training = TrainingConfig.from_yaml(write(REFERENCE), ignore_interpolation=False).training
    assert (training.logging_dir, training.run_name) == ("out/runs", "m")


def test_references_of_a_text_are_resolved():
    assert TrainingConfig.from_str(REFERENCE).training.logging_dir == "out/runs"
    assert TrainingConfig.from_str(f"{HEAD}training: {{run_name: 's${{training.seed}}'}}").training.run_name == "s42"
    said = refused(TrainingConfig.from_str, f"{HEAD}training: {{run_name: '${{training.sed}}'}}")
    assert said == "training.run_name: Interpolation key 'training.sed' not found"


@pytest.mark.parametrize("text", ['"${"', "'${a'", "'x ${a.b} \\${c}'", '"${a}\\n"'])
def test_any_text_with_a_reference_is_kept(write, text):
    taken = TrainingConfig.from_yaml(write(f"{HEAD}training: {{trainer_kwargs: {{x: {text}}}}}"))
    assert taken.training.trainer_kwargs["x"] == text[1:-1].replace("\\n", "\n")


def test_nothing_heavy_is_imported():
    heavy = {"torch", "lightning", "transformers", "trl", "datasets", "peft", "yaml", "omegaconf"}
    script = f"import sys, oumi_pl.core.configs; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
