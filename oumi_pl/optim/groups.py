"""Parameter groups, and fused optimizer steps."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], embeddings: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Splits the trainable parameters into `matrices`, `embeddings` and `no_decay` (biases, norms).

    Weight decay on a norm's scale or a bias does not regularise. `matrices` is a separate group because optimizers like
    Muon are for the weights of layers, not for embeddings with a row per token.

    Args:
        named: The parameters with their names.
        embeddings: The parameters of embeddings and of the head.
    """
    vocabulary = {id(parameter) for parameter in embeddings}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "no_decay": []}
    for _, parameter in named:
        if parameter.requires_grad:
            kind = "no_decay" if parameter.ndim < 2 else "embeddings" if id(parameter) in vocabulary else "matrices"
            groups[kind].append(parameter)
    settings: dict[str, dict[str, Any]] = {"no_decay": {"weight_decay": 0.0}}
    return [{"params": group, "name": name} | settings.get(name, {}) for name, group in groups.items() if group]


def fuse(optimizer: Optimizer) -> None:
    """Switches on the fused step of Adam and AdamW, unless the recipe sets `fused` or `foreach`."""
    undecided = all(group.get("fused") is None and group.get("foreach") is None for group in optimizer.param_groups)
    if isinstance(optimizer, Adam | AdamW) and undecided:
        for group in optimizer.param_groups:
            group["fused"] = True
