"""Several devices: FSDP's block and DDP's options as a strategy of the trainer."""

import os
from typing import Any

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.recipe.notes import Notes, refuse

PLACE = "trainer.strategy"


def strategy(config: TrainingConfig, notes: Notes, devices: int | None) -> dict[str, Any]:
    """`trainer.strategy`, and the precision that goes with it.

    Raises:
        UserError: something has no counterpart.
    """
    fsdp = config.fsdp
    if not fsdp.enable_fsdp:
        return _ddp(config)
    made: dict[str, Any] = _precision(config, notes)
    name = fsdp.sharding_strategy.name
    if name == "NO_SHARD":
        notes.became["fsdp.sharding_strategy"] = "trainer.strategy ddp, which is what it comes to"
        return {"strategy": "ddp"} | made
    if name in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2"):
        refuse("fsdp.sharding_strategy", f"{name} has no counterpart; FULL_SHARD gives the same numbers in less memory")
    if name == "HYBRID_SHARD":
        notes.comment(PLACE, "HYBRID_SHARD shards within a node; on several, this shards over all, with equal numbers")
    size = devices or int(os.environ.get("WORLD_SIZE", "0")) or _visible()
    notes.comment(PLACE, "data_parallel_size is the number of all GPUs")
    notes.became["fsdp.enable_fsdp"] = f"trainer.strategy ModelParallelStrategy (FSDP2) over {size} devices"
    arguments = {"data_parallel_size": size, "tensor_parallel_size": 1}
    return {"strategy": {"class_path": "ModelParallelStrategy", "init_args": arguments}} | made


def _ddp(config: TrainingConfig) -> dict[str, Any]:
    return {"strategy": "ddp_find_unused_parameters_true"} if config.training.ddp_find_unused_parameters else {}


def _precision(config: TrainingConfig, notes: Notes) -> dict[str, Any]:
    name = config.fsdp.mixed_precision
    if name is None:
        return {}
    if name == "fp16":
        refuse("fsdp.mixed_precision", "fp16 is not sharded; set bf16")
    if config.model.dtype != "float32":
        notes.became["fsdp.mixed_precision"] = f"nothing: the weights are {config.model.torch_dtype_str} already"
        return {}
    return {"precision": "bf16-mixed"}


def _visible() -> int:
    import torch

    return max(1, torch.cuda.device_count())
