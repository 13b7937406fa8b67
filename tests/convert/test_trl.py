"""TRL's command lines and YAML; the defaults that are written out are those of the TRL that is installed."""

import dataclasses

import pytest
import yaml

from oumi_pl.commands.convert import text_of
from oumi_pl.convert import peers
from oumi_pl.convert.trl import DATASET_KEYS, KEYS, UNCUT
from oumi_pl.errors import UserError
from tests.convert import samples
from tests.convert.helpers import assert_fits, at, changed_by_null, converted, refuse_in_one_message, silent_keys

ARGUMENTS = {"model_name_or_path": "org/base", "dataset_name": "org/rows"}


@pytest.fixture(scope="module")
def configs():
    trl = pytest.importorskip("trl")
    return {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig, "reward": trl.RewardConfig}


def default(config, name):
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


@pytest.mark.parametrize("trainer", KEYS)
def test_a_default_that_is_written_out_is_trls(configs, trainer):
    from trl import ModelConfig

    config = configs[trainer]
    tree, _ = converted(ARGUMENTS | {"use_peft": True}, trainer)
    assert at(tree, "model.optimizer.lr") == default(config, "learning_rate")
    assert at(tree, "model.optimizer.weight_decay") == default(config, "weight_decay")
    assert at(tree, "model.gradient_checkpointing") == default(config, "gradient_checkpointing")
    assert at(tree, "data.max_length") == default(config, "max_length")
    assert at(tree, "data.batch_size") == default(config, "per_device_train_batch_size")
    assert at(tree, "trainer.max_epochs") == default(config, "num_train_epochs")
    assert at(tree, "trainer.gradient_clip_val") == default(config, "max_grad_norm")
    assert at(tree, "seed_everything") == default(config, "seed")
    assert at(tree, "checkpoint.every") == default(config, "save_steps")
    assert (default(config, "lr_scheduler_type"), default(config, "optim")) == ("linear", "adamw_torch_fused")
    assert default(config, "bf16") is None
    assert at(tree, "trainer.precision") == "bf16-mixed"
    lora = at(tree, "model.lora")
    assert {key: default(ModelConfig, key) for key in ("lora_alpha", "lora_dropout")}.items() <= lora.items()
    assert lora["r"] == default(ModelConfig, "lora_r")
    if trainer in ("dpo", "kto"):
        assert at(tree, "model.loss.beta") == default(config, "beta")
    assert_fits(tree)


def test_every_argument_of_trl_is_translated_or_named_with_a_reason(configs):
    """None of them is unknown: what has a default that is None or off may be refused once it is on."""
    from trl import ModelConfig, ScriptArguments

    for trainer, config in configs.items():
        keys = KEYS[trainer]
        for field in (
            *dataclasses.fields(config),
            *dataclasses.fields(ModelConfig),
            *dataclasses.fields(ScriptArguments),
        ):
            value = {"model_name_or_path": "m", "dataset_name": "d"}.get(field.name, "no")
            try:
                converted(ARGUMENTS | {field.name: value}, trainer)
            except UserError as error:
                assert "is unknown here" not in str(error), (trainer, field.name)
            except (ValueError, TypeError):
                assert field.name in keys.translated  # it was read, as a number


