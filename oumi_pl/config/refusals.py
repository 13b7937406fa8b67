"""Checks that the parts of a run fit each other and the command, before any row or weight is loaded."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oumi_pl.errors import UserError, nearby, nearest
from oumi_pl.terminal.text import echo

NEEDS = {
    "fit": ("train",),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict", "test", "validation"),
}
"""Command -> the keys of `data` of which it needs at least one."""
GIVES = {False: "tokens", True: "pairs"}
"""Whether examples branch -> their name in messages."""
PARTNERS = (
    "SFT and Distill go with SFTData, Distill also with DistillData and RolloutData, DPO with DPOData, KTO with "
    "KTOData, Reward with RewardData, GRPO with RolloutData, Pretrain with PretrainData"
)


def refuse_contradictions(
    command: str, config: Mapping[str, Any], model: Any, data: Any, callbacks: Sequence[Any]
) -> None:
    """Checks the parts of a run after they have been built.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        config: The parsed recipe.
        model: The LightningModule.
        data: The LightningDataModule.
        callbacks: All callbacks of the run.

    Raises:
        UserError: at the first contradiction.
    """
    name = config.get("name")
    if name is not None and (not name or Path(name).name != name or name.startswith(".")):
        raise UserError(f"name: {name!r} can't be the name of a folder; runs_dir chooses where run folders go")
    if command != "predict" and model.branching not in (None, data.branching):
        module, kind, gives = type(model).__name__, type(data).__name__, GIVES[data.branching]
        raise UserError(f"data: {kind} gives {gives}, but {module} trains on {GIVES[model.branching]}; {PARTNERS}")
    sources = getattr(data, "sources", {})
    if sources and all(sources.get(name) is None for name in NEEDS[command]):
        raise UserError(f"data.{NEEDS[command][0]}: `{command}` needs a source here, but the recipe names none")
    _refuse_checkpoint(config.get("ckpt_path"), command)
    if command == "predict" and not model.generates:
        raise UserError(f"predict: {type(model).__name__} does not complete prompts; use `validate` or `test`")
    if command != "fit" and config.get("ckpt_path") is None:
        _check_weights(command, getattr(model, "model_name", "a model"))
    if command == "predict":
        _check_predictions(callbacks)
    if command == "fit":
        trainer = config.get("trainer") or {}
        for key in ("max_steps", "max_epochs"):
            if trainer.get(key) == 0:
                raise UserError(f"trainer.{key} is 0, so there is nothing to train")
        _refuse_callbacks(config, callbacks)
        if (accumulate := trainer.get("accumulate_grad_batches")) is not None and accumulate < 1:
            raise UserError(f"trainer.accumulate_grad_batches is {accumulate}, but has to be at least 1")
        if sources and sources.get("validation") is None:
            _refuse_without_validation(config, callbacks)
        for callback in callbacks:
            _refuse_unknown_metric(getattr(callback, "monitor", None), callback, model, data, callbacks)


def _refuse_callbacks(config: Mapping[str, Any], callbacks: Sequence[Any]) -> None:
    """Refuses callbacks of Lightning that can't work here, or not beside another key."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    from oumi_pl.modules.base import refuse_unfit_callbacks

    refuse_unfit_callbacks(callbacks)
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        accumulate = (config.get("trainer") or {}).get("accumulate_grad_batches") or 1
        clashes = {
            "trainer.accumulate_grad_batches": (accumulate > 1, "keep one of them"),
            "val_every": (config.get("val_every") is not None, "set trainer.val_check_interval, in micro-batches"),
            "max_tokens": (config.get("max_tokens") is not None, "set trainer.max_steps or max_epochs"),
        }
        for key, (is_set, instead) in clashes.items():
            if is_set:
                raise UserError(f"{key}: GradientAccumulationScheduler changes the size of updates; {instead}")


def _check_weights(command: str, model: str | None) -> None:
    """Refuses to evaluate random weights; says so if pretrained weights are used for lack of a checkpoint."""
    if model is None:
        raise UserError(f"`{command}` would run on untrained weights; pass --ckpt_path FILE")
    echo(f"no --ckpt_path given; using the pretrained weights of {model}", file=sys.stderr)


def _check_predictions(callbacks: Sequence[Any]) -> None:
    for settings in (callback.settings for callback in callbacks if type(callback).__name__ == "Predictions"):
        if settings["max_new_tokens"] < 1:
            raise UserError(f"predictions.max_new_tokens is {settings['max_new_tokens']}, but has to be at least 1")
        if settings["temperature"] < 0:
            raise UserError(f"predictions.temperature is {settings['temperature']}, but can't be negative; 0 is greedy")


