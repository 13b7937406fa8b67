"""`checkpoint-N` folders: which are complete, which is the last, and their `trainer_state.json`."""

import json
import logging
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.errors import UserError
from oumi_pl.runs.checksums import refuse_damaged
from oumi_pl.runs.files import HALF, remove
from oumi_pl.runs.folders import first_whole, set_aside

if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerState

logger = logging.getLogger("oumi_pl")

STATE = "trainer_state.json"
TRAINING = "training_state.pt"
"""Lightning's checkpoint, without the weights: optimizer, schedule, generators, position in the data, callbacks."""

_NUMBERED = re.compile(r"checkpoint-(\d+)$")


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = {int(m.group(1)): p for p in output_dir.glob("checkpoint-*") if (m := _NUMBERED.search(p.name))}
    return [folders[step] for step in sorted(folders) if (folders[step] / STATE).is_file()]


def find_checkpoint(named: str | None, output_dir: Path, try_last: bool) -> Path | None:
    """Where a run resumes from: the folder that is named, else the last of `output_dir` if that may be tried.

    An output folder is taken for the last checkpoint in it. Damaged ones are passed over, with a warning.

    Raises:
        UserError: if the named folder is not one of this trainer's checkpoints, or all are damaged.
        DamagedError: if the named checkpoint is damaged.
    """
    if named is None:
        return _last_whole(output_dir) if try_last else None
    folder = Path(named)
    if not (folder / TRAINING).is_file() and (inside := _last_whole(folder)):
        return inside
    if not (folder / TRAINING).is_file():
        why = "holds no " + TRAINING if folder.is_dir() else "is not there"
        raise UserError(f"training.resume_from_checkpoint: {folder} {why}; name a checkpoint-N folder of this trainer")
    refuse_damaged(folder)
    return folder


def _last_whole(output_dir: Path) -> Path | None:
    last, damaged = first_whole(reversed(checkpoints(output_dir)), output_dir, "training.resume_from_checkpoint")
    for path, why in damaged.items():
        logger.warning("%s is damaged (%s); training goes on from %s", path, why, last)
    if os.environ.get("RANK", "0") == "0":
        set_aside(damaged)
    return last


def write_state(file: Path, state: "TrainerState") -> None:
    """Writes `trainer_state.json`: transformers' fields, and `total_tokens_seen`, which is Oumi's."""
    content = asdict(state) | {"total_tokens_seen": state.num_input_tokens_seen}
    half = file.with_name(file.name + HALF)
    half.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    half.replace(file)


def read_state(folder: Path) -> dict[str, Any]:
    """The fields of transformers that `write_state` wrote."""
    content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    content.pop("total_tokens_seen")
    return content


def keep_last(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond a number; the best one stays, and counts."""
    if limit is None or limit < 1:
        return
    folders = checkpoints(output_dir)
    spared = [p for p in folders if best is not None and p == Path(best)]
    others = [p for p in folders if p not in spared]
    # the newest is always kept: the run resumes from it
    kept = max(1, limit - len(spared))
    for old in others[:-kept]:
        remove(old)
