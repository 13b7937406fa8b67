"""How checkpoints are written and read, so that a kill at any moment leaves a whole one; and the generators' state."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from oumi_pl.errors import UserError
from oumi_pl.runs.checkpoint_files import HALF, remove


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, forces it to the disk, and moves it there in one step.

    Lightning's own builds the file in memory and moves it from the system's temporary directory, which across file
    systems is a copy that a kill can cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves to a local path, atomically; a half that could not be written is removed."""
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
            # torch's writer fails once more when it closes a file that it could not write, in words of its own
            full = error if isinstance(error, OSError) else error.__context__
            if isinstance(full, OSError):
                full.filename = full.filename or str(path)
            raise
        if path.is_dir():  # a sharded checkpoint of an earlier layout
            remove(path)
        half.replace(path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads tensors and plain containers, never code, unless asked to.

        Raises:
            UserError: if the file is not a checkpoint, or damaged.
        """
        try:
            content = super().load_checkpoint(path, map_location, weights_only=weights_only is not False)
        except Exception as error:  # whatever torch trips over, it is this file
            raise UserError(f"{path}: can't be read as a checkpoint: {str(error).partition(chr(10))[0]}") from error
        hands_over = Path(path).name == ".temp.ckpt"  # bare weights, by which a spawned process returns what it trained
        if not hands_over and (not isinstance(content, dict) or "state_dict" not in content):
            raise UserError(f"{path}: is not a checkpoint of a run (it has no state_dict)")
        return content


def rng_state() -> dict[str, Any]:
    """The state of every generator that training may draw from, as plain values that load with `weights_only=True`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts every generator back to a saved state."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