def refuse_missing_gpus(config: Mapping[str, Any], trainer: Any) -> None:
    """Refuses to run a recipe for several GPUs as several CPU processes, unless the recipe or torchrun asks for them.

    Raises:
        UserError: if several devices are requested without an accelerator, and there is only a CPU.
    """
    on_cpu = config.get("accelerator") == "auto" and trainer.strategy.root_device.type == "cpu"
    if on_cpu and trainer.num_devices > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise UserError(
            f"trainer.devices: {trainer.num_devices} devices are requested, but no GPU is visible; "
            "to run as many processes on the CPU, add --trainer.accelerator cpu"
        )


def launched_devices(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Devices and nodes of a run that torchrun started, for a recipe that leaves them out; empty without torchrun.

    Raises:
        UserError: the recipe sets others. Each process would train a model of its own.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
    left_out = devices in ("auto", None, -1, "-1")
    listed = devices.strip(",").split(",") if isinstance(devices, str) and "," in devices else devices
    count = local if left_out else len(listed) if isinstance(listed, list) else int(listed)
    if count != local or nodes not in (1, world // local):
        raise UserError(
            f"trainer.devices: torchrun started {local} process{'es' if local > 1 else ''} on each of {world // local} "
            f"node{'s' if world > local else ''}, and the recipe has {devices} on {nodes}; leave trainer.devices and "
            "trainer.num_nodes out, or start it without torchrun"
        )
    return {"devices": local if left_out else devices, "num_nodes": world // local}


STRATEGIES = ("auto", "ddp", "fsdp2", "Sharded")
"""The documented values of `trainer.strategy`."""


def refuse_unknown_devices(trainer: Mapping[str, Any]) -> None:
    """Checks accelerator, devices and strategy of the trainer before Lightning does.

    Raises:
        UserError: if a name is unknown (suggests the nearest), or the strategy does not support the recipe.
    """
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    import oumi_pl.models.sharding  # noqa: F401 - it registers a strategy

    if trainer.get("barebones"):
        raise UserError("trainer.barebones: a run needs callbacks and a logger, which it turns off; leave it out")
    if trainer.get("max_steps", -1) is None:
        raise UserError("trainer.max_steps is null: leave it out for no limit")
    accelerators, strategies = AcceleratorRegistry.available_accelerators(), StrategyRegistry.available_strategies()
    for key, names in {"accelerator": accelerators, "strategy": strategies}.items():
        name, known = trainer.get(key), ["auto", "gpu", *names] if key == "accelerator" else ["auto", *names]
        if isinstance(name, str) and name not in known:
            # of Lightning's strategies, those that this package is tested with
            right = STRATEGIES if key == "strategy" else known
            raise UserError(f"trainer.{key}: unknown {key} {name!r}{nearest(name, right)}")
    there = {name: AcceleratorRegistry[name]["accelerator"].is_available() for name in accelerators}
    there |= {"gpu": there["cuda"] or there["mps"], "auto": True}
    accelerator = trainer.get("accelerator")
    if isinstance(accelerator, str) and not there[accelerator]:
        raise UserError(f"trainer.accelerator: no {accelerator!r} device is visible; leave it out to use what there is")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not there["gpu"] and not there["tpu"])
    _refuse_devices(trainer.get("devices", "auto"), on_cpu)
    _refuse_strategy(trainer.get("strategy"), trainer.get("gradient_clip_val"))


def _refuse_devices(devices: Any, on_cpu: bool) -> None:
    """Checks that devices are a number or a list of indices; on the CPU only a number (of processes)."""
    written = re.sub(r"[\[\]\s]", "", str(devices))
    if str(devices) == "0" or not re.fullmatch(r"auto|-1|\d+(,\d+)*,?", written):
        raise UserError(f"trainer.devices: {devices!r} is neither how many (2), nor which ('0,2'), nor 'auto' for all")
    if on_cpu and not re.fullmatch(r"auto|\d+", written):
        raise UserError(
            f"trainer.devices: {devices!r} chooses among GPUs, but this runs on the CPU: "
            "set how many processes, 2 for example"
        )


def _refuse_strategy(strategy: Any, clip: float | None) -> None:
    """Refuses DeepSpeed, and clipping under FSDP1, which do not give access to the whole gradient."""
    from oumi_pl.models.sharding import FSDP2

    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    instead = "take strategy: fsdp2"
    if name.lower().startswith("deepspeed"):
        raise UserError(f"trainer.strategy: {name} keeps gradients where their norm can't be computed; {instead}")
    if clip and name.lower().startswith("fsdp") and name != FSDP2:
        raise UserError(
            f"trainer.gradient_clip_val: under {name} no process sees the norm of all gradients, by which they are "
            f"clipped; {instead}, or leave out clipping"
        )
    if clip is not None and clip < 0:
        raise UserError(f"trainer.gradient_clip_val is {clip}, but a norm is above 0; leave it out to clip nothing")


def refuse_unsupported_precision(precision: Any, device: Any) -> None:
    """Refuses bfloat16 on a GPU without it: torch would emulate it, slower than float32.

    Args:
        precision: The trainer's.
        device: The device that trains.

    Raises:
        UserError: if the GPU does not support the precision.
    """
    import torch

    if device.type != "cuda" or "bf16" not in str(precision):
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"trainer.precision: {precision} needs a GPU with bfloat16 (NVIDIA's from Ampere on), but "
            f"{torch.cuda.get_device_name(device)} has none; set it to 16-mixed or 32-true"
        )


def refuse_seed(seed: Any) -> None:
    """Checks the range of a seed.

    Raises:
        UserError: if it is negative, or above 2**32 - 1, which no generator accepts.
    """
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything is {seed}, but has to be between 0 and {2**32 - 1}")


def _refuse_without_validation(config: Mapping[str, Any], callbacks: Sequence[Any]) -> None:
    reason = "val_every" if config.get("val_every") is not None else None
    for callback in callbacks:
        if getattr(callback, "needs_validation", False):
            reason = f"the callback {type(callback).__name__}"
        elif str(getattr(callback, "monitor", None) or "").startswith("val/"):
            reason = f"{_place(callback)}: {callback.monitor!r}"
    if reason:
        raise UserError(
            f"{reason} needs held-out rows, but the recipe names none; set data.validation, to 0.05 for example"
        )


def _refuse_unknown_metric(monitor: str | None, callback: Any, model: Any, data: Any, callbacks: Sequence[Any]) -> None:
    """Checks the name of a monitored metric, unless a class of a user takes part, which may log any name."""
    own = [type(part).__module__.split(".")[0] not in ("oumi_pl", "lightning") for part in (model, *callbacks)]
    if monitor is None or any(own) or not getattr(model, "validation_metrics", ()) or monitor.startswith("train/"):
        return
    known = [name for part in (model, data, *callbacks) for name in getattr(part, "validation_metrics", ())]
    groups = [name for part in callbacks for name in getattr(part, "validation_groups", ())]
    if monitor not in known and not any(monitor.startswith(f"{name}/") for name in groups):
        raise UserError(f"{_place(callback)}: unknown metric {monitor!r}{nearest(monitor, known)}")


def _place(callback: Any) -> str:
    """The key at which a recipe sets what a callback monitors."""
    return "checkpoint.monitor" if type(callback).__name__ == "Checkpoints" else f"monitor of {type(callback).__name__}"


def _refuse_checkpoint(name: str | None, command: str) -> None:
    """Checks that a checkpoint file exists and is valid: Lightning would start from scratch for a missing `last`."""
    if name is None or "://" in name:
        return
    from oumi_pl.runs.checkpoints import WEIGHTS_ONLY, holds_weights_only, is_sharded_checkpoint
    from oumi_pl.runs.checksums import is_archive

    path = Path(name).expanduser()
    if path.is_dir() and not is_sharded_checkpoint(path):
        inside = sorted(path.rglob("*.ckpt"))
        hint = f"; name the file, {inside[-1]} for example" if inside else ""
        raise UserError(f"--ckpt_path: {name} is a directory, but not a sharded checkpoint{hint}")
    if not path.exists():
        raise UserError(f"--ckpt_path: no file {name!r}{nearby(path, lambda p: p.suffix == '.ckpt')}")
    # torch writes zip archives, whose index comes last; a pipe would wait for ever
    if not path.is_dir() and not (path.is_file() and is_archive(path)):
        raise UserError(f"--ckpt_path: {name} is not a checkpoint, or was cut short when it was written")
    if command == "fit":
        try:
            refused = holds_weights_only(path)
        except Exception:  # a damaged file can raise anything, and is reported when it is read
            return
        if refused:
            raise UserError(f"--ckpt_path: {name}: {WEIGHTS_ONLY}")
