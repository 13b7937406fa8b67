"""Finds an engine's checkpoints, and adds the state that a resume needs and the engine does not save."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from oumi_pl.errors import UserError
from oumi_pl.runs import checksums, folders

FILE = "oumi_pl.pt"
"""Name of the file that `save` adds to an engine's checkpoint."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def newest_whole(directory: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest complete checkpoint of an engine that is not damaged, and newer ones with what is wrong with them.

    Raises:
        UserError: there are complete checkpoints, and all are damaged.
    """
    return folders.first_whole(_complete(directory), directory)


def _complete(directory: Path) -> Iterator[Path]:
    """The complete checkpoints of an engine, newest first.

    Of its own files, transformers writes `trainer_state.json` last: a checkpoint that a kill cut short has none, or an
    incomplete one.
    """
    by_step = {int(m[1]): path for path in directory.glob("checkpoint-*") if (m := _CHECKPOINT.search(path.name))}
    for step in sorted(by_step, reverse=True):
        path = by_step[step]
        if (path / checksums.LIST).is_file():  # written when all others were; they may be damaged since
            yield path
            continue
        try:
            state = json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(state, dict) and state.get("global_step") == step and (path / FILE).is_file():
            yield path


def save(checkpoint: Path, trainer: Any, metrics_row: dict[str, float], checkpoints: Any) -> None:
    """Saves position in the data, tokens seen, metrics of this step, reference and best score.

    Args:
        checkpoint: Folder of the engine's checkpoint; created if missing.
        trainer: The Lightning trainer.
        metrics_row: The metrics of this step.
        checkpoints: The trainer's `Checkpoints`, or None.
    """
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / checksums.LIST).unlink(missing_ok=True)  # of a checkpoint that is written again
    module = trainer.lightning_module
    content = {
        "data": trainer.datamodule.state_dict(),
        "micro_batches": trainer.accumulate_grad_batches,
        "tokens_seen": dict(module.tokens_seen),
        "optimizer_settings": module.optimizer_settings,
        "metrics_row": metrics_row,
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "reference": module.reference.state() if module.reference is not None else {},
        "best": checkpoints.state_dict() if checkpoints is not None else {},
    }
    torch.save(content, checkpoint / FILE)


def load(checkpoint: Path, trainer: Any, folder: Any, checkpoints: Any) -> dict[str, Any]:
    """Restores what `save` saved, and returns the position in the data. Call it before building the training loader.

    Args:
        checkpoint: Folder of an engine's checkpoint.
        trainer: The Lightning trainer.
        folder: The trainer's `RunFolder`, or None.
        checkpoints: The trainer's `Checkpoints`, or None.

    Raises:
        UserError: the file is damaged, or the run started from another model.
    """
    try:
        content = torch.load(checkpoint / FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"--resume: {checkpoint / FILE} can't be read: {str(error).partition(chr(10))[0]}") from error
    module = trainer.lightning_module
    trainer.datamodule.load_state_dict(content["data"])
    module.tokens_seen = content["tokens_seen"]
    module.saved_optimizer_settings = content.get("optimizer_settings", [])
    if module.reference is not None:
        module.reference.load_state(content["reference"])  # refuses another initial model
    trainer.callback_metrics.update({k: torch.tensor(v) for k, v in content["metrics"].items()})
    if folder is not None:
        folder.on_load_checkpoint(trainer, module, content)
    if checkpoints is not None and content["best"]:
        checkpoints.load_state_dict(content["best"])
    set_step(trainer, int(_CHECKPOINT.search(checkpoint.name)[1]))  # type: ignore[index]
    return content["data"]


def set_step(trainer: Any, step: int) -> None:
    """Sets the Lightning trainer's `global_step`, which callbacks, loggers and streams read."""
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
