"""A linear output head, one chunk of rows at a time: logits and gradients.

Shapes: `n` tokens, `hidden` the width of the model, `vocab`, `rows` the size of a chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from oumi_pl.errors import UserError
from oumi_pl.types import TokenLoss

Transform = Callable[[Tensor], Tensor]
"""Maps float32 logits `[n, vocab]` element by element to the final ones: a soft cap, a scale."""

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""Logits alive at a time, per type of device: 64 MB of float32 on a CPU, where larger chunks ran no faster."""
MIN_ROWS = 128
"""Smallest chunk, however large the vocabulary: each chunk reads the head's weight and its gradient once."""
_ROW_ALIGNMENT = 64  # elements; see `LinearHead.logits`


def chunks(n: int, vocab: int, device: torch.device, chunk_size: int | None) -> list[slice]:
    """Cuts `n` rows into equal chunks of at most `chunk_size`, or of a size that suits `vocab` and `device`.

    Raises:
        UserError: `chunk_size` is not positive.
    """
    if chunk_size is None:
        chunk_size = max(MIN_ROWS, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocab)
    if chunk_size < 1:
        raise UserError(f"chunk_size is a number of rows, at least 1, not {chunk_size}")
    count = -(-n // chunk_size)
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of losses and sums for logits of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_plain_linear(head: nn.Module, hidden: Tensor) -> bool:
    """Whether `head` is only a matrix product and a bias, whose tensors can be read directly.

    False for subclasses (LoRA, quantised, FSDP), hooks, parametrisations, and sharded or offloaded weights.
    """
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.device == hidden.device
        and head.weight.is_floating_point()
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )


@dataclass(frozen=True)
class Task:
    """The arguments of an autograd function of the head that get no gradient."""

    targets: Tensor
    """`[n]` int64."""
    transform: Transform | None
    chunk_size: int | None
    with_gradients: bool
    """Whether a backward pass will follow."""


@dataclass(frozen=True)
class LossTask(Task):
    """The same, for a loss."""

    token_loss: TokenLoss
    weights: Tensor | None = None
    """`[n]`, factors on the losses; None if all are 1."""


class LinearHead:
    """Hidden states and an output head, both cast to the dtype of the matrix products.

    Each call of `logits` overwrites what the last one returned, unless `keep` was called in between.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        """Casts `hidden` `[n, hidden]`, `weight` `[vocab, hidden]` and `bias` `[vocab]` to `dtype`.

        None is autocast's dtype if it is active, else that of `hidden`.
        """
        self.dtype = dtype or _compute_dtype(hidden)
        self.hidden = hidden.detach().to(self.dtype)
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.vocab = len(weight)
        self._buffer: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        """Computes the logits `[rows, vocab]` of a slice of the hidden states."""
        states = self.hidden[rows]
        if self._buffer is None or len(self._buffer) < len(states):
            # One buffer, because allocating memory pages costs more than a softmax. Rows begin at aligned addresses:
            # with an odd vocabulary the product took 1.5 times longer otherwise (float32, MKL).
            width = -(-self.vocab // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
            self._buffer = torch.empty(len(states) + 1, width, dtype=self.dtype, device=states.device)
        out = self._buffer[: len(states), : self.vocab]
        torch.mm(states, self.weight.t(), out=out)
        return out if self.bias is None else out.add_(self.bias)

    def keep(self) -> None:
        """Gives the last returned logits to the caller: the next call allocates a new buffer."""
        self._buffer = None


class HeadGradients:
    """Gradients of a sum over tokens for hidden states, weight and bias, accumulated chunk by chunk.

    `tensors` holds the three; None for one that is not needed. Those of the head are summed in full precision: rounding
    chunks to bfloat16 before adding them would bias the sum.
    """

    def __init__(self, head: LinearHead, needed: Sequence[bool]) -> None:
        """Takes the head, and whether each of hidden states, weight and bias needs a gradient."""
        self._head = head
        full = full_precision(head.dtype)
        self._hidden = torch.empty_like(head.hidden) if needed[0] else None
        self._weight = torch.zeros_like(head.weight, dtype=full) if needed[1] else None
        self._bias = torch.zeros_like(head.weight[:, 0], dtype=full) if needed[2] else None

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden states `[n, hidden]`, weight `[vocab, hidden]` and bias `[vocab]`."""
        return self._hidden, self._weight, self._bias

    def add(self, rows: slice, by_logits: Tensor) -> None:
        """Adds a chunk, given the gradient of its logits, `[rows, vocab]` in full precision."""
        low = by_logits.to(self._head.dtype)
        states = self._head.hidden[rows]
        if self._hidden is not None:
            torch.mm(low, self._head.weight, out=self._hidden[rows])
        if self._bias is not None:
            self._bias += by_logits.sum(0)
        if self._weight is None:
            return
        if self._weight.is_cuda and low.dtype != self._weight.dtype:
            torch.addmm(self._weight, low.t(), states, out_dtype=self._weight.dtype, out=self._weight)
        else:
            self._weight.addmm_(by_logits.t(), states.to(by_logits.dtype))


