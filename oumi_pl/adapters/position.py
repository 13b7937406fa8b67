"""Where a run stands: told to the Lightning objects that look there, and kept in the engine's checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from oumi_pl.adapters.batches import Batches
from oumi_pl.errors import UserError
from oumi_pl.modules.dpo import DPO

FILE = "oumi_pl.pt"
"""In an engine's checkpoint: what a resume needs and the engine does not keep."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def newest(directory: Path) -> Path | None:
    """The newest whole checkpoint of an engine; None if there is none.

    `trainer_state.json` is what transformers writes last: a kill leaves none, or the beginning of one.
    """
    found = {int(m[1]): path for path in directory.glob("checkpoint-*") if (m := _CHECKPOINT.search(path.name))}
    for step in sorted(found, reverse=True):
        try:
            state = json.loads((found[step] / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if state.get("global_step") == step and (found[step] / FILE).is_file():
            return found[step]
    return None


def show_batches(trainer: Any, batches: Batches) -> None:
    """Tells the Lightning trainer how far the epoch has come: `epoch` is made of it."""
    loop = trainer.fit_loop
    loop.max_batches = batches.length or float("inf")
    loop.epoch_progress.current.completed = batches.epoch
    loop.epoch_loop.batch_progress.current.ready = batches.handed
    loop.epoch_loop.batch_progress.is_last_batch = batches.is_epoch_end


def show_step(trainer: Any, step: int) -> None:
    """Tells the Lightning trainer how many updates are done: callbacks, loggers and streams look there."""
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


def save(checkpoint: Path, trainer: Any, row: dict[str, float], checkpoints: Any) -> None:
    """Writes what the engine does not keep: where the data stand, tokens seen, metrics of this step, the best score."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    module = trainer.lightning_module
    content = {
        "data": trainer.datamodule.state_dict(),
        "micro_batches": trainer.accumulate_grad_batches,
        "tokens_seen": dict(module.tokens_seen),
        "metrics_row": row,
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "reference": module.reference.state() if isinstance(module, DPO) else {},
        "best": checkpoints.state_dict() if checkpoints is not None else {},
    }
    torch.save(content, checkpoint / FILE)


def load(checkpoint: Path, trainer: Any, folder: Any, checkpoints: Any) -> None:
    """Takes up what `save` wrote, before the training loader is made.

    Raises:
        UserError: the file is damaged, or the run started from another model.
    """
    try:
        content = torch.load(checkpoint / FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes can be wrong in any way
        raise UserError(f"--resume: {checkpoint / FILE} can't be read: {str(error).partition(chr(10))[0]}") from error
    trainer.datamodule.load_state_dict(content["data"])
    trainer.lightning_module.tokens_seen = content["tokens_seen"]
    if content["reference"]:
        trainer.lightning_module.reference.load_state(content["reference"])  # refuses another initial model
    trainer.callback_metrics.update({k: torch.tensor(v) for k, v in content["metrics"].items()})
    if folder is not None:
        folder._row = content["metrics_row"]
    if checkpoints is not None and content["best"]:
        checkpoints.load_state_dict(content["best"])
    show_step(trainer, int(_CHECKPOINT.search(checkpoint.name)[1]))  # type: ignore[index]
