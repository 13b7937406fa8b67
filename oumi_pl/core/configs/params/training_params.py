"""How long and how fast is trained, and what is logged and saved meanwhile."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

from oumi_pl.core.configs.params.base_params import (
    SPEED,
    BaseParams,
    OumiConfigError,
    harmless,
    hints,
    honoured,
    refused,
)
from oumi_pl.core.configs.params.gkd_params import GkdParams
from oumi_pl.core.configs.params.grpo_params import GrpoParams
from oumi_pl.core.configs.params.unsupported_params import GoldParams, Unsupported

NOT_HERE = ("TRL_GOLD",)
LONGEST_NAME = 100
"""Trackers take names of 128 characters, and put some of their own around this one."""


class TrainerType(Enum):
    """Who trains: as Oumi's trainers of these names do, or oumi_pl as it does by itself."""

    TRL_SFT = "trl_sft"
    TRL_DPO = "trl_dpo"
    TRL_KTO = "trl_kto"
    TRL_GKD = "trl_gkd"
    TRL_GRPO = "trl_grpo"
    VERL_GRPO = "verl_grpo"
    HF = "hf"
    OUMI = "oumi"
    SFT = "sft"
    DPO = "dpo"
    KTO = "kto"
    PRETRAIN = "pretrain"


THROUGH_TRANSFORMERS = (
    *(TrainerType.TRL_SFT, TrainerType.TRL_DPO, TrainerType.TRL_KTO, TrainerType.TRL_GKD, TrainerType.TRL_GRPO),
    TrainerType.HF,
)
ONLINE = (TrainerType.TRL_GRPO, TrainerType.VERL_GRPO)
"""Trainer types that sample completions, and train on their rewards."""


class SchedulerType(StrEnum):
    """Schedules of the learning rate; a field takes the value, not the name."""

    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    CONSTANT = "constant"


class MixedPrecisionDtype(StrEnum):
    """Type that is computed in when weights stay float32."""

    NONE = "none"
    FP16 = "fp16"
    BF16 = "bf16"


SET_BY: dict[str, str] = {
    "optim": "optimizer",
    "log_level": "dep_log_level",
    "gradient_checkpointing": "enable_gradient_checkpointing",
    "torch_compile": "compile",
    "fp16": "mixed_precision_dtype",
    "bf16": "mixed_precision_dtype",
    "report_to": "enable_wandb, enable_mlflow and enable_tensorboard",
    "torch_empty_cache_steps": "empty_device_cache_steps",
    "save_strategy": "save_steps and save_epoch",
    "include_num_input_tokens_seen": "include_performance_metrics",
    "include_tokens_per_second": "include_performance_metrics",
    "ddp_broadcast_buffers": "use_deterministic",
    "accelerator_config": "dataloader_main_process_only",
}
"""Argument of transformers' and TRL's trainers -> the field of another name that sets it."""
FIXED = ("logging_nan_inf_filter", "push_to_hub", "dataloader_pin_memory")
"""Arguments of these trainers that no field sets."""

SHOWN = "it only decides what is shown while training"
EVERY_STEP = "every step is written to metrics.csv"
THROUGHPUT = "throughput is in metrics.csv in any case"
PROFILE = "trainer.callbacks, TorchProfile"
"""What fields become, or why they are harmless."""


@dataclass
class TelemetryParams(BaseParams):
    """Timings, devices, and the configuration of a run."""

    telemetry_dir: str | None = "telemetry"
    """Where it is written, within the output directory unless absolute; null: nowhere."""
    collect_telemetry_for_all_ranks: bool = harmless(THROUGHPUT, False)
    track_gpu_temperature: bool = refused(
        "temperatures are not read; a tracker's system metrics have them (enable_wandb)", False
    )


