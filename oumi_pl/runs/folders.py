"""Creates, reads and finds run folders.

Contents of `runs/<name>/`:

- `run.json`: recipe, command, state, versions, where the time went
- `config.yaml`: the complete config; `fit --config` of it repeats the run
- `recipe.yaml`: the recipe as its author wrote it, without command-line options and defaults
- `data.json`: the data report
- `metrics.csv`: one line per optimizer step
- `samples.jsonl`: completions that callbacks sampled during training
- `rollouts.jsonl`: of online training, every training completion with its rewards and advantage
- `curves.png`, `report.html`: curves of the metrics, and one page with all of this
- `checkpoints/`: `step-*.ckpt`, and `best.ckpt` (weights only) when a metric is monitored
- `model/`: the trained model, for `transformers`
"""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from oumi_pl.errors import UserError, nearest

RUN = "run.json"
CONFIG = "config.yaml"
RECIPE = "recipe.yaml"
METRICS = "metrics.csv"
CHECKPOINTS = "checkpoints"
TIME = "trainer.max_time"
"""What has ended a run, if its time was up."""
HALF = ".half"
"""Suffix of a checkpoint that is still being written."""

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


def remove(path: Path) -> None:
    """Deletes a file, or a directory with its content; nothing if there is none. Checkpoints may be either."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def create(root: Path, name: str) -> Path:
    """Creates `root/name`, or `name-2`, `name-3`, ... if that exists.

    Raises:
        UserError: if the folder can't be created.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for run in _names(root, name):
            try:
                run.mkdir()
            except FileExistsError:
                continue
            (run / CHECKPOINTS).mkdir()
            return run
    except OSError as error:
        raise UserError(f"runs_dir: can't write to {root}: {error.strerror}") from error
    raise UserError(f"runs_dir: {root} holds too many runs named {name}")


def free(root: Path, name: str) -> Path:
    """The folder that `create` would create now."""
    return next(run for run in _names(root, name) if not run.exists())


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
    half = run / f"{RUN}.half"
    half.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    half.replace(run / RUN)


def read_state(run: Path) -> dict[str, Any]:
    """The content of `run.json`; empty if it is missing or unreadable."""
    try:
        state = json.loads((run / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def process() -> dict[str, Any]:
    """Identifies this process by host, process id and start time."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def condition(state: dict[str, Any]) -> str:
    """The current state of a run: the one in `run.json`, unless that is `running` and its process has ended.

    Returns:
        `finished`, `stopped`, `failed` or `running`; `killed` if the process of a `running` one no longer exists;
        `running?` if that can't be checked, on another machine for example; `unknown` if `run.json` has no state.
    """
    status = str(state.get("status") or "unknown")
    owner = state.get("process")
    if status != "running":
        return status
    if not isinstance(owner, dict) or owner.get("host") != socket.gethostname() or not owner.get("began"):
        return "running?"
    return "running" if _began(owner.get("pid")) == owner["began"] else "killed"


def _began(pid: object) -> str | None:
    """Start time of a process as the system prints it; None if there is no such process, or it is unknown.

    A process id alone does not identify a process, since systems reuse ids.
    """
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"  # X is dead, Z a zombie
    if shutil.which("ps") is None:
        return None
    printed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return printed.stdout.strip() or None


Column = tuple[list[int], list[float]]
"""Steps and values of a metric."""
RECENT = 20
"""A displayed training loss is the mean of this many updates, because single ones are noisy."""


def read_metrics(run: Path, only: Collection[str] | None = None) -> dict[str, Column]:
    """Reads `metrics.csv`, or the columns in `only`, without empty cells; empty if there is no such file.

    A line that a kill cut short is skipped.
    """
    columns: dict[str, Column] = {}
    try:
        with (run / METRICS).open(newline="", encoding="utf-8") as text:
            names = next(csv.reader(text), [])
            wanted = [(i, *columns.setdefault(n, ([], []))) for i, n in enumerate(names) if only is None or n in only]
            for line in text:
                cells = line.rstrip().split(",")  # below the header there are only numbers, so no quotes
                if len(cells) != len(names) or not cells[0].isdigit():
                    continue
                step = int(cells[0])
                for i, steps, values in wanted:
                    if cells[i]:
                        steps.append(step)
                        values.append(float(cells[i]))
    except (OSError, ValueError):
        pass
    return {name: column for name, column in columns.items() if column[0]}


def recent(values: Sequence[float]) -> float:
    """Mean of the last `RECENT` values, which is the displayed loss; NaN if one of them is NaN."""
    last = values[-RECENT:]
    return sum(last) / len(last) if last else float("nan")


def seconds(run: Path, state: dict[str, Any]) -> float | None:
    """Duration of a run including earlier sessions; up to the last line of metrics if its end was not recorded."""
    if state.get("status") != "running":
        return sum(map(_number, state["times"].values())) if isinstance(state.get("times"), dict) else None
    try:
        last = (run / METRICS).stat().st_mtime
    except OSError:
        return None
    begun = _number(state.get("begun"))
    return max(0.0, last - begun) + _number(state.get("before")) if begun else None


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
    return sorted(runs, key=lambda run: (_number(runs[run].get("created_ns")), run.name))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def recipe_of(config: Path) -> str | None:
    """The recipe behind a run's `config.yaml`, for the name of a repeated run; None for other files."""
    return read_state(config.parent).get("recipe") if config.name == CONFIG else None


def last_unfinished(root: Path, recipe: str, name: str | None = None) -> Path:
    """The newest unfinished run of a recipe; with `name`, among the runs of that name.

    Raises:
        UserError: if there is none.
    """
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


def _runs_of(root: Path, recipe: str, name: str | None) -> dict[Path, dict[str, Any]]:
    """The runs of a recipe and their states, oldest first; with `name`, those of that name."""
    pattern = rf"{re.escape(name)}(-\d+)?" if name else ".*"  # `create` adds a number to a name that is taken
    states = {run: read_state(run) for run in all_runs(root) if re.fullmatch(pattern, run.name)}
    return {run: state for run, state in states.items() if state.get("recipe") == recipe}


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run; None if it has none."""
    steps = saved_steps(run / CHECKPOINTS)
    return steps[-1] if steps else None
