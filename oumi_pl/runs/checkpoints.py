"""Writes checkpoints atomically, so that a kill at any moment leaves a complete one; reads the state of generators."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from oumi_pl.errors import UserError
from oumi_pl.runs.folders import HALF, remove


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder, syncs it to disk, and renames it.

    Lightning's own class serializes in memory and moves the file from the system's temporary directory. Across file
    systems that is a copy, which a kill can cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves to a local path atomically; removes the temporary file if writing fails."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(path.name + HALF)
        try:
            with half.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            half.unlink(missing_ok=True)
            # after a failed write, torch's writer fails again on closing the file, with an error that hides the cause
            full = error if isinstance(error, OSError) else error.__context__
            if isinstance(full, OSError):
                full.filename = full.filename or str(path)
            raise
        if path.is_dir():  # a sharded checkpoint, written with another strategy before
            remove(path)
        half.replace(path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads tensors and plain containers only, since other pickles can run code, unless `weights_only` is False.

        Raises:
            UserError: if the file is not a checkpoint, or damaged.
        """
        try:
            content = super().load_checkpoint(path, map_location, weights_only=weights_only is not False)
        except Exception as error:  # any error of torch's is about this file
            raise UserError(f"{path}: can't be read as a checkpoint: {str(error).partition(chr(10))[0]}") from error
        # a spawned process returns its weights to Lightning in a file of this name, without a dictionary around them
        is_handover = Path(path).name == ".temp.ckpt"
        if not is_handover and (not isinstance(content, dict) or "state_dict" not in content):
            raise UserError(f"{path}: is not a checkpoint of a run (it has no state_dict)")
        return content


def saved_at(path: Path) -> int:
    """The step at which a checkpoint was saved."""
    file = path / "meta.pt" if path.is_dir() else path  # a sharded checkpoint is a directory
    return int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def rng_state() -> dict[str, Any]:
    """The state of all random generators that training may use, as plain values that load with `weights_only=True`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores the state of all random generators."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
