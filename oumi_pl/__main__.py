"""The command line: answers at once what needs no heavy import, then calls LightningCLI or one of our commands."""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from oumi_pl import __version__
from oumi_pl.errors import UserError, machine_failure, nearest, versions
from oumi_pl.terminal.screen import meanwhile
from oumi_pl.terminal.text import echo

HELP = """\
usage: oumi_pl COMMAND [options]          (or: python -m oumi_pl COMMAND)

  recipes   list, show, copy recipes:     oumi_pl recipes; recipes show NAME; recipes copy NAME FILE
  preview   show what the model will see: oumi_pl preview --config quickstart/sft
  fit       train on a recipe:            oumi_pl fit --config quickstart/sft
  plan      memory and time beforehand:   oumi_pl plan --config RECIPE --devices 8 --memory 80
  runs      list and compare runs:        oumi_pl runs; runs compare A B
  generate  complete prompts:             oumi_pl generate --model runs/NAME/model --prompt TEXT
            or all rows of a file:        oumi_pl generate --model DIR --file rows.jsonl --output answers.jsonl
  chat      talk with a model:            oumi_pl chat --model DIR; or --run NAME
  score     score rows with a reward model: oumi_pl score --model DIR --input rows.jsonl --output scores.jsonl

  validate  compute validation metrics:   oumi_pl validate --config RECIPE --ckpt_path FILE
  test      compute metrics of the test rows
  predict   write a completion per row, as JSON lines
  prepare   tokenize a pretraining corpus once, into shards
  export    write a checkpoint as a folder that transformers loads; --format gguf: for llama.cpp and Ollama
  push      upload a model to the hub:    oumi_pl push RUN OWNER/NAME (private; --dry_run lists its files)
  compare   compare training engines:     oumi_pl compare --config RECIPE --engines lightning,trl
  train     run an Oumi training config:  oumi_pl train -c oumi.yaml --training.max_steps 3
  convert   a config of Oumi, axolotl, LLaMA-Factory or TRL as a recipe: oumi_pl convert FILE --output NEW

options of fit, validate, test and predict:
  --config NAME|FILE      a recipe, by name or path; several are merged, the later wins
  --KEY VALUE             override a value of the recipe: --data.batch_size 8 --trainer.max_steps 100
                          a source with another path keeps nothing of the recipe's: --data.train.path rows.jsonl
  --resume [RUN]          fit: resume the last unfinished run of the recipe, or this run folder
  --resume auto           fit: the same, or start the run: a command that a scheduler can repeat until it exits with 0
  --dry_run               fit: try a few updates, and print what would run, its memory and time
  --engine hf|trl         fit: the same training in the loop of transformers' Trainer or TRL's
  --print_config          print the complete config, and exit
  --help [TOPIC]          all options, or one topic: fit --help model, fit --help Cosine (takes seconds)

A recipe can name any Python class, so running a recipe can run any code: only run recipes that you trust.
"""

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = (
    *TRAINER_COMMANDS,
    *("recipes", "preview", "plan", "runs", "generate", "chat", "score"),
    *("prepare", "export", "push", "compare", "train", "convert"),
)


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0 for success, 2 for a mistake of the user, 1 for a bug."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what can't be encoded
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(_readable(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # the parser raises it after --help and --print_config, Lightning after Ctrl-C
        return _code_of(stop)
    except BrokenPipeError:  # `| head` closed the pipe; the flush at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13
    except Exception as error:
        return _report(error)
    return code


def _readable(arguments: Sequence[str]) -> list[str]:
    """The arguments, which are written to recipes, logs and reports.

    Raises:
        UserError: one has bytes that aren't UTF-8; Python reads them as half surrogate pairs.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            shown = argument.encode(errors="backslashreplace").decode()
            raise UserError(f"argument {shown}: not UTF-8 text; rename the file or folder") from error
    return list(arguments)


def _report(error: Exception) -> int:
    """Prints an error and returns the exit code: a message for mistakes and full disks, a traceback for bugs."""
    message = str(error) if isinstance(error, UserError) else machine_failure(error)
    if message is not None:
        echo(f"error: {message}", file=sys.stderr)
        return 2
    import traceback

    echo(traceback.format_exc(), end="", file=sys.stderr)
    echo(_origin(error), file=sys.stderr)
    return 1


def _code_of(stop: SystemExit) -> int:
    if isinstance(stop.__context__, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if argv[0] == "--version":
        echo(f"oumi_pl {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
    # users keep their own classes, which recipes name by class_path, in the working directory
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if command not in TRAINER_COMMANDS:
        return int(importlib.import_module(f"oumi_pl.commands.{command}").main(rest))
    from oumi_pl.config import files as recipe_files

    typed = recipe_files.read_options(rest)
    topic = dict(typed).get("--help")
    if topic == "all":
        return _train(command, [("--help", None)])
    if topic is not None:
        from oumi_pl.commands import help as help_pages

        return help_pages.main(command, topic)
    return _train(command, typed)


def _train(command: str, typed: list[tuple[str, str | None]]) -> int:
    from oumi_pl.runs import lock

    try:
        return _fit(command, typed)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        echo(_after_interrupt(lock.held()), file=sys.stderr)
        return 130
    finally:
        lock.release_all()


def _after_interrupt(runs: list[Path]) -> str:
    """What to do next after Ctrl-C, given the run folders that this process was writing."""
    from oumi_pl.runs import folders

    if not runs:
        return "interrupted before training began; to start it, repeat the command"
    run, checkpoint = runs[-1], folders.newest_checkpoint(runs[-1])
    shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    if checkpoint is None:
        return f"interrupted before the first checkpoint; to start it again: oumi_pl fit --resume {shown}"
    return f"interrupted; to continue from {checkpoint.name}: oumi_pl fit --resume {shown}"


def _fit(command: str, typed: list[tuple[str, str | None]]) -> int:
    # here and not above: they import what listing recipes, for example, does not need
    from oumi_pl.config import files as recipe_files
    from oumi_pl.runs import folders

    typed = [(flag, _recipe(value) if flag == "--config" else value) for flag, value in typed]
    configs = [Path(value) for flag, value in typed if flag == "--config" and value]
    trees = [recipe_files.check(path) for path in configs]
    resume = dict(typed).get("--resume")
    args = recipe_files.write_options(option for option in typed if option[0] != "--resume")
    asks_for_help = any(flag.endswith("help") for flag, _ in typed)
    if not configs and resume is None and not asks_for_help:
        recipes = ", ".join(recipe_files.names())
        raise UserError(f"{command} needs a recipe: oumi_pl {command} --config NAME or FILE; recipes: {recipes}")
    if resume in ("", recipe_files.AUTO) and not configs:
        raise UserError(
            "--resume: name the recipe of the run (--config NAME or FILE), or its folder (--resume RUN; "
            "oumi_pl runs lists them)"
        )
    recipe = "-".join(folders.recipe_of(path) or recipe_files.recipe_name(path) for path in configs) or "run"
    tree = recipe_files.merged(trees)
    folder = None
    if resume is not None:
        try:
            folder, recipe, args = recipe_files.resume_arguments(command, resume, recipe, args, tree)
        except recipe_files.NothingToDo as nothing:
            echo(nothing)
            return 0
        if folder is not None:
            trees = [recipe_files.check(folder / folders.CONFIG)]
    if not asks_for_help:
        args = recipe_files.with_fresh_sources(args, trees)
    # Threads that spin while they wait slow each other down when anything else runs on the machine: 80 steps of the
    # quickstart on two busy cores took 92 s with GNU OpenMP's default and 29 s with this; on idle ones 120 steps took
    # 14 s with either. torch reads it when it is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Large pages for large tensors, where Linux has them: steps of small models spend less time on page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with meanwhile("loading PyTorch and Lightning"):
        from oumi_pl.callbacks.stopping import Stopped
        from oumi_pl.config.cli import CLI
        from oumi_pl.runs.received import code_of_run

    if folder is not None and (code := code_of_run(trees[0], tree)):
        echo(f"note: {folder} runs code that its {folders.CONFIG} names: {', '.join(code)}", file=sys.stderr)
    try:
        CLI([command, *args], recipe=recipe, resume=folder, trees=trees)
    except Stopped as stop:
        echo(stop, file=sys.stderr)
        return stop.exit_code
    return 0


def _recipe(name: str | None) -> str:
    """The path of the recipe in the value of `--config`."""
    from oumi_pl.config import files as recipe_files

    if not name:
        raise UserError("--config: give a recipe by name or path; recipes: " + ", ".join(recipe_files.names()))
    return str(recipe_files.find(name))


def _origin(error: Exception) -> str:
    """The lines below a traceback: it comes from a file of the user, or looks like a bug of ours."""
    import traceback

    ours, installed = str(Path(__file__).parent), (sys.prefix, sys.base_prefix, "<")
    files = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    files = [(file, line) for file, line in files if file.startswith(ours) or not file.startswith(installed)]
    if files and not files[-1][0].startswith(ours):
        return f"the error comes from your file: {files[-1][0]} line {files[-1][1]}"
    return f"{versions()}\nthis looks like a bug of oumi_pl; please report it with all of these lines{_address()}"


def _address() -> str:
    """The address for bug reports, if the package metadata has one."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        urls = [line.partition(", ") for line in metadata.metadata("oumi_pl").get_all("Project-URL") or ()]
        ranked = sorted(urls, key=lambda url: url[0].lower() not in ("issues", "bug tracker", "tracker"))
        return f": {ranked[0][2]}" if ranked else ""
    return ""


if __name__ == "__main__":
    sys.exit(main())
