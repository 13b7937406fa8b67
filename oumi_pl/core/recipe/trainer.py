"""The loop of an Oumi config: how long, how often, on what, and what is saved."""

import math
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from oumi_pl.core.configs import TrainingConfig, TrainingParams
from oumi_pl.core.recipe.engine import Engine
from oumi_pl.core.recipe.notes import Notes, refuse
from oumi_pl.core.recipe.sharding import strategy
from oumi_pl.runs.folders import CHECKPOINTS

NEVER = 1_000_000_000
"""Steps that no run reaches."""
ALL = 1000
"""Checkpoints to keep, where Oumi keeps whatever it writes."""
CHECKPOINT = re.compile(r"(?:checkpoint|step)-(\d+)(?:\.ckpt)?")
"""Name of a checkpoint, of transformers or of Lightning."""


MLFLOW_STORE = "sqlite:///mlflow.db"
"""MLflow's own default, and so that of transformers' callback; Lightning's is a folder, which MLflow takes no more."""


def trainer(config: TrainingConfig, notes: Notes, devices: int | None, engine: Engine) -> dict[str, Any]:
    """The section `trainer`; engines other than Lightning train on one device.

    Raises:
        UserError: something has no counterpart.
    """
    training = config.training
    if engine != "lightning":
        devices = devices or 1
        notes.nothing("training.ddp_find_unused_parameters", "it trains on one device")
        notes.nothing("training.log_model_summary", "train writes telemetry/model_summary.txt beside the run")
    made: dict[str, Any] = {} if devices is None else {"devices": devices}
    made |= strategy(config, notes, devices) if engine == "lightning" else {}
    if training.max_steps > 0:
        made["max_steps"] = training.max_steps
        if training.num_train_epochs != 3:
            notes.became["training.num_train_epochs"] = "nothing: max_steps wins"
    else:
        made["max_epochs"] = training.num_train_epochs
    if training.gradient_accumulation_steps != 1:
        made["accumulate_grad_batches"] = training.gradient_accumulation_steps
        if training.trainer_type.name in ("OUMI", "TRL_DPO", "DPO"):
            notes.comment(
                "trainer.accumulate_grad_batches",
                "an update is the mean over all of it; in Oumi, that of the means of its micro-batches",
            )
    if training.max_grad_norm:
        made["gradient_clip_val"] = training.max_grad_norm
    if (precision := training.mixed_precision_dtype.name) != "NONE":
        made["precision"] = {"FP16": "16-mixed", "BF16": "bf16-mixed"}[precision]
    made |= _determinism(training, notes)
    if training.log_model_summary and engine == "lightning":
        made["enable_model_summary"] = True
    if training.save_epoch and training.save_steps <= 0:
        made["callbacks"] = [{"class_path": "oumi_pl.core.recipe.epochs.SaveEachEpoch"}]
    loggers = _loggers(training, notes)
    return made | ({"logger": loggers} if loggers else {})


def _determinism(training: TrainingParams, notes: Notes) -> dict[str, Any]:
    if training.full_determinism:
        return {"deterministic": True}
    if training.use_deterministic:
        notes.comment("trainer.deterministic", "Oumi sets cuDNN alone; this warns of other operations as well")
        return {"deterministic": "warn"}
    return {}


