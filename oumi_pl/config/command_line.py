"""Reads a command line, and rewrites `--resume` and `model: recipe:NAME` in it before it is parsed.

Imports nothing heavy, so that mistakes are reported at once.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError, nearby
from oumi_pl.runs import folders

ALONE = {"--dry_run": "true", "--help": "", "--resume": ""}
"""Options that need no value -> their value without one."""
SHORT = {"-c": "--config", "-h": "--help"}
_VALUE = re.compile(r"(?!-)|-[\d.]")
"""The beginning of a value: no dash, unless a number follows."""

Option = tuple[str, str | None]
"""(`--data.batch_size`, `8`); None without a value. An argument that belongs to no option counts as an option."""


def read(args: Sequence[str]) -> list[Option]:
    """Splits a command line into options and values: `--key value`, or `--key=value`."""
    options: list[Option] = []
    rest = list(args)
    while rest:
        flag, equals, attached = rest.pop(0).partition("=")
        flag = SHORT.get(flag, flag)
        value = attached if equals else ALONE.get(flag)
        if not equals and rest and flag.startswith("-") and flag != "--print_config" and _VALUE.match(rest[0]):
            value = rest.pop(0)
        options.append((flag, value))
    return options


def write(options: Iterable[Option]) -> list[str]:
    """The command line that `read` splits into these options."""
    return [flag if value is None else f"{flag}={value}" for flag, value in options]


def value_of(flag: str, args: Sequence[str]) -> str | None:
    """The value of an option on a command line, the last if it is repeated; None without it."""
    return dict(read(args)).get(flag)


# ---- --resume


LONGER = ("--trainer.max_steps", "--trainer.max_epochs", "--trainer.max_time")
"""Options that extend a finished run."""
LISTED = 4
"""Most differences between a recipe and its run that are listed."""


def resume_arguments(
    command: str, resume: str, recipe: str, args: list[str], tree: Mapping[str, Any]
) -> tuple[Path, str, list[str]]:
    """Finds the run to resume. Returns its folder, the name of its recipe, and the command line that continues it.

    The run's `config.yaml`, which has the settings that it used, replaces `--config`. Other options override it.

    Args:
        command: Must be `fit`.
        resume: A run folder; empty for the last unfinished run of the recipe.
        recipe: Name of the recipe.
        args: The command line.
        tree: Content of the recipe, which may set `runs_dir`.

    Raises:
        UserError: if there is nothing to resume, or the run is finished.
    """
    if command != "fit":
        raise UserError(f"--resume is for fit; for {command}, pass the weights with --ckpt_path FILE")
    if value_of("--ckpt_path", args) is not None:
        raise UserError("--resume uses the run's newest checkpoint: leave out --ckpt_path or --resume")
    root = Path(str(value_of("--runs_dir", args) or tree.get("runs_dir") or "runs")).expanduser()
    if resume:
        run = _run_at(Path(resume).expanduser(), root)
    else:
        run = folders.last_unfinished(root, recipe, value_of("--name", args) or tree.get("name"))
    config = run / folders.CONFIG
    if not config.is_file():
        raise UserError(
            f"--resume: {run} has no {folders.CONFIG}, so it stopped before training began; start a new run"
        )
    state = folders.read_state(run)
    checkpoint = folders.newest_checkpoint(run)
    _refuse_finished(run, state, checkpoint, args)
    if differences := differing(tree, recipe_files.check(config) if tree else {}):
        listed = [f"{key} ({ours} there, {theirs} in the recipe)" for key, ours, theirs in differences[:LISTED]]
        more = f" and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
        print(
            f"note: the run continues with {config}, which differs from the recipe in {', '.join(listed)}{more}; "
            f"to change a value, pass it as an option: --{differences[0][0]} VALUE",
            file=sys.stderr,
        )
    kept = write(option for option in read(args) if option[0] != "--config")
    arguments = ["--config", str(config), *kept]
    if checkpoint is not None:
        arguments.append(f"--ckpt_path={checkpoint}")
    # with another engine, `adapters.train` finds and reports the checkpoint
    is_engine_run = any((run / folders.CHECKPOINTS).glob("checkpoint-*"))
    if checkpoint is not None or not is_engine_run:
        print(f"resuming {run} from {checkpoint.name if checkpoint else 'the start: it has no checkpoint yet'}")
    return run, str(state.get("recipe", recipe)), arguments


def differing(recipe: Mapping[str, Any], run: Mapping[str, Any], above: str = "") -> list[tuple[str, Any, Any]]:
    """Values of a recipe that differ from a run's config, as (option, value in the run, value in the recipe).

    A run's config is parsed: class names are full paths, and numbers written as text are numbers.
    """
    differences: list[tuple[str, Any, Any]] = []
    for key, theirs in recipe.items():
        option, ours = (above if key == "init_args" else f"{above}.{key}".lstrip(".")), run.get(key)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            differences += differing(theirs, ours, option)
        elif not _equal(theirs, ours):
            differences.append((option.removesuffix(".class_path"), ours, theirs))
    return differences


def _equal(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, Mapping) and isinstance(theirs, str):  # a class without arguments
        return _equal(theirs, ours.get("class_path"))
    if isinstance(theirs, list) and isinstance(ours, list):
        return len(theirs) == len(ours) and all(map(_equal_item, theirs, ours))
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs == ours or theirs.startswith("recipe:") or ours.endswith(f".{theirs}")
    try:
        return theirs == ours or float(theirs) == float(ours)
    except (TypeError, ValueError):
        return False


def _equal_item(theirs: Any, ours: Any) -> bool:
    both = isinstance(theirs, Mapping) and isinstance(ours, Mapping)
    return not differing(theirs, ours) if both else _equal(theirs, ours)


def _run_at(path: Path, root: Path) -> Path:
    """Checks that a path is a run folder, and suggests one if not."""
    if (path / folders.RUN).is_file():
        if not folders.read_state(path):
            raise UserError(f"--resume: {path / folders.RUN} can't be read, so {path} can't be resumed")
        return path
    if path.is_dir():
        raise UserError(f"--resume: {path} is not a run folder (it has no {folders.RUN})")
    meant = f"; did you mean {(root / path).as_posix()!r}?" if _is_run(root / path) else nearby(path, _is_run)
    raise UserError(f"--resume: no run folder {path}{meant}")


def _is_run(path: Path) -> bool:
    return (path / folders.RUN).is_file()


def _refuse_finished(run: Path, state: Mapping[str, Any], checkpoint: Path | None, args: list[str]) -> None:
    """Refuses a run with nothing left to train. The trainer would notice only after loading everything."""
    more = [option for option in LONGER if value_of(option, args) is not None]
    if state.get("status") == "finished" and not more:
        raise UserError(
            f"--resume: {run} is finished, at step {state.get('step', '?')}; "
            f"to train it further: --resume {run} --trainer.max_steps MORE (or --trainer.max_epochs)"
        )
    steps = value_of("--trainer.max_steps", args) or ""
    if checkpoint is not None and steps.isdigit() and int(steps) <= folders.step_of(checkpoint):
        raise UserError(
            f"--resume: {run} is at step {folders.step_of(checkpoint)} already: "
            f"--trainer.max_steps {steps} leaves nothing to do"
        )


# ---- model: recipe:NAME


PREFIX = "recipe:"
OPTIONS = ("--model.init_args.model", "--model.model")


def with_model(args: list[str], tree: Mapping[str, Any]) -> list[str]:
    """Replaces `model: recipe:NAME` by the folder of the model that this recipe trains; trains it first if needed.

    Args:
        args: The command line.
        tree: Content of the recipe.

    Raises:
        UserError: there is no such recipe, or its run did not finish.
    """
    values = [value for option in OPTIONS if (value := value_of(option, args)) is not None]
    name = values[-1] if values else None
    if name is None:
        model = tree.get("model")
        arguments = model.get("init_args") if isinstance(model, Mapping) else None
        name = arguments.get("model") if isinstance(arguments, Mapping) else None
    if not isinstance(name, str) or not name.startswith(PREFIX):
        return args
    root = Path(str(value_of("--runs_dir", args) or tree.get("runs_dir") or "runs")).expanduser()
    return [*args, f"{OPTIONS[0]}={trained(name.removeprefix(PREFIX), root)}"]


def trained(recipe: str, root: Path) -> Path:
    """The model of the newest finished run of a recipe in `root`. Trains the recipe if there is none.

    Raises:
        UserError: there is no such recipe, or its run did not finish.
    """
    name = recipe_files.recipe_name(recipe_files.find(recipe))
    if model := folders.last_model(root, name):
        print(f"model: {model}")
        return model
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"model: recipe:{recipe} has no finished run in {root}; train it first, in one process")
    command = [sys.executable, "-m", "oumi_pl", "fit", "--config", recipe, "--runs_dir", str(root)]
    print(f"model: recipe:{recipe} has no finished run in {root}, so it is trained first", flush=True)
    status = subprocess.run(command, check=False).returncode
    model = folders.last_model(root, name)
    if status or model is None:
        raise UserError(f"model: the run of recipe:{recipe} did not finish; run it separately: fit --config {recipe}")
    return model
