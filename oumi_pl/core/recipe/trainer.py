"""The loop of an Oumi config: its engine and devices, how long and how often, and what is saved."""

import math
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from oumi_pl.core.configs import TrainingConfig, TrainingParams
from oumi_pl.core.recipe.notes import Notes, given, refuse
from oumi_pl.core.recipe.profiling import profile_arguments
from oumi_pl.runs.folders import CHECKPOINTS

Engine = Literal["lightning", "trl", "hf"]

ENGINES: dict[str, Engine] = {
    "TRL_SFT": "trl", "TRL_DPO": "trl", "TRL_KTO": "trl", "TRL_GKD": "trl", "TRL_GRPO": "trl", "HF": "hf",
    "VERL_GRPO": "lightning",
    "OUMI": "lightning", "SFT": "lightning", "DPO": "lightning", "KTO": "lightning", "PRETRAIN": "lightning",
}  # fmt: skip
"""Trainer type -> what drives the training loop."""

APO = "apo_zero_unpaired"
"""TRL's loss of KTO that needs no KL divergence."""
NEVER = 1_000_000_000
"""Steps that no run reaches."""
ALL = 1000
"""Checkpoints to keep, where Oumi keeps whatever it writes."""
CHECKPOINT = re.compile(r"(?:checkpoint|step)-(\d+)(?:\.ckpt)?")
"""Name of a checkpoint, of transformers or of Lightning."""
MLFLOW_STORE = "sqlite:///mlflow.db"
"""MLflow's own default, and so that of transformers' callback; Lightning's is a folder, which MLflow takes no more."""
STRATEGY = "trainer.strategy"


