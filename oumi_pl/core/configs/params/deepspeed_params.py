"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054)."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from oumi_pl.core.configs.errors import OumiConfigError
from oumi_pl.core.configs.params.base_params import BaseParams
from oumi_pl.core.configs.params.values import converted, hints, members


class ZeRORuntimeStage(StrEnum):
    """What is cut into shards: nothing, optimizer state, gradients too, weights too."""

    ZERO_0 = "0"
    ZERO_1 = "1"
    ZERO_2 = "2"
    ZERO_3 = "3"


class DeepSpeedPrecision(StrEnum):
    """Half precisions."""

    FP16 = "fp16"
    BF16 = "bf16"


class DeepSpeedOffloadDevice(StrEnum):
    """Where offloaded numbers lie."""

    CPU = "cpu"
    NVME = "nvme"


@dataclass
class OffloadConfig(BaseParams):
    """How numbers are kept off the GPU."""

    device: DeepSpeedOffloadDevice = DeepSpeedOffloadDevice.CPU
    """Where they lie."""
    pin_memory: bool = True
    """Whether the host's memory is page-locked."""
    buffer_count: int = 4
    """Buffers on the CPU."""
    buffer_count_nvme: int = 2
    """Buffers on the disk."""
    block_size: int = 1_048_576
    """Bytes that are read or written at a time."""
    queue_depth: int = 8
    """Requests that wait at the disk."""
    single_submit: bool = False
    """Whether requests are handed over one by one."""
    overlap_events: bool = True
    """Whether reading and writing overlap."""
    thread_count: int = 1
    """Threads that read and write."""


@dataclass
class DeepSpeedParams(BaseParams):
    """DeepSpeed; read when `enable_deepspeed` is true."""

    enable_deepspeed: bool = False
    """Whether DeepSpeed runs the training."""
    deepspeed_config_path: str | Path | None = None
    """A configuration in DeepSpeed's own JSON, which stands for all other fields."""
    zero_stage: ZeRORuntimeStage = ZeRORuntimeStage.ZERO_0
    """What is cut into shards."""
    offload_optimizer: OffloadConfig | None = None
    """Optimizer state off the GPU; from ZERO_1 on."""
    offload_param: OffloadConfig | None = None
    """Weights off the GPU; ZERO_3 only."""
    precision: DeepSpeedPrecision | None = None
    """Half precision; null: as the weights are."""
    overlap_comm: bool = False
    """Whether gradients are exchanged while others are computed."""
    contiguous_gradients: bool = True
    """Whether gradients are copied into one buffer."""
    reduce_bucket_size: int | str = 500_000_000
    """Elements that are reduced at a time."""
    allgather_bucket_size: int = 500_000_000
    """Elements that are gathered at a time."""
    allgather_partitions: bool = True
    """Whether updated weights are gathered, not broadcast."""
    reduce_scatter: bool = True
    """Whether gradients are scattered, not all reduced."""
    round_robin_gradients: bool = False
    """Whether gradients are copied in turns, for offloading."""
    stage3_prefetch_bucket_size: int | str = 50_000_000
    """ZERO_3: elements that are fetched ahead."""
    stage3_param_persistence_threshold: int | str = 100_000
    """ZERO_3: parameters smaller than this are not cut."""
    stage3_max_live_parameters: int = 1_000_000_000
    """ZERO_3: parameters that may be whole at a time."""
    stage3_max_reuse_distance: int = 1_000_000_000
    """ZERO_3: parameters stay whole when they are needed again within this many."""
    stage3_gather_16bit_weights_on_model_save: bool = False
    """ZERO_3: whether weights are gathered to be saved."""
    sub_group_size: int = 1_000_000_000
    """ZERO_3: parameters that are updated at a time."""
    train_batch_size: int | str = "auto"
    """Rows of an update over all GPUs."""
    train_micro_batch_size_per_gpu: int | str = "auto"
    """Rows of a micro-batch."""
    gradient_accumulation_steps: int | str = "auto"
    """Micro-batches of an update."""
    gradient_clipping: int | str = "auto"
    """Norm that gradients are clipped to."""
    zero_allow_untested_optimizer: bool = True
    """Whether optimizers that DeepSpeed has not tested may be used."""
    zero_force_ds_cpu_optimizer: bool = True
    """Whether DeepSpeed's own optimizer is needed when state is offloaded."""
    activation_checkpointing: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's section of this name, as it is."""
    memory_efficient_linear: bool = False
    """Kept for Oumi's files: never handed to DeepSpeed."""
    steps_per_print: int = 10
    """Updates between two reports."""
    wall_clock_breakdown: bool = False
    """Whether times are reported."""

    def _check(self) -> None:
        stage = self.zero_stage
        if self.offload_param is not None and stage != ZeRORuntimeStage.ZERO_3:
            raise OumiConfigError(f"offload_param: needs zero_stage: ZERO_3, and it is {stage.name}")
        if self.offload_optimizer is not None and stage == ZeRORuntimeStage.ZERO_0:
            raise OumiConfigError("offload_optimizer: needs zero_stage: ZERO_1, ZERO_2 or ZERO_3, and it is ZERO_0")
        for name, hint in hints(DeepSpeedParams).items():
            if members(hint) == (int, str) and isinstance(value := getattr(self, name), str) and value != "auto":
                setattr(self, name, _number(value, name))

    def _finalize(self) -> None:
        path = self.deepspeed_config_path
        if self.enable_deepspeed and path is not None and not Path(path).is_file():
            raise OumiConfigError(f"deepspeed_config_path: there is no file {str(path)!r}")


def _number(value: str, name: str) -> int:
    try:
        return int(converted(value, int, name))
    except OumiConfigError:
        raise OumiConfigError(f"{name}: {value!r} is not an int or 'auto'") from None