@pytest.mark.parametrize(
    ("trainer", "more", "place", "value"),
    [
        ("sft", {}, "data.train_on", "completion_or_all"),
        ("sft", {"assistant_only_loss": True}, "data.train_on", "assistant"),
        ("sft", {"completion_only_loss": False}, "data.train_on", "all"),
        ("sft", {"packing": True}, "data.packing", True),
        ("sft", {"dataset_text_field": "body"}, "data.train.columns", {"text": "body"}),
        ("sft", {"dataset_train_split": "all", "dataset_config": "main"}, "data.train.config", "main"),
        ("sft", {"eval_strategy": "steps", "eval_steps": 50}, "val_every", 50),
        ("sft", {"eval_strategy": "epoch"}, "data.validation.split", "test"),
        ("sft", {"use_peft": True, "lora_target_modules": ["all-linear"]}, "model.lora.target_modules", None),
        ("sft", {"use_peft": True, "load_in_4bit": True}, "model.quantization", "nf4"),
        ("sft", {"dtype": "bfloat16"}, "model.dtype", "bfloat16"),
        ("sft", {"warmup_ratio": 0.1, "lr_scheduler_type": "cosine"}, "model.schedule.warmup", 0.1),
        ("sft", {"bf16": False}, "trainer.precision", None),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]}, "model.loss.weights", [1.0, 0.5]),
        ("dpo", {"loss_weights": [2.0]}, "model.loss.weights", [2.0]),
        ("dpo", {"loss_type": "ipo", "beta": 0.2}, "model.loss", {"class_path": "IPO", "init_args": {"beta": 0.2}}),
        ("dpo", {"sync_ref_model": True}, "model.sync_every", 512),
        ("kto", {"desirable_weight": 1.5}, "model.desirable_weight", 1.5),
        ("reward", {"center_rewards_coefficient": 0.01}, "model.loss.center_rewards_coefficient", 0.01),
    ],
)
def test_an_argument_becomes_the_key_that_means_the_same(trainer, more, place, value):
    tree, _ = converted(ARGUMENTS | more, trainer)
    assert at(tree, place) == value
    assert_fits(tree)


