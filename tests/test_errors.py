"""The battery: what a user may do wrong, and the one message that it ends in."""

import errno

import pytest
import torch

from oumi_pl.errors import UserError, nearest, of_the_machine
from tests.command_line import GONE, CommandLine, jsonl

FIT = ("fit", "--config", "r.yaml")
VALIDATION = {"data.init_args.validation": 0.3}
GOOD = {"prompt": "a b", "response": "c d"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def trained_on(rows: str, **changes):
    """A recipe that trains on `data.jsonl`, and that file."""
    return {"data.init_args.train": "data.jsonl"} | changes, {"data.jsonl": rows}


MISSPELT = {
    "top": ({"sed_everything": 3}, "sed_everything: unknown key; did you mean 'seed_everything'?"),
    "section": ({"trainer.max_step": 3}, "trainer.max_step: unknown key; did you mean 'trainer.max_steps'?"),
    "class": ({"model.init_args.optimiser": {}}, "model.optimiser: unknown key; did you mean 'optimizer'?"),
    "class in class": (
        {"model.init_args.optimizer.init_args.weight_deca": 0.1},
        "model.optimizer.weight_deca: unknown key; did you mean 'weight_decay'?",
    ),
    "empty section": ({"modle": {}}, "modle: unknown key; did you mean 'model'?"),
    "source": ({"data.init_args.train": {"paht": "rows.jsonl"}}, "data.train.paht: unknown key; did you mean 'path'?"),
    "callback": (
        {"trainer.callbacks": [{"class_path": "Answers", "init_args": {"row": 3}}]},
        "trainer.callbacks.0.row: unknown key; did you mean 'rows'?",
    ),
    "in a wrong section": ({"max_steps": 3}, "max_steps: unknown key; did you mean 'trainer.max_steps'?"),
    "in a wrong class": (
        {"model.init_args.batch_size": 3},
        "model.batch_size: unknown key; did you mean 'data.batch_size'?",
    ),
    "a level too high": ({"model.lora": {"r": 8}}, "model.lora: belongs one level deeper, under model.init_args"),
    "model config": (
        {"model.init_args.config.hiden_size": 3},
        "model.config.hiden_size: llama has no such value; did you mean 'hidden_size'?",
    ),
    "lora": ({"model.init_args.lora": {"rr": 8}}, "model.lora.rr: unknown key; did you mean 'r'?"),
    "no mapping": ({"trainer": "fast"}, "trainer: 'fast' is given, but here is a mapping of keys to values"),
}


@pytest.mark.parametrize(("changes", "message"), MISSPELT.values(), ids=MISSPELT)
def test_misspelt_key_in_the_recipe(cli, changes, message):
    cli.recipe(changes)
    assert message in cli.fails(*FIT)


OPTIONS = {
    "top": ("--sed_everything 3", "unknown option --sed_everything; did you mean '--seed_everything'?"),
    "section": ("--trainer.max_step 3", "unknown option --trainer.max_step; did you mean '--trainer.max_steps'?"),
    "section=": ("--trainer.max_step=3", "unknown option --trainer.max_step; did you mean '--trainer.max_steps'?"),
    "class": ("--model.optimiser AdamW", "model.optimiser: unknown key; did you mean 'optimizer'?"),
    "class in class": (
        "--model.optimizer.weight_deca 0.1",
        "model.optimizer.weight_deca: unknown key; did you mean 'weight_decay'?",
    ),
    "class in class, union": (
        "--model.schedule.warmap 3",
        "model.schedule.warmap: unknown key; did you mean 'warmup'?",
    ),
    "lora": ("--model.lora.rr 8", "model.lora.rr: unknown key; did you mean 'r'?"),
    "without its section": ("--batch_size 3", "unknown option --batch_size; did you mean '--data.batch_size'?"),
    "without its class": ("--lr 3e-4", "unknown option --lr; did you mean '--model.optimizer.lr'?"),
    "nothing like it": ("--quux 3", "unknown option --quux; `--help` lists all, `--model.help SFT` those of a class"),
    "no option": ("r.yaml", "'r.yaml' belongs to no option; a recipe is given as --config NAME or FILE"),
    "no value": ("--trainer.max_steps", "--trainer.max_steps: a value is missing"),
    "no value in a class": ("--data.batch_size", "--data.batch_size: a value is missing"),
    "wrong type": ("--data.batch_size many", "data.batch_size: 'many' is not an int"),
    "literal": ("--data.overflow dropp", "data.overflow: 'dropp' is not a valid value; did you mean 'drop'?"),
    "class name": ("--model.optimizer AdamX", "model.optimizer: unknown class 'AdamX'; did you mean 'Adamax'?"),
    "class path": ("--model.loss nowhere.Loss", "model.loss: No module named 'nowhere'"),
    "engine": ("--engine trl", "engine: 'trl' is not a valid value; the only one so far is 'lightning'"),
    "name": ("--name a/b", "name: 'a/b' can't be the name of a folder"),
}


@pytest.mark.parametrize(("typed", "message"), OPTIONS.values(), ids=OPTIONS)
def test_wrong_option(cli, typed, message):
    assert message in cli.fails(*FIT, *typed.split())


VALUES = {
    "int": ({"data.init_args.batch_size": "many"}, "data.batch_size: 'many' is not an int"),
    "whole": ({"data.init_args.max_length": 1.5}, "data.max_length: '1.5' is not an int"),
    "float": ({"model.init_args.optimizer.init_args.lr": "fast"}, "model.optimizer.lr: 'fast' is not a float"),
    "section": ({"trainer.max_steps": "many"}, "trainer.max_steps: 'many' is not an int"),
    "model config": (
        {"model.init_args.config.hidden_size": "big"},
        "model.config: Validation error for field 'hidden_size'",
    ),
    "batch_size": ({"data.init_args.batch_size": 0}, "data.batch_size is 0, but has to be at least 1"),
    "warmup": (
        {"model.init_args.schedule.init_args.warmup": -1},
        "model.schedule.warmup is -1, but can't be negative",
    ),
    "lr": ({"model.init_args.optimizer.init_args.lr": -1.0}, "model.optimizer: Invalid learning rate: -1.0"),
    "max_steps": ({"trainer.max_steps": -5}, "trainer: `max_steps` must be a non-negative integer or -1"),
    "no steps": ({"trainer.max_steps": 0}, "trainer.max_steps is 0, so there is nothing to train"),
    "accumulation": (
        {"trainer.accumulate_grad_batches": 0},
        "trainer.accumulate_grad_batches is 0, but has to be at least 1",
    ),
    "lora rank": ({"model.init_args.lora": {"r": 0}}, "model.lora: `r` should be a positive integer"),
    "every": ({"checkpoint.every": 0}, "checkpoint: every (0) and keep (1) have to be at least 1"),
    "val_every": (VALIDATION | {"val_every": 0}, "val_every is 0, but has to be at least 1 optimizer step"),
    "overflow": (
        {"data.init_args.overflow": "dropp"},
        "data.overflow: 'dropp' is not a valid value; did you mean 'drop'?",
    ),
    "dtype": (
        {"model.init_args.dtype": "float23"},
        "model.dtype: 'float23' is not a valid value; did you mean 'float32'?",
    ),
    "precision": (
        {"trainer.precision": "bf16-mixd"},
        "trainer.precision: 'bf16-mixd' is not a valid value; did you mean 'bf16-mixed'?",
    ),
    "accelerator": ({"trainer.accelerator": "gpuu"}, "trainer.accelerator: there is no 'gpuu'; did you mean 'gpu'?"),
    "strategy": ({"trainer.strategy": "ddpp"}, "trainer.strategy: there is no 'ddpp'; did you mean 'ddp'?"),
    "clipping": ({"trainer.gradient_clip_algorithm": "vale"}, "trainer: `gradient_clip_algorithm` vale is invalid"),
    "architecture": (
        {"model.init_args.config.model_type": "lama"},
        "model.config.model_type: unknown architecture 'lama'; did you mean 'llama'?",
    ),
    "engine": ({"engine": "trl"}, "engine: 'trl' is not a valid value; the only one so far is 'lightning'"),
}


@pytest.mark.parametrize(("changes", "message"), VALUES.values(), ids=VALUES)
def test_wrong_value(cli, changes, message):
    cli.recipe(changes)
    assert message in cli.fails(*FIT)


CLASSES = {
    "model": ({"model.class_path": "SFTT"}, "model: unknown class 'SFTT'; did you mean 'SFT'?"),
    "data": ({"data.class_path": "SFTDat"}, "data: unknown class 'SFTDat'; did you mean 'SFTData'?"),
    "optimizer": (
        {"model.init_args.optimizer.class_path": "adamw8"},
        "model.optimizer: unknown class 'adamw8'; did you mean 'AdamW'?",
    ),
    "schedule": (
        {"model.init_args.schedule.class_path": "Cosin"},
        "model.schedule: unknown class 'Cosin'; did you mean 'Cosine'?",
    ),
    "loss": (
        {"model.init_args.loss": {"class_path": "CrossEntropi"}},
        "model.loss: unknown class 'CrossEntropi'; did you mean 'CrossEntropy'?",
    ),
    "tokenizer": (
        {"data.init_args.tokenizer": {"class_path": "ByteTokeniser"}},
        "data.tokenizer: unknown class 'ByteTokeniser'; did you mean 'ByteTokenizer'?",
    ),
    "callback": (
        {"trainer.callbacks": [{"class_path": "Answer"}]},
        "trainer.callbacks.0: unknown class 'Answer'; did you mean 'Answers'?",
    ),
    "no class": ({"model": [1]}, "model: [1] does not name a LanguageModule; write class_path: NAME"),
    "no model": ({"model": GONE}, "model: missing, and there is no default"),
}


@pytest.mark.parametrize(("changes", "message"), CLASSES.values(), ids=CLASSES)
def test_unknown_class(cli, changes, message):
    cli.recipe(changes)
    assert message in cli.fails(*FIT)


MODULES = {
    "absent": ("", "gone_a.Own", "there is no module 'gone_a'; did you mean 'own_a'?"),
    "without the class": ("class Own: pass\n", "own_b.Ow", "module 'own_b' has no 'Ow'; did you mean 'Own'?"),
    "not Python": ("class Own:\n  def f(self) pass\n", "own_c.Own", "own_c.py line 2: expected ':'"),
    "lacks a package": ("import nowhere\n", "own_d.Own", "its module imports 'nowhere', which is not installed"),
    "fails": ("x = 1\n1 / 0\n", "own_e.Own", "its module can't be imported: ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("place", ["model.init_args.loss", "trainer.callbacks"])
@pytest.mark.parametrize(("code", "path", "message"), MODULES.values(), ids=MODULES)
def test_class_of_ones_own(cli, place, code, path, message):
    file = path.partition(".")[0].replace("gone", "own")
    cli.write(f"{file}.py", code)
    value = {"class_path": path}
    cli.recipe({place: [value] if place == "trainer.callbacks" else value})
    said = cli.fails(*FIT)
    assert message in said
    assert said.startswith(f"error: {place.replace('init_args.', '')}")


def test_class_of_another_kind(cli):
    cli.write("own_f.py", "class Own: pass\n")
    cli.recipe({"trainer.callbacks": [{"class_path": "own_f.Own"}]})
    assert "trainer.callbacks: own_f.Own is not a subclass of Callback" in cli.fails(*FIT)


DATA = {
    "no file": (
        {"data.init_args.train": "row.jsonl"},
        {},
        "row.jsonl: no such file or directory (in .: did you mean 'rows.jsonl'?)",
    ),
    "empty": (*trained_on(""), "data.jsonl: split 'train' has no rows"),
    "not JSON": (*trained_on(jsonl(GOOD, GOOD) + '{"prompt": "a\n'), "data.jsonl:3: not valid JSON"),
    "lacks a column": (*trained_on(jsonl(GOOD, {"prompt": "a"})), "data.jsonl:2: no column 'response'"),
    "unknown columns": (*trained_on(jsonl({"x": 1, "y": 2})), "data.jsonl:1: no format fits the columns x, y"),
    "two formats": (*trained_on(jsonl(GOOD, CHAT)), "data.jsonl:2: no column 'prompt'"),
    "two kinds of files": (
        {"data.init_args.train": "both"},
        {"both/a.jsonl": jsonl(GOOD), "both/b.csv": "prompt,response\na,b\n"},
        "both: different kinds of files (a.jsonl, b.csv); choose one with a glob",
    ),
    "all too long": (
        *trained_on(jsonl(CHAT, CHAT), **{"data.init_args.overflow": "drop", "data.init_args.max_length": 5}),
        "data.train: none of 2 rows is left (2 longer than max_length)",
    ),
    "one too long": (
        *trained_on(jsonl(CHAT), **{"data.init_args.overflow": "error", "data.init_args.max_length": 5}),
        "data.jsonl:1: ",
    ),
    "template": ({"data.init_args.template": "chatm"}, {}, "unknown chat template 'chatm'; did you mean 'chatml'?"),
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
    monkeypatch.setattr("oumi_pl.modules.base.build_model", None)
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
    "lora targets": (
        {"model.init_args.lora": {"r": 2, "target_modules": ["qproj"]}},
        "model.lora: Target modules {'qproj'} not found in the base model",
    ),
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
    "val_every without rows": ({"val_every": 1}, "val_every needs held-out rows, and the recipe names none"),
    "callback without rows": (
        {"trainer.callbacks": [{"class_path": "Answers"}]},
        "the callback Answers needs held-out rows, and the recipe names none",
    ),
    "monitor without rows": (
        {"checkpoint.monitor": "val/loss"},
        "checkpoint.monitor: 'val/loss' needs held-out rows, and the recipe names none",
    ),
    "monitor": (
        VALIDATION | {"checkpoint.monitor": "val/los"},
        "checkpoint.monitor: there is no metric 'val/los'; did you mean 'val/loss'?",
    ),
    "early stopping": (
        VALIDATION | {"trainer.callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/los"}}]},
        "monitor of EarlyStopping: there is no metric 'val/los'; did you mean 'val/loss'?",
    ),
    "quantization": (
        {"model.init_args.quantization": "nf4", "model.init_args.lora": {"r": 2}},
        "model.quantization: there are no pretrained weights",
    ),
    "no training rows": (
        {"data.init_args.train": GONE},
        "data.train: `fit` needs a source here, and the recipe names none",
    ),
    "runs_dir": (
        {"runs_dir": "rows.jsonl/runs"},
        "runs_dir: can't write to rows.jsonl/runs: rows.jsonl is not a directory",
    ),
}


