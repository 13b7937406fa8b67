"""Writes `model/` at the end of a run."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.export import export_model, model_card
from oumi_pl.runs import CONFIG


class Export(L.Callback):
    """Writes the trained model to `runs/<name>/model`: the best weights when a metric is monitored, else the last.

    Args:
        enabled: Whether to export at all.
        merge: Add a LoRA adapter to its base weights; alone, an adapter is small and needs its base to load.
    """

    def __init__(self, enabled: bool = True, merge: bool = False) -> None:
        self.enabled = enabled
        self.merge = merge

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Exports."""
        folder = next((c.directory for c in trainer.callbacks if isinstance(c, RunFolder)), None)  # type: ignore[attr-defined]
        if not self.enabled or folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        best = next((c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)), "")
        last = None
        if best and Path(best).is_file():
            last = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
            pl_module.load_weights(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
        self.write(trainer, pl_module, folder)
        if last is not None:
            pl_module.load_weights(last)

    def write(self, trainer: Any, pl_module: Any, folder: Path) -> None:
        """Exports the weights that the module has now."""
        data = trainer.datamodule
        text = (folder / CONFIG).read_text() if (folder / CONFIG).exists() else ""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("train/", "val/"))}
        export_model(
            pl_module.causal_lm,
            folder / "model",
            getattr(data, "tokenizer", None),
            merge=self.merge or (pl_module.lora is not None and pl_module.model_name is None),
            stop_tokens=getattr(data, "stop_tokens", ()),
            card=model_card(yaml.safe_load(text) or {}, text, metrics, folder.name),
        )