@pytest.mark.parametrize(
    ("trainer", "more", "message"),
    [
        ("sft", {"neftune_noise_alpha": 5}, "neftune_noise_alpha: noise on embeddings has no counterpart"),
        ("sft", {"beta": 0.1}, "beta is unknown here"),
        ("sft", {"loss_type": "dft"}, "loss_type: 'dft' has no counterpart"),
        ("dpo", {"f_divergence_type": "js_divergence"}, "the only value is reverse_kl"),
        ("sft", {"packing_strategy": "wrapped"}, "the only value is bfd"),
        ("sft", {"model_name_or_path": None}, "model_name_or_path: missing"),
        (None, {}, "add --trainer sft, dpo, kto, reward"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(trainer, more, message):
    values = {key: value for key, value in (ARGUMENTS | more).items() if value is not None}
    with pytest.raises(UserError) as error:
        peers.recipe(values, "TRL", None, trainer, None)
    assert message in str(error.value)


SAMPLES = samples.TRAINING | samples.TRL | {"bf16": False}


@pytest.mark.parametrize("more", [{}, {"use_peft": True}, {"eval_strategy": "steps"}])
@pytest.mark.parametrize("trainer", KEYS)
def test_every_argument_changes_the_recipe_or_is_named_with_a_reason(trainer, more):
    known = {key: value for key, value in SAMPLES.items() if key in KEYS[trainer].translated}
    assert silent_keys(ARGUMENTS | more, known, KEYS[trainer], trainer=trainer) == []


@pytest.mark.parametrize("trainer", KEYS)
def test_values_of_any_type_are_converted_or_refused(trainer):
    refuse_in_one_message(ARGUMENTS | {"use_peft": True}, KEYS[trainer], trainer=trainer)
    datasets = [{"path": "org/rows"}]
    refuse_in_one_message(ARGUMENTS | {"datasets": datasets}, DATASET_KEYS, within="datasets", trainer=trainer)


@pytest.mark.parametrize("trainer", KEYS)
def test_null_is_the_default_but_where_trl_reads_it_otherwise(trainer):
    known = {key: value for key, value in SAMPLES.items() if key in KEYS[trainer].translated}
    changed = changed_by_null(ARGUMENTS, known, KEYS[trainer], trainer=trainer)
    assert changed == {"max_grad_norm", "gradient_checkpointing", "max_length"}
    tree, _ = converted(ARGUMENTS | {"max_length": None}, trainer)
    assert at(tree, "data.overflow") == "error"  # TRL cuts no row then
    assert at(converted(ARGUMENTS | {"max_length": UNCUT}, trainer)[0], "data.overflow") == "keep_start"


@pytest.mark.parametrize(
    ("options", "strategy", "devices"),
    [
        ("--accelerate_config fsdp2", "fsdp2", 8),
        ("--accelerate_config zero3 --num_processes 2", "fsdp2", 2),
        ("--accelerate_config zero2 --num_processes 2", "ddp", 2),
        ("--accelerate_config single_gpu", None, 1),
        ("--deepspeed {folder}/mine.json", "fsdp2", None),
        ("--config_file {folder}/own.yaml", {"class_path": "Sharded", "init_args": {"offload": True}}, 3),
        ("--fsdp full_shard --fsdp_config {folder}/fsdp.json",
         {"class_path": "Sharded", "init_args": {"offload": True}}, None),
        ("--fsdp 'full_shard offload'", {"class_path": "Sharded", "init_args": {"offload": True}}, None),
    ],
)  # fmt: skip
def test_devices_and_strategy_are_those_that_accelerate_would_start(tmp_path, options, strategy, devices):
    own = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": True}, "num_processes": 6}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own | {"num_machines": 2}))
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "fsdp.json").write_text('{"offload_params": true}')
    text = text_of(f"trl sft --model_name_or_path m --dataset_name d {options.format(folder=tmp_path)}", [])
    tree = yaml.safe_load(text)
    assert (tree["trainer"].get("strategy"), tree["trainer"].get("devices")) == (strategy, devices)


@pytest.mark.parametrize("option", ["--deepspeed", "--fsdp_config", "--config_file"])
def test_a_file_that_can_not_be_read_is_named(tmp_path, option):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json: can't be read as JSON or YAML: "):
        text_of(f"trl sft --model_name_or_path m --dataset_name d {option} {tmp_path}/x.json", [])


def test_the_options_of_a_launcher_are_read_or_named(tmp_path):
    options = "--num-processes=4 --num_machines 2 --multi_gpu"
    (tmp_path / "run.sh").write_text(SCRIPT.replace("--config_file fsdp.yaml", options))
    text = text_of(str(tmp_path / "run.sh"), [])
    trainer = yaml.safe_load(text)["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == (2, 2)
    assert "launcher.--multi_gpu: it decides on how processes are started" in text


SCRIPT = """\
#!/bin/sh
# trl dpo --an old line
export X=1
accelerate launch --config_file fsdp.yaml \\
    trl/scripts/sft.py \\
    --model_name_or_path org/base --dataset_name "org/my rows" \\
    --learning_rate 2.0e-4 --use-peft --lora_target_modules q_proj v_proj  # LoRA
"""


@pytest.mark.parametrize("wrapped", ["a string", "a script", "a YAML with the command"])
def test_a_command_line_is_read_from_a_string_a_script_and_its_yaml(tmp_path, wrapped):
    (tmp_path / "run.sh").write_text(SCRIPT)
    (tmp_path / "c.yaml").write_text("learning_rate: 2.0e-4\nuse_peft: true\nlora_target_modules: [q_proj, v_proj]\n")
    line = 'trl sft --model_name_or_path org/base --dataset_name "org/my rows" '
    given = {
        "a string": f"{line}--learning_rate 2e-4 --use_peft --lora_target_modules q_proj v_proj",
        "a script": str(tmp_path / "run.sh"),
        "a YAML with the command": f"{line}--config {tmp_path / 'c.yaml'}",
    }[wrapped]
    text = text_of(given, [])
    assert "path: org/my rows" in text
    assert ("fsdp.yaml: there is no such file here" in text) == (wrapped == "a script")
    assert "lr: 2.0e-4" in text
    assert "target_modules: [q_proj, v_proj]" in text
    assert "class_path: SFT\n" in text


def test_a_yaml_needs_the_trainer_and_options_override_it(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model_name_or_path: org/base\ndataset_name: org/pairs\nbeta: 0.3\n")
    assert "lr: 5.0e-6" in (
        text := text_of(str(file), ["--learning_rate=5e-6"], trainer="dpo", devices=2, engine="trl")
    )
    assert "engine: trl" in text
    assert "devices: 2" in text
    assert "beta: 0.3" in text


def test_a_key_or_value_can_end_no_comment(tmp_path):
    file = tmp_path / "c.yaml"
    values = {"base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "r", "type": "alpaca"}]}
    values |= {"wandb_x\nmodel: {}": 1, "special_tokens": {"bos_token": "\x1b[31m\nmodel: {}"}}
    file.write_text(yaml.safe_dump(values))
    text = text_of(str(file), [])
    assert "\x1b" not in text
    assert yaml.safe_load(text)["model"]["init_args"]["model"] == "m"
