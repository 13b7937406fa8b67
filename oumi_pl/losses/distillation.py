"""Divergences between a student's and a teacher's next-token distributions, one chunk of logits at a time.

The full logits of both models, `[targets, vocab]` each, would be by far the largest tensors, so only one chunk of rows
is in memory at a time: the student's logits, the teacher's outcomes, and the gradient. The gradient is computed in the
forward pass; the backward pass only scales it.

An *outcome* is a token, or the bucket of all tokens outside the teacher's top k. Shapes: `n` targets,
`outcomes` (the vocabulary, or k + 1), `vocab`, `hidden` the width of the model.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy, token_loss_sum
from oumi_pl.losses.linear_head import (
    HeadGradients,
    LinearHead,
    Transform,
    at_target,
    call_head,
    chunks,
    full_precision,
    graph_is_kept,
    is_largest,
    is_plain_linear,
    leaf_and_logits,
    to_leaf,
    transformed,
)

ALIVE = 4
"""Tensors of the size of a chunk's logits that are alive at a time; chunks are smaller by this factor."""


class Divergence(ABC):
    """A divergence between two distributions. To add one, subclass it and name the class by `class_path`."""

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Maps log-probabilities `[n, outcomes]` of student and teacher, float32, to divergences `[n]`.

        The student's are differentiable. The teacher's may be -inf.
        """

    def derivative(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor] | None:
        """The divergences `[n]` and their derivatives with respect to the student's log-probabilities `[n, outcomes]`.

        Optional: None leaves the derivative to autograd. May overwrite `teacher`.
        """
        return None


class ForwardKL(Divergence):
    """`KL(teacher || student)`: the student covers all modes of the teacher (Hinton et al. 2015, arXiv:1503.02531)."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Computes `sum q (log q - log p)`, with the student's `p` and the teacher's `q`."""
        return _kl(teacher, student)

    def derivative(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """See `Divergence`."""
        return _kl(teacher, student), teacher.exp().neg_()


class ReverseKL(Divergence):
    """`KL(student || teacher)`: the student seeks a mode of the teacher (Gu et al. 2023, arXiv:2306.08543)."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Computes `sum p (log p - log q)`, with the student's `p` and the teacher's `q`."""
        return _kl(student, teacher)

    def derivative(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """See `Divergence`. The term `p`, from differentiating the factor p, is left out: the softmax cancels it."""
        weighted = student.exp().mul_(student - teacher)
        return weighted.sum(-1), weighted


class JSD(Divergence):
    """`beta KL(teacher || m) + (1 - beta) KL(student || m)` with the mixture `m = beta teacher + (1 - beta) student`.

    The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv:2306.13649, equation 1). It is bounded.
    As `beta` goes to 0, JSD / beta approaches the forward KL; as `beta` goes to 1, JSD / (1 - beta) approaches the
    reverse KL. At 0 and 1 the divergence itself is 0, so these are refused (in TRL they select the two KLs).

    Args:
        beta: Share of the teacher in the mixture, above 0 and below 1.
    """

    def __init__(self, beta: float = 0.5) -> None:
        if not 0 < beta < 1:
            raise UserError(f"beta is {beta}, but has to be above 0 and below 1; for 0 and 1 use ForwardKL, ReverseKL")
        self.beta = beta

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Computes both terms. The mixture is positive wherever one of the two is, so both terms are finite."""
        mixture = self._mixture(student, teacher)
        return self.beta * _kl(teacher, mixture) + (1 - self.beta) * _kl(student, mixture)

    def derivative(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """See `Divergence`. It is `(1 - beta) p log(p / m)`; the terms through the mixture cancel."""
        mixture = self._mixture(student, teacher)
        by_student = student.exp().mul_(student - mixture).mul_(1 - self.beta)
        return self.beta * _kl(teacher, mixture) + by_student.sum(-1), by_student

    def _mixture(self, student: Tensor, teacher: Tensor) -> Tensor:
        share = torch.tensor(self.beta, dtype=student.dtype, device=student.device)
        return torch.logaddexp(student + torch.log1p(-share), teacher + share.log())


def _kl(of: Tensor, to: Tensor) -> Tensor:
    """`KL(of || to)` of log-probabilities `[n, outcomes]`, `[n]`. An outcome with probability 0 in `of` adds 0."""
    return F.kl_div(to, of, reduction="none", log_target=True).nan_to_num(0.0, torch.inf, -torch.inf).sum(-1)


# ---- the teacher


class Outcomes(ABC):
    """The teacher's distributions at the targets of a batch."""

    @abstractmethod
    def logps(self, rows: slice) -> tuple[Tensor | None, Tensor]:
        """Returns ids and log-probabilities of the outcomes for some targets, float32.

        Returns:
            None and `[rows, vocab]`; or the ids of the top tokens `[rows, k]`, most likely first, and `[rows, k + 1]`,
            whose last column is the log-probability of all other tokens together.
        """


@dataclass(frozen=True)
class TeacherHead(Outcomes):
    """Outcomes computed from the teacher's hidden states `[targets, hidden]`, a chunk at a time."""

    hidden: Tensor
    head: nn.Module
    transform: Transform | None
    temperature: float
    vocab: int
    """How many of the teacher's logits stand for tokens."""

    @torch.no_grad()
    def logps(self, rows: slice) -> tuple[None, Tensor]:
        """Runs the head."""
        logits = transformed(call_head(self.head, self.hidden[rows]), self.transform)[:, : self.vocab]
        return None, (logits / self.temperature if self.temperature != 1 else logits).log_softmax(-1)


@dataclass(frozen=True)
class TopK(Outcomes):
    """Precomputed outcomes: ids `[targets, k]`, log-probabilities `[targets, k + 1]`.

    If k is the vocabulary size, there are no other tokens: log-probabilities are `[targets, k]`.
    """

    ids: Tensor
    values: Tensor

    def logps(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Returns rows of the stored values; a copy, because derivatives may overwrite it."""
        return self.ids[rows], self.values[rows].clone()


@torch.no_grad()
def top_k(outcomes: Outcomes, targets: int, k: int, chunk_size: int) -> Tensor:
    """Summarises full distributions as `[targets, 2 k + 1]` float32.

    The columns are k ids (int32 bits viewed as float32), their log-probabilities, and that of all other tokens together
    (-inf if k is the vocabulary size).
    """
    columns = [torch.empty(0, 2 * k + 1)]
    for first in range(0, targets, chunk_size):
        _, logps = outcomes.logps(slice(first, min(first + chunk_size, targets)))
        values, ids = logps.topk(k, sorted=True)
        rest = logps.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        columns.append(torch.cat([ids.to(torch.int32).view(torch.float32), values.float(), rest.float()], -1).cpu())
    return torch.cat(columns)


def from_columns(columns: Tensor, vocab: int) -> TopK:
    """Restores outcomes from the columns that `top_k` wrote, for this vocabulary size."""
    k = columns.shape[-1] // 2
    ids = columns[:, :k].contiguous().view(torch.int32).long()
    return TopK(ids, columns[:, k : 2 * k] if k == vocab else columns[:, k:])


# ---- the loss


class DistillationSums(NamedTuple):
    """Scalar sums over the targets of a batch."""

    loss: Tensor
    """Differentiable: `(1 - weight) divergence + weight nll`."""
    divergence: Tensor
    nll: Tensor
    """Negative log-likelihood of the targets, at temperature 1."""
    correct: Tensor
    """How many targets had the student's largest logit."""
    agreed: Tensor
    """How many targets have the same most likely token in student and teacher."""


@dataclass(frozen=True)
class _Task:
    targets: Tensor
    outcomes: Outcomes
    divergence: Divergence
    temperature: float
    weight: float
    transform: Transform | None
    vocab: int
    """How many logits of the student are compared."""
    chunk_size: int | None
    with_gradients: bool = True


def distillation_sums(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    outcomes: Outcomes,
    divergence: Divergence,
    *,
    vocab: int,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    transform: Transform | None = None,
    chunk_size: int | None = None,
) -> DistillationSums:
    """Sums a divergence from a teacher, mixed with cross-entropy, without holding all logits of either model.

    Args:
        hidden: `[n, hidden]`, the student's states that predict the targets.
        targets: `[n]` int64.
        head: The student's output head, `[n, hidden]` to logits `[n, vocab]`.
        outcomes: The teacher's distributions, at the same temperature.
        divergence: Compares the two distributions.
        vocab: How many of the student's logits stand for tokens of both models.
        temperature: Divides the student's logits before the divergence.
        cross_entropy: Weight of the targets' cross-entropy, from 0 to 1; the divergence is weighted by 1 minus it.
        transform: Applied to the student's float32 logits.
        chunk_size: Rows of logits alive at a time; None chooses by vocabulary and device.
    """
    with_gradients = torch.is_grad_enabled()
    task = _Task(
        targets, outcomes, divergence, temperature, cross_entropy, transform, vocab, chunk_size, with_gradients
    )
    if not len(targets):  # a 0 that depends on the model, so that all ranks take part in the backward pass
        zero = token_loss_sum(hidden, targets, head, CrossEntropy(), transform=transform).loss_sum
        return DistillationSums(zero, *(zero.detach() for _ in range(4)))
    if is_plain_linear(head, hidden):
        return DistillationSums(*_LinearDistillation.apply(hidden, head.weight, head.bias, task))
    losses = []
    for rows in _chunks(task, hidden, getattr(head, "out_features", None) or 2**17):

        def of_chunk(states: Tensor, rows: slice = rows) -> tuple[Tensor, ...]:
            return _of_chunk(task, transformed(call_head(head, states), transform), rows)

        losses.append(checkpoint(of_chunk, hidden[rows], use_reentrant=False))
    return DistillationSums(*(torch.stack(column).sum() for column in zip(*losses, strict=True)))


def _chunks(task: _Task, hidden: Tensor, vocab: int) -> list[slice]:
    return chunks(len(hidden), ALIVE * vocab, hidden, task.chunk_size)


def _compared(task: _Task, logits: Tensor, ids: Tensor | None) -> Tensor:
    """The student's log-probabilities of the outcomes, `[rows, outcomes]`."""
    scaled = logits[:, : task.vocab]
    scaled = scaled / task.temperature if task.temperature != 1 else scaled
    logps = scaled.log_softmax(-1)
    if ids is None:
        return logps
    top = logps.gather(-1, ids)
    if ids.shape[-1] == task.vocab:
        return top
    # summed over the other tokens: `1 - sum(top)` loses all digits if the top tokens have nearly all the probability
    rest = logps.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest], -1)


def _of_chunk(task: _Task, logits: Tensor, rows: slice) -> tuple[Tensor, ...]:
    """Sums over a chunk of the student's logits `[rows, vocab]`, differentiable with respect to them."""
    targets = task.targets[rows]
    ids, teacher = task.outcomes.logps(rows)
    divergences = task.divergence(_compared(task, logits, ids), teacher)
    nll = logits.logsumexp(-1) - at_target(logits, targets)
    loss = (1 - task.weight) * divergences.sum() + task.weight * nll.sum()
    return loss, divergences.sum(), nll.sum(), *_counts(task, logits, targets, ids, teacher)


def _counts(task: _Task, logits: Tensor, targets: Tensor, ids: Tensor | None, teacher: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach()
    best = logits[:, : task.vocab].argmax(-1)
    theirs = teacher.argmax(-1) if ids is None else ids[:, 0]  # ids are sorted, the most likely first
    return is_largest(logits, targets).sum(), (best == theirs).sum()


class _LinearDistillation(torch.autograd.Function):
    """The sums for a linear head. The forward pass computes the gradients too, up to the upstream factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> tuple[Tensor, ...]:
        head = LinearHead(hidden, weight, bias)
        needed = ctx.needs_input_grad[:3]
        gradients = HeadGradients(head, needed) if task.with_gradients and any(needed) else None
        sums: list[tuple[Tensor, ...]] = []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(task, hidden, head.vocab):
                logits = head.logits(rows)
                if gradients is None:
                    sums.append(_of_chunk(task, transformed(logits, task.transform), rows))
                    continue
                leaf, last = leaf_and_logits(logits, task.transform)
                of_rows, gradient = _with_gradient(task, last, rows)
                sums.append(of_rows)
                gradients.add(rows, to_leaf(leaf, last, gradient))
        if gradients is not None:
            ctx.save_for_backward(*gradients.tensors)
            ctx.dtypes = [t if t is None else t.dtype for t in (hidden, weight, bias)]
        loss, *rest = (torch.stack(column).sum() for column in zip(*sums, strict=True))
        ctx.mark_non_differentiable(*rest)
        return loss.to(full_precision(head.dtype)), *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scales what the forward pass computed."""
        scale = Tensor.mul if graph_is_kept() else Tensor.mul_
        scaled = [
            None if gradient is None else scale(gradient, upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None


def _with_gradient(task: _Task, logits: Tensor, rows: slice) -> tuple[tuple[Tensor, ...], Tensor]:
    """The sums of a chunk, and the gradient of its loss with respect to the logits `[rows, vocab]`."""
    logits = logits.detach()
    targets = task.targets[rows]
    ids, teacher = task.outcomes.logps(rows)
    counts = _counts(task, logits, targets, ids, teacher)
    derivative = None
    if ids is None:  # with few outcomes, autograd is cheap
        student = _compared(task, logits, ids)
        derivative = task.divergence.derivative(student, teacher)
    if derivative is None:
        inputs = logits.clone().requires_grad_()
        with torch.enable_grad():
            divergences = task.divergence(_compared(task, inputs, ids), teacher)
        share = torch.full_like(divergences, 1 - task.weight)
        (gradient,) = torch.autograd.grad(divergences, inputs, share)
        divergences = divergences.detach()
    else:
        divergences, by_logps = derivative
        # through the softmax: d log p_j / d x_i = (1[i = j] - p_i) / temperature
        gradient = torch.zeros_like(logits) if task.vocab < logits.shape[-1] else torch.empty_like(logits)
        compared = gradient[:, : task.vocab]
        torch.mul(student.exp_(), by_logps.sum(-1, keepdim=True).neg_(), out=compared)
        compared.add_(by_logps).mul_((1 - task.weight) / task.temperature)
    lse = logits.logsumexp(-1)
    nll = lse - at_target(logits, targets)
    if task.weight:
        softmax = logits.sub(lse.unsqueeze(-1)).exp_()
        gradient.add_(softmax, alpha=task.weight)
        columns = targets.unsqueeze(-1)
        gradient.scatter_add_(-1, columns, torch.full_like(columns, -task.weight, dtype=gradient.dtype))
    loss = (1 - task.weight) * divergences.sum() + task.weight * nll.sum()
    return (loss, divergences.sum(), nll.sum(), *counts), gradient
