"""Creates, reads and finds run folders.

Contents of `runs/<name>/`:

- `run.json`: recipe, command, state, which phases are complete, versions, where the time went
- `lock.json`: the process that writes to the folder, while one does
- `config.yaml`: the complete config; `fit --config` of it repeats the run
- `recipe.yaml`: the recipe as its author wrote it, without command-line options and defaults
- `data.json`: the data report
- `held_out.jsonl`: source, file and line of each held-out row, if a fraction of the training rows is held out
- `metrics.csv`: one line per optimizer step
- `samples.jsonl`: completions that callbacks sampled during training
- `rollouts.jsonl`: of online training, every training completion with its rewards and advantage
- `curves.png`, `report.html`: curves of the metrics, and one page with all of this
- `checkpoints/`: `step-*.ckpt`, and `best.ckpt` (weights only) when a metric is monitored
- `model/`: the trained model, for `transformers`

Nothing in it names its own place: a run folder can be moved, renamed or copied, and resumed from any directory. Names
that end in `.half` were being written when a process was killed; the next start removes them.
"""

import contextlib
import csv
import errno
import io
import json
import os
import re
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints

from oumi_pl.errors import UserError, nearest
from oumi_pl.runs import checksums, files, lock
from oumi_pl.runs.files import HALF

RUN = "run.json"
CONFIG = "config.yaml"
RECIPE = "recipe.yaml"
HELD_OUT = "held_out.jsonl"
METRICS = "metrics.csv"
CHECKPOINTS = "checkpoints"
TIME = "trainer.max_time"
"""Value of `ended_by` in `run.json` if the time limit ended the run."""
PHASES = ("prepare", "reference", "train", "validate", "samples", "export", "report")
"""What a run consists of, in order. `phases` in `run.json` lists those that are complete, and a resumed run goes on
with the first that is not. `status` becomes `finished` after the last, or if the report can't be drawn."""


class State(TypedDict, total=False):
    """The content of `run.json`."""

    recipe: str
    status: str
    """`running`, `stopped`, `failed` or `finished`; see `condition`."""
    phases: list[str]
    command: str
    created: str
    created_ns: int
    updated: str
    pid: int
    process: dict[str, str | int | None]
    """Host, process id and start time, from `oumi_pl.runs.lock.process`."""
    oumi_pl: str
    """Version of the package."""
    environment: dict[str, Any]
    model: dict[str, str | int | None]
    template_date: str
    """The date that the chat template writes."""
    steps: int
    """Updates that the run is to make; `step` of them are done."""
    step: int
    exported_step: int
    begun: float
    """When the process began, in seconds since 1970."""
    before: float
    """Seconds that earlier processes took."""
    times: dict[str, float]
    """Seconds by what they were spent on: see `oumi_pl.report.clock.Clock`. These are not the `PHASES`."""
    metrics: dict[str, float | None]
    """The last ones; None for those that are not finite."""
    resumed: list[int]
    """The steps at which the run was resumed."""
    resumed_by: str
    parent: dict[str, Any]
    """What the run started from: see `oumi_pl.runs.lineage.parent_of`."""
    loggers: dict[str, str]
    """Name of a logger -> the id of the run there."""
    warnings: list[str]
    ended_by: str | None
    """The setting that ended training before the last update: `TIME`, or None."""
    why: str | None
    """What ended training before the last update, in words: a signal, early stopping, a callback."""
    reason: str | None
    """The message of the error that stopped or failed the run."""


TYPES = get_type_hints(State)

_STEP = re.compile(r"step-(\d+)\.ckpt$")


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after `step` updates."""
    return f"step-{step:08d}.ckpt"


def saved_steps(directory: Path) -> list[Path]:
    """The complete `step-*.ckpt` in a directory, oldest first."""
    return sorted(p for p in directory.glob("step-*.ckpt") if _STEP.search(p.name))


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint; -1 for `best.ckpt` and other names without one."""
    match = _STEP.search(checkpoint.name)
    return int(match.group(1)) if match else -1


def create(root: Path, name: str, fill: Callable[[Path], None] = lambda run: None) -> Path:
    """Creates `root/name`, or `name-2`, `name-3`, ... if that exists, with the files that `fill` writes to it.

    The folder gets its name when it is complete: a kill leaves a run that can be resumed, or none. This process has the
    lock of the folder then.

    Raises:
        UserError: if the folder can't be created.
    """
    first = root / name
    half = _half(first)
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        files.remove(half)
        half.mkdir()
        (half / CHECKPOINTS).mkdir()
        lock.write(half)
        fill(half)
        files.sync_all(half)
        for run in _names(root, name):
            if _is_remnant(run):
                files.remove(run)
            try:
                half.rename(run)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                continue
            files.sync(root)
            lock.acquire(run)
            return run
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"runs_dir: can't write to {root}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            files.remove(half)
    raise UserError(f"runs_dir: {root} holds too many runs named {name}")


