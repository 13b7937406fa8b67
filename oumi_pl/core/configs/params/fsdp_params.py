"""Weights, gradients and optimizer state cut into shards, one for each GPU."""

from dataclasses import dataclass
from enum import StrEnum

from oumi_pl.core.configs.params.base_params import BaseParams


class ShardingStrategy(StrEnum):
    """What is cut into shards."""

    FULL_SHARD = "FULL_SHARD"
    SHARD_GRAD_OP = "SHARD_GRAD_OP"
    HYBRID_SHARD = "HYBRID_SHARD"
    NO_SHARD = "NO_SHARD"
    HYBRID_SHARD_ZERO2 = "HYBRID_SHARD_ZERO2"


class StateDictType(StrEnum):
    """How the weights of a checkpoint are put down."""

    FULL_STATE_DICT = "FULL_STATE_DICT"
    SHARDED_STATE_DICT = "SHARDED_STATE_DICT"
    LOCAL_STATE_DICT = "LOCAL_STATE_DICT"


class BackwardPrefetch(StrEnum):
    """When the next shards are fetched on the way back."""

    BACKWARD_PRE = "BACKWARD_PRE"
    BACKWARD_POST = "BACKWARD_POST"
    NO_PREFETCH = "NO_PREFETCH"


class AutoWrapPolicy(StrEnum):
    """Where the model is cut into units."""

    SIZE_BASED_WRAP = "SIZE_BASED_WRAP"
    TRANSFORMER_BASED_WRAP = "TRANSFORMER_BASED_WRAP"
    NO_WRAP = "NO_WRAP"


@dataclass
class FSDPParams(BaseParams):
    """Fully sharded data parallel; read when `enable_fsdp` is true."""

    enable_fsdp: bool = False
    """Whether the model is sharded."""
    sharding_strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD
    """What is cut into shards."""
    cpu_offload: bool = False
    """Whether shards wait in the memory of the host."""
    mixed_precision: str | None = None
    """Type that is computed in, `bf16` or `fp16`; null: that of the weights."""
    backward_prefetch: BackwardPrefetch = BackwardPrefetch.BACKWARD_PRE
    """When the next shards are fetched on the way back."""
    forward_prefetch: bool = False
    """Whether the next shards are fetched early on the way forth."""
    use_orig_params: bool | None = None
    """Whether parameters keep their names and shapes; null: unless adapters are trained without compiling."""
    state_dict_type: StateDictType = StateDictType.FULL_STATE_DICT
    """How the weights of a checkpoint are put down."""
    auto_wrap_policy: AutoWrapPolicy = AutoWrapPolicy.NO_WRAP
    """Where the model is cut into units."""
    min_num_params: int = 100_000
    """Least parameters of a unit, for SIZE_BASED_WRAP."""
    transformer_layer_cls: str | None = None
    """Classes of the layers that are units, by commas; null: found in the model."""
    sync_module_states: bool = True
    """Whether all ranks begin with the weights of the first."""

    def _check(self) -> None:
        self._one_of("mixed_precision", ("bf16", "fp16"))
