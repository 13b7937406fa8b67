"""What a user may do wrong with data, models, checkpoints and what has to go together; nothing is begun for it."""

import re
import sys

import lightning as L
import pytest
import torch

from oumi_pl.callbacks.predictions import Predictions
from oumi_pl.config import refusals
from oumi_pl.data.base import TextData
from oumi_pl.errors import UserError
from oumi_pl.models.sharding import Sharded
from oumi_pl.modules.base import LanguageModule
from tests.command_line import GONE, CommandLine, jsonl

FIT = ("fit", "--config", "r.yaml")
VALIDATION = {"data.init_args.validation": 0.3}
GOOD = {"prompt": "a b", "response": "c d"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def must_not_run(*_):
    raise AssertionError


def trained_on(rows: str, **changes):
    """A recipe that trains on `data.jsonl`, and that file."""
    return {"data.init_args.train": "data.jsonl"} | changes, {"data.jsonl": rows}


DATA = {
    "unknown columns": (*trained_on(jsonl({"x": 1, "y": 2})), "data.jsonl:1: no format fits the columns x, y"),
    "two kinds of files": (
        {"data.init_args.train": "both"},
        {"both/a.jsonl": jsonl(GOOD), "both/b.csv": "prompt,response\na,b\n"},
        "both: different kinds of files (a.jsonl, b.csv); choose one with a glob",
    ),
    "one too long": (
        *trained_on(jsonl(CHAT), **{"data.init_args.overflow": "error", "data.init_args.max_length": 5}),
        "data.jsonl:1: ",
    ),
    "template file": (
        {"data.init_args.template": "mine.jinja"},
        {"main.jinja": "x"},
        "no chat template file 'mine.jinja'; did you mean 'main.jinja'?",
    ),
    "no template": (
        {"data.init_args.tokenizer.init_args": {"chat_template": False}},
        {},
        "rows.jsonl:1: rows are conversations and the tokenizer has no chat template; choose one with `template`",
    ),
    "template that can't be masked": (
        {"data.init_args.template": "t.jinja"},
        {"t.jinja": "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"},
        "rows.jsonl:1: with this chat template, turn 2 can't be masked exactly",
    ),
    "template that is no Jinja": (
        {"data.init_args.template": "t.jinja"},
        {"t.jinja": "{% for m in messages %}\n{{ m.content }\n{% endfor %}"},
        "chat template (file t.jinja) isn't valid Jinja, line 2",
    ),
    "tokenizer": (
        {"data.init_args.tokenizer": "no/such"},
        {},
        "data.tokenizer: 'no/such' is no folder and not in the cache",
    ),
    "broken tokenizer": ({"data.init_args.tokenizer": "./tok"}, {"tok/x": ""}, "data.tokenizer: can't load"),
}


@pytest.mark.parametrize(("changes", "files", "message"), DATA.values(), ids=DATA)
def test_data(cli, monkeypatch, changes, files, message):
    """Told before any weight is made."""
    monkeypatch.setattr(LanguageModule, "build", must_not_run)
    cli.recipe(changes)
    for name, content in files.items():
        cli.write(name, content)
    assert message in cli.fails(*FIT)


def test_a_data_file_is_not_read_as_a_config(cli):
    """A parser of configs would open it, and take its one row for the arguments of a source."""
    cli.recipe({"data.init_args.train": "data.json"})
    cli.write("data.json", '{"path": "rows.jsonl"}')
    assert "data.json row 1: no format fits the columns path" in cli.fails(*FIT)


PRETRAINED = {"model.init_args.config": GONE, "model.init_args.model": "./there"}
MODELS = {
    "no folder": (PRETRAINED, "model: there is no folder './there'"),
    "freeze": (
        {"model.init_args.freeze": ["model.layer"]},
        "model.freeze: the model has no module 'model.layer'; did you mean 'model.layers'?",
    ),
    "attention": ({"model.init_args.attn": "spda"}, "model.attn: 'spda' does not work for this model"),
}


@pytest.mark.parametrize(("changes", "message"), MODELS.values(), ids=MODELS)
def test_model(cli, changes, message):
    cli.recipe(changes)
    assert message in cli.fails(*FIT)


TOGETHER = {
    "val_every twice": (
        VALIDATION | {"val_every": 1, "trainer.val_check_interval": 2},
        "val_every and trainer.val_check_interval both say when to validate",
    ),
    "val_every without rows": ({"val_every": 1}, "val_every needs held-out rows, but the recipe names none"),
    "callback without rows": (
        {"trainer.callbacks": [{"class_path": "Answers"}]},
        "the callback Answers needs held-out rows, but the recipe names none",
    ),
    "monitor without rows": (
        {"checkpoint.monitor": "val/loss"},
        "checkpoint.monitor: 'val/loss' needs held-out rows, but the recipe names none",
    ),
    "monitor": (
        VALIDATION | {"checkpoint.monitor": "val/los"},
        "checkpoint.monitor: unknown metric 'val/los'; did you mean 'val/loss'?",
    ),
    "early stopping": (
        VALIDATION | {"trainer.callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/los"}}]},
        "monitor of EarlyStopping: unknown metric 'val/los'; did you mean 'val/loss'?",
    ),
    "quantization": (
        {"model.init_args.quantization": "nf4", "model.init_args.lora": {"r": 2}},
        "model.quantization: there are no pretrained weights",
    ),
    "no training rows": (
        {"data.init_args.train": GONE},
        "data.train: `fit` needs a source here, but the recipe names none",
    ),
}


