"""What a run of streamed documents was trained on, told at its end."""

import json
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.run_folder import RunFolder


class Consumed(L.Callback):
    """Keeps in `data.json` how much of each source was read in the last pass; of a mixture, prints the shares."""

    @rank_zero_only
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Prints and writes."""
        consumed = trainer.datamodule.consumed() if hasattr(trainer.datamodule, "consumed") else []
        folder = next((c.directory for c in trainer.callbacks if isinstance(c, RunFolder)), None)
        for source in consumed:
            if "wanted" in source and source["tokens"]:
                print(
                    f"read of {source['source']}: {source['share']:.2%} of the tokens ({source['wanted']:.2%} wanted), "
                    f"what lies ready in the shuffle buffer included"
                )
        if consumed and folder is not None:
            file = folder / "data.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"consumed": consumed}, indent=1) + "\n")