_UNNAMED = re.compile(rf"\..+\.(\d{{1,18}})@(.+){re.escape(HALF)}$")


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes were writing: in the directory of all runs, or in a run's folder."""
    for path in (*folder.glob(f"*{HALF}"), *(folder / CHECKPOINTS).glob(f"*{HALF}")):
        if _UNNAMED.match(path.name):  # a folder that may still be in the making
            if _is_abandoned(path):
                files.remove(path)
        elif (folder / RUN).is_file():
            files.remove(path)


_OF_PROCESS = re.compile(rf"\.(\d{{1,18}})@([^@]+){re.escape(HALF)}$")


def remove_abandoned(directory: Path) -> None:
    """Removes what processes of this host that no longer run were writing into a directory that others write to."""
    for path in directory.glob(f"*{HALF}"):
        match = _OF_PROCESS.search(path.name)
        if match is None or match[2] != socket.gethostname() or int(match[1]) == os.getpid():
            continue
        if lock.began(int(match[1])) is None:
            files.remove(path)


def half_of(folder: Path) -> Path:
    """Where this process may write a folder before it gets its name; removes what killed processes left of it."""
    half = _half(folder)
    for path in folder.parent.glob(f".*{HALF}"):
        match = _UNNAMED.match(path.name)
        if match and path.name == f".{folder.name}.{match[1]}@{match[2]}{HALF}" and _is_abandoned(path):
            files.remove(path)
    return half


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, and moves its content to `folder`, which is new or empty, at the end of the block.

    A new folder is complete or not there, and is written beside its place. One that exists may be the working directory
    or a mount: it stays, is written to from within, and each of its files is complete.
    """
    half = half_for(folder)
    half.mkdir(parents=True)
    try:
        yield half
        files.sync_all(half)
        if half.parent == folder.resolve():
            for entry in sorted(half.iterdir()):
                entry.rename(half.parent / entry.name)
        else:
            half.rename(folder.resolve())  # which fails if somebody else has filled it meanwhile
        files.sync(half.parent)
    finally:
        files.remove(half)


def half_for(folder: Path) -> Path:
    """Where `filling` writes; removes what killed processes left of it."""
    folder = folder.resolve()
    return half_of(folder / folder.name if folder.is_dir() else folder)


def _half(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}@{socket.gethostname()}{HALF}")


def _is_abandoned(half: Path) -> bool:
    """Whether the process is gone that wrote a folder whose name names it."""
    match = _UNNAMED.match(half.name)
    if match is None or match[2] != socket.gethostname():
        return False
    return int(match[1]) == os.getpid() or lock.began(int(match[1])) is None


def _is_remnant(run: Path) -> bool:
    """Whether a folder is what a process left that was killed before it wrote anything into its run folder."""
    if not run.is_dir() or run.is_symlink():
        return False
    names = {path.name for path in run.iterdir()}
    if CHECKPOINTS not in names or names - {CHECKPOINTS, lock.LOCK} or any((run / CHECKPOINTS).iterdir()):
        return False
    return lock.LOCK not in names or lock.is_alive(lock.owner(run)) is False


def free(root: Path, name: str) -> Path:
    """The folder that `create` would create now."""
    return next(run for run in _names(root, name) if not run.exists() or _is_remnant(run) or _is_empty(run))


def _is_empty(run: Path) -> bool:
    return run.is_dir() and not run.is_symlink() and not any(run.iterdir())


def _names(root: Path, name: str) -> Iterator[Path]:
    yield root / name
    yield from (root / f"{name}-{number}" for number in range(2, 100_000))


def refuse_unwritable(root: Path, key: str = "runs_dir") -> None:
    """Checks, without writing anything, that folders can be created in `root`; `key` names it in the error.

    Raises:
        UserError: if `root`, or its nearest existing parent, is not a directory or not writable.
    """
    there = root
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{key}: can't write to {root}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: can't write to {root}: no permission to write to {there}")


def write_state(run: Path, **values: Any) -> None:
    """Updates `run.json` atomically: a kill leaves the old file."""
    state = read_state(run) | values | {"updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    files.write(run / RUN, json.dumps(state, indent=1) + "\n")


def read_state(run: Path) -> dict[str, Any]:
    """The content of `run.json`; empty if it is missing or unreadable.

    A value that is not of the type that `State` gives is left out, as if it had never been written.
    """
    try:
        state = files.parse(files.read(run / RUN))
    except (OSError, ValueError):
        return {}
    if not isinstance(state, dict):
        return {}
    return {key: value for key, value in state.items() if key not in TYPES or _is_of_type(value, TYPES[key])}


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a type: a class, a list or a mapping of them, or one of several."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is UnionType:
        return any(_is_of_type(value, argument) for argument in arguments)
    if kind is list:
        return isinstance(value, list) and all(_is_of_type(item, arguments[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is_of_type(item, arguments[1]) for item in value.values())
    if hint is Any:
        return True
    return isinstance(value, (int, float) if hint is float else hint) and not isinstance(value, bool)


def in_order(phases: Collection[str]) -> list[str]:
    """Known phases in the order of `PHASES`, each once."""
    return [phase for phase in PHASES if phase in phases]


def condition(state: dict[str, Any]) -> str:
    """The current state of a run: the one in `run.json`, unless that is `running` and its process has ended.

    Returns:
        `finished`, `stopped`, `failed` or `running`; `killed` if the process of a `running` one no longer exists;
        `running?` if that can't be checked, on another machine for example; `unknown` if `run.json` has no state.
    """
    status = state.get("status") or "unknown"
    if status != "running":
        return status
    return {True: "running", False: "killed", None: "running?"}[lock.is_alive(state.get("process"))]


Column = tuple[list[int], list[float]]
"""Steps and values of a metric."""
RECENT = 20
"""A displayed training loss is the mean of this many updates, because single ones are noisy."""


def read_metrics(run: Path, only: Collection[str] | None = None) -> dict[str, Column]:
    """Reads `metrics.csv`, or the columns in `only`, without empty cells; empty if there is no such file.

    Lines that a kill cut short, and damaged lines and cells, are skipped.
    """
    columns: dict[str, Column] = {}
    try:
        text = io.StringIO(files.read(run / METRICS).decode(errors="replace"), newline="")
        names = next(csv.reader(text), [])
    except (OSError, ValueError, csv.Error):
        return {}
    wanted = [(i, *columns.setdefault(n, ([], []))) for i, n in enumerate(names) if only is None or n in only]
    for line in text:
        if not line.endswith("\n"):
            break
        cells = line.rstrip().split(",")  # below the header there are only numbers, so no quotes
        step = step_in(cells[0])
        if step is None or len(cells) != len(names):
            continue
        for i, steps, values in wanted:
            with contextlib.suppress(ValueError):
                value = float(cells[i] or "nan")
                if cells[i]:
                    steps.append(step)
                    values.append(value)
    return {name: column for name, column in columns.items() if column[0]}


def step_in(cell: str | None) -> int | None:
    """The step in a cell of `metrics.csv`; None if there is no number, or one that is no step."""
    if not cell or len(cell) > 18 or not (cell.isascii() and cell.isdigit()):
        return None
    return int(cell)


def recent(values: Sequence[float]) -> float:
    """Mean of the last `RECENT` values, which is the displayed loss; NaN if one of them is NaN."""
    last = values[-RECENT:]
    return sum(last) / len(last) if last else float("nan")


def seconds(run: Path, state: dict[str, Any]) -> float | None:
    """Duration of a run, including the time before resumes; up to the last metrics line if its end was not recorded."""
    if state.get("status") != "running":
        return sum(state["times"].values()) if "times" in state else None
    try:
        last = (run / METRICS).stat().st_mtime
    except OSError:
        return None
    begun = state.get("begun")
    return max(0.0, last - begun) + state.get("before", 0.0) if begun else None


def find(name: str, root: Path) -> Path:
    """Finds a run by name or path.

    Raises:
        UserError: if there is none; suggests the nearest name.
    """
    for path in (root / name, Path(name).expanduser()):
        if (path / RUN).is_file():
            return path
    raise UserError(f"no run {name!r} in {root}{nearest(name, [run.name for run in all_runs(root)])}")


def all_runs(root: Path) -> list[Path]:
    """The run folders in a directory, oldest first."""
    runs = {file.parent: read_state(file.parent) for file in root.glob(f"*/{RUN}")}
    return sorted(runs, key=lambda run: (runs[run].get("created_ns", 0), run.name))


def recipe_of(config: Path) -> str | None:
    """The recipe behind a run's `config.yaml`, for the name of a repeated run; None for other files."""
    return read_state(config.parent).get("recipe") if config.name == CONFIG else None


