"""Finds recipes and reads the command line, importing nothing heavy, so that mistakes are reported at once."""

import functools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oumi_pl.errors import UserError, nearby, nearest
from oumi_pl.runs import folders, lock
from oumi_pl.runs.files import refuse_expanding
from oumi_pl.terminal.text import echo

ENDINGS = (".yaml", ".yml")
ORDER = ("quickstart", "sft", "dpo", "kto", "reward", "distill", "pretrain")
"""Folders of shipped recipes, and names in `quickstart`, in the order in which to list them."""


class Header(NamedTuple):
    """The content of the comment at the top of a recipe."""

    purpose: str
    """What it trains on which data."""
    commands: list[str]
    """Command lines that run the recipe."""
    hardware: str
    """The hardware it needs, in a few words."""


def shipped() -> Path:
    """Directory of the shipped recipes: inside the package when installed, next to it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Names of the shipped recipes, `quickstart/sft` for example."""
    root = shipped()
    shipped_names = [p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml")]
    return sorted(shipped_names, key=lambda name: [(_rank(part), part) for part in name.split("/")])


def _rank(part: str) -> int:
    return ORDER.index(part) if part in ORDER else len(ORDER)


def header(recipe: Path) -> Header:
    """Reads the comment at the top of a recipe.

    Lines before the first indented one are the purpose, indented lines are commands, and the first clause after
    `Hardware:` is the hardware.
    """
    lines: list[str] = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    commands = [i for i, line in enumerate(lines) if line.startswith("  ")]
    purpose = " ".join(line.strip() for line in lines[: min(commands, default=0)])
    hardware = next((line.strip().removeprefix("Hardware:") for line in lines if line.startswith(" Hardware:")), "")
    needs = re.split(r"[.;](?:\s|$)", hardware.strip(), maxsplit=1)[0]
    return Header(purpose, [lines[i].strip().replace("python -m oumi_pl", "oumi_pl") for i in commands], needs)


def find(name: str) -> Path:
    """Finds the file of a recipe by path or name.

    Raises:
        UserError: if there is none; suggests the nearest name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.exists() and path.suffix in ENDINGS:
        raise UserError(f"--config: {name} is not a file")
    if name in names():
        return shipped() / f"{name}.yaml"
    if path.suffix in ENDINGS:
        beside = [p.as_posix() for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        by_name = [f"recipes/{n}.yaml" for n in names()]
        raise UserError(f"--config: no file {name!r}{nearest(name, [*beside, *by_name])}")
    raise UserError(f"--config: no recipe {name!r}{nearest(name, names())}")


def recipe_name(path: Path) -> str:
    """The name of a recipe's runs: `quickstart-sft` for recipes/quickstart/sft.yaml."""
    root = shipped().resolve()
    resolved = path.resolve()
    if resolved.is_relative_to(root):
        return "-".join(resolved.relative_to(root).with_suffix("").parts)
    return path.stem


def check(path: Path) -> dict[str, Any]:
    """Reads and parses a recipe.

    Raises:
        UserError: if it can't be read, isn't YAML or a mapping, or repeats a key (PyYAML would silently keep the last).
    """
    import yaml

    try:
        if not path.is_file():
            raise UserError(f"{path}: is not a file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line}: not UTF-8 text; save the recipe as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        refuse_expanding(node)
        _refuse_repeated_keys(node, path, "")
        value = yaml.safe_load(text)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:  # ValueError: an impossible date
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if value is None and text.strip():
        raise UserError(f"{path} has no settings; write model:, data: and trainer: into it, or copy a recipe")
    if not isinstance(value, dict):
        kind = {type(None): "empty", list: "a list", str: "text"}.get(type(value), f"of type {type(value).__name__}")
        raise UserError(f"{path}: a recipe is a mapping (model:, data:, trainer:), and this file is {kind}")
    return value


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two recipes key by key; the second wins."""
    tree = dict(first)
    for key, value in second.items():
        old = tree.get(key)
        tree[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return tree


def merged(recipes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges recipes in order; the later ones win. A source with another `path` replaces the earlier one as a whole."""
    return functools.reduce(lambda first, second: merge(_without_replaced(first, second), second), recipes, {})


def _without_replaced(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first recipe without the sources that the second replaces."""
    replaced = []
    for split in SPLITS:
        old, new = _source_of(first, split), _source_of(second, split)
        if (
            isinstance(old, Mapping)
            and isinstance(new, Mapping)
            and new.get("path", old.get("path")) != old.get("path")
        ):
            replaced.append(split)
    if not replaced:
        return first
    data = dict(first["data"])
    holder = dict(data["init_args"]) if isinstance(data.get("init_args"), Mapping) else data
    for split in replaced:
        del holder[split]
    return {**first, "data": {**data, "init_args": holder} if holder is not data else data}


def as_written(paths: Sequence[Path]) -> bytes | None:
    """The text of a recipe with its comments. Several recipes are merged without comments; None without any."""
    import yaml

    if len(paths) == 1:
        return paths[0].read_bytes()
    if not paths:
        return None
    header = f"# Merged, the later wins: {', '.join(map(str, paths))}\n"
    return (header + yaml.safe_dump(merged(map(check, paths)), sort_keys=False)).encode()


def _refuse_repeated_keys(node: Any, path: Path, prefix: str) -> None:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _refuse_repeated_keys(item, path, f"{prefix}[{i}]")
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name = f"{prefix}.{key.value}" if prefix else str(key.value)
        line = key.start_mark.line + 1
        if name in seen:
            raise UserError(f"{path} line {line}: the key {name} is repeated, first in line {seen[name]}; keep one")
        seen[name] = line
        _refuse_repeated_keys(value, path, name)


ALONE = {"--dry_run": "true", "--help": "", "--resume": ""}
"""Options that need no value -> their value without one."""
SHORT = {"-c": "--config", "-h": "--help"}
_VALUE = re.compile(r"(?!-)|-[\d.]")
"""The beginning of a value: no dash, unless a number follows."""

Option = tuple[str, str | None]
"""(`--data.batch_size`, `8`); None without a value. An argument that belongs to no option counts as an option."""


def read_options(args: Sequence[str]) -> list[Option]:
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


def write_options(options: Iterable[Option]) -> list[str]:
    """The command line that `read_options` splits into these options."""
    return [flag if value is None else f"{flag}={value}" for flag, value in options]


def value_of(flag: str, args: Sequence[str]) -> str | None:
    """The value of an option on a command line, the last if it is repeated; None without it."""
    return dict(read_options(args)).get(flag)


# ---- --resume


LONGER = ("--trainer.max_steps", "--trainer.max_epochs", f"--{folders.TIME}")
"""Options that extend a finished run."""
AUTO = "auto"
"""Value of `--resume` for schedulers, which start the same command until the run is finished."""


class NothingToDo(Exception):  # noqa: N818 - not an error: the run did what the command asks for
    """`--resume auto` on a run that is finished."""


LISTED = 4
"""Most differences between a recipe and its run that are listed."""


def resume_arguments(
    command: str, resume: str, recipe: str, args: list[str], tree: Mapping[str, Any]
) -> tuple[Path | None, str, list[str]]:
    """Finds the run to resume. Returns its folder, the name of its recipe, and the command line that continues it.

    This process then holds the lock of the folder. With `auto`, the folder is None and the arguments are unchanged if
    there is no run yet.

    The run's `config.yaml`, which has the settings that it used, replaces `--config`. Other options override it.

    Args:
        command: Must be `fit`.
        resume: A run folder; empty for the last unfinished run of the recipe; `auto` for its last run, or a new one.
        recipe: Name of the recipe.
        args: The command line.
        tree: Content of the recipe, which may set `runs_dir`.

    Raises:
        UserError: if there is nothing to resume, the run is finished, or another process writes to it.
        NothingToDo: with `auto`, if the run is finished.
    """
    if command != "fit":
        raise UserError(f"--resume is for fit; for {command}, pass the weights with --ckpt_path FILE")
    if value_of("--ckpt_path", args) is not None:
        raise UserError("--resume uses the run's newest checkpoint: leave out --ckpt_path or --resume")
    root = Path(str(value_of("--runs_dir", args) or tree.get("runs_dir") or "runs")).expanduser()
    run = _chosen(resume, root, recipe, value_of("--name", args) or tree.get("name"))
    if run is None:
        return None, recipe, args
    if _is_first_rank() and not _only_shows(args):
        lock.acquire(run)  # before reading its state, which another process may be changing
        folders.remove_leftovers(run)  # here, since a finished run goes no further
    config = run / folders.CONFIG
    if not config.is_file():
        raise UserError(
            f"--resume: {run} has no {folders.CONFIG}, so it stopped before training began; start a new run "
            "(leave --resume out)"
        )
    state = folders.read_state(run)
    checkpoint = folders.newest_checkpoint(run)
    if resume == AUTO and state.get("status") == "finished" and not _longer(state, args, config):
        raise NothingToDo(
            f"--resume auto: {run} is finished, at step {state.get('step', '?')}; to train it further: "
            f"{folders.how_to_extend(run, dict(state))}; to start a new run, leave --resume out"
        )
    _refuse_finished(run, state, checkpoint, args)
    checkpoint, damaged = folders.newest_whole_checkpoint(run)  # reads it, which takes a second per 1.5 GB
    _say_differences(config, tree)
    kept = write_options(option for option in read_options(args) if option[0] != "--config")
    arguments = ["--config", str(config), *kept]
    if checkpoint is not None:
        arguments.append(f"--ckpt_path={checkpoint}")
    _say_where(run, state, checkpoint, damaged)
    if _is_first_rank() and not _only_shows(args):
        folders.set_aside(damaged)
    return run, str(state.get("recipe", recipe)), arguments


def _say_where(run: Path, state: dict[str, Any], checkpoint: Path | None, damaged: Mapping[Path, str]) -> None:
    """Prints from which checkpoint the run goes on, which ones are damaged, and what is left after training."""
    # with another engine, `adapters.train` finds and reports the checkpoint
    is_engine_run = any((run / folders.CHECKPOINTS).glob("checkpoint-*"))
    if checkpoint is not None or not is_engine_run:
        echo(f"resuming {run} from {checkpoint.name if checkpoint else 'the start: it has no checkpoint yet'}")
    for path, why in damaged.items():
        echo(f"note: {path} is damaged: {why}; what came after {checkpoint and checkpoint.name} is trained again")
    phases = folders.in_order(state.get("phases", []))
    if (checkpoint is not None or is_engine_run) and "train" in phases and state.get("status") != "finished":
        left = [phase for phase in folders.PHASES if phase not in phases]
        echo(f"its training is complete; what is left: {', '.join(left) or 'nothing'}")


def _chosen(resume: str, root: Path, recipe: str, name: str | None) -> Path | None:
    """The run that `--resume` means; None if `auto` starts a new one."""
    if resume != AUTO:
        return _run_at(Path(resume).expanduser(), root) if resume else folders.last_unfinished(root, recipe, name)
    run = folders.last_run(root, recipe, str(name or recipe))
    if run is None or not (run / folders.CONFIG).is_file():
        echo(f"--resume auto: there is no run of {name or recipe} in {root} yet; starting one")
        return None
    return run


def _say_differences(config: Path, tree: Mapping[str, Any]) -> None:
    """Prints what a run's config has otherwise than the recipe that was named beside `--resume`."""
    if differences := differing(tree, check(config) if tree else {}):
        listed = [f"{key} ({ours} there, {theirs} in the recipe)" for key, ours, theirs in differences[:LISTED]]
        joined = ", ".join(listed)
        text = joined if joined.isprintable() else ascii(joined)  # no escape sequences of a received run
        more = f" and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
        echo(
            f"note: the run continues with {config}, which differs from the recipe in "
            f"{text}{more}; to change a value, pass it as an option: --{differences[0][0]} VALUE",
            file=sys.stderr,
        )


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


def _only_shows(args: list[str]) -> bool:
    """Whether a command line writes nothing."""
    return value_of("--dry_run", args) == "true" or any(flag == "--print_config" for flag, _ in read_options(args))


def _is_first_rank() -> bool:
    """Whether this is the process of a run that writes its folder, as launchers and Lightning number them."""
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def _longer(state: Mapping[str, Any], args: list[str], config: Path | None = None) -> list[str]:
    """The options on a command line that extend a run; with its `config`, without those that it was run with."""
    more = [option for option in LONGER if value_of(option, args) is not None]
    if config is not None:
        own = check(config).get("trainer") or {}
        more = [o for o in more if value_of(o, args) != str(own.get(o.removeprefix("--trainer.")))]
    if state.get("ended_by") == folders.TIME:
        more = [option for option in more if option == f"--{folders.TIME}"]
    return more


def _refuse_finished(run: Path, state: Mapping[str, Any], checkpoint: Path | None, args: list[str]) -> None:
    """Refuses a run with nothing left to train. The trainer would notice only after loading everything."""
    if state.get("status") == "finished" and not _longer(state, args):
        by = f", by {folders.TIME}" if state.get("ended_by") == folders.TIME else ""
        raise UserError(
            f"--resume: {run} is finished, at step {state.get('step', '?')}{by}; "
            f"to train it further: {folders.how_to_extend(run, dict(state))}"
        )
    steps = value_of("--trainer.max_steps", args) or ""
    # an unfinished run may end where its checkpoint is: it is exported then
    last = int(steps) - (state.get("status") == "finished") if steps.isdigit() else math.inf
    if checkpoint is not None and last < folders.step_of(checkpoint):
        raise UserError(
            f"--resume: {run} is at step {folders.step_of(checkpoint)} already: "
            f"--trainer.max_steps {steps} leaves nothing to do"
        )


# ---- model: recipe:NAME


PREFIX = "recipe:"
MODELS = ("model", "reference", "teacher")
"""Arguments of modules that name a model."""


def with_fresh_sources(args: list[str], trees: Iterable[Mapping[str, Any]]) -> list[str]:
    """Adds options so that a source of data with another `path` has nothing of the source that it replaces.

    The parser merges mappings: a `sample: 12` of the recipe would be kept beside the path of other rows.

    Args:
        args: The command line.
        trees: Contents of the recipes, in order.
    """
    resets = []
    for split in SPLITS:
        source: dict[str, Any] = {}
        left: set[str] = set()
        for value in (*(_source_of(tree, split) for tree in trees), _typed_source(args, split)):
            if value is None:
                continue
            if not isinstance(value, Mapping):
                source, left = {}, set()
                continue
            if source and value.get("path", source.get("path")) != source.get("path"):
                left |= source.keys()
                source = {}
            left -= value.keys()
            source |= value
        if left:
            fresh = {key: SOURCE_DEFAULTS.get(key) for key in sorted(left)}
            resets.append(f"--data.{split}={json.dumps({**source, **fresh})}")
    return [*args, *resets]


SPLITS = ("train", "validation", "test", "predict")
SOURCE_DEFAULTS = {"split": "train", "errors": "strict"}
"""Values of a source that are not null when left out."""


def _source_of(tree: Mapping[str, Any], split: str) -> Any:
    """The source of a split in a recipe, which may leave `init_args` out."""
    data = tree.get("data")
    if not isinstance(data, Mapping):
        return None
    arguments = data.get("init_args")
    return (arguments if isinstance(arguments, Mapping) else data).get(split)


def _typed_source(args: list[str], split: str) -> Any:
    """The source of a split on the command line: a value, or its keys that are set there; None if it isn't named."""
    keys: dict[str, Any] = {}
    whole: Any = None
    for flag, value in read_options(args):
        name = flag.removeprefix("--data.").removeprefix("init_args.")
        if flag.startswith("--data.") and name == split and value is not None:
            whole = _parsed(value)
        elif flag.startswith("--data.") and name.startswith(f"{split}."):
            keys[name.removeprefix(f"{split}.")] = None if value is None else _parsed(value)
    if isinstance(whole, Mapping):
        return {**whole, **keys}
    return whole if whole is not None else keys or None


def _parsed(value: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def with_model(args: list[str], tree: Mapping[str, Any]) -> list[str]:
    """Replaces `recipe:NAME`, where a module's argument names a model, by the folder of the model of that recipe.

    Trains the recipe first if it has no finished run.

    Args:
        args: The command line.
        tree: Content of the recipe.

    Raises:
        UserError: there is no such recipe, or its run did not finish.
    """
    root = Path(str(value_of("--runs_dir", args) or tree.get("runs_dir") or "runs")).expanduser()
    model = tree.get("model")
    arguments = model.get("init_args") if isinstance(model, Mapping) else None
    replaced = []
    for key in MODELS:
        options = (f"--model.init_args.{key}", f"--model.{key}")
        typed = [value for option in options if (value := value_of(option, args)) is not None]
        name = typed[-1] if typed else arguments.get(key) if isinstance(arguments, Mapping) else None
        if isinstance(name, str) and name.startswith(PREFIX):
            replaced.append(f"{options[0]}={trained(name.removeprefix(PREFIX), root, key)}")
    return [*args, *replaced]


def trained(recipe: str, root: Path, key: str = "model") -> Path:
    """The model of the newest finished run of a recipe in `root`. Trains the recipe if there is none.

    `key` is the argument that names it, for messages.

    Raises:
        UserError: there is no such recipe, or its run did not finish.
    """
    name = recipe_name(find(recipe))
    if model := folders.last_model(root, name):
        echo(f"{key}: {model}")
        return model
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{key}: recipe:{recipe} has no finished run in {root}; train it first, in one process")
    command = [sys.executable, "-m", "oumi_pl", "fit", "--config", recipe, "--runs_dir", str(root)]
    echo(f"{key}: recipe:{recipe} has no finished run in {root}, so it is trained first", flush=True)
    import subprocess

    status = subprocess.run(command, check=False).returncode
    model = folders.last_model(root, name)
    if status or model is None:
        raise UserError(f"{key}: the run of recipe:{recipe} did not finish; run it separately: fit --config {recipe}")
    return model