def engine_of(config: TrainingConfig, kind: str, requested: Engine | None, devices: int | None, notes: Notes) -> Engine:
    """What drives the training loop: the engine that was requested, else that of the trainer type where it can.

    Args:
        config: The config.
        kind: `SFT`, `DPO`, `KTO`, `Distill`, `GRPO` or `Pretrain`.
        requested: By the user; None for that of the trainer type.
        devices: Devices per node; None for as many as there are.
        notes: Where comments go.

    Raises:
        UserError: the requested engine can't do something that the config says.
    """
    training = config.training
    engine = requested or ENGINES[training.trainer_type.name]
    if engine == "lightning":
        return engine
    peft = config.peft
    only_lightning = {
        "peft.lora_modules_to_save": (training.use_peft and peft.lora_modules_to_save, "modules trained as a whole"),
        "fsdp.enable_fsdp": (config.fsdp.enable_fsdp, "several devices"),
        "deepspeed.enable_deepspeed": (config.deepspeed.enable_deepspeed, "several devices"),
        "training.gradient_accumulation_steps": (
            kind == "KTO"
            and training.gradient_accumulation_steps > 1
            and training.trainer_kwargs.get("loss_type") != APO,
            "a KL divergence over several micro-batches",
        ),
        "training.profiler": (profile_arguments(config.training.profiler) is not None, "profiling"),
        "training.save_epoch": (training.save_epoch and training.save_steps <= 0, "checkpoints by epoch"),
    }
    for path, (is_set, what) in only_lightning.items():
        if is_set and requested:
            refuse(path, f"{requested} can't do {what} here; leave --engine out, or name lightning")
        if is_set:
            notes.comment("", f"Lightning drives it, and not {engine}, which can't do {what} here")
            return "lightning"
    if not requested and max(devices or 1, int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        notes.comment("", f"Lightning drives it, and not {engine}, which trains on one device")
        return "lightning"
    if not requested and (engine, kind) == ("trl", "Pretrain"):
        notes.comment("", "transformers' Trainer drives it, and not TRL's SFT, which does no more with rows of tokens")
        return "hf"
    return engine


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
    if training.max_steps > 0:
        notes.nothing("training.num_train_epochs", "max_steps wins")
    accumulated = training.gradient_accumulation_steps
    if accumulated != 1 and training.trainer_type.name in ("OUMI", "TRL_DPO", "DPO", "TRL_KTO", "KTO"):
        different = "an update is the mean over all micro-batches together; in Oumi, the mean of their means"
        notes.comment("trainer.accumulate_grad_batches", different)
    if training.use_deterministic and not training.full_determinism:
        notes.comment(
            "trainer.deterministic",
            "use_deterministic: Oumi sets cuDNN alone; here, other operations that aren't deterministic warn",
        )
    strategy = _strategy(config, notes) if engine == "lightning" else {}
    return (
        given(devices=devices)
        | strategy
        | given(
            max_steps=training.max_steps if training.max_steps > 0 else None,
            max_epochs=None if training.max_steps > 0 else training.num_train_epochs,
            accumulate_grad_batches=None if accumulated == 1 else accumulated,
            gradient_clip_val=training.max_grad_norm or None,
            precision={"FP16": "16-mixed", "BF16": "bf16-mixed"}.get(training.mixed_precision_dtype.name),
            deterministic=training.full_determinism or (training.use_deterministic and "warn"),
            enable_model_summary=training.log_model_summary and engine == "lightning",
            callbacks=_callbacks(config, notes),
            logger=_loggers(training, notes),
        )
    )


def _callbacks(config: TrainingConfig, notes: Notes) -> list[dict[str, Any]]:
    callbacks: list[dict[str, Any]] = []
    if config.training.save_epoch and config.training.save_steps <= 0:
        callbacks.append({"class_path": "oumi_pl.core.recipe.epochs.SaveEachEpoch"})
    if (arguments := profile_arguments(config.training.profiler)) is not None:
        callbacks.append({"class_path": "oumi_pl.core.recipe.profiling.TorchProfile", "init_args": arguments})
        for path in [path for path in notes.became if path.startswith("training.profiler.")]:
            notes.became[path] = "trainer.callbacks, TorchProfile"
    return callbacks


def _strategy(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """`trainer.strategy`, and the precision that goes with it."""
    fsdp = config.fsdp
    if config.deepspeed.enable_deepspeed:
        return _deepspeed(config, notes)
    if not fsdp.enable_fsdp:
        return {"strategy": "ddp_find_unused_parameters_true"} if config.training.ddp_find_unused_parameters else {}
    section: dict[str, Any] = _sharded_precision(config, "fsdp.mixed_precision", fsdp.mixed_precision, notes)
    name = fsdp.sharding_strategy.name
    if name == "NO_SHARD":
        notes.became["fsdp.sharding_strategy"] = "trainer.strategy ddp, which is what it comes to"
        return {"strategy": "ddp"} | section
    if name in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2"):
        refuse("fsdp.sharding_strategy", f"{name} has no counterpart; FULL_SHARD gives the same numbers in less memory")
    if name == "HYBRID_SHARD":
        notes.comment(
            STRATEGY, "HYBRID_SHARD shards within a node; on several, this shards over all, with equal numbers"
        )
    if fsdp.cpu_offload:
        notes.comment(STRATEGY, "offload: weights, gradients and optimizer states are kept and updated in host memory")
    return _fsdp2("fsdp.enable_fsdp", notes, offload=fsdp.cpu_offload) | section


def _deepspeed(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """`trainer.strategy` for DeepSpeed's ZeRO, and the precision that goes with it."""
    params, training = config.deepspeed, config.training
    same = {
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
    }
    for key, value in same.items():
        if (given := getattr(params, key)) not in ("auto", value):
            refuse(f"deepspeed.{key}", f"{given}, but section training says {value}; set auto, or the same in both")
    if params.train_batch_size != "auto":
        refuse("deepspeed.train_batch_size", "the rows of an update follow from section training; set auto")
    precision = None if params.precision is None else params.precision.value
    section = _sharded_precision(config, "deepspeed.precision", precision, notes)
    if not params.shards:
        notes.comment(STRATEGY, "DDP takes the place of DeepSpeed's ZERO_0; the numbers are the same")
        return {"strategy": "ddp"} | section
    offload = params.offload_optimizer is not None or params.offload_param is not None
    kept = "; offload: all of these are kept and updated in host memory" if offload else ""
    notes.comment(
        STRATEGY,
        f"FSDP2, which shards weights, gradients and optimizer states, takes the place of DeepSpeed's "
        f"{params.zero_stage.name}; the numbers are the same{kept}",
    )
    return _fsdp2("deepspeed.enable_deepspeed", notes, offload=offload) | section


def _fsdp2(place: str, notes: Notes, *, offload: bool) -> dict[str, Any]:
    notes.became[place] = "trainer.strategy fsdp2, over all devices"
    return {"strategy": {"class_path": "Sharded", "init_args": {"offload": True}} if offload else "fsdp2"}


def _sharded_precision(config: TrainingConfig, place: str, name: str | None, notes: Notes) -> dict[str, Any]:
    if name is None:
        return {}
    if name == "fp16":
        refuse(place, "fp16 is not sharded; set bf16")
    if config.model.dtype != "float32":
        notes.nothing(place, f"the weights are {config.model.torch_dtype_str} already")
        return {}
    return {"precision": "bf16-mixed"}


def _loggers(training: TrainingParams, notes: Notes) -> list[dict[str, Any]]:
    loggers: list[dict[str, Any]] = []
    if training.enable_wandb:
        project = "oumi" if training.trainer_type.name == "OUMI" else "huggingface"
        arguments = given(project=os.environ.get("WANDB_PROJECT", project), name=training.run_name)
        loggers.append({"class_path": "WandbLogger", "init_args": arguments})
    if training.enable_mlflow:
        store = os.environ.get("MLFLOW_TRACKING_URI", MLFLOW_STORE)
        arguments = given(run_name=training.run_name, tracking_uri=store)
        loggers.append({"class_path": "MLFlowLogger", "init_args": arguments})
    installed = find_spec("tensorboard") or find_spec("tensorboardX")
    if not installed:
        notes.nothing("training.enable_tensorboard", "TensorBoard is not installed")
    if training.enable_tensorboard and installed:
        output = Path(training.output_dir)
        folder = Path(training.logging_dir) if training.logging_dir else output.parent / "tensorboard" / output.name
        arguments = {"save_dir": str(folder.parent), "name": folder.name, "version": ""}
        loggers.append({"class_path": "TensorBoardLogger", "init_args": arguments})
    elif training.enable_tensorboard:
        notes.comment(
            "trainer", "metrics are written to metrics.csv; for TensorBoard as well: pip install 'oumi_pl[tracking]'"
        )
    if not any(one["class_path"] == "TensorBoardLogger" for one in loggers):
        notes.nothing("training.logging_dir", "it is TensorBoard's, which gets no metrics")
    if not loggers:
        notes.nothing("training.run_name", "it is the name for trackers, and none is enabled")
    return loggers


def around(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    """What is beside the sections: folders, validation, checkpoints, the export.

    Raises:
        UserError: something has no counterpart.
    """
    training = config.training
    folder = Path(training.output_dir).expanduser()
    name = folder.name or folder.resolve().name
    if not name or name.startswith("."):
        refuse("training.output_dir", f"{training.output_dir!r} can't be the name of a run; name a folder for it")
    notes.became["training.output_dir"] = f"{folder}: runs_dir and name; where it is taken, a number is added"
    return {"name": name, "runs_dir": str(folder.parent)} | given(
        val_every=_validation(training, notes), checkpoint=_checkpoints(training, notes), export=_export(config, notes)
    )


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
        if training.trainer_kwargs.get("load_best_model_at_end"):
            why = "the best model is kept as a checkpoint, and save_steps: 0 writes none; set save_steps"
            refuse("training.trainer_kwargs.load_best_model_at_end", why)
        return {"enabled": False}
    if training.save_epoch:
        notes.nothing("training.save_epoch", "save_steps wins")
    section: dict[str, Any] = {"every": training.save_steps}
    kwargs = training.trainer_kwargs
    section["keep"] = int(kwargs.get("save_total_limit") or ALL)
    if kwargs.get("load_best_model_at_end"):
        metric = str(kwargs.get("metric_for_best_model") or "loss").removeprefix("eval_")
        higher = kwargs.get("greater_is_better", not metric.endswith("loss"))
        section |= {"monitor": f"val/{metric}"} | ({"mode": "max"} if higher else {})
    return section


def _export(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    section: dict[str, Any] = {} if config.training.save_final_model else {"enabled": False}
    mode = config.peft.peft_save_mode.name
    if config.training.use_peft and mode == "ADAPTER_AND_BASE_MODEL":
        if config.peft.q_lora or config.is_sharded:
            refuse("peft.peft_save_mode", f"{mode} needs the base whole and in full precision; set ADAPTER_ONLY")
        notes.became["peft.peft_save_mode"] = "the adapter in model/, and beside it the base, which train writes"
        notes.comment("export", "train writes the base model beside the adapter; fit writes the adapter alone")
    return section | given(merge=config.training.use_peft and mode == "MERGED")


def resume(training: TrainingParams) -> str | None:
    """What `fit --resume` is given: a run, empty for the last unfinished one; None for a new run.

    Raises:
        UserError: a checkpoint is named that is not the newest of its run.
    """
    given = training.resume_from_checkpoint
    if not given:
        return "" if training.try_resume_from_last_checkpoint else None
    place = Path(given).expanduser()
    if _step(place) < 0:  # a run
        return given
    folder = place.parent
    newest = max(folder.iterdir() if folder.is_dir() else (), key=_step, default=place)
    if not place.exists() or _step(newest) != _step(place):
        why = f"a run goes on from its newest checkpoint, {newest.name}" if place.exists() else "there is none"
        refuse("training.resume_from_checkpoint", f"{given}: {why}")
    return str(folder.parent if folder.name == CHECKPOINTS else folder)


def _step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint; -1 for other files."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1