@pytest.mark.parametrize(("changes", "message"), TOGETHER.values(), ids=TOGETHER)
def test_what_does_not_go_together(cli, monkeypatch, changes, message):
    """Told before any weight is made or row read."""
    monkeypatch.setattr(LanguageModule, "build", must_not_run)
    monkeypatch.setattr(TextData, "prepare_data", must_not_run)
    cli.recipe(changes)
    assert message in cli.fails(*FIT)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_command_without_its_rows(cli, command):
    message = cli.fails(command, "--config", "r.yaml")
    assert "needs a source here, but the recipe names none" in message
    assert f"`{command}`" in message


def test_without_a_checkpoint_it_is_said_what_is_measured(cli):
    refusals._check_weights("validate", "org/name")
    assert cli.capsys.readouterr().err == "no --ckpt_path given; using the pretrained weights of org/name\n"


@pytest.mark.parametrize(("setting", "value"), [("max_new_tokens", 0), ("temperature", -1.0)])
def test_predictions_that_cannot_be(setting, value):
    with pytest.raises(UserError, match=f"predictions.{setting} is {value}"):
        refusals._check_predictions([Predictions(**{setting: value})])


OWN_FORMATS = {
    "fails": ("row['nope']", "rows.jsonl:1: own_h.read raised KeyError: 'nope' (HERE/own_h.py line 2)"),
    "makes no record": ("3", "rows.jsonl:1: own_h.read returned a int for this row; a format returns a Conversation"),
}


@pytest.mark.parametrize(("made", "message"), OWN_FORMATS.values(), ids=OWN_FORMATS)
def test_format_of_ones_own(cli, monkeypatch, made, message):
    monkeypatch.delitem(sys.modules, "own_h", raising=False)
    cli.write("own_h.py", f"def read(row):\n    return {made}\n")
    cli.recipe({"data.init_args.train": {"path": "rows.jsonl", "format": "own_h.read"}})
    assert message in cli.fails(*FIT).replace(str(cli.directory), "HERE")


CHECKPOINTS = {
    "absent": ("ct.ckpt", "--ckpt_path: no file 'ct.ckpt'; did you mean 'cut.ckpt'?"),
    "keyword": ("last", "--ckpt_path: no file 'last'"),
    "garbage": ("cut.ckpt", "--ckpt_path: cut.ckpt is not a checkpoint, or was cut short"),
    "folder": (
        "folder",
        "folder is a directory, but not a sharded checkpoint; name the file, folder/x.ckpt",
    ),
    "weights alone": ("weights.pt", "weights.pt: is not a checkpoint of a run (it has no state_dict)"),
}


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize(("path", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoint(cli, command, path, message):
    cli.recipe(VALIDATION)
    cli.write("cut.ckpt", "abc")
    cli.write("folder/x.ckpt", "abc")
    torch.save({"weight": torch.zeros(2)}, "weights.pt")
    assert message in cli.fails(command, "--config", "r.yaml", "--ckpt_path", path)


# ---- callbacks of Lightning, and strategies

CALLBACKS = "lightning.pytorch.callbacks."


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("StochasticWeightAveraging", {"swa_lrs": 1e-3}, "would average nothing; take WeightAveraging, or "),
        ("ModelPruning", {"pruning_fn": "l1_unstructured"}, "looks for weights before they are built"),
        ("BatchSizeFinder", {}, "`fit --dry_run` measures the memory of a batch_size"),
    ],
)
def test_callbacks_that_can_not_work_are_refused_by_name(cli, name, arguments, says):
    cli.recipe({"trainer.callbacks": [{"class_path": CALLBACKS + name, "init_args": arguments}]})
    message = cli.fails(*FIT)
    assert f"trainer.callbacks: {name} " in message
    assert says in message


def test_the_class_that_averages_instead_is_accepted(cli):
    for name in (f"{CALLBACKS}WeightAveraging", "oumi_pl.callbacks.ema.EMA"):
        cli.recipe({"trainer.callbacks": [{"class_path": name}]})
        cli.works(*FIT)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches: .* keep one"),
        ("--val_every=2", "val_every: .* trainer.val_check_interval"),
        ("--max_tokens=5000", "max_tokens: .* trainer.max_steps or max_epochs"),
    ],
)
def test_a_schedule_of_accumulation_is_refused_beside_what_it_changes(cli, option, says):
    schedule = {"class_path": f"{CALLBACKS}GradientAccumulationScheduler", "init_args": {"scheduling": {0: 1, 1: 2}}}
    cli.recipe({"trainer.callbacks": [schedule], "trainer.max_steps": GONE, "data.init_args.validation": 0.3})
    assert re.search(says, cli.fails(*FIT, option))


def test_the_advice_for_deepspeed_is_a_strategy_that_is_accepted(cli):
    message = cli.fails(*FIT, "--trainer.strategy=deepspeed_stage_2", "--trainer.devices=2")
    advised = message.partition("take strategy: ")[2].split()[0]
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=advised, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, Sharded)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ("--trainer.strategy.shards=0", "trainer.strategy.shards is 0, but has to be at least 1"),
        ("--trainer.strategy.replicas=0", "trainer.strategy.replicas is 0, but has to be at least 1"),
        ("--trainer.strategy.replicas=3", "trainer.strategy: replicas 3 does not divide 1 devices"),
        ("--trainer.strategy.tensor=0", "trainer.strategy.tensor is 0, but has to be at least 1"),
        ("--trainer.strategy.tensor=2", "trainer.strategy: tensor 2 does not divide 1 devices"),
    ],
)
def test_sizes_of_sharding_that_can_not_be_are_refused(cli, sizes, says):
    cli.recipe({})
    assert says in cli.fails(*FIT, "--trainer.strategy=Sharded", sizes)
