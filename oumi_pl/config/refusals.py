"""Refuses what does not go together in a recipe, or with the command, before any row is read or weight loaded."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oumi_pl.errors import UserError, nearest

NEEDS = {
    "fit": ("train",),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict", "test", "validation"),
}
"""Command -> the sources under `data` of which it needs one."""


PARTNERS = "SFT goes with SFTData, DPO with DPOData, Pretrain with PretrainData"


def refuse_contradictions(
    command: str, config: Mapping[str, Any], model: Any, data: Any, callbacks: Sequence[Any]
) -> None:
    """Looks at the parts of a run together, once they are made.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        config: The recipe as it was parsed.
        model: The LightningModule.
        data: The LightningDataModule.
        callbacks: All callbacks of the run.

    Raises:
        UserError: at the first thing that can't be.
    """
    _refuse_name(config.get("name"))
    if command != "predict" and (reads := getattr(model, "reads", None)) != (gives := getattr(data, "gives", reads)):
        module, kind = type(model).__name__, type(data).__name__
        raise UserError(f"data: {kind} gives {gives}, and {module} trains on {reads}; {PARTNERS}")
    sources = getattr(data, "sources", {})
    if sources and all(sources.get(name) is None for name in NEEDS[command]):
        raise UserError(f"data.{NEEDS[command][0]}: `{command}` needs a source here, and the recipe names none")
    _refuse_checkpoint(config.get("ckpt_path"))
    if command != "fit" and config.get("ckpt_path") is None and not getattr(model, "model_name", True):
        raise UserError(f"`{command}` of random weights says nothing: name the trained ones with --ckpt_path FILE")
    if command == "fit":
        trainer = config.get("trainer") or {}
        for key in ("max_steps", "max_epochs"):
            if trainer.get(key) == 0:
                raise UserError(f"trainer.{key} is 0, so there is nothing to train")
        if (accumulate := trainer.get("accumulate_grad_batches")) is not None and accumulate < 1:
            raise UserError(f"trainer.accumulate_grad_batches is {accumulate}, but has to be at least 1")
        if sources and sources.get("validation") is None:
            _refuse_without_validation(config, callbacks)
        for callback in callbacks:
            _refuse_unknown_metric(getattr(callback, "monitor", None), callback, model, callbacks)


def refuse_missing_gpus(config: Mapping[str, Any], trainer: Any) -> None:
    """Refuses to put a recipe for several GPUs on as many processes of a machine without any, unless asked to.

    Raises:
        UserError: if several devices are asked for, no accelerator is named, and there is none but the CPU.
    """
    if config.get("accelerator") == "auto" and trainer.num_devices > 1 and trainer.strategy.root_device.type == "cpu":
        raise UserError(
            f"trainer.devices: {trainer.num_devices} devices are asked for, and no GPU is visible; "
            "for as many processes on the CPU, add --trainer.accelerator cpu"
        )


def refuse_unknown_devices(trainer: Mapping[str, Any]) -> None:
    """Tells a misspelt accelerator or strategy, for Lightning lists them all or some.

    Raises:
        UserError: if there is no such name; offers the nearest.
    """
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    accelerators, strategies = AcceleratorRegistry.available_accelerators(), StrategyRegistry.available_strategies()
    for key, names in {"accelerator": accelerators, "strategy": strategies}.items():
        name, known = trainer.get(key), ["auto", "gpu", *names] if key == "accelerator" else ["auto", *names]
        if isinstance(name, str) and name not in known:
            raise UserError(f"trainer.{key}: there is no {name!r}{nearest(name, known)}")


def _refuse_name(name: str | None) -> None:
    if name is not None and (not name or Path(name).name != name or name.startswith(".")):
        raise UserError(f"name: {name!r} can't be the name of a folder; where folders go is said with runs_dir")


def _refuse_without_validation(config: Mapping[str, Any], callbacks: Sequence[Any]) -> None:
    asks = "val_every" if config.get("val_every") is not None else None
    for callback in callbacks:
        if getattr(callback, "needs_validation", False):
            asks = f"the callback {type(callback).__name__}"
        elif str(getattr(callback, "monitor", None) or "").startswith("val/"):
            asks = f"{_place(callback)}: {callback.monitor!r}"
    if asks:
        raise UserError(
            f"{asks} needs held-out rows, and the recipe names none; set data.validation, to 0.05 for example"
        )


def _refuse_unknown_metric(monitor: str | None, callback: Any, model: Any, callbacks: Sequence[Any]) -> None:
    """Tells a misspelt metric at once where it can be known; classes of one's own may log whatever they like."""
    own = [type(part).__module__.split(".")[0] not in ("oumi_pl", "lightning") for part in (model, *callbacks)]
    if monitor is None or any(own) or not getattr(model, "validation_metrics", ()) or monitor.startswith("train/"):
        return
    known = [name for part in (model, *callbacks) for name in getattr(part, "validation_metrics", ())]
    if monitor not in known:
        raise UserError(f"{_place(callback)}: there is no metric {monitor!r}{nearest(monitor, known)}")


def _place(callback: Any) -> str:
    """Where a recipe says what a callback monitors."""
    return "checkpoint.monitor" if type(callback).__name__ == "Checkpoints" else f"monitor of {type(callback).__name__}"


def _refuse_checkpoint(name: str | None) -> None:
    """A checkpoint that is not there, or no checkpoint: Lightning would take `last` for a start from scratch."""
    if name is None or "://" in name:
        return
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "meta.pt").is_file():  # sharded
            return
        inside = sorted(path.rglob("*.ckpt"))
        hint = f"; name the file, {inside[-1]} for example" if inside else ""
        raise UserError(f"--ckpt_path: {name} is a directory and no sharded checkpoint{hint}")
    if not path.is_file():
        beside = [p.as_posix() for p in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        raise UserError(f"--ckpt_path: no file {name!r}{nearest(path.as_posix(), beside)}")
    if not zipfile.is_zipfile(path):  # what torch writes is a zip archive, whose index comes last
        raise UserError(f"--ckpt_path: {name} is not a checkpoint, or was cut short while it was written")
