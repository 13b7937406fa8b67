"""Names of checkpoints on disk, for those who only have to find one: nothing heavy is imported here."""

import re
import shutil
from pathlib import Path

HALF = ".half"
"""Suffix of a checkpoint that is still being written."""

_STEP = re.compile(r"step-(\d+)\.ckpt$")


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after so many updates."""
    return f"step-{step:08d}.ckpt"


def saved_steps(directory: Path) -> list[Path]:
    """The whole checkpoints in a directory, oldest first."""
    return sorted(p for p in directory.glob("step-*.ckpt") if _STEP.search(p.name))


def step_of(checkpoint: Path) -> int:
    """Updates that a checkpoint has behind it, by its name; -1 for `best.ckpt` and others without a step."""
    found = _STEP.search(checkpoint.name)
    return int(found.group(1)) if found else -1


def remove(path: Path) -> None:
    """Deletes a checkpoint, file or sharded directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
