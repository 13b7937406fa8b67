"""Parameter groups: what an optimizer treats alike."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], embeddings: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Splits the trainable parameters into `matrices`, `embeddings` and `no_decay` (biases, norms).

    Decaying a norm's scale or a bias pulls it to zero without regularising anything. Optimizers like Muon are for the
    matrices between the layers, and not for the rows of a vocabulary.

    Args:
        named: The parameters with their names.
        embeddings: Those of embeddings and of the head.
    """
    rows = {id(parameter) for parameter in embeddings}
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "no_decay": []}
    for _, parameter in named:
        if parameter.requires_grad:
            kind = "no_decay" if parameter.ndim < 2 else "embeddings" if id(parameter) in rows else "matrices"
            groups[kind].append(parameter)
    undecayed: dict[str, dict[str, Any]] = {"no_decay": {"weight_decay": 0.0}}
    return [{"params": found, "name": name} | undecayed.get(name, {}) for name, found in groups.items() if found]


def fuse(optimizer: Optimizer) -> None:
    """Lets Adam and AdamW take their step in one pass over memory, unless it was said how they do."""
    undecided = all(group.get("fused") is None and group.get("foreach") is None for group in optimizer.param_groups)
    if isinstance(optimizer, Adam | AdamW) and undecided:
        for group in optimizer.param_groups:
            group["fused"] = True
