"""What a run of streamed documents was trained on, reported at its end."""

import json
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.run_folder import run_directory
from oumi_pl.types import RunData, RunModule


class Consumed(L.Callback):
    """Writes to `data.json` how much of each source was read in the last pass; prints the shares of a mixture."""

    @rank_zero_only
    def on_train_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Prints and writes."""
        data: RunData = trainer.datamodule
        consumed, directory = data.consumed(), run_directory(trainer)
        for source in consumed:
            if "wanted" in source and source["tokens"]:
                print(
                    f"read from {source['source']}: {source['share']:.2%} of the tokens ({source['wanted']:.2%} "
                    "wanted), including what is still in the shuffle buffer"
                )
        if consumed and directory is not None:
            file = directory / "data.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"consumed": consumed}, indent=1) + "\n")
