"""Sharpness-aware minimisation (Foret et al. 2021, arXiv:2010.01412), and noise on the gradient.

oumi_pl fit --config quickstart/sft --model.optimizer sam.SAM --model.optimizer.lr 0.1
"""

import lightning as L
import torch


class SAM(torch.optim.SGD):
    """SGD whose gradient is taken at the worst point within `rho`; it computes the gradient twice."""

    def __init__(self, params, lr: float, rho: float = 0.05, momentum: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum)
        self.rho = rho

    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
            moves = [p.grad * (self.rho / (norm + 1e-12)) for p in weights]
            torch._foreach_add_(weights, moves)
            with torch.enable_grad():
                closure()
            torch._foreach_sub_(weights, moves)
        super().step()
        return loss


class GradientNoise(L.Callback):
    """Adds noise of variance `eta / (1 + step)^0.55` to the gradient (Neelakantan et al. 2015, arXiv:1511.06807)."""

    def __init__(self, eta: float = 0.01):
        self.eta = eta

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in (p for p in pl_module.parameters() if p.grad is not None):
            parameter.grad += torch.randn_like(parameter.grad) * (self.eta / (1 + trainer.global_step) ** 0.55) ** 0.5
