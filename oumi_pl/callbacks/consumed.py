"""What a run of streamed documents was trained on, told at its end."""

import json
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl.callbacks.run_folder import RunFolder


class Consumed(L.Callback):
    """Prints and keeps in `data.json` how much of each source was trained on, and the shares that were aimed at."""

    @rank_zero_only
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Prints and writes."""
        consumed = trainer.datamodule.consumed() if hasattr(trainer.datamodule, "consumed") else []
        folder = next((c.directory for c in trainer.callbacks if isinstance(c, RunFolder)), None)
        for source in consumed:
            wanted = f" ({source['wanted']:.2%} wanted)" if "wanted" in source else ""
            print(
                f"read of {source['source']}: {source['tokens']:,} tokens, {source['share']:.2%} of all{wanted}, in "
                f"{source['passes']} whole passes and {source['documents']:,} documents"
            )
        if consumed and folder is not None:
            file = folder / "data.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"consumed": consumed}, indent=1) + "\n")
