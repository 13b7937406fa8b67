"""How long and how fast is trained, and what is logged and saved meanwhile."""

import hashlib
import re
from dataclasses import dataclass, field
from enum import Enum, StrEnum
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
from oumi_pl.core.configs.params.unsupported_params import GkdParams, GoldParams, GrpoParams

NOT_HERE = ("TRL_KTO", "TRL_GRPO", "TRL_GKD", "TRL_GOLD", "VERL_GRPO")
LONGEST_NAME = 100
"""Trackers take names of 128 characters, and put some of their own around this one."""


class TrainerType(Enum):
    """Who trains: as Oumi's trainers of these names do, or oumi_pl as it does by itself."""

    TRL_SFT = "trl_sft"
    TRL_DPO = "trl_dpo"
    HF = "hf"
    OUMI = "oumi"
    SFT = "sft"
    DPO = "dpo"
    PRETRAIN = "pretrain"


THROUGH_TRANSFORMERS = (TrainerType.TRL_SFT, TrainerType.TRL_DPO, TrainerType.HF)


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


@dataclass
class TelemetryParams(BaseParams):
    """Timings, devices, and the configuration of a run."""

    telemetry_dir: str | None = "telemetry"
    """Where it is written, within the output directory unless absolute; null: nowhere."""
    collect_telemetry_for_all_ranks: bool = False
    """Whether all ranks are written down, not only the first."""
    track_gpu_temperature: bool = False
    """Whether the GPU's temperature is written down at each step."""


@dataclass
class ProfilerScheduleParams(BaseParams):
    """Which steps are recorded."""

    enable_schedule: bool = False
    """false: the whole run is recorded."""
    wait: int = 0
    """Steps of a cycle that are passed over."""
    warmup: int = 1
    """Steps that are traced and thrown away."""
    active: int = 3
    """Steps that are recorded."""
    repeat: int = 1
    """Number of cycles; 0: until the end."""
    skip_first: int = 1
    """Steps before the first cycle."""

    def _check(self) -> None:
        self._at_least(0, "wait", "warmup", "repeat", "skip_first")
        self._at_least(1, "active")


@dataclass
class ProfilerParams(BaseParams):
    """What is recorded; off unless one of the two `enable_` is true."""

    save_dir: str | None = None
    """Where profiles are written; null: `profiler` in the output directory."""
    enable_cpu_profiling: bool = refused("set trainer.profiler in the recipe, e.g. `profiler: pytorch`", False)
    """Whether the CPU's time is recorded."""
    enable_cuda_profiling: bool = refused("set trainer.profiler in the recipe, e.g. `profiler: pytorch`", False)
    """Whether the GPU's time is recorded."""
    record_shapes: bool = False
    """Whether operations are told apart by their shapes."""
    profile_memory: bool = False
    """Whether memory is recorded."""
    with_stack: bool = False
    """Whether lines of code are recorded."""
    with_flops: bool = False
    """Whether floating-point operations are estimated."""
    with_modules: bool = False
    """Whether operations are told apart by their modules."""
    row_limit: int = 50
    """Rows of a table; -1: all."""
    schedule: ProfilerScheduleParams = field(default_factory=ProfilerScheduleParams)
    """Which steps are recorded."""