def last_unfinished(root: Path, recipe: str, name: str | None = None) -> Path:
    """The newest unfinished run of a recipe; with `name`, among the runs of that name.

    Raises:
        UserError: if there is none.
    """
    _refuse_unreadable(root, name or recipe)
    own = _runs_of(root, recipe, name)
    unfinished = [run for run, state in own.items() if state.get("status") != "finished"]
    if not unfinished:
        whose = f"recipe {recipe!r}" + (f" named {name!r}" if name else "")
        hint = "there is no run of it; leave --resume out to start one"
        if own:
            newest = [*own][-1]
            hint = f"{newest} is finished; to train it further: {how_to_extend(newest, own[newest])}"
        raise UserError(f"--resume: nothing to resume for {whose} in {root}: {hint}")
    return unfinished[-1]


def last_run(root: Path, recipe: str, name: str) -> Path | None:
    """The newest run of a recipe among the runs of a name: an unfinished one if there is one. None without any.

    Raises:
        UserError: it can't be known, because the `run.json` of a run of that name can't be read.
    """
    _refuse_unreadable(root, name)
    own = _runs_of(root, recipe, name)
    unfinished = [run for run, state in own.items() if state.get("status") != "finished"]
    return next(reversed(unfinished or [*own]), None)


def how_to_extend(run: Path, state: dict[str, Any]) -> str:
    """The options that train a finished run further."""
    if state.get("ended_by") == TIME:  # what the run has taken so far counts
        return f"--resume {run} --{TIME} LONGER (the time of the whole run, as in 00:12:00:00; or null)"
    return f"--resume {run} --trainer.max_steps MORE (or --trainer.max_epochs)"