def _loggers(training: TrainingParams, notes: Notes) -> list[dict[str, Any]]:
    made = []
    project = "oumi" if training.trainer_type.name == "OUMI" else "huggingface"
    named = {"name": training.run_name} if training.run_name else {}
    if training.enable_wandb:
        project = os.environ.get("WANDB_PROJECT", project)
        made.append({"class_path": "WandbLogger", "init_args": {"project": project, **named}})
    if training.enable_mlflow:
        run = {"run_name": training.run_name} if training.run_name else {}
        store = {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI", MLFLOW_STORE)}
        made.append({"class_path": "MLFlowLogger", "init_args": run | store})
    installed = find_spec("tensorboard") or find_spec("tensorboardX")
    if not installed:
        notes.nothing("training.enable_tensorboard", "TensorBoard is not installed")
    if training.enable_tensorboard and installed:
        output = Path(training.output_dir)
        folder = Path(training.logging_dir) if training.logging_dir else output.parent / "tensorboard" / output.name
        arguments = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
        made.append({"class_path": "TensorBoardLogger", "init_args": arguments})
    elif training.enable_tensorboard:
        notes.comment(
            "trainer", "metrics are written to metrics.csv; for TensorBoard as well: pip install 'oumi_pl[tracking]'"
        )
    if not any(one["class_path"] == "TensorBoardLogger" for one in made):
        notes.nothing("training.logging_dir", "it is TensorBoard's, which gets no metrics")
    if training.run_name and not made:
        notes.became["training.run_name"] = "nothing: it is the name for trackers, and none is enabled"
    return made


def around(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """What stands beside the sections: folders, validation, checkpoints, the export.

    Raises:
        UserError: something has no counterpart.
    """
    training = config.training
    folder = Path(training.output_dir).expanduser()
    name = folder.name or folder.resolve().name
    if not name or name.startswith("."):
        refuse("training.output_dir", f"{training.output_dir!r} can't be the name of a run; name a folder for it")
    made: dict[str, Any] = {"name": name, "runs_dir": str(folder.parent)}
    notes.became["training.output_dir"] = f"{folder}: runs_dir and name; where it is taken, a number is added"
    if (every := _validation(training, notes)) is not None:
        made["val_every"] = every
    made["checkpoint"] = _checkpoints(training, notes)
    export = _export(config, notes)
    return made | ({"export": export} if export else {})


def _validation(training: TrainingParams, notes: Notes) -> int | None:
    if training.eval_strategy == "epoch":
        notes.nothing("training.eval_steps", "training.eval_strategy is epoch")
    if training.eval_strategy != "steps":
        return None
    if training.eval_steps >= 1:
        return int(training.eval_steps)
    if training.max_steps <= 0:
        refuse("training.eval_steps", f"{training.eval_steps} is a share of max_steps, which is not set; count steps")
    return math.ceil(training.eval_steps * training.max_steps)


def _checkpoints(training: TrainingParams, notes: Notes) -> dict[str, Any]:
    if training.save_steps <= 0:
        if training.save_epoch:
            notes.became["training.save_epoch"] = "trainer.callbacks, SaveEachEpoch"
            return {"every": NEVER, "keep": ALL}
        notes.comment("checkpoint", "none but that of the end: save_steps is 0")
        return {"every": NEVER}
    if training.save_epoch:
        notes.became["training.save_epoch"] = "nothing: save_steps wins"
    made: dict[str, Any] = {"every": training.save_steps}
    kwargs = training.trainer_kwargs
    if kwargs.get("save_total_limit"):
        made["keep"] = int(kwargs["save_total_limit"])
    else:
        made["keep"] = ALL
    if kwargs.get("load_best_model_at_end"):
        metric = str(kwargs.get("metric_for_best_model") or "loss").removeprefix("eval_")
        higher = kwargs.get("greater_is_better", not metric.endswith("loss"))
        made |= {"monitor": f"val/{metric}"} | ({"mode": "max"} if higher else {})
    return made


def _export(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if not config.training.save_final_model:
        made["enabled"] = False
    mode = config.peft.peft_save_mode.name
    if not config.training.use_peft:
        return made
    if mode == "ADAPTER_AND_BASE_MODEL":
        if config.peft.q_lora or config.fsdp.enable_fsdp:
            refuse("peft.peft_save_mode", f"{mode} needs the base whole and in full precision; set ADAPTER_ONLY")
        notes.became["peft.peft_save_mode"] = "the adapter in model/, and beside it the base, which train writes"
        notes.comment("export", "train writes the base model beside the adapter; fit writes the adapter alone")
    if mode == "MERGED":
        made["merge"] = True
    return made


def resume(training: TrainingParams) -> str | None:
    """What `fit --resume` is given: a run, empty for the last unfinished one; None to start anew.

    Raises:
        UserError: a checkpoint is named that is not the newest of its run.
    """
    given = training.resume_from_checkpoint
    if not given:
        return "" if training.try_resume_from_last_checkpoint else None
    place = Path(given).expanduser()
    if CHECKPOINT.fullmatch(place.name) is None:
        return given
    folder = place.parent
    saved = [one for one in folder.iterdir() if CHECKPOINT.fullmatch(one.name)] if folder.is_dir() else []
    newest = max(saved, key=_step, default=place)
    if not place.exists() or _step(newest) != _step(place):
        why = f"a run goes on from its newest checkpoint, {newest.name}" if place.exists() else "there is none"
        refuse("training.resume_from_checkpoint", f"{given}: {why}")
    return str(folder.parent if folder.name == CHECKPOINTS else folder)


def _step(checkpoint: Path) -> int:
    found = CHECKPOINT.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1