@dataclass
class TrainingParams(BaseParams):
    """Everything about the loop."""

    use_peft: bool = honoured("model.lora", False)
    """Whether adapters are trained, as the section `peft` says."""
    trainer_type: TrainerType = honoured("model.class_path, data.class_path and engine", TrainerType.HF)
    """Who trains."""
    enable_gradient_checkpointing: bool = honoured("model.gradient_checkpointing", False)
    """Whether activations are computed again on the way back: less memory, more time."""
    gradient_checkpointing_kwargs: dict[str, Any] = honoured("use_reentrant: false is how it is done", {})
    """Arguments of that, as `use_reentrant: false`."""
    output_dir: str = honoured("runs_dir and name", "output")
    """Where everything is written."""
    per_device_train_batch_size: int = honoured("data.batch_size", 8)
    """Rows of a micro-batch."""
    per_device_eval_batch_size: int = honoured("data.eval_batch_size", 8)
    """Rows of a micro-batch when evaluating."""
    gradient_accumulation_steps: int = honoured("trainer.accumulate_grad_batches", 1)
    """Micro-batches of an update."""
    max_steps: int = honoured("trainer.max_steps", -1)
    """Updates; positive: wins over the epochs."""
    num_train_epochs: int = honoured("trainer.max_epochs", 3)
    """Times that the data are gone through."""
    save_epoch: bool = honoured("checkpoint.every, where save_steps doesn't say when", False)
    """Whether there is a checkpoint after each epoch, if `save_steps` is 0."""
    save_steps: int = honoured("checkpoint.every", 500)
    """Updates between two checkpoints; 0: none."""
    save_final_model: bool = honoured("export.enabled", True)
    """Whether the model is saved at the end."""
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
    """Function that makes metrics of predictions, by its registered name."""
    reward_functions: list[str] | None = refused("rewards are for reinforcement learning", None)
    """For reinforcement learning, which is not here."""
    reward_function_kwargs: dict[str, Any] = refused("rewards are for reinforcement learning", {})
    """For reinforcement learning, which is not here."""
    grpo: GrpoParams = refused("GRPO is not among the trainer types here", GrpoParams())
    """For a trainer type that is not here."""
    gkd: GkdParams = refused("GKD is not among the trainer types here", GkdParams())
    """For a trainer type that is not here."""
    gold: GoldParams = refused("GOLD is not among the trainer types here", GoldParams())
    """For a trainer type that is not here."""
    log_level: str = harmless("it decides on what is shown while training alone", "info")
    """From which level on the library's own messages are shown."""
    dep_log_level: str = harmless("it decides on what is shown while training alone", "warning")
    """From which level on those of other libraries are."""
    log_examples: bool = harmless("it decides on what is shown while training alone", False)
    """Whether an example of the data is logged as it is trained on."""
    enable_wandb: bool = honoured("trainer.logger", False)
    """Whether Weights & Biases gets the metrics."""
    enable_mlflow: bool = honoured("trainer.logger", False)
    """Whether MLflow does."""
    enable_tensorboard: bool = honoured("trainer.logger", True)
    """Whether TensorBoard does."""
    logging_strategy: str = harmless("every step is written to metrics.csv", "steps")
    """When metrics are logged: `steps`, `epoch` or `no`."""
    logging_dir: str | None = honoured("trainer.logger", None)
    """Folder of TensorBoard; null: `tensorboard` in the output directory."""
    logging_steps: int = harmless("every step is written to metrics.csv", 50)
    """Updates between two logs."""
    logging_first_step: bool = harmless("every step is written to metrics.csv", False)
    """Whether the first update is logged as well."""
    eval_strategy: str = honoured("data.validation and val_every", "no")
    """When the validation split is evaluated: `no`, `steps` or `epoch`."""
    eval_steps: int | float = honoured("val_every", 500)
    """Updates between two evaluations; below 1: a share of all updates."""
    learning_rate: float = honoured("model.optimizer.lr", 5e-5)
    """Highest learning rate."""
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
    """Decay of the weights."""
    adam_beta1: float = honoured("model.optimizer.betas", 0.9)
    """Adam's average of the gradients."""
    adam_beta2: float = honoured("model.optimizer.betas", 0.999)
    """Adam's average of their squares."""
    adam_epsilon: float = honoured("model.optimizer.eps", 1e-8)
    """Adam's guard against a division by zero."""
    sgd_momentum: float = honoured("model.optimizer.momentum", 0.0)
    """Momentum, if the optimizer is `sgd`."""
    mixed_precision_dtype: MixedPrecisionDtype = honoured("trainer.precision", MixedPrecisionDtype.NONE)
    """Type that is computed in when weights are float32; NONE: that of the weights."""
    compile: bool = honoured("model.compile", False)
    """Whether torch.compile compiles the model."""
    include_performance_metrics: bool = harmless("throughput is in metrics.csv in any case", False)
    """Whether speed and utilization are logged."""
    include_alternative_mfu_metrics: bool = harmless("throughput is in metrics.csv in any case", False)
    """Whether utilization is logged by transformers' count of operations as well."""
    log_model_summary: bool = honoured("trainer.enable_model_summary, and telemetry/model_summary.txt", False)
    """Whether the modules of the model are logged."""
    resume_from_checkpoint: str | None = honoured("fit --resume", None)
    """Checkpoint to go on from."""
    try_resume_from_last_checkpoint: bool = honoured("fit --resume", False)
    """Whether to go on from the last checkpoint of the output directory, if there is one."""
    dataloader_num_workers: int | str = honoured("data.workers", 0)
    """Processes that read rows while training: a number, or `auto`."""
    dataloader_persistent_workers: bool = harmless(SPEED, False)
    """Whether these processes live on after an epoch."""
    dataloader_prefetch_factor: int | None = harmless(SPEED, None)
    """Batches that each process reads ahead."""
    dataloader_main_process_only: bool | None = harmless("each rank takes its share of the same rows", None)
    """Whether the first rank reads for all."""
    ddp_find_unused_parameters: bool | None = honoured("trainer.strategy", None)
    """Whether DDP looks for parameters without gradients; null: as the trainer type does."""
    max_grad_norm: float | None = honoured("trainer.gradient_clip_val", 1.0)
    """Norm that gradients are clipped to; 0 or null: they are not."""
    trainer_kwargs: dict[str, Any] = honoured("the keys that have a counterpart, one by one", {})
    """Further arguments of transformers' and TRL's trainers, as `beta`."""
    verl_config_overrides: dict[str, Any] = refused("verl is not driven from here", {})
    """For verl, which is not here."""
    profiler: ProfilerParams = harmless("it is only read while profiling", ProfilerParams())
    """What torch.profiler records."""
    telemetry: TelemetryParams = harmless(
        "it is about figures of the machine; throughput is in metrics.csv", TelemetryParams()
    )
    """What the run writes down of itself."""
    empty_device_cache_steps: int | None = harmless(SPEED, None)
    """Updates after which unused memory of the GPU is given back."""
    nccl_default_timeout_minutes: float | None = refused("set `timeout` of trainer.strategy in the recipe", None)
    """Minutes until a rank that waits for others gives up."""
    label_ignore_index: int | None = harmless("tokens without loss are told apart by a mask", None)
    """Label of tokens that are not learnt; null: -100, or the model's."""

    @property
    def telemetry_dir(self) -> Path | None:
        """Where telemetry is written; None for nowhere."""
        directory = self.telemetry.telemetry_dir
        return Path(self.output_dir) / directory if directory else None

    def __post_init__(self) -> None:
        """Names the trainer types that are Oumi's, but not here, before anything is converted."""
        asked = str(self.trainer_type).removeprefix("TrainerType.").upper()
        if asked in NOT_HERE:
            here = ", ".join(TrainerType.__members__)
            raise OumiConfigError(f"trainer_type: Oumi's {asked} is not among the trainer types here: {here}")
        super().__post_init__()

    def _check(self) -> None:
        self.run_name = _fit_for_trackers(self.run_name)
        workers = self.dataloader_num_workers
        if isinstance(workers, str) and workers != "auto":
            raise OumiConfigError(f"dataloader_num_workers: {workers!r} is not an int or 'auto'")
        self._check_length()
        self._check_warmup()
        self._check_eval_steps()
        self._check_rewards()
        if self.trainer_type in THROUGH_TRANSFORMERS:
            self._check_trainer_kwargs()

    def _check_trainer_kwargs(self) -> None:
        """Refuses arguments that fields set already."""
        for key in self.trainer_kwargs:
            if key in FIXED:
                raise OumiConfigError(f"trainer_kwargs.{key}: is fixed, and can't be set")
            if key in SET_BY or key in hints(TrainingParams):
                raise OumiConfigError(f"trainer_kwargs.{key}: is set by training.{SET_BY.get(key, key)}")

    def _check_length(self) -> None:
        self._at_least(1, "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size")
        if self.max_grad_norm is not None and self.max_grad_norm < 0:
            raise OumiConfigError(
                f"max_grad_norm is {self.max_grad_norm:g}, but has to be at least 0, which clips nothing"
            )
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise OumiConfigError(
                f"max_steps is {self.max_steps} and num_train_epochs {self.num_train_epochs}, so there is nothing to "
                "train; one of them has to be positive"
            )
        if not self.output_dir:
            raise OumiConfigError("output_dir: empty, but there has to be a folder to write to")

    def _check_warmup(self) -> None:
        self._is_share("warmup_ratio", "; warmup_steps counts updates")
        self._at_least(0, "warmup_steps")
        if None not in (self.warmup_ratio, self.warmup_steps) and self.trainer_type not in THROUGH_TRANSFORMERS:
            raise OumiConfigError("warmup_ratio: warmup_steps is given as well; keep one")

    def _check_eval_steps(self) -> None:
        self._one_of("logging_strategy", ("steps", "epoch", "no"))
        self._one_of("eval_strategy", ("steps", "epoch", "no"))
        steps = self.eval_steps
        if isinstance(steps, float):
            if not 0 < steps < 1:
                raise OumiConfigError(f"eval_steps is {steps}, but has to be an int, or a share between 0 and 1")
            if self.trainer_type == TrainerType.OUMI:
                raise OumiConfigError(f"eval_steps is {steps}, but for trainer_type: OUMI it has to be an int")
        elif self.eval_strategy == "steps":
            self._at_least(1, "eval_steps")

    def _check_rewards(self) -> None:
        for name in ("reward_functions", "reward_function_kwargs", "verl_config_overrides"):
            if any(getattr(self, name) or ()):
                raise OumiConfigError(f"{name}: reinforcement learning is not among the trainer types here; remove it")


def _fit_for_trackers(name: str | None) -> str | None:
    """A run's name as trackers take it: other characters become `_`, and a long one ends in a hash of itself."""
    if not name:
        return name
    fit = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    if len(fit) > LONGEST_NAME:
        ending = "..." + hashlib.shake_128(name.encode()).hexdigest(8)
        fit = fit[: LONGEST_NAME - len(ending)] + ending
    return fit
