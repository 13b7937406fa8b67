"""Names and finds checkpoints on disk. Imports nothing heavy, unlike `checkpoints.py`."""

import re
import shutil
from pathlib import Path

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
    """Deletes a checkpoint, file or sharded directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
