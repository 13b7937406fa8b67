"""Training on several GPUs: PyTorch's FSDP and DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054)."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

from oumi_pl.core.configs.params.base_params import (
    SPEED,
    BaseParams,
    OumiConfigError,
    converted,
    harmless,
    hints,
    honoured,
    members,
    refused,
    with_fields,
)


class ShardingStrategy(StrEnum):
    """What is sharded."""

    FULL_SHARD = "FULL_SHARD"
    SHARD_GRAD_OP = "SHARD_GRAD_OP"
    HYBRID_SHARD = "HYBRID_SHARD"
    NO_SHARD = "NO_SHARD"
    HYBRID_SHARD_ZERO2 = "HYBRID_SHARD_ZERO2"

    def to_torch(self) -> Any:
        """The member of `torch.distributed.fsdp.ShardingStrategy`."""
        name = "_HYBRID_SHARD_ZERO2" if self is ShardingStrategy.HYBRID_SHARD_ZERO2 else self.name
        return import_module("torch.distributed.fsdp").ShardingStrategy[name]


class StateDictType(StrEnum):
    """How the weights of a checkpoint are stored."""

    FULL_STATE_DICT = "FULL_STATE_DICT"
    SHARDED_STATE_DICT = "SHARDED_STATE_DICT"
    LOCAL_STATE_DICT = "LOCAL_STATE_DICT"

    def to_torch(self) -> Any:
        """The member of `torch.distributed.fsdp.StateDictType`."""
        return import_module("torch.distributed.fsdp").StateDictType[self.name]


class BackwardPrefetch(StrEnum):
    """When the next shards are fetched in the backward pass."""

    BACKWARD_PRE = "BACKWARD_PRE"
    BACKWARD_POST = "BACKWARD_POST"
    NO_PREFETCH = "NO_PREFETCH"

    def to_torch(self) -> Any:
        """The member of `torch.distributed.fsdp.BackwardPrefetch`; None for no prefetch."""
        if self is BackwardPrefetch.NO_PREFETCH:
            return None
        return import_module("torch.distributed.fsdp").BackwardPrefetch[self.name]


class AutoWrapPolicy(StrEnum):
    """How the model is divided into units."""

    SIZE_BASED_WRAP = "SIZE_BASED_WRAP"
    TRANSFORMER_BASED_WRAP = "TRANSFORMER_BASED_WRAP"
    NO_WRAP = "NO_WRAP"


BLOCKS = "FSDP2 shards by the model's own blocks; the numbers are the same"


@dataclass
class FSDPParams(BaseParams):
    """Fully sharded data parallel; read when `enable_fsdp` is true."""

    enable_fsdp: bool = honoured("trainer.strategy", False)
    sharding_strategy: ShardingStrategy = honoured("trainer.strategy", ShardingStrategy.FULL_SHARD)
    cpu_offload: bool = honoured("trainer.strategy Sharded, offload", False)
    mixed_precision: str | None = honoured("trainer.precision", None)
    """Type of the computation, `bf16` or `fp16`; null: that of the weights."""
    backward_prefetch: BackwardPrefetch = harmless(SPEED, BackwardPrefetch.BACKWARD_PRE)
    forward_prefetch: bool = harmless(SPEED, False)
    use_orig_params: bool | None = harmless("FSDP2 always keeps parameters as they are", None)
    state_dict_type: StateDictType = harmless(
        "checkpoints are sharded, and the model at the end is whole", StateDictType.FULL_STATE_DICT
    )
    auto_wrap_policy: AutoWrapPolicy = harmless(BLOCKS, AutoWrapPolicy.NO_WRAP)
    min_num_params: int = harmless(BLOCKS, 100_000)
    transformer_layer_cls: str | None = harmless(BLOCKS, None)
    sync_module_states: bool = harmless("every rank loads the same weights", True)

    def _problems(self) -> Iterator[str]:
        yield from self._none_of("mixed_precision", ("bf16", "fp16"))


class ZeRORuntimeStage(StrEnum):
    """What is sharded: nothing, optimizer state, gradients too, weights too."""

    ZERO_0 = "0"
    ZERO_1 = "1"
    ZERO_2 = "2"
    ZERO_3 = "3"


class DeepSpeedPrecision(StrEnum):
    """Half precisions."""

    FP16 = "fp16"
    BF16 = "bf16"


class DeepSpeedOffloadDevice(StrEnum):
    """Where offloaded tensors are kept."""

    CPU = "cpu"
    NVME = "nvme"


# FSDP2 takes DeepSpeed's place, so most of these fields are here only for files that name them.
COUNT = (int | str, "auto")
OFFLOAD: dict[str, Any] = {
    "device": DeepSpeedOffloadDevice.CPU, "pin_memory": True, "buffer_count": 4, "buffer_count_nvme": 2,
    "block_size": 1_048_576, "queue_depth": 8, "single_submit": False, "overlap_events": True, "thread_count": 1,
}  # fmt: skip
DEEPSPEED: dict[str, Any] = {
    "overlap_comm": False, "contiguous_gradients": True,
    "reduce_bucket_size": (int | str, 500_000_000), "allgather_bucket_size": 500_000_000,
    "allgather_partitions": True, "reduce_scatter": True, "round_robin_gradients": False,
    "stage3_prefetch_bucket_size": (int | str, 50_000_000),
    "stage3_param_persistence_threshold": (int | str, 100_000), "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000, "stage3_gather_16bit_weights_on_model_save": False,
    "sub_group_size": 1_000_000_000, "train_micro_batch_size_per_gpu": COUNT, "gradient_accumulation_steps": COUNT,
    "gradient_clipping": COUNT, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": True,
    "activation_checkpointing": {}, "memory_efficient_linear": False, "steps_per_print": 10,
    "wall_clock_breakdown": False,
}  # fmt: skip


@with_fields(OFFLOAD)
class OffloadConfig(BaseParams):
    """How tensors are kept off the GPU."""


@with_fields(DEEPSPEED)
class DeepSpeedParams(BaseParams):
    """DeepSpeed; read when `enable_deepspeed` is true."""

    enable_deepspeed: bool = honoured("trainer.strategy, FSDP2 in place of DeepSpeed", False)
    deepspeed_config_path: str | Path | None = refused("name zero_stage and precision in this section", None)
    """A configuration in DeepSpeed's own JSON, which replaces all other fields."""
    zero_stage: ZeRORuntimeStage = honoured("trainer.strategy: ddp for ZERO_0, else FSDP2", ZeRORuntimeStage.ZERO_0)
    precision: DeepSpeedPrecision | None = honoured("trainer.precision", None)
    offload_optimizer: OffloadConfig | None = None
    offload_param: OffloadConfig | None = None
    train_batch_size: int | str = "auto"
    """Rows of an update over all GPUs."""

    @property
    def shards(self) -> bool:
        """Whether it is enabled and divides something among devices."""
        return self.enable_deepspeed and self.zero_stage != ZeRORuntimeStage.ZERO_0

    def is_zero3_enabled(self) -> bool:
        """Whether weights are divided among devices too."""
        return self.zero_stage == ZeRORuntimeStage.ZERO_3

    def _problems(self) -> Iterator[str]:
        stage = self.zero_stage
        if self.offload_param is not None and stage != ZeRORuntimeStage.ZERO_3:
            yield f"offload_param: needs zero_stage: ZERO_3, and it is {stage.name}"
        if self.offload_optimizer is not None and stage == ZeRORuntimeStage.ZERO_0:
            yield "offload_optimizer: needs zero_stage: ZERO_1, ZERO_2 or ZERO_3, and it is ZERO_0"

    def _settle(self) -> None:
        for name, hint in hints(DeepSpeedParams).items():
            value = getattr(self, name)
            if members(hint) != (int, str) or not isinstance(value, str) or value == "auto":
                continue
            try:
                setattr(self, name, converted(value, int, name))
            except OumiConfigError:
                raise OumiConfigError(f"{name}: {value!r} is not an int or 'auto'") from None

    def _final_problems(self) -> Iterator[str]:
        path = self.deepspeed_config_path
        if self.enable_deepspeed and path is not None and not Path(path).is_file():
            yield f"deepspeed_config_path: there is no file {str(path)!r}"
