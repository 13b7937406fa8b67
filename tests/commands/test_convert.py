"""`convert`: the text of a recipe, which reads back as the recipe."""

import re

import pytest
import yaml

from oumi_pl.commands.convert import convert, main
from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe import as_yaml, to_recipe
from oumi_pl.errors import UserError

OUMI = """
model: {model_name: org/model, model_max_length: 256, torch_dtype_str: bfloat16}
data: {train: {datasets: [{dataset_name: yahma/alpaca-cleaned, split: "train[:99]"}]}}
training:
  trainer_type: TRL_SFT
  learning_rate: 2e-5
  weight_decay: 1e-7
  max_steps: 10
  save_steps: 0
  enable_tensorboard: false
"""

TEXT = """\
# Converted from Oumi's oumi.yaml.
#   python -m oumi_pl fit --config THIS_FILE
seed_everything: 42
engine: trl
model:
  class_path: SFT
  init_args:
    model: org/model
    dtype: bfloat16
    optimizer: {class_path: AdamW, init_args: {lr: 2.0e-5, weight_decay: 1.0e-7}}
    schedule: {class_path: Linear}
# if the tokenizer has no chat template, Oumi takes its own `default`: template: oumi/default
data:
  class_path: SFTData
  init_args:
    train: {path: yahma/alpaca-cleaned, split: 'train[:99]', format: oumi_pl.core.recipe.formats.alpaca}
    train_on: all
    max_length: 256
    overflow: keep_start
    group_by_length: false
    batch_size: 8
trainer:
  devices: 1
  max_steps: 10
  gradient_clip_val: 1.0
name: output
runs_dir: .
checkpoint: {enabled: false}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "oumi.yaml"
    path.write_text(OUMI)
    return path


def test_the_text(file, capsys):
    assert main([str(file)]) == 0
    assert capsys.readouterr().out == TEXT


def test_overrides_and_engine(file, capsys):
    main([str(file), "--engine", "lightning", "--training.max_steps", "7", "--training.learning_rate=3e-4"])
    tree = yaml.safe_load(capsys.readouterr().out)
    assert "engine" not in tree
    assert tree["trainer"]["max_steps"] == 7
    assert tree["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 3e-4


def test_the_text_reads_back_as_the_recipe(file):
    changes = [
        "--training.use_peft=true",
        "--peft.lora_exclude_modules=['.*: {a}', \"b'#\"]",
        "--training.run_name='yes'",
        "--training.enable_wandb=true",
        "--training.trainer_kwargs={save_total_limit: 3}",
        "--training.seed=7",
    ]
    built = to_recipe(TrainingConfig.from_yaml_and_arg_list(file, changes))
    assert yaml.safe_load(convert(file, changes)) == built.tree


@pytest.mark.parametrize(
    "value", [1e-8, 2e-5, 1e-7, 0.0, 0.1, 1.0, 123456.0, 1e22, 3.3333333333333335e-05, -2e-9, 6e-4]
)
def test_numbers_stay_what_they_are(value):
    assert yaml.safe_load(as_yaml({"x": value})) == {"x": value}
    assert isinstance(yaml.safe_load(as_yaml({"x": value}))["x"], float)


def test_numbers_are_short():
    assert as_yaml({"a": 6e-4, "b": 2e-5, "c": 1.5e-7, "d": 0.03}) == "a: 6.0e-4\nb: 2.0e-5\nc: 1.5e-7\nd: 0.03\n"


def test_comments_stand_before_the_key_that_they_are_about():
    tree = {"data": {"class_path": "X", "init_args": {"train": "a", "overflow": "b"}}, "name": "n"}
    comments = {
        "": ["on top"],
        "data.init_args.overflow": ["of overflow"],
        "data.init_args.gone": ["of data"],
        "name": ["of the name " + "and on " * 40],
    }
    lines = as_yaml(tree, comments, "head").splitlines()
    assert lines[:3] == ["# head", "# on top", "# of data"]
    assert lines[lines.index("    overflow: b") - 1] == "    # of overflow"
    assert max(map(len, lines)) <= 110
    assert yaml.safe_load("\n".join(lines)) == tree


def test_resuming_is_reported(file):
    text = convert(file, ["--training.try_resume_from_last_checkpoint=true"])
    assert re.search(r"fit --config THIS_FILE --resume$", text, re.MULTILINE)


def test_mistakes(file):
    with pytest.raises(UserError, match="no file"):
        main([str(file.with_name("none.yaml"))])
    with pytest.raises(UserError, match=r"^trl grpo is not converted; sft, dpo, kto, reward are$"):
        main(["trl grpo --model_name_or_path x/y --beta 0.1"])
    with pytest.raises(UserError, match="is an address; download"):
        main(["oumi://configs/x.yaml"])
    with pytest.raises(UserError, match=r"convert: argument --engine"):
        main([str(file), "--engine", "x"])
    with pytest.raises(UserError, match=r"convert: .*required: config"):
        main([])
    with pytest.raises(UserError, match=r"training\.max_step\b.*max_steps"):
        main([str(file), "--training.max_step", "3"])


def test_a_file_of_comments_alone_has_no_settings(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("# base_model: x\n\n  # learning_rate: 1\n")
    with pytest.raises(UserError, match=r"c\.yaml has no settings; all of its lines are comments"):
        main([str(file)])


def test_the_recipe_is_written_to_a_new_file(file, tmp_path, capsys):
    assert main([str(file), "--output", str(tmp_path / "mine.yaml"), "--training.max_steps", "7"]) == 0
    assert (tmp_path / "mine.yaml").read_text() == TEXT.replace("max_steps: 10", "max_steps: 7")
    assert (
        capsys.readouterr().out
        == f"converted {file} to {tmp_path}/mine.yaml: oumi_pl fit --config {tmp_path}/mine.yaml\n"
    )


def test_a_conversion_that_fails_writes_nothing(file, tmp_path):
    with pytest.raises(UserError, match="max_steps"):
        main([str(file), "--output", str(tmp_path / "mine.yaml"), "--training.max_step", "3"])
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_exists_is_replaced_only_with_overwrite(file, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"mine\.yaml exists; name another file, or replace it with --overwrite"):
        main([str(file), "--output", str(mine)])
    with pytest.raises(UserError, match="max_steps"):
        main([str(file), "--output", str(mine), "--overwrite", "--training.max_step", "3"])
    assert mine.read_text() == "mine"
    assert main([str(file), "--output", str(mine), "--overwrite"]) == 0
    assert mine.read_text() == TEXT


def test_places_that_can_not_be_written_are_refused_before_the_work(file, tmp_path):
    with pytest.raises(UserError, match="is a folder; name a file"):
        main([str(file), "--output", str(tmp_path)])
    with pytest.raises(UserError, match="--output: there is no folder"):
        main([str(file), "--output", str(tmp_path / "none/mine.yaml")])