@pytest.mark.parametrize(("changes", "message"), TOGETHER.values(), ids=TOGETHER)
def test_what_does_not_go_together(cli, monkeypatch, changes, message):
    """Told before any weight is made, and where it can be before any row is read."""
    monkeypatch.setattr("oumi_pl.modules.base.build_model", None)
    if "runs_dir" not in changes:
        monkeypatch.setattr("oumi_pl.data.base.rows", None)
    cli.recipe(changes)
    assert message in cli.fails(*FIT)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_command_without_its_rows(cli, command):
    message = cli.fails(command, "--config", "r.yaml")
    assert "needs a source here, and the recipe names none" in message
    assert f"`{command}`" in message


CHECKPOINTS = {
    "absent": ("ck.ckpt", "--ckpt_path: no file 'ck.ckpt'; did you mean 'cut.ckpt'?"),
    "keyword": ("last", "--ckpt_path: no file 'last'"),
    "garbage": ("cut.ckpt", "--ckpt_path: cut.ckpt is not a checkpoint, or was cut short"),
    "folder": ("folder", "--ckpt_path: folder is a directory and no sharded checkpoint; name the file, folder/x.ckpt"),
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


@pytest.mark.parametrize("hidden", [False, True])
def test_full_disk(cli, monkeypatch, hidden):
    """One message, and the run is marked as failed; torch's writer may hide the reason behind an error of its own."""

    def full(*_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            if hidden:
                raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr("oumi_pl.checkpoints.torch.save", full)
    code, _, err = cli.run(*FIT)
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(message) == 1
    assert message[0].startswith("error: No space left on device to write runs/r/checkpoints/step-00000002.ckpt")
    assert message[0].endswith("; make room, and go on with --resume, or choose another --runs_dir")
    assert "Traceback" not in err
    assert cli.state("runs/r")["status"] == "failed"
    assert not list(cli.directory.glob("runs/r/checkpoints/*"))


def test_out_of_memory():
    assert "halve data.batch_size" in of_the_machine(torch.OutOfMemoryError("CUDA out of memory"))
    assert of_the_machine(RuntimeError("other")) is None


def test_bug_of_ours_keeps_its_traceback(cli, monkeypatch):
    monkeypatch.setattr("oumi_pl.callbacks.run_folder.runs.write_state", {}.__getitem__)
    code, _, err = cli.run(*FIT)
    assert code == 1
    assert "Traceback" in err
    assert err.rstrip().endswith("this looks like a bug of oumi_pl; please report it with the lines above")


def test_mistake_in_a_class_of_ones_own_is_not_called_a_bug_of_ours(cli):
    code = "import lightning as L\nclass Own(L.Callback):\n  def on_train_start(self, *_):\n    {}['x']\n"
    cli.write("own_g.py", code)
    cli.recipe({"trainer.callbacks": [{"class_path": "own_g.Own"}]})
    code, _, err = cli.run(*FIT)
    assert code == 1
    assert "KeyError: 'x'" in err
    assert err.rstrip().endswith("own_g.py line 4")
    assert "this comes from a file of yours" in err


@pytest.mark.parametrize(
    ("name", "names", "end"),
    [
        ("max_step", ["max_steps", "lr"], "; did you mean 'max_steps'?"),
        ("adamw", ["Adam", "AdamW"], "; did you mean 'AdamW'?"),
        ("x", ["b", "a"], "; known: 'a', 'b'"),
        ("x", [], ""),
        ("x", [f"a{i}" for i in range(20)], ", ... (20 in all)"),
    ],
)
def test_nearest(name, names, end):
    assert nearest(name, names).endswith(end)


def test_user_error_is_no_kind_of_value_error():
    """Libraries catch those of their own, and would swallow it."""
    assert UserError.__mro__[1] is Exception
