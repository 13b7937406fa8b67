"""Log-probabilities under a linear output head, for losses that weigh tokens after seeing all of them."""

from typing import Any

import torch
from torch import Tensor

from oumi_pl.losses.devices import device_of
from oumi_pl.losses.linear_head import (
    HeadGradients,
    LinearHead,
    Task,
    chunks,
    full_precision,
    gradients_with_graph,
    graph_is_kept,
    leaf_and_logits,
    to_leaf,
    transformed,
)
from oumi_pl.losses.vocabulary import Vocabulary


class LinearLogps(torch.autograd.Function):
    """Log-probabilities under a linear head. Keeps the softmax for backward up to a budget, else recomputes it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: Task) -> Tensor:
        """Returns the log-probabilities of the targets, `[n]`."""
        head, targets = LinearHead(hidden, weight, bias), task.targets
        lse = torch.empty(len(hidden), dtype=full_precision(head.dtype), device=hidden.device)
        logps = torch.empty_like(lse)
        # a transform may return a tensor that must not be overwritten, and lower precision would lose digits of the
        # sums
        device = device_of(hidden)
        in_place = task.transform is None and head.dtype == lse.dtype and device.is_in_place
        budget = device.kept_elements if in_place and task.with_gradients else 0
        ctx.kept = {}
        with torch.autocast(hidden.device.type, enabled=False):
            for number, rows in enumerate(chunks(len(hidden), head.vocab, hidden, task.chunk_size)):
                logits = transformed(head.logits(rows), task.transform)
                target_logits = task.vocabulary.at_target(logits, targets[rows])
                if in_place:
                    lse[rows], total = _exponentials(logits, task.vocabulary)
                    budget -= logits.numel()
                    if budget >= 0:
                        ctx.kept[number] = logits, total
                        head.keep()
                else:
                    lse[rows] = task.vocabulary.logsumexp(logits)
                logps[rows] = target_logits - lse[rows]
        ctx.save_for_backward(hidden, weight, bias, lse)
        ctx.task, ctx.dtype = task, head.dtype
        return logps

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients chunk by chunk; under `create_graph`, such that they have a graph themselves."""
        hidden, weight, bias, _ = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *gradients_with_graph(ctx.task, upstream, (hidden, weight, bias), dtype=ctx.dtype), None
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            gradients = _gradients(ctx, upstream)
        inputs = (hidden, weight, bias)
        cast = [g if g is None else g.to(t.dtype) for g, t in zip(gradients.tensors, inputs, strict=True)]
        return *cast, None


def _gradients(ctx: Any, upstream: Tensor) -> HeadGradients:
    """The gradients, from the kept softmax or from recomputed logits."""
    hidden, weight, bias, lse = ctx.saved_tensors
    task: Task = ctx.task
    head = LinearHead(hidden, weight, bias, ctx.dtype)
    gradients = HeadGradients(head, ctx.needs_input_grad[:3])
    for number, rows in enumerate(chunks(len(hidden), head.vocab, hidden, task.chunk_size)):
        # The gradient of a log-probability with respect to the logits is one-hot - softmax.
        weights, wanted = upstream[rows].unsqueeze(-1), task.targets[rows]
        if number in ctx.kept:
            exponentials, total = ctx.kept[number] if graph_is_kept() else ctx.kept.pop(number)
            scale = exponentials.mul if graph_is_kept() else exponentials.mul_
            by_logits = scale(-weights / total)
            gradients.add(rows, task.vocabulary.add_at_target(by_logits, wanted, upstream[rows]))
            continue
        leaf, logits = leaf_and_logits(head.logits(rows), task.transform)
        # a transform may have saved its output for backward
        shift = logits.detach().sub if task.transform else logits.sub_
        gradient = shift(lse[rows].unsqueeze(-1)).exp_().mul_(-weights)
        gradient = task.vocabulary.add_at_target(gradient, wanted, upstream[rows])
        gradients.add(rows, to_leaf(leaf, logits, gradient))
    gradients.add_over(task.vocabulary)
    return gradients


def _exponentials(logits: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Overwrites logits `[n, vocab]` with `exp(logits - max)`; returns logsumexp `[n]` and the sums `[n, 1]`."""
    top = vocabulary.largest(logits.amax(-1, keepdim=True))
    total = vocabulary.total(logits.sub_(top).exp_().sum(-1, keepdim=True))
    return (top + total.log()).squeeze(-1), total
