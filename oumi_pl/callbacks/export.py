"""Exports the trained model at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from oumi_pl.callbacks import find
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.run_folder import RunFolder, completed, is_due, run_directory
from oumi_pl.data.licences import licence_of
from oumi_pl.models.export import model_card, read_checkpoint, why_not_alone
from oumi_pl.models.lm import LM
from oumi_pl.models.sharding import is_sharded, whole
from oumi_pl.runs import folders
from oumi_pl.runs.files import remove
from oumi_pl.runs.folders import CONFIG
from oumi_pl.runs.lineage import parent_text
from oumi_pl.terminal.screen import working
from oumi_pl.terminal.text import echo
from oumi_pl.types import RunData, RunModule


class Export(L.Callback):
    """Writes the trained model to `runs/<name>/model`: the best weights if a metric is monitored, else the last.

    Args:
        enabled: Whether to export at all.
        merge: Merge a LoRA adapter into its base weights. Unmerged, the export is small but needs its base to load. An
            adapter is always merged if its base can't load it: the base has no rows for added tokens, or is random.
    """

    def __init__(self, enabled: bool = True, merge: bool = False) -> None:
        self.enabled = enabled
        self.merge = merge

    def on_train_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Exports the best or the last weights; the module keeps the last."""
        folder = run_directory(trainer)
        if not self.enabled or folder is None or trainer.fast_dev_run or not is_due(trainer, "export"):
            return
        checkpoints = find(trainer, Checkpoints)
        if checkpoints is not None:
            checkpoints.finish(trainer)  # the best weights may still be being written
        best = "" if checkpoints is None else checkpoints.best_model_path
        metrics: dict[str, Any] = dict(trainer.callback_metrics)
        last = None
        if trainer.strategy.broadcast(bool(best) and Path(best).exists()):
            last = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
            metrics = _load(pl_module, Path(best))
        step = trainer.global_step if last is None else step_saved(Path(best))
        with working("exporting the model"):
            self.write(trainer, pl_module, folder, metrics)
        if last is not None:
            pl_module.load_weights(last)
        if (run := find(trainer, RunFolder)) is not None:
            run.record(exported_step=step)
        completed(trainer, "export")

    def write(self, trainer: Any, pl_module: RunModule, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Exports the module's current weights; replaces an export from before the run was resumed."""
        data: RunData = trainer.datamodule
        text = (folder / CONFIG).read_text(encoding="utf-8") if (folder / CONFIG).exists() else ""
        metrics = {k: float(v) for k, v in metrics.items() if k.startswith(("train/", "val/"))}
        model = pl_module.causal_lm
        has_adapter = pl_module.lora is not None
        merge = has_adapter and (self.merge or bool(why_not_alone(model)))
        expected = None
        if merge:
            if pl_module.quantization is None:  # else the copy has another base, in full precision
                expected = model.probe_logits()
            model = _copy_on_cpu(pl_module, data, trainer.is_global_zero)
            if is_sharded(model):  # not rank 0, whose copy is whole, and which gathers the heads when it saves
                for value in pl_module.heads().values():
                    whole(value)
                return
        if trainer.is_global_zero:
            remove(folder / "model")
        pl_module.save(
            folder / "model",
            model=model,
            tokenizer=data.tokenizer,
            merge=merge,
            keep=False,
            expected=expected,
            stop_tokens=data.stop_tokens,
            card=model_card(
                yaml.safe_load(text) or {},
                text,
                metrics,
                folder.name,
                has_adapter and not merge,
                parent=parent_text(folders.read_state(folder)),
                generates=pl_module.generates,
                chat=bool(data.tokenizer.chat_template),
                licence=licence_of,
            ),
        )
        if trainer.is_global_zero:
            echo(f"model -> {folder / 'model'}")


def _load(pl_module: RunModule, checkpoint: Path) -> dict[str, float]:
    """Loads the weights of a checkpoint into the live model; returns the metrics of the checkpoint."""
    if checkpoint.is_file():
        content = read_checkpoint(checkpoint)
        pl_module.load_weights(content["state_dict"])
        return content.get("metrics", {})
    from torch.distributed import checkpoint as dcp

    dcp.load({"state_dict": pl_module.state_dict()}, checkpoint_id=checkpoint)  # into the live shards
    return torch.load(checkpoint / "meta.pt", map_location="cpu", weights_only=True).get("metrics", {})


def step_saved(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    content = checkpoint if checkpoint.is_file() else checkpoint / "meta.pt"
    return int(torch.load(content, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def _copy_on_cpu(pl_module: RunModule, data: RunData, is_rank_zero: bool) -> LM:
    """Builds a copy of the trained model on rank 0 for merging: unsharded, in full precision, in host memory.

    All ranks have to call this, since sharded weights are gathered. The others get the live model back.
    """
    weights = {}
    for name, value in pl_module.state_dict().items():
        weights[name.removeprefix("model.")] = whole(value)
    if not is_rank_zero:
        return pl_module.causal_lm
    quantization, pl_module.quantization = pl_module.quantization, None  # `build` would quantize the base again
    try:
        built: LM = pl_module.build(data.tokenizer, data.added_tokens, branching=None)
    finally:
        pl_module.quantization = quantization
    built.load_state_dict(weights, strict=False)
    return built
