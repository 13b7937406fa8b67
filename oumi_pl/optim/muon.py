"""Muon for the hidden matrices and AdamW for the rest, in one optimizer: Lightning's automatic loop takes only one."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Muon, Optimizer
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from oumi_pl.errors import UserError
from oumi_pl.optim.groups import is_of

MATRICES = "matrices"
"""Name of the parameter group that Muon updates: see `oumi_pl.optim.groups.parameter_groups`."""


class _Muon(Muon):
    """torch's Muon, which takes a parameter of several matrices, such as the weights of experts, one by one."""

    def __init__(self, groups: list[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
        # torch refuses anything but matrices; their number and shape matter only in `step`
        matrices = [group | {"params": [p.new_empty(0, 0) for p in group["params"]]} for group in groups]
        super().__init__(matrices, *args, **kwargs)
        for group, whole in zip(self.param_groups, groups, strict=True):
            group["params"] = whole["params"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it is called without one
        """Torch's update, with matrices of sharded weights put together before they are orthogonalised."""
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [])
            self._init_group(group, *lists)
            for weight, gradient, momentum in zip(*lists, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = _orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-_adjust_lr(float(group["lr"]), group["adjust_lr_fn"], weight.shape[-2:]))


def _orthogonal(update: Tensor, *settings: Any) -> Tensor:
    """The nearest orthogonal matrices by Newton-Schulz iterations in bfloat16, sharded as the update is.

    Each rank computes them of whole matrices: of shards, products would be sums of rounded ones. Iterations enlarge
    what rounding adds to small singular values, so updates still differ, by up to percents, where gradients differ in
    their last digits.
    """
    if isinstance(update, DTensor):
        mesh, half = update.device_mesh, cast("DTensor", update.bfloat16())
        whole = _orthogonal(half.full_tensor(), *settings)
        everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return everywhere.redistribute(placements=update.placements)
    if update.ndim == 2:
        return _zeropower_via_newtonschulz(update, *settings)
    return torch.stack([_orthogonal(part, *settings) for part in update])


class MuonAdamW(Optimizer):
    """Orthogonalised momentum for hidden matrices, AdamW for embeddings, the head, norms and biases.

    Muon (Jordan 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest orthogonal
    one. Its updates are scaled to the size of AdamW's (`match_rms_adamw`, Liu et al. 2025, arXiv:2502.16982), so that
    one learning rate, the one that suits AdamW, serves both. The weights of experts, `[experts, in, out]`, are a matrix
    per expert.

    Args:
        params: Groups as `parameter_groups` returns them; those named `matrices` go to Muon.
        lr: Learning rate of all groups.
        weight_decay: Decoupled, for all groups that do not set their own.
        momentum: Of Muon.
        ns_steps: Newton-Schulz iterations of Muon.
        betas: Of AdamW.
        eps: Of AdamW.
        fused: Of AdamW.

    Raises:
        UserError: no group is named `matrices`.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        groups = [dict(group) for group in params]
        if not any(is_of(group, MATRICES) for group in groups):
            raise UserError("model.optimizer: MuonAdamW needs hidden matrices to train, and there are none")
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        hidden = [group for group in self.param_groups if is_of(group, MATRICES)]
        others = [group for group in self.param_groups if not is_of(group, MATRICES)]
        scaled = "match_rms_adamw"
        self._muon = _Muon(hidden, lr, weight_decay, momentum=momentum, ns_steps=ns_steps, adjust_lr_fn=scaled)
        self._adamw = AdamW(others, lr, betas, eps, weight_decay, fused=fused) if others else None
        # the inner optimizers' own group dictionaries, which hold their defaults: a schedule that sets `lr` sets it for
        # both
        order = [id(group["params"][0]) for group in self.param_groups]
        groups = [*self._muon.param_groups, *(self._adamw.param_groups if self._adamw else [])]
        self.param_groups = sorted(groups, key=lambda group: order.index(id(group["params"][0])))
        self._share()

    def _share(self) -> None:
        """Makes both optimizers use the groups and the state of this one, which is what checkpoints hold."""
        self._muon.param_groups = [group for group in self.param_groups if is_of(group, MATRICES)]
        self._muon.state = self.state
        if self._adamw is not None:
            self._adamw.param_groups = [group for group in self.param_groups if not is_of(group, MATRICES)]
            self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        super().load_state_dict(state_dict)
        self._share()  # torch has replaced `param_groups` and `state`

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        if self._adamw is not None:
            self._adamw.step()
        return loss