def last_model(root: Path, recipe: str) -> Path | None:
    """The exported model of the newest finished run of a recipe, among runs named after it; None if there is none."""
    states = _runs_of(root, recipe, name=recipe)
    finished = [run for run, s in states.items() if s.get("status") == "finished" and (run / "model").is_dir()]
    return finished[-1] / "model" if finished else None


def _refuse_unreadable(root: Path, name: str) -> None:
    for run in all_runs(root):
        if re.fullmatch(_numbered(name), run.name) and not read_state(run):
            raise UserError(
                f"--resume: {run / RUN} can't be read, so it is not known whether that run is to go on; put a copy in "
                "its place, or rename the folder to leave it out"
            )


def _numbered(name: str) -> str:
    """A pattern of the folders of a name: `create` adds a number if it is taken."""
    return rf"{re.escape(name)}(-\d+)?"


def _runs_of(root: Path, recipe: str, name: str | None) -> dict[Path, dict[str, Any]]:
    """The runs of a recipe and their states, oldest first; with `name`, those of that name."""
    pattern = _numbered(name) if name else ".*"
    states = {run: read_state(run) for run in all_runs(root) if re.fullmatch(pattern, run.name)}
    return {run: state for run, state in states.items() if state.get("recipe") == recipe}


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run; None if it has none."""
    steps = saved_steps(run / CHECKPOINTS)
    return steps[-1] if steps else None


def newest_whole_checkpoint(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of a run that is not damaged, and the newer ones with what is wrong with them.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    return first_whole(reversed(saved_steps(run / CHECKPOINTS)), run / CHECKPOINTS)


def first_whole(
    checkpoints: Iterable[Path], directory: Path, key: str = "--resume"
) -> tuple[Path | None, dict[Path, str]]:
    """The first of some checkpoints that is not damaged, and those before it with what is wrong with them.

    Reads them, which takes a second per 1.5 GB.

    Args:
        checkpoints: Complete checkpoints, newest first.
        directory: Where they are, for the message.
        key: The key or option that asks for them, for the message.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in checkpoints:
        why = checksums.damage(path)
        if why is None:
            return path, damaged
        damaged[path] = why
    if damaged:
        listed = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
        raise UserError(
            f"{key}: all checkpoints in {directory} are damaged ({listed}); put a copy in their place, or remove "
            "them to train from the start"
        )
    return None, damaged


DAMAGED = ".damaged"
"""Suffix that damaged checkpoints get, so that a run that goes on from an older one may write its own."""


def set_aside(damaged: Iterable[Path]) -> None:
    """Renames damaged checkpoints."""
    for path in damaged:
        aside = path.with_name(path.name + DAMAGED)
        files.remove(aside)
        path.rename(aside)