class LinearTokenLoss(torch.autograd.Function):
    """Loss sum of a linear head. The forward pass computes the gradients too, up to the upstream factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: LossTask) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses and the count of targets whose logit is the largest, both scalars."""
        head, targets = LinearHead(hidden, weight, bias), task.targets
        needed = ctx.needs_input_grad[:3]
        gradients = HeadGradients(head, needed) if task.with_gradients and any(needed) else None
        losses = torch.empty(len(hidden), dtype=full_precision(head.dtype), device=hidden.device)
        hits = torch.empty_like(losses, dtype=torch.bool)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks(len(hidden), head.vocab, hidden.device, task.chunk_size):
                logits = head.logits(rows)
                if gradients is None:
                    logits = transformed(logits, task.transform)
                    losses[rows] = checked_losses(task.token_loss, logits, targets[rows])
                    hits[rows] = is_largest(logits, targets[rows])
                else:
                    losses[rows], hits[rows], gradient = _with_gradient(task, logits, targets[rows])
                    if task.weights is not None:
                        gradient = gradient * task.weights[rows].to(gradient.dtype).unsqueeze(-1)
                    gradients.add(rows, gradient)
        if task.weights is not None:
            losses *= task.weights
        if gradients is not None:
            ctx.save_for_backward(*gradients.tensors)
            ctx.dtypes = [t if t is None else t.dtype for t in (hidden, weight, bias)]
        correct = hits.sum()
        ctx.mark_non_differentiable(correct)
        return losses.sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scales what the forward pass computed."""
        # In place unless the graph is kept for another pass: a second tensor of the weight's size would raise the peak.
        scale = Tensor.mul if graph_is_kept() else Tensor.mul_
        scaled = [
            None if gradient is None else scale(gradient, upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None


def transformed(logits: Tensor, transform: Transform | None) -> Tensor:
    """Applies `transform` to logits in full precision."""
    logits = logits.to(full_precision(logits.dtype))
    return logits if transform is None else transform(logits)


def at_target(logits: Tensor, targets: Tensor) -> Tensor:
    """Picks each target's entry, `[n]`."""
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def is_largest(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each target has the largest logit, `[n]` bool."""
    logits = logits.detach()
    return at_target(logits, targets) >= logits.amax(-1)


def checked_losses(token_loss: TokenLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """Calls `token_loss`.

    Raises:
        UserError: it returned anything but one loss per token.
    """
    losses = token_loss(logits, targets)
    if losses.shape != targets.shape:
        raise UserError(
            f"{type(token_loss).__name__} returned a tensor of shape {list(losses.shape)} for {len(targets)} tokens; "
            "a token loss returns one loss per token, neither summed nor averaged"
        )
    return losses


def _with_gradient(task: LossTask, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the losses `[n]`, whether each target has the largest logit `[n]`, and the gradient of `logits`."""
    quick = _quick_method(task.token_loss)
    if quick and task.transform is None:
        hits = is_largest(logits, targets)
        losses, gradient = quick(logits, targets)
        return losses, hits, gradient
    leaf, last = leaf_and_logits(logits, task.transform)
    hits = is_largest(last, targets)
    if quick:
        losses, gradient = quick(last.detach().clone(), targets)
    else:
        inputs = last.detach().requires_grad_()
        with torch.enable_grad():
            losses = checked_losses(task.token_loss, inputs, targets)
        (gradient,) = torch.autograd.grad(losses, inputs, torch.ones_like(losses))
    return losses.detach(), hits, to_leaf(leaf, last, gradient)


def _quick_method(token_loss: TokenLoss) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Finds `loss_and_gradient`, unless a subclass overrides only the loss, for which it would be wrong."""
    for cls in type(token_loss).__mro__:
        if "loss_and_gradient" in vars(cls):
            return token_loss.loss_and_gradient  # type: ignore[attr-defined]
        if "__call__" in vars(cls) or "forward" in vars(cls):
            return None
    return None


def leaf_and_logits(logits: Tensor, transform: Transform | None) -> tuple[Tensor, Tensor]:
    """Returns logits in full precision before and after `transform`, connected by a graph if there is one."""
    leaf = logits.to(full_precision(logits.dtype))
    if transform is None:
        return leaf, leaf
    leaf = leaf.detach().requires_grad_()
    with torch.enable_grad():
        return leaf, transform(leaf)


def to_leaf(leaf: Tensor, last: Tensor, gradient: Tensor) -> Tensor:
    """Backpropagates a gradient from the last logits to the first."""
    return gradient if last is leaf else torch.autograd.grad(last, leaf, gradient)[0]


def graph_is_kept() -> bool:
    """Whether the running backward pass retains the graph; True if this version of torch can't say."""
    # private in torch, hence the fallback: True only costs memory
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    # autocast does not cast float64 either
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype
