"""Losses of logits whose columns, the vocabulary, are divided over ranks.

With tensor parallelism, the output head is divided along the vocabulary. A chunk's largest logit, the sum of its
exponentials and the logits of its targets are reduced over the ranks; the logits themselves stay where they are.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Vocabulary:
    """All columns of the logits are here."""

    def at_target(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Picks each target's entry, `[n]`, from `[n, columns]`."""
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def add_at_target(self, values: Tensor, targets: Tensor, terms: Tensor) -> Tensor:
        """Adds `terms` `[n]` to each target's entry of `values` `[n, columns]`, in place."""
        return values.scatter_add_(-1, targets.unsqueeze(-1), terms.unsqueeze(-1))

    def largest(self, values: Tensor) -> Tensor:
        """The largest of the ranks' values."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum of the ranks' values."""
        return values

    def logsumexp(self, logits: Tensor) -> Tensor:
        """Of each row of `[n, columns]`, `[n]`."""
        return logits.logsumexp(-1)


@dataclass(frozen=True)
class VocabularyPart(Vocabulary):
    """Some columns are here, and the others at the other ranks of a group.

    All of them have to call each method but `add_at_target`, which needs nothing of the others.
    """

    group: dist.ProcessGroup
    start: int
    """The first token whose column is here."""
    size: int
    """The number of columns here."""

    def _own(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the targets, and whether they are here, `[n]` each."""
        columns = targets - self.start
        is_own = (columns >= 0) & (columns < self.size)
        return columns.where(is_own, 0), is_own

    def at_target(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Vocabulary`."""
        columns, is_own = self._own(targets)
        return self.total(super().at_target(logits, columns).where(is_own, 0))

    def add_at_target(self, values: Tensor, targets: Tensor, terms: Tensor) -> Tensor:
        """See `Vocabulary`."""
        columns, is_own = self._own(targets)
        return super().add_at_target(values, columns, terms.where(is_own, 0))

    def largest(self, values: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        result = values.contiguous().clone()
        dist.all_reduce(result, how, self.group)
        return result

    def logsumexp(self, logits: Tensor) -> Tensor:
        """See `Vocabulary`."""
        top = self.largest(logits.amax(-1))
        return top + self.total((logits - top.unsqueeze(-1)).exp().sum(-1)).log()


ALL = Vocabulary()


class LocalHead(NamedTuple):
    """The tensors of a linear output head on this rank."""

    weight: Tensor
    """`[columns, hidden]`."""
    bias: Tensor | None
    """`[columns]`."""
    vocabulary: Vocabulary
    """Which columns these are."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has to be called, so that its hooks run."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def divided_head(head: nn.Module, hidden: Tensor) -> LocalHead | None:
    """The part on this rank of a linear head whose weight a tensor group holds.

    None for other heads, and for those that have to be called: with a hook, a bias that is divided, a weight in
    integers or on another device.
    """
    weight = getattr(head, "weight", None)
    if type(head) is not nn.Linear or not isinstance(weight, DTensor):
        return None
    if weight.device_mesh.mesh_dim_names != ("tensor",):  # of FSDP2, which a call of the wrapper gathers
        return None
    if weight.device.type != hidden.device.type or not weight.is_floating_point() or has_hooks(head):
        return None
    mesh, bias = weight.device_mesh, cast("DTensor | None", head.bias)
    if weight.placements[0].is_replicate():
        return LocalHead(weight.to_local(), None if bias is None else bias.to_local(), ALL)
    if bias is not None:
        return None
    local = weight.to_local()
    return LocalHead(local, None, VocabularyPart(mesh.get_group(), mesh.get_local_rank() * len(local), len(local)))
