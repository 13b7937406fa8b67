"""The run folder: its name, what it holds, and finding the one to resume.

    runs/<name>/
      run.json       recipe, command, state, versions
      config.yaml    what ran; `fit --config` of it runs it again
      data.json      the data report
      metrics.csv    one line per optimizer step
      checkpoints/   step-*.ckpt, and best.ckpt (weights only) when a metric is monitored
      model/         the trained model, for `transformers`
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from oumi_pl.checkpoint_files import saved_steps
from oumi_pl.errors import UserError

RUN = "run.json"
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"


def create(root: Path, name: str) -> Path:
    """Makes `root/name`, or `name-2`, `name-3`, ... beside what is there.

    Raises:
        UserError: if the directory can't be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in range(1, 100_000):
            run = root / (name if number == 1 else f"{name}-{number}")
            try:
                run.mkdir()
            except FileExistsError:
                continue
            (run / CHECKPOINTS).mkdir()
            return run
    except OSError as error:
        raise UserError(f"runs_dir: can't write to {root}: {error.strerror}") from error
    raise UserError(f"runs_dir: {root} holds too many runs named {name}")


def write_state(run: Path, **values: Any) -> None:
    """Updates `run.json`, atomically: a kill leaves the old one."""
    state = read_state(run) | values | {"updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    half = run / f"{RUN}.half"
    half.write_text(json.dumps(state, indent=1) + "\n")
    os.replace(half, run / RUN)


def read_state(run: Path) -> dict[str, Any]:
    """What `run.json` says; empty if there is none."""
    try:
        return json.loads((run / RUN).read_text())
    except FileNotFoundError:
        return {}


def last_unfinished(root: Path, recipe: str) -> Path:
    """The newest run of a recipe that did not finish.

    Raises:
        UserError: if there is none.
    """
    runs = [p.parent for p in root.glob(f"*/{RUN}")] if root.is_dir() else []
    own = [r for r in runs if read_state(r).get("recipe") == recipe]
    unfinished = [r for r in own if read_state(r).get("status") != "finished"]
    if not unfinished:
        hint = f"its {len(own)} runs are finished" if own else "it has no run"
        raise UserError(f"--resume: nothing to resume for recipe {recipe!r} in {root}: {hint}; leave --resume out to start one")
    return max(unfinished, key=lambda r: read_state(r).get("created_ns", 0))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; None if it was stopped before the first."""
    steps = saved_steps(run / CHECKPOINTS)
    return steps[-1] if steps else None
