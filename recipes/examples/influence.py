"""Influence functions (Koh and Liang 2017, arXiv:1703.04730): which training rows a held-out loss depends on."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def dot(left, right):
    """The inner product of two lists of tensors."""
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


def influences(module, trained, held_out, parameters, damping=0.01, steps=20):
    """Estimates by how much the mean held-out loss would rise if a training batch had a little more weight.

    Args:
        module: A trained module.
        trained: Batches, such as `[data.batch("train", [i]) for i in rows]`; one influence for each.
        held_out: A batch.
        parameters: The weights that count, such as those of the last layer.
        damping: Added to the Hessian's diagonal.
        steps: Of conjugate gradients.
    """
    loss = lambda batch: -module.causal_lm(batch).mean()  # noqa: E731
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has first derivatives only
        total = sum(loss(batch) for batch in trained) / len(trained)
        gradient = torch.autograd.grad(total, parameters, create_graph=True)
        target = torch.autograd.grad(loss(held_out), parameters)
        solution, residual = [torch.zeros_like(g) for g in target], list(target)
        direction, left = residual, dot(residual, residual)
        for _ in range(steps):  # (H + damping) solution = target
            curved = torch.autograd.grad(gradient, parameters, direction, retain_graph=True)
            curved = [c + damping * d for c, d in zip(curved, direction, strict=True)]
            size = left / dot(direction, curved)
            solution = [s + size * d for s, d in zip(solution, direction, strict=True)]
            residual = [r - size * c for r, c in zip(residual, curved, strict=True)]
            before, left = left, dot(residual, residual)
            if left < 1e-12 * dot(target, target):
                break
            direction = [r + left / before * d for r, d in zip(residual, direction, strict=True)]
        return [-float(dot(solution, torch.autograd.grad(loss(batch), parameters))) for batch in trained]
