"""The configuration of a training run under Oumi's names, with Oumi's fields and defaults.

Light to import: no PyTorch, and YAML only when a file is read.
"""

from oumi_pl.core.configs.base_config import BaseConfig
from oumi_pl.core.configs.params.base_params import MISSING, BaseParams, OumiConfigError
from oumi_pl.core.configs.params.data_params import (
    DataParams,
    DatasetParams,
    DatasetSplit,
    DatasetSplitParams,
    MixtureStrategy,
    TrainTarget,
)
from oumi_pl.core.configs.params.gkd_params import GkdParams
from oumi_pl.core.configs.params.grpo_params import GrpoParams
from oumi_pl.core.configs.params.model_params import ModelParams
from oumi_pl.core.configs.params.peft_params import LoraWeightInitialization, PeftParams, PeftSaveMode, TaskType
from oumi_pl.core.configs.params.sharding_params import (
    AutoWrapPolicy,
    BackwardPrefetch,
    DeepSpeedOffloadDevice,
    DeepSpeedParams,
    DeepSpeedPrecision,
    FSDPParams,
    OffloadConfig,
    ShardingStrategy,
    StateDictType,
    ZeRORuntimeStage,
)
from oumi_pl.core.configs.params.training_params import (
    MixedPrecisionDtype,
    ProfilerParams,
    ProfilerScheduleParams,
    SchedulerType,
    TelemetryParams,
    TrainerType,
    TrainingParams,
)
from oumi_pl.core.configs.params.unsupported_params import GoldParams
from oumi_pl.core.configs.training_config import TrainingConfig

__all__ = [
    "MISSING", "AutoWrapPolicy", "BackwardPrefetch", "BaseConfig", "BaseParams", "DataParams", "DatasetParams",
    "DatasetSplit", "DatasetSplitParams", "DeepSpeedOffloadDevice", "DeepSpeedParams", "DeepSpeedPrecision",
    "FSDPParams", "GkdParams", "GoldParams", "GrpoParams", "LoraWeightInitialization", "MixedPrecisionDtype",
    "MixtureStrategy", "ModelParams", "OffloadConfig", "OumiConfigError", "PeftParams", "PeftSaveMode",
    "ProfilerParams", "ProfilerScheduleParams", "SchedulerType", "ShardingStrategy", "StateDictType", "TaskType",
    "TelemetryParams", "TrainTarget", "TrainerType", "TrainingConfig", "TrainingParams", "ZeRORuntimeStage",
]  # fmt: skip
