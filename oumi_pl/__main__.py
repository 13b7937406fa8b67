"""The command line: answers what needs no heavy import, then hands over to LightningCLI or a command of our own."""

import contextlib
import importlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from oumi_pl import __version__
from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError, nearest, of_the_machine, versions
from oumi_pl.terminal.screen import meanwhile

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
  --dry_run               fit: everything but training; what it would be, what memory and time it takes
  --engine hf|trl         fit: with transformers' Trainer or TRL's, the same training
  --print_config          print what would run, and stop
  --help [TOPIC]          all options; of a section, a class: fit --help model, fit --help Cosine (takes seconds)

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
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # the parser's way to end after --help and --print_config; Lightning's after Ctrl-C
        return _code_of(stop)
    except BrokenPipeError:  # whoever read the output has seen enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13
    except Exception as error:
        return _told(error)
    return code


def _told(error: Exception) -> int:
    """Prints an error: the user's and the machine's in a message, a bug with all there is to know of it."""
    message = str(error) if isinstance(error, UserError) else of_the_machine(error)
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
        return 2
    import traceback

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
    if (topic := _help_topic(rest)) not in (None, "all"):
        from oumi_pl.commands import help as help_pages

        return help_pages.main(command, topic)
    if topic == "all":
        rest = ["--help"]
    return _train(command, rest)


def _train(command: str, rest: list[str]) -> int:
    args, configs, trees = _with_recipe_paths(_with_values(rest))
    from oumi_pl.runs import folders

    resume, args = _take_resume(args)
    asks_for_help = any(arg.partition("=")[0].endswith((".help", "--help")) or arg == "-h" for arg in args)
    if not configs and resume is None and not asks_for_help:
        recipes = ", ".join(recipe_files.names())
        raise UserError(f"{command} needs a recipe: oumi_pl {command} --config NAME or FILE; recipes: {recipes}")
    if resume == "" and not configs:
        told = (
            "name the recipe of the run (--config NAME or FILE), or its folder (--resume RUN; oumi_pl runs lists them)"
        )
        raise UserError(f"--resume: {told}")
    recipe = "-".join(folders.recipe_of(path) or recipe_files.recipe_name(path) for path in configs) or "run"
    tree: dict[str, Any] = {}
    for recipe_tree in trees:
        tree = recipe_files.merge(tree, recipe_tree)
    folder = None
    if resume is not None:
        from oumi_pl.config import resuming

        folder, recipe, args = resuming.arguments(command, resume, recipe, args, tree)
        trees = [recipe_files.check(folder / folders.CONFIG)]
    if not asks_for_help:
        from oumi_pl.config import recipe_models

        args = recipe_models.with_model(args, {} if folder else tree)
    # Threads that spin while they wait stand in each other's way when anything else runs on the machine: 80 steps of
    # the quickstart on two busy cores took 92 s with GNU OpenMP's default and 29 s with this; on quiet ones 120 steps
    # took 14 s with either. Read when torch is loaded, so it is set before.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Large tensors in large pages, where Linux has them: a step of a small model spends less time on fresh memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with meanwhile("loading PyTorch and Lightning"):
        from oumi_pl.callbacks.preemption import Stopped
        from oumi_pl.config.cli import CLI

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


def _with_values(args: list[str]) -> list[str]:
    """Gives `--dry_run` the value that it may be typed without."""
    pairs = itertools.pairwise([*args, ""])
    return [f"{a}=true" if a == "--dry_run" and after.lower() not in ("true", "false") else a for a, after in pairs]


def _help_topic(args: list[str]) -> str | None:
    """What `--help` is asked about: a topic, nothing in particular (an empty string); None if it isn't asked."""
    for arg, after in itertools.pairwise([*args, ""]):
        flag, equals, value = arg.partition("=")
        if flag in ("-h", "--help"):
            return value if equals else after if not after.startswith("--") else ""
    return None


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
    """What stands under a traceback: whether it ends in a file of the user's, or looks like a bug of ours."""
    import traceback

    ours, installed = str(Path(__file__).parent), (sys.prefix, sys.base_prefix, "<")
    files = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    files = [(file, line) for file, line in files if file.startswith(ours) or not file.startswith(installed)]
    if files and not files[-1][0].startswith(ours):
        return f"this comes from a file of yours: {files[-1][0]} line {files[-1][1]}"
    return f"{versions()}\nthis looks like a bug of oumi_pl; please report it with all of these lines{_address()}"


def _address() -> str:
    """Where to report, if the package says so."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        urls = [line.partition(", ") for line in metadata.metadata("oumi_pl").get_all("Project-URL") or ()]
        ranked = sorted(urls, key=lambda url: url[0].lower() not in ("issues", "bug tracker", "tracker"))
        return f": {ranked[0][2]}" if ranked else ""
    return ""


if __name__ == "__main__":
    sys.exit(main())
