"""Token losses and log-probabilities computed from hidden states, one chunk of logits at a time.

The logits of a batch, `[n, vocab]`, would be by far its largest tensor. Nothing here holds more than a chunk of its
rows: `token_loss_sum` computes the gradients of a chunk right after its logits, so the backward pass only scales them;
`token_logps` is for losses whose weight of a token depends on the whole sequence (DPO and its family), and recomputes
the logits in the backward pass if it could not keep them.

Shapes: `n` tokens that carry a loss (callers select them *before* the head), `hidden` the width of the model, `vocab`.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from oumi_pl.errors import UserError
from oumi_pl.losses.devices import device_of
from oumi_pl.losses.linear_head import (
    LinearTokenLoss,
    LossTask,
    OtherInputsError,
    Task,
    TokenLossOfHead,
    Transform,
    at_target,
    call_head,
    checked_losses,
    chunks,
    full_precision,
    is_largest,
    is_plain_linear,
    is_transformed,
    transformed,
)
from oumi_pl.losses.linear_logps import LinearLogps
from oumi_pl.losses.vocabulary import ALL, LocalHead, Vocabulary, divided_head
from oumi_pl.types import Sums, TokenLoss


class CrossEntropy(TokenLoss):
    """Cross entropy per token, optionally smoothed and with a penalty on the size of the logits.

    `loss = (1 - s) * (lse - x[target]) + s * (lse - mean(x)) + z * lse^2`, where `x` are the logits and
    `lse = logsumexp(x)`. Smoothing by `s` is that of `torch.nn.functional.cross_entropy` (Szegedy et al. 2016,
    arXiv:1512.00567); the term in `z` is the z-loss of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
    """

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        """Sets label smoothing and z-loss; both are off by default.

        Args:
            label_smoothing: the share of the target's probability that is spread over the vocabulary, from 0 to 1.
            z_loss: the coefficient of `logsumexp(logits)^2`; PaLM trained with 1e-4.

        Raises:
            UserError: a value is out of its range.
        """
        if not 0.0 <= label_smoothing <= 1.0:
            raise UserError(f"label_smoothing is a share from 0 to 1, not {label_smoothing}")
        if not 0.0 <= z_loss < float("inf"):
            raise UserError(f"z_loss is a coefficient of 0 or more, not {z_loss}")
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Maps float32 `logits` `[n, vocab]` and `targets` `[n]` to losses `[n]`."""
        mean = logits.mean(-1) if self.label_smoothing else None
        return self._losses(logits.logsumexp(-1), at_target(logits, targets), mean)

    def loss_and_gradient(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Computes losses and gradient in one pass, on a CPU in place. Overwrites `logits`.

        Optional for a token loss: without it, `token_loss_sum` gets the gradient from autograd.

        Args:
            logits: `[n, vocab]`, in the dtype of the head; in float32 (or float64) on a CPU and after a transform. On a
                CPU, these are a few rows of a chunk.
            targets: `[n]`.

        Returns:
            The losses `[n]` and the gradient of their sum with respect to the logits `[n, vocab]`, both float32
            (float64 for float64 logits).
        """
        smoothing = self.label_smoothing
        mean = logits.mean(-1, dtype=full_precision(logits.dtype)) if smoothing else None
        target_logits = at_target(logits, targets).to(full_precision(logits.dtype))
        gradient, lse = _softmax(logits, targets, target_logits)
        losses = self._losses(lse, target_logits, mean)
        if self.z_loss:
            gradient.mul_((1 + 2 * self.z_loss * lse).unsqueeze(-1))
        if smoothing:
            gradient.sub_(smoothing / logits.shape[-1])
        gradient.scatter_add_(-1, targets.unsqueeze(-1), gradient.new_full((len(targets), 1), smoothing - 1))
        return losses, gradient

    def of_part(self, logits: Tensor, targets: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor, Tensor]:
        """Computes losses, hits and gradient from some columns of the logits. Overwrites `logits`.

        Args:
            logits: `[n, columns]`, of this rank.
            targets: `[n]`.
            vocabulary: Which columns these are.

        Returns:
            The losses `[n]`, whether each target has the largest logit `[n]`, and the gradient of the sum of the losses
            for the logits of this rank `[n, columns]`.
        """
        smoothing = self.label_smoothing
        logits = logits.to(full_precision(logits.dtype))
        number = vocabulary.total(logits.new_tensor(logits.shape[-1])) if smoothing else None
        mean = None if number is None else vocabulary.total(logits.sum(-1)) / number
        target_logits = vocabulary.at_target(logits, targets)
        top = vocabulary.largest(logits.amax(-1))
        total = vocabulary.total(logits.sub_(top.unsqueeze(-1)).exp_().sum(-1))
        lse = top + total.log()
        gradient = logits.div_(total.unsqueeze(-1))
        if self.z_loss:
            gradient.mul_((1 + 2 * self.z_loss * lse).unsqueeze(-1))
        if number is not None:
            gradient.sub_(smoothing / number)
        vocabulary.add_at_target(gradient, targets, torch.full_like(lse, smoothing - 1))
        return self._losses(lse, target_logits, mean), target_logits >= top, gradient

    def _losses(self, lse: Tensor, target_logits: Tensor, mean: Tensor | None) -> Tensor:
        losses = lse - target_logits
        if mean is not None:
            losses = torch.lerp(losses, lse - mean, self.label_smoothing)
        return losses + self.z_loss * lse.square() if self.z_loss else losses


def is_cross_entropy(loss: TokenLoss) -> bool:
    """Whether a loss is plain cross entropy, which is the negative log-likelihood and the default of other engines."""
    return type(loss) is CrossEntropy and loss.label_smoothing == loss.z_loss == 0


class TokenLossOutput(NamedTuple):
    """The sum of a batch's token losses, and counts for the metrics."""

    loss_sum: Tensor
    """Scalar, float32 (float64 if the head computes in it), differentiable."""
    target_tokens: Tensor
    """Scalar, int64: how many tokens were summed."""
    correct: Tensor
    """Scalar, int64: how many targets had the largest logit; a tie counts as one."""
    metrics: Sums
    """Sums of the loss's own metrics (`TokenLoss.metrics`) over the targets, scalars."""


def token_loss_sum(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    token_loss: TokenLoss,
    *,
    weights: Tensor | None = None,
    transform: Transform | None = None,
    chunk_size: int | None = None,
) -> TokenLossOutput:
    """Sums a token loss over the logits `head(hidden)`, without ever holding all of them.

    The gradients are computed chunk by chunk in the forward pass and scaled in the backward pass, so the loss is called
    once per token. Exceptions are heads with backward hooks, which have to see the scaled gradients; heads that are
    sharded separately, whose weights are gathered again for the backward pass; and heads that compute with trained
    tensors besides their own parameters. They run under activation checkpointing, which calls the loss again in the
    backward pass, since the gradients of all logits are not kept. With gradients disabled only losses are computed.
    Matrix products run in autocast's dtype where it is active, in that of `hidden` elsewhere; losses and sums over
    tokens are float32 (float64 in a float64 model).

    Under `create_graph=True`, the backward pass computes the gradients again from plain operations, chunk by chunk, so
    that they can be differentiated. Within transforms of `torch.func` and forward-mode AD, plain operations are used
    throughout, and all logits are kept.

    Args:
        hidden: `[n, hidden]`, only the positions that carry a loss. `n` may be 0: then the sum is 0 and the gradients
            are zeros, so that every rank of a distributed run uses the same parameters.
        targets: `[n]` int64, each a token id.
        head: maps `[n, hidden]` to logits `[n, vocab]`.
        token_loss: called with float32 logits. If it is an `nn.Module`, its parameters get gradients.
        weights: `[n]`, factors on the losses and metrics; None if all are 1.
        transform: applied to the float32 logits before the loss.
        chunk_size: rows of logits alive at a time; None chooses by vocabulary and device.

    Raises:
        UserError: `chunk_size` is not positive.
    """
    _check(hidden, targets)
    task = LossTask(targets, transform, chunk_size, torch.is_grad_enabled(), token_loss, weights)
    tensors = _tensors_of(head, hidden)
    # of a part of the vocabulary, only the loss of this package can be computed; others need all logits
    if tensors is not None and (tensors.vocabulary is ALL or type(token_loss) is CrossEntropy):
        task = replace(task, vocabulary=tensors.vocabulary)
        loss_sum, correct = LinearTokenLoss.apply(hidden, tensors.weight, tensors.bias, task, *task.parameters)
    else:
        loss_sum, correct = _sum_of_any_head(hidden, head, task, chunks(len(targets), _vocab(head), hidden, chunk_size))
    if not len(targets):  # so that the names are those of every other batch
        task.metrics.clear()
        task.measure(hidden.new_zeros(0, _vocab(head), dtype=full_precision(hidden.dtype)), targets, None)
    # a copy, since activation checkpointing calls the loss again
    return TokenLossOutput(loss_sum, torch.tensor(len(targets), device=hidden.device), correct, dict(task.metrics))


def _tensors_of(head: nn.Module, hidden: Tensor) -> LocalHead | None:
    """Weight and bias of a plain linear head, or this rank's part of them; None if the head has to be called."""
    if is_transformed(hidden, head):
        return None
    if is_plain_linear(head, hidden):
        return LocalHead(cast("Tensor", head.weight), cast("Tensor | None", head.bias), ALL)
    return divided_head(head, hidden)


def _sum_of_any_head(hidden: Tensor, head: nn.Module, task: LossTask, rows: list[slice]) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and the count of targets with the largest logit."""
    if _is_whole(head) and not is_transformed(hidden, head):
        trained = [p for p in head.parameters() if p.requires_grad]
        with contextlib.suppress(OtherInputsError):
            loss_sum, correct = TokenLossOfHead.apply(hidden, head, task, rows, *trained, *task.parameters)
            return loss_sum, correct
    weights = task.weights
    losses, hits = _by_chunks(_loss_of_chunk(task, head), hidden, task.targets, head, task.chunk_size, weights=weights)
    return (losses if weights is None else losses * weights).sum(), hits.sum()


def token_losses(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    token_loss: TokenLoss,
    *,
    transform: Transform | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Computes the loss of each target, `[n]`, for losses that weigh tokens after seeing all of them.

    Logits are recomputed in the backward pass, which calls the loss again. Arguments and dtypes are as for
    `token_loss_sum`.
    """
    _check(hidden, targets)
    task = LossTask(targets, transform, chunk_size, torch.is_grad_enabled(), token_loss)
    return _by_chunks(_loss_of_chunk(task, head), hidden, targets, head, chunk_size)[0]


def _loss_of_chunk(task: LossTask, head: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    def of_chunk(states: Tensor, wanted: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
        logits = transformed(call_head(head, states), task.transform)
        task.measure(logits, wanted, weights)
        return checked_losses(task.token_loss, logits, wanted), is_largest(logits, wanted)

    return of_chunk


def token_logps(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    *,
    transform: Transform | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Computes the log-probability of each target, for losses that weigh tokens after seeing all of them.

    On a CPU the softmax of the first 128 MB of logits is kept for the backward pass. The rest is recomputed, with four
    matrix products in all where `token_loss_sum` needs three. Arguments, dtypes, the case of `n = 0` and errors are
    as for `token_loss_sum`.

    Returns:
        `[n]`, float32 (float64 in a float64 model).
    """
    _check(hidden, targets)
    if (tensors := _tensors_of(head, hidden)) is not None:
        task = Task(targets, transform, chunk_size, torch.is_grad_enabled(), vocabulary=tensors.vocabulary)
        return LinearLogps.apply(hidden, tensors.weight, tensors.bias, task)

    def of_chunk(states: Tensor, wanted: Tensor, _: None) -> tuple[Tensor, ...]:
        logits = transformed(call_head(head, states), transform)
        return (at_target(logits, wanted) - logits.logsumexp(-1),)

    return _by_chunks(of_chunk, hidden, targets, head, chunk_size)[0]


def _by_chunks(
    of_chunk: Callable[..., tuple[Tensor, ...]],
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    chunk_size: int | None,
    *,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Runs `of_chunk` over rows under activation checkpointing and joins each of its outputs, `[n]`."""
    n = len(targets)
    if n == 0:  # one row of zeros, so that the head is part of the graph on every rank
        weights = None
        hidden, targets = torch.cat([hidden, hidden.new_zeros(1, hidden.shape[1])]), targets.new_zeros(1)
    # torch.func has no saved tensor hooks, by which checkpointing works
    options = {"use_reentrant": False}
    run: Any = _called if is_transformed(hidden, head) else checkpoint
    outputs = [
        run(of_chunk, hidden[rows], targets[rows], None if weights is None else weights[rows], **options)
        for rows in chunks(len(targets), _vocab(head), hidden, chunk_size)
    ]
    return [torch.cat(column)[:n] for column in zip(*outputs, strict=True)]


def _called(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return function(*args)


def _is_whole(head: nn.Module) -> bool:
    """Whether the parameters of a head can be differentiated with respect to, while the loss is computed.

    Not so if it is sharded separately, since it is gathered in hooks of its own; and its hooks of the backward pass
    would see gradients before they are scaled.
    """
    hooks = [(m._backward_hooks, m._backward_pre_hooks) for m in head.modules()]
    return not any(any(of) for of in hooks) and not any(isinstance(p, DTensor) for p in head.parameters())


def _vocab(head: nn.Module) -> int:
    """The size of the vocabulary, to choose a chunk size; a large guess if the head does not say."""
    return int(getattr(head, "out_features", 0)) or 2**17


def _softmax(logits: Tensor, targets: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns softmax `[n, vocab]` and logsumexp `[n]` in full precision. May overwrite `logits`."""
    full = full_precision(logits.dtype)
    if device_of(logits).is_in_place:
        logits = logits.to(full)
        top = logits.amax(-1, keepdim=True)
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        return logits.div_(total), (top + total.log()).squeeze(-1)
    logps = F.log_softmax(logits, -1, dtype=full)
    lse = target_logits - at_target(logps, targets)
    return logps.exp_(), lse


def _check(hidden: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden is [n, hidden] and targets [n]: got {list(hidden.shape)} and {list(targets.shape)}")
