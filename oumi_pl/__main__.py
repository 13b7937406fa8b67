"""The command line: answers what needs no heavy import, then hands over to LightningCLI or a command of our own."""

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from oumi_pl import __version__, runs
from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError, nearest, of_the_machine

HELP = """\
usage: oumi_pl COMMAND [options]          (or: python -m oumi_pl COMMAND)

  recipes   those that come with it:      oumi_pl recipes; recipes show NAME; recipes copy NAME FILE
  preview   what a model will see:        oumi_pl preview --config quickstart/sft
  fit       train on a recipe:            oumi_pl fit --config quickstart/sft
  runs      what was trained, and how far: oumi_pl runs; runs compare A B
  generate  completions:                  oumi_pl generate --model runs/NAME/model --prompt TEXT

  validate  metrics of held-out rows:     oumi_pl validate --config RECIPE --ckpt_path FILE
  test      metrics of the test rows
  predict   one completion per row, as jsonl
  prepare   tokenize a pretraining corpus once, into shards
  export    a checkpoint to a folder that transformers loads
  compare   a recipe on several engines:   oumi_pl compare --config RECIPE --engines lightning,trl
  train     an Oumi training config:       oumi_pl train -c oumi.yaml --training.max_steps 3
  convert   an Oumi config as a recipe:    oumi_pl convert oumi.yaml

options of fit, validate, test and predict:
  --config NAME|FILE      a recipe, by name or path; several merge, the later wins
  --KEY VALUE             any value of a recipe: --data.batch_size 8 --trainer.max_steps 100
  --resume [RUN]          fit: go on with the last unfinished run of the recipe, or with this run folder
  --engine hf|trl         fit: with transformers' Trainer or TRL's, the same training
  --print_config          print what would run, and stop
  --help                  all options, and --model.help SFT those of a class (these take some seconds)

A recipe can name any Python class, so running a recipe is running code: run only those that you trust.
"""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = (
    *TRAINER_COMMANDS,
    *("recipes", "preview", "runs", "generate"),
    *("prepare", "export", "compare", "train", "convert"),
)


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 2 for a mistake of the user's, 1 for a bug."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # the parser's way to end after --help and --print_config; Lightning's after Ctrl-C
        return _code_of(stop)
    except Exception as error:
        if message := of_the_machine(error):
            print(f"error: {message}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(_whose(error), file=sys.stderr)
        return 1


def _code_of(stop: SystemExit) -> int:
    if isinstance(stop.__context__, KeyboardInterrupt):
        print("interrupted; fit --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if argv[0] == "--version":
        print(f"oumi_pl {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
    # classes of one's own, named by class_path, lie beside the recipe that one runs
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if command not in TRAINER_COMMANDS:
        return int(importlib.import_module(f"oumi_pl.commands.{command}").main(rest))
    return _train(command, rest)


def _train(command: str, rest: list[str]) -> int:
    args, configs, trees = _with_recipe_paths(rest)
    resume, args = _take_resume(args)
    asks_for_help = any(arg.partition("=")[0].endswith((".help", "--help")) or arg == "-h" for arg in args)
    if not configs and resume is None and not asks_for_help:
        recipes = ", ".join(recipe_files.names())
        raise UserError(f"{command} needs a recipe: oumi_pl {command} --config NAME or FILE; recipes: {recipes}")
    recipe = "-".join(runs.recipe_of(path) or recipe_files.recipe_name(path) for path in configs) or "run"
    tree: dict[str, Any] = {}
    for recipe_tree in trees:
        tree = recipe_files.merge(tree, recipe_tree)
    folder = None
    if resume is not None:
        from oumi_pl.config import resuming

        folder, recipe, args = resuming.arguments(command, resume, recipe, args, tree)
        trees = [recipe_files.check(folder / runs.CONFIG)]
    if not asks_for_help:
        from oumi_pl.config import recipe_models

        args = recipe_models.with_model(args, {} if folder else tree)
    # Threads that spin while they wait stand in each other's way when anything else runs on the machine: 80 steps of
    # the quickstart on two busy cores took 92 s with GNU OpenMP's default and 29 s with this; on quiet ones 120 steps
    # took 14 s with either. Read when torch is loaded, so it is set before.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Large tensors in large pages, where Linux has them: a step of a small model spends less time on fresh memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from oumi_pl.callbacks.preemption import Stopped
    from oumi_pl.cli import CLI

    try:
        CLI([command, *args], recipe=recipe, resume=folder, trees=trees)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    return 0


def _with_recipe_paths(args: list[str]) -> tuple[list[str], list[Path], list[dict[str, Any]]]:
    """Replaces recipe names by paths and refuses recipes that can't be read, before anything heavy is imported."""
    out: list[str] = []
    found: list[Path] = []
    trees: list[dict[str, Any]] = []
    rest = iter(args)
    for arg in rest:
        flag, equals, value = arg.partition("=")
        if flag not in ("--config", "-c"):
            out.append(arg)
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("--"):
            raise UserError("--config: name a recipe or a file; recipes: " + ", ".join(recipe_files.names()))
        path = recipe_files.find(value)
        trees.append(recipe_files.check(path))
        found.append(path)
        out += ["--config", str(path)]
    return out, found, trees


def _take_resume(args: list[str]) -> tuple[str | None, list[str]]:
    """Takes `--resume [RUN]` off the arguments; an empty string means the last unfinished run."""
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag != "--resume":
            continue
        if not equals and i + 1 < len(args) and not args[i + 1].startswith("-"):
            return args[i + 1], args[:i] + args[i + 2 :]
        return value, args[:i] + args[i + 1 :]
    return None, args


def _whose(error: Exception) -> str:
    """The last line under a traceback: whether it ends in a file of the user's, or looks like a bug of ours."""
    ours, installed = str(Path(__file__).parent), (sys.prefix, sys.base_prefix, "<")
    files = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    files = [(file, line) for file, line in files if file.startswith(ours) or not file.startswith(installed)]
    if files and not files[-1][0].startswith(ours):
        return f"this comes from a file of yours: {files[-1][0]} line {files[-1][1]}"
    return "this looks like a bug of oumi_pl; please report it with the lines above"


if __name__ == "__main__":
    sys.exit(main())