@dataclass
class ProfilerScheduleParams(BaseParams):
    """Which steps are recorded."""

    enable_schedule: bool = False
    """false: the whole run is recorded."""
    wait: int = 0
    warmup: int = 1
    active: int = 3
    repeat: int = 1
    skip_first: int = 1

    def _problems(self) -> Iterator[str]:
        yield from self._below(0, "wait", "warmup", "repeat", "skip_first")
        yield from self._below(1, "active")


@dataclass
class ProfilerParams(BaseParams):
    """What is recorded; off unless one of the two `enable_` is true."""

    save_dir: str | None = None
    enable_cpu_profiling: bool = honoured(PROFILE, False)
    enable_cuda_profiling: bool = honoured(PROFILE, False)
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    row_limit: int = 50
    schedule: ProfilerScheduleParams = field(default_factory=ProfilerScheduleParams)


@dataclass
class TrainingParams(BaseParams):
    """Everything about the loop."""

    use_peft: bool = honoured("model.lora", False)
    """Whether adapters are trained, as the section `peft` says."""
    trainer_type: TrainerType = honoured("model.class_path, data.class_path and engine", TrainerType.HF)
    enable_gradient_checkpointing: bool = honoured("model.gradient_checkpointing", False)
    gradient_checkpointing_kwargs: dict[str, Any] = honoured("use_reentrant: false is how it is done", {})
    output_dir: str = honoured("runs_dir and name", "output")
    per_device_train_batch_size: int = honoured("data.batch_size", 8)
    """Rows of a micro-batch."""
    per_device_eval_batch_size: int = honoured("data.eval_batch_size", 8)
    gradient_accumulation_steps: int = honoured("trainer.accumulate_grad_batches", 1)
    """Micro-batches of an update."""
    max_steps: int = honoured("trainer.max_steps", -1)
    """Updates; positive: wins over the epochs."""
    num_train_epochs: int = honoured("trainer.max_epochs", 3)
    save_epoch: bool = honoured("checkpoint.every, where save_steps doesn't say when", False)
    """Whether there is a checkpoint after each epoch, if `save_steps` is 0."""
    save_steps: int = honoured("checkpoint.every", 500)
    """Updates between two checkpoints; 0: none."""
    save_final_model: bool = honoured("export.enabled", True)
    seed: int = honoured("seed_everything", 42)
    """Seed of weights and dropout."""
    data_seed: int = honoured("data.seed", 42)
    """Seed of the order of the rows."""
    use_deterministic: bool = honoured("trainer.deterministic", False)
    """Whether cuDNN has to be deterministic."""
    full_determinism: bool = honoured("trainer.deterministic", False)
    """Whether everything has to be deterministic, at whatever cost."""
    run_name: str | None = honoured("trainer.logger", None)
    """Name of the run for trackers; letters, digits, `_`, `-` and `.`, others become `_`."""
    metrics_function: str | None = refused(
        "there are no functions of metrics; write a callback, or read metrics.csv", None
    )
    reward_functions: list[str] | None = honoured("data.reward", None)
    """Rewards by Oumi's names, or functions `(completion, row) -> float` by their paths."""
    reward_function_kwargs: dict[str, Any] = refused("write a function without them, and name its path", {})
    grpo: GrpoParams = honoured("the keys that have a counterpart, one by one", GrpoParams())
    """The section of TRL_GRPO and VERL_GRPO."""
    gkd: GkdParams = honoured("the keys that have a counterpart, one by one", GkdParams())
    """The section of TRL_GKD."""
    gold: GoldParams = refused("GOLD is not among the trainer types here", GoldParams())
    log_level: str = harmless(SHOWN, "info")
    """From which level on the library's own messages are shown."""
    dep_log_level: str = harmless(SHOWN, "warning")
    """From which level on those of other libraries are."""
    log_examples: bool = harmless(SHOWN, False)
    enable_wandb: bool = honoured("trainer.logger", False)
    enable_mlflow: bool = honoured("trainer.logger", False)
    enable_tensorboard: bool = honoured("trainer.logger", True)
    logging_strategy: str = harmless(EVERY_STEP, "steps")
    """When metrics are logged: `steps`, `epoch` or `no`."""
    logging_dir: str | None = honoured("trainer.logger", None)
    """Folder of TensorBoard; null: `tensorboard` in the output directory."""
    logging_steps: int = harmless(EVERY_STEP, 50)
    logging_first_step: bool = harmless(EVERY_STEP, False)
    eval_strategy: str = honoured("data.validation and val_every", "no")
    """When the validation split is evaluated: `no`, `steps` or `epoch`."""
    eval_steps: int | float = honoured("val_every", 500)
    """Updates between two evaluations; below 1: a share of all updates."""
    learning_rate: float = honoured("model.optimizer.lr", 5e-5)
    lr_scheduler_type: str = honoured("model.schedule", "linear")
    """Schedule of the learning rate, by its name in transformers."""
    lr_scheduler_kwargs: dict[str, Any] = honoured("model.schedule", {})
    """Arguments of the schedule, as `min_lr_rate` or `num_cycles`."""
    warmup_ratio: float | None = honoured("model.schedule.warmup", None)
    """Share of the updates in which the learning rate rises, from 0 to 1."""
    warmup_steps: int | None = honoured("model.schedule.warmup", None)
    """Updates in which the learning rate rises; wins over the ratio."""
    optimizer: str = honoured("model.optimizer", "adamw_torch")
    """Optimizer, by its name in transformers."""
    weight_decay: float = honoured("model.optimizer.weight_decay", 0.0)
    adam_beta1: float = honoured("model.optimizer.betas", 0.9)
    adam_beta2: float = honoured("model.optimizer.betas", 0.999)
    adam_epsilon: float = honoured("model.optimizer.eps", 1e-8)
    sgd_momentum: float = honoured("model.optimizer.momentum", 0.0)
    mixed_precision_dtype: MixedPrecisionDtype = honoured("trainer.precision", MixedPrecisionDtype.NONE)
    compile: bool = honoured("model.compile", False)
    include_performance_metrics: bool = harmless(THROUGHPUT, False)
    include_alternative_mfu_metrics: bool = harmless(THROUGHPUT, False)
    log_model_summary: bool = honoured("trainer.enable_model_summary, and telemetry/model_summary.txt", False)
    resume_from_checkpoint: str | None = honoured("fit --resume", None)
    try_resume_from_last_checkpoint: bool = honoured("fit --resume", False)
    """Whether to go on from the last checkpoint of the output directory, if there is one."""
    dataloader_num_workers: int | str = honoured("data.workers", 0)
    """Processes that read rows while training: a number, or `auto`."""
    dataloader_persistent_workers: bool = harmless(SPEED, False)
    dataloader_prefetch_factor: int | None = harmless(SPEED, None)
    dataloader_main_process_only: bool | None = harmless("each rank takes its share of the same rows", None)
    ddp_find_unused_parameters: bool | None = honoured("trainer.strategy", None)
    max_grad_norm: float | None = honoured("trainer.gradient_clip_val", 1.0)
    """Norm that gradients are clipped to; 0 or null: they are not."""
    trainer_kwargs: dict[str, Any] = honoured("the keys that have a counterpart, one by one", {})
    """Further arguments of transformers' and TRL's trainers, as `beta`."""
    verl_config_overrides: dict[str, Any] = honoured("the keys that have a counterpart, one by one", {})
    """Keys of verl's own config, of VERL_GRPO."""
    profiler: ProfilerParams = harmless("it is only read while profiling", ProfilerParams())
    telemetry: TelemetryParams = harmless(f"it describes the machine; {THROUGHPUT}", TelemetryParams())
    empty_device_cache_steps: int | None = harmless(SPEED, None)
    """Updates after which unused memory of the GPU is given back."""
    nccl_default_timeout_minutes: float | None = refused("set `timeout` of trainer.strategy in the recipe", None)
    label_ignore_index: int | None = harmless("tokens without loss are marked by a mask", None)
    """Label of tokens without loss; null: -100, or the model's."""

    def to_hf(self, training_config: Any = None) -> Any:
        """The arguments of transformers' or TRL's trainer that these parameters stand for.

        Args:
            training_config: Not used; here because Oumi's signature has it.

        Raises:
            UserError: an argument is unknown, or set twice.
        """
        # imported by name, since reading a config must not import these libraries
        return import_module("oumi_pl.core.trainers.hyperparameters").to_hf(self)

    @property
    def telemetry_dir(self) -> Path | None:
        """Where telemetry is written; None for nowhere."""
        directory = self.telemetry.telemetry_dir
        return Path(self.output_dir) / directory if directory else None

    def __post_init__(self) -> None:
        """Names the trainer types that are Oumi's, but not here, before anything is converted."""
        given = str(self.trainer_type).removeprefix("TrainerType.").upper()
        if given in NOT_HERE:
            here = ", ".join(TrainerType.__members__)
            raise OumiConfigError(f"trainer_type: Oumi's {given} is not among the trainer types here: {here}")
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        if isinstance(workers := self.dataloader_num_workers, str) and workers != "auto":
            yield f"dataloader_num_workers: {workers!r} is not an int or 'auto'"
        yield from self._below(
            1, "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"
        )
        if self.max_grad_norm is not None and self.max_grad_norm < 0:
            yield f"max_grad_norm is {self.max_grad_norm:g}, but has to be at least 0, which clips nothing"
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            given = f"max_steps is {self.max_steps} and num_train_epochs {self.num_train_epochs}"
            yield f"{given}, so there is nothing to train; one of them has to be positive"
        if not self.output_dir:
            yield "output_dir: empty, but there has to be a folder to write to"
        yield from self._no_share("warmup_ratio", "; warmup_steps counts updates")
        yield from self._below(0, "warmup_steps")
        if None not in (self.warmup_ratio, self.warmup_steps) and self.trainer_type not in THROUGH_TRANSFORMERS:
            yield "warmup_ratio: warmup_steps is given as well; keep one"
        yield from self._none_of("logging_strategy", ("steps", "epoch", "no"))
        yield from self._none_of("eval_strategy", ("steps", "epoch", "no"))
        yield from self._interval_problems()
        for section, params in self:
            if isinstance(params, Unsupported):
                yield from (f"{section}.{problem}" for problem in params.unsupported())
        for name in ("reward_functions", "reward_function_kwargs", "verl_config_overrides"):
            only = ONLINE if name != "verl_config_overrides" else ONLINE[1:]
            if any(getattr(self, name) or ()) and self.trainer_type not in only:
                yield f"{name}: is for {' and '.join(kind.name for kind in only)}; remove it"
        for key in self.trainer_kwargs if self.trainer_type in THROUGH_TRANSFORMERS else ():
            if key in FIXED:
                yield f"trainer_kwargs.{key}: is fixed, and can't be set"
            if key in SET_BY or key in hints(TrainingParams):
                yield f"trainer_kwargs.{key}: is set by training.{SET_BY.get(key, key)}"

    def _interval_problems(self) -> Iterator[str]:
        steps = self.eval_steps
        if isinstance(steps, float) and not 0 < steps < 1:
            yield f"eval_steps is {steps}, but has to be an int, or a share between 0 and 1"
        if isinstance(steps, float) and self.trainer_type == TrainerType.OUMI:
            yield f"eval_steps is {steps}, but for trainer_type: OUMI it has to be an int"
        if self.eval_strategy == "steps" and not isinstance(steps, float):
            yield from self._below(1, "eval_steps")

    def _settle(self) -> None:
        """Turns the name of the run into one that trackers take, and ends a long one in a hash of itself."""
        if name := self.run_name:
            fit = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
            ending = "..." + hashlib.shake_128(name.encode()).hexdigest(8)
            self.run_name = fit if len(fit) <= LONGEST_NAME else fit[: LONGEST_NAME - len(ending)] + ending
