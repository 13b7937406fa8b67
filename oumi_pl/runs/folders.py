"""The run folder: its name, what it holds, and finding the one to resume.

Contents of `runs/<name>/`:

- `run.json`: recipe, command, state, versions, where the time went
- `config.yaml`: what ran; `fit --config` of it runs it again
- `recipe.yaml`: the recipe as it was written, before options of the command line and defaults
- `data.json`: the data report
- `metrics.csv`: one line per optimizer step
- `samples.jsonl`: what the model wrote on the way, where a callback asks it to
- `curves.png`, `report.html`: pictures of the metrics, and one page with all of this
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
from oumi_pl.runs.checkpoint_files import saved_steps

RUN = "run.json"
CONFIG = "config.yaml"
RECIPE = "recipe.yaml"
METRICS = "metrics.csv"
CHECKPOINTS = "checkpoints"


def create(root: Path, name: str) -> Path:
    """Makes `root/name`, or `name-2`, `name-3`, ... beside what is there.

    Raises:
        UserError: if the directory can't be written.
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
    """The folder that `create` would make now."""
    return next(run for run in _names(root, name) if not run.exists())


def _names(root: Path, name: str) -> Iterator[Path]:
    yield root / name
    yield from (root / f"{name}-{number}" for number in range(2, 100_000))


def refuse_unwritable(root: Path, key: str = "runs_dir") -> None:
    """Tells early, and without writing anything, that no folder can be made in `root`, which `key` names.

    Raises:
        UserError: if `root`, or what is there of its path, is not a directory that can be written to.
    """
    there = root
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{key}: can't write to {root}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: can't write to {root}: no permission to write to {there}")


def write_state(run: Path, **values: Any) -> None:
    """Updates `run.json`, atomically: a kill leaves the old one."""
    state = read_state(run) | values | {"updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    half = run / f"{RUN}.half"
    half.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    half.replace(run / RUN)


def read_state(run: Path) -> dict[str, Any]:
    """What `run.json` says; empty if there is none that can be read."""
    try:
        state = json.loads((run / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def process() -> dict[str, Any]:
    """Identifies this process: its machine, its number there, and when it started."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}


def condition(state: dict[str, Any]) -> str:
    """The state of a run as it is now: what `run.json` says, unless its process is gone.

    Returns:
        `finished`, `stopped`, `failed`, `running`; `killed` where it says running and no such process is there; and
        `running?` where that can't be known, on another machine for example; `unknown` if nothing is said.
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

    A process number alone is given to another process sooner or later.
    """
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"  # ended, and not yet buried by its parent
    if shutil.which("ps") is None:
        return None
    printed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return printed.stdout.strip() or None


Column = tuple[list[int], list[float]]
"""The steps of a metric, and its values."""
RECENT = 20
"""Updates over which a displayed training loss is averaged: that of a single update is noise."""


def read_metrics(run: Path, only: Collection[str] | None = None) -> dict[str, Column]:
    """The columns of `metrics.csv`, or some of them, without empty cells; empty if there is no such file.

    A line that a kill left unfinished is passed over.
    """
    found: dict[str, Column] = {}
    try:
        with (run / METRICS).open(newline="", encoding="utf-8") as text:
            names = next(csv.reader(text), [])
            wanted = [(i, *found.setdefault(n, ([], []))) for i, n in enumerate(names) if only is None or n in only]
            for line in text:
                cells = line.rstrip().split(",")  # numbers alone: nothing is quoted below the names
                if len(cells) != len(names) or not cells[0].isdigit():
                    continue
                step = int(cells[0])
                for i, steps, values in wanted:
                    if cells[i]:
                        steps.append(step)
                        values.append(float(cells[i]))
    except (OSError, ValueError):
        pass
    return {name: column for name, column in found.items() if column[0]}


def recent(values: Sequence[float]) -> float:
    """Mean of the last `RECENT` values, the loss that is displayed; NaN if one of them is not a number."""
    last = values[-RECENT:]
    return sum(last) / len(last) if last else float("nan")


def seconds(run: Path, state: dict[str, Any]) -> float | None:
    """How long a run took, with what it was resumed from; up to its last line where its end is not recorded."""
    if state.get("status") != "running":
        return sum(map(_number, state["times"].values())) if isinstance(state.get("times"), dict) else None
    try:
        last = (run / METRICS).stat().st_mtime
    except OSError:
        return None
    begun = _number(state.get("begun"))
    return max(0.0, last - begun) + _number(state.get("before")) if begun else None


def find(name: str, root: Path) -> Path:
    """A run by name or path.

    Raises:
        UserError: if there is none; offers the nearest name.
    """
    for path in (root / name, Path(name).expanduser()):
        if (path / RUN).is_file():
            return path
    raise UserError(f"no run {name!r} in {root}{nearest(name, [run.name for run in all_runs(root)])}")


def all_runs(root: Path) -> list[Path]:
    """The run folders in a directory, oldest first."""
    found = {file.parent: read_state(file.parent) for file in root.glob(f"*/{RUN}")} if root.is_dir() else {}
    return sorted(found, key=lambda run: (_number(found[run].get("created_ns")), run.name))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def recipe_of(config: Path) -> str | None:
    """The recipe that a run's `config.yaml` comes from, so that running it again makes a run of the same name."""
    return read_state(config.parent).get("recipe") if config.name == CONFIG else None


def last_unfinished(root: Path, recipe: str, name: str | None = None) -> Path:
    """The newest run of a recipe that did not finish; with `name`, among the runs of that name.

    Raises:
        UserError: if there is none.
    """
    own = _runs_of(root, recipe, name)
    unfinished = {run: state for run, state in own.items() if state.get("status") != "finished"}
    if not unfinished:
        whose = f"recipe {recipe!r}" + (f" named {name!r}" if name else "")
        newest = max(own, key=lambda r: own[r].get("created_ns", 0), default=None)
        hint = "there is no run of it; leave --resume out to start one"
        if newest is not None:
            hint = f"{newest} is finished; to train it further: --resume {newest} --trainer.max_steps MORE"
        raise UserError(f"--resume: nothing to resume for {whose} in {root}: {hint}")
    return max(unfinished, key=lambda r: unfinished[r].get("created_ns", 0))


def last_model(root: Path, recipe: str) -> Path | None:
    """The exported model of the newest finished run of a recipe that has no other name; None if there is none."""
    states = _runs_of(root, recipe, name=recipe)
    finished = [run for run, s in states.items() if s.get("status") == "finished" and (run / "model").is_dir()]
    newest = max(finished, key=lambda run: states[run].get("created_ns", 0), default=None)
    return None if newest is None else newest / "model"


def _runs_of(root: Path, recipe: str, name: str | None) -> dict[Path, dict[str, Any]]:
    """The runs of a recipe and their states; with `name`, those of that name."""
    states = {p.parent: read_state(p.parent) for p in root.glob(f"*/{RUN}")} if root.is_dir() else {}
    return {run: state for run, state in states.items() if state.get("recipe") == recipe and _is_named(run, name)}


def _is_named(run: Path, name: str | None) -> bool:
    """Whether `create` may have made this folder for the name."""
    return name is None or re.fullmatch(rf"{re.escape(name)}(-\d+)?", run.name) is not None


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; None if it was stopped before the first."""
    steps = saved_steps(run / CHECKPOINTS)
    return steps[-1] if steps else None
