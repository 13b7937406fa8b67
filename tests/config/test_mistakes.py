"""What a user may do wrong with keys, options, values and classes, and the one message it ends in; bugs; full disks."""

import errno
import platform

import pytest
import torch

from oumi_pl.errors import UserError, machine_failure, nearest
from tests.command_line import GONE, CommandLine

FIT = ("fit", "--config", "r.yaml")
VALIDATION = {"data.init_args.validation": 0.3}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


MISSPELT = {
    "class": ({"model.init_args.optimiser": {}}, "model.optimiser: unknown key; did you mean 'model.optimizer'?"),
    "empty section": ({"modle": {}}, "modle: unknown key; did you mean 'model'?"),
    "source": (
        {"data.init_args.train": {"paht": "rows.jsonl"}},
        "data.train.paht: unknown key; did you mean 'data.train.path'?",
    ),
    "callback": (
        {"trainer.callbacks": [{"class_path": "Answers", "init_args": {"row": 3}}]},
        "trainer.callbacks.0.row: unknown key; did you mean 'trainer.callbacks.0.rows'?",
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
    "class": ("--model.optimiser AdamW", "unknown option --model.optimiser; did you mean '--model.optimizer'?"),
    "class in class": (
        "--model.optimizer.weight_deca 0.1",
        "unknown option --model.optimizer.weight_deca; did you mean '--model.optimizer.weight_decay'?",
    ),
    "class in class, union": (
        "--model.schedule.warmap 3",
        "unknown option --model.schedule.warmap; did you mean '--model.schedule.warmup'?",
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
    "class path": ("--model.loss nowhere.Loss", "model.loss: nowhere.Loss: there is no module 'nowhere'; searched "),
    "engine": ("--engine tlr", "engine: 'tlr' is not a valid value; did you mean 'trl'?"),
    "name": ("--name a/b", "name: 'a/b' can't be the name of a folder"),
}


@pytest.mark.parametrize(("typed", "message"), OPTIONS.values(), ids=OPTIONS)
def test_wrong_option(cli, typed, message):
    assert message in cli.fails(*FIT, *typed.split())


VALUES = {
    "int": ({"data.init_args.batch_size": "many"}, "data.batch_size: 'many' is not an int"),
    "whole": ({"data.init_args.max_length": 1.5}, "data.max_length: 1.5 is not an int"),
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
    "max_steps": ({"trainer.max_steps": -5}, "trainer: `max_steps` must be a non-negative integer or -1"),
    "no steps": ({"trainer.max_steps": 0}, "trainer.max_steps is 0, so there is nothing to train"),
    "accumulation": (
        {"trainer.accumulate_grad_batches": 0},
        "trainer.accumulate_grad_batches is 0, but has to be at least 1",
    ),
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
    "accelerator": (
        {"trainer.accelerator": "gpuu"},
        "unknown accelerator 'gpuu'; did you mean 'gpu'?",
    ),
    "strategy": ({"trainer.strategy": "ddpp"}, "trainer.strategy: unknown strategy 'ddpp'; did you mean 'ddp'?"),
    "strategy of a later version": ({"trainer.strategy": "fsdp3"}, "unknown strategy 'fsdp3'; did you mean 'fsdp2'?"),
    "strategy unlike any": ({"trainer.strategy": "zero"}, "known: 'Sharded', 'auto', 'ddp', 'fsdp2'"),
    "clipping": ({"trainer.gradient_clip_algorithm": "vale"}, "trainer: `gradient_clip_algorithm` vale is invalid"),
    "architecture": (
        {"model.init_args.config.model_type": "lama"},
        "model.config.model_type: unknown architecture 'lama'; did you mean 'llama'?",
    ),
    "engine": ({"engine": "tlr"}, "engine: 'tlr' is not a valid value; did you mean 'trl'?"),
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
    "no class": (
        {"model": [1]},
        "model: [1] is not a LanguageModule; write for example `model: {class_path: SFT",
    ),
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
    assert "trainer.callbacks.0: own_f.Own is not a subclass of Callback" in cli.fails(*FIT)


@pytest.mark.parametrize("hidden", [False, True])
def test_full_disk(cli, monkeypatch, hidden):
    """One message, and the run is marked as failed; torch's writer may hide the reason behind an error of its own."""

    def full(*_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            if hidden:
                raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr("oumi_pl.runs.checkpoints.torch.save", full)
    code, _, err = cli.run(*FIT)
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(message) == 1
    assert message[0].startswith("error: No space left on device to write runs/r/checkpoints/step-00000002.ckpt")
    assert message[0].endswith("; free some space and continue with --resume, or choose another --runs_dir")
    assert "Traceback" not in err
    assert cli.state("runs/r")["status"] == "failed"
    assert not list(cli.directory.glob("runs/r/checkpoints/*"))


def test_out_of_memory():
    assert "halve data.batch_size" in machine_failure(torch.OutOfMemoryError("CUDA out of memory"))
    assert machine_failure(RuntimeError("other")) is None


def test_another_rank_exited():
    assert "another rank exited" in machine_failure(RuntimeError("[pair.cc:553] Connection closed by peer [::1]:1"))
    for words in ("Read error [127.0.0.1]:5: Connection reset by peer", "NCCL error: remote process exited"):
        assert "If it says nothing, it was killed" in machine_failure(RuntimeError(words))
    assert machine_failure(ConnectionResetError("Connection reset by peer")) is None  # of the network


def test_bug_of_ours_keeps_its_traceback(cli, monkeypatch):
    monkeypatch.setattr("oumi_pl.callbacks.run_folder.folders.write_state", {}.__getitem__)
    code, _, err = cli.run(*FIT)
    assert code == 1
    assert "Traceback" in err
    *_, versions, last = err.rstrip().splitlines()
    assert last == "this looks like a bug of oumi_pl; please report it with all of these lines"
    assert f"torch {torch.__version__.partition(chr(43))[0]}" in versions
    assert f"Python {platform.python_version()}, " in versions


def test_mistake_in_a_class_of_ones_own_is_not_called_a_bug_of_ours(cli):
    code = "import lightning as L\nclass Own(L.Callback):\n  def on_train_start(self, *_):\n    {}['x']\n"
    cli.write("own_g.py", code)
    cli.recipe({"trainer.callbacks": [{"class_path": "own_g.Own"}]})
    code, _, err = cli.run(*FIT)
    assert code == 1
    assert "KeyError: 'x'" in err
    assert err.rstrip().endswith("own_g.py line 4")
    assert "the error comes from your file" in err


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "is killed by signal: Killed. ",
            "was killed, which is what the system does to a process when memory",
        ),
        ("is killed by signal: Bus error. It is possible", "ran out of shared memory (/dev/shm): enlarge it"),
        ("is killed by signal: Segmentation fault. ", "was ended by the signal 'Segmentation fault'"),
        ("exited unexpectedly", "ended unexpectedly: set data.workers to 0 to see the error"),
    ],
)
def test_a_loader_process_that_ended_is_named_with_the_likely_cause(words, message):
    error = RuntimeError(f"DataLoader worker (pid 4711) {words}")
    output = machine_failure(error)
    assert message in output
    assert output.endswith("continue with --resume")
    second = RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly")
    second.__cause__ = error
    assert machine_failure(second) == output


def test_a_full_cache_disk_and_a_full_run_disk_have_different_messages(tmp_path):
    full = OSError(28, "No space left on device", str(tmp_path / "cache" / "examples" / "x.bin"))
    assert "set OUMI_PL_CACHE to a folder on another disk" in machine_failure(full)
    elsewhere = OSError(28, "No space left on device", str(tmp_path / "runs" / "x"))
    assert "choose another --runs_dir" in machine_failure(elsewhere)
