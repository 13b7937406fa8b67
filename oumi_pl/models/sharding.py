"""FSDP2: which modules are sharded, when Lightning's ModelParallelStrategy asks for it."""

from typing import Any

import lightning as L
import torch
from torch import nn

from oumi_pl.errors import UserError
from oumi_pl.models.lm import LM


def shard(model: LM, module: L.LightningModule) -> None:
    """Shards each decoder layer, then the wrapper as the root, over the data-parallel ranks.

    The root holds what is left: embeddings, final norm and head. It is gathered while the wrapper's `forward` runs,
    which is where the chunked loss reads the head's weight. Does nothing under any other strategy.

    Raises:
        UserError: under tensor parallelism, for which no plan is written.
    """
    from lightning.pytorch.strategies import ModelParallelStrategy

    if not isinstance(module.trainer.strategy, ModelParallelStrategy):
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh: Any = module.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        raise UserError("trainer.strategy: tensor_parallel_size has to be 1; shard over data_parallel_size instead")
    policy = MixedPrecisionPolicy()
    if module.trainer.precision == "bf16-mixed":
        # gather and multiply in bfloat16; keep weights, and sum gradients over ranks, in float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # heads beside the model, a reward head for example, are sharded and reduced like it
    heads = [child for child in module.children() if child is not model and any(True for _ in child.parameters())]
    for layer in [*decoder_layers(model), model, *heads]:
        fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds only parts of the weights."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters())


def decoder_layers(model: LM) -> list[nn.Module]:
    """The transformer blocks: the modules that the architecture lists as not to be split."""
    names = set(model.base._no_split_modules or [])
    return [m for m in model.base.modules() if type(m).__name__ in names]
