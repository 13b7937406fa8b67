"""A linear output head, one chunk of rows at a time: logits and gradients.

Shapes: `n` tokens, `hidden` the width of the model, `vocab`, `rows` the size of a chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from oumi_pl.errors import UserError
from oumi_pl.losses.devices import device_of, row_multiple
from oumi_pl.losses.vocabulary import ALL, Vocabulary, has_hooks
from oumi_pl.types import Sums, TokenLoss

QuickMethod = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Losses and gradient of logits and targets: see `CrossEntropy.loss_and_gradient`."""
Transform = Callable[[Tensor], Tensor]
"""Maps float32 logits `[n, vocab]` element by element to the final ones: a soft cap, a scale."""

MIN_ROWS = 128
"""Smallest chunk, however large the vocabulary: each chunk reads the head's weight and its gradient once."""
COLUMN_MULTIPLE = 64
"""The buffer of logits has a multiple of so many columns; see `LinearHead.logits`."""


def chunks(n: int, vocab: int, like: Tensor, chunk_size: int | None) -> list[slice]:
    """Cuts `n` rows into chunks of `chunk_size` rows at most, or of what suits `vocab` and the device of `like`.

    Raises:
        UserError: `chunk_size` is not positive.
    """
    if chunk_size is None:
        device = device_of(like)
        multiple = device.row_multiple
        most = max(MIN_ROWS, device.chunk_elements // vocab // multiple * multiple)
        count = -(-n // most)
        size = min(most, -(-n // max(1, count) // multiple) * multiple)
        return [slice(begin, min(begin + size, n)) for begin in range(0, n, size or 1)]
    if chunk_size < 1:
        raise UserError(f"chunk_size is a number of rows, at least 1, not {chunk_size}")
    count = -(-n // chunk_size)
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


def pad_rows(matrix: Tensor, multiple: int) -> Tensor:
    """Appends rows of zeros to a matrix, up to a multiple; returns the same one if there is nothing to append."""
    more = -len(matrix) % multiple
    return torch.nn.functional.pad(matrix, (0, 0, 0, more)) if more else matrix


def call_head(head: nn.Module, states: Tensor) -> Tensor:
    """The logits `[n, vocab]` of a head that has to be called; it gets rows of zeros up to a multiple as well."""
    return head(pad_rows(states, row_multiple(states, compute_dtype(states))))[: len(states)]


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of losses and sums for logits of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_plain_linear(head: nn.Module, hidden: Tensor) -> bool:
    """Whether `head` is only a matrix product and a bias, whose tensors can be read directly.

    False for subclasses (LoRA, quantised, FSDP), hooks, parametrisations, and sharded or offloaded weights.
    """
    return (
        type(head) is nn.Linear
        and type(head.weight) in (nn.Parameter, FakeTensor)  # fake while a run is planned
        and head.weight.device == hidden.device
        and head.weight.is_floating_point()
        and not has_hooks(head)
    )


def is_transformed(hidden: Tensor, head: nn.Module) -> bool:
    """Whether forward-mode AD or a transform of `torch.func` is under way, which need plain operations of torch."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in (hidden, *head.parameters()))


@dataclass(frozen=True)
class Task:
    """What is computed from the logits: here the log-probabilities of targets.

    It holds the arguments of an autograd function of the head that get no gradient.
    """

    targets: Tensor
    """`[n]` int64."""
    transform: Transform | None
    chunk_size: int | None
    with_gradients: bool
    """Whether a backward pass will follow."""
    vocabulary: Vocabulary = field(default=ALL, kw_only=True)
    """Which columns of the logits this rank computes."""

    has_parameters = False
    """Whether the values depend on trained parameters besides the logits."""

    def values(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A number per token, `[rows]`, from logits `[rows, vocab]` as the head gives them."""
        logits = transformed(logits, self.transform)
        return at_target(logits, targets) - logits.logsumexp(-1)


@dataclass(frozen=True)
class LossTask(Task):
    """What is computed from the logits: a loss of each target, to be summed."""

    token_loss: TokenLoss
    weights: Tensor | None = None
    """`[n]`, factors on the losses and metrics; None if all are 1."""
    metrics: Sums = field(default_factory=dict)
    """Sums of the metrics of the loss over the chunks so far."""

    def values(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The losses of tokens, `[rows]`, from logits `[rows, vocab]` as the head gives them."""
        return checked_losses(self.token_loss, transformed(logits, self.transform), targets)

    def weights_of(self, rows: slice) -> Tensor | None:
        """The factors of a chunk, `[rows]`."""
        return None if self.weights is None else self.weights[rows]

    @property
    def has_parameters(self) -> bool:  # type: ignore[override]
        """Whether something of the loss itself is trained."""
        return bool(self.parameters)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained of the loss itself."""
        loss = self.token_loss
        return tuple(p for p in loss.parameters() if p.requires_grad) if isinstance(loss, nn.Module) else ()

    @torch.no_grad()
    def measure(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> None:
        """Adds the metrics of the loss for a chunk, from logits `[rows, vocab]`."""
        if not isinstance(self.token_loss, TokenLoss) or type(self.token_loss).metrics is TokenLoss.metrics:
            return
        logits = logits.to(full_precision(logits.dtype))
        for name, values in self.token_loss.metrics(logits.detach(), targets).items():
            if values.shape != targets.shape:
                raise UserError(
                    f"model.loss: the metric {name} of {type(self.token_loss).__name__} has shape "
                    f"{list(values.shape)} for {len(targets)} tokens; a metric has one value per token"
                )
            weighed = values if weights is None else values * weights
            self.metrics[name] = self.metrics.get(name, 0) + weighed.sum(dtype=full_precision(logits.dtype))


class LinearHead:
    """Hidden states and an output head, both cast to the dtype of the matrix products.

    Each call of `logits` overwrites what the last one returned, unless `keep` was called in between.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        """Casts `hidden` `[n, hidden]`, `weight` `[vocab, hidden]` and `bias` `[vocab]` to `dtype`.

        None is autocast's dtype if it is active, else that of `hidden`.
        """
        self.dtype = dtype or compute_dtype(hidden)
        self.hidden = hidden.detach().to(self.dtype)
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.vocab = len(weight)
        self.multiple = row_multiple(hidden, self.dtype)
        """Products are computed for a multiple of so many rows."""
        self._buffer: Tensor | None = None

    def states(self, rows: slice) -> Tensor:
        """A slice of the hidden states, with rows of zeros up to a multiple of `multiple`."""
        return pad_rows(self.hidden[rows], self.multiple)

    def logits(self, rows: slice) -> Tensor:
        """Computes the logits `[rows, vocab]` of a slice of the hidden states."""
        states = self.states(rows)
        if self._buffer is None or len(self._buffer) < len(states):
            # One buffer, because allocating memory pages costs more than a softmax. Rows begin at aligned addresses:
            # with an odd vocabulary the product took 1.5 times longer otherwise (float32, MKL).
            # One row more, since chunks of a size that the user sets may differ by one.
            width = -(-self.vocab // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
            self._buffer = torch.empty(len(states) + 1, width, dtype=self.dtype, device=states.device)
        out = self._buffer[: len(states), : self.vocab]
        for columns in self.columns():
            torch.mm(states, self.weight[columns].t(), out=out[:, columns])
        out = out[: rows.stop - rows.start]
        return out if self.bias is None else out.add_(self.bias)

    def columns(self) -> list[slice]:
        """The columns of each matrix product with the weight."""
        width = device_of(self.weight).columns or self.vocab
        return [slice(begin, begin + width) for begin in range(0, self.vocab, width)]

    def keep(self) -> None:
        """Gives the last returned logits to the caller: the next call allocates a new buffer."""
        self._buffer = None


class HeadGradients:
    """Gradients of a sum over tokens for hidden states, weight and bias, accumulated chunk by chunk.

    `tensors` holds the three; None for one that is not needed. Those of the head are summed in full precision: a sum
    in bfloat16 would lose what later chunks add.
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

    def add_over(self, vocabulary: Vocabulary) -> None:
        """Adds up what the columns of all ranks give for the hidden states, after the last chunk."""
        if self._hidden is not None:
            self._hidden = vocabulary.total(self._hidden)

    def add(self, rows: slice, by_logits: Tensor) -> None:
        """Adds a chunk, given the gradient of its logits, `[rows, vocab]`."""
        low = by_logits.to(self._head.dtype)
        states = self._head.states(rows)
        if self._bias is not None:
            self._bias += by_logits.sum(0, dtype=self._bias.dtype)
        if self._head.multiple > 1:
            self._add_rounded(rows, low, states)
            return
        if self._hidden is not None:
            torch.mm(low, self._head.weight, out=self._hidden[rows])
        if self._weight is None:
            return
        if device_of(low).has_mixed_addmm and low.dtype != self._weight.dtype:
            torch.addmm(self._weight, low.t(), states, out_dtype=self._weight.dtype, out=self._weight)
        else:
            self._weight.addmm_(by_logits.t(), states.to(by_logits.dtype))

    def _add_rounded(self, rows: slice, low: Tensor, states: Tensor) -> None:
        """Adds a chunk in half precision on a CPU, whose products have no float32 result.

        The product of a chunk is rounded to half precision once, as the only product of a batch would be, and added in
        float32: for the weight as a whole, for the hidden states those of each block of columns.
        """
        of_states = torch.zeros_like(states, dtype=full_precision(low.dtype))
        for columns in self._head.columns():
            part = pad_rows(low[:, columns], self._head.multiple)
            if self._hidden is not None:
                of_states += part @ self._head.weight[columns]
            if self._weight is not None:
                self._weight[columns] += part.t() @ states
        if self._hidden is not None:
            self._hidden[rows] = of_states[: len(low)]


class LinearTokenLoss(torch.autograd.Function):
    """Loss sum of a linear head. The forward pass computes the gradients too, up to the upstream factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: LossTask, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses and the count of targets whose logit is the largest, both scalars.

        `parameters` are those of the loss.
        """
        head = LinearHead(hidden, weight, bias)
        with_gradients = task.with_gradients and any(ctx.needs_input_grad)
        gradients = HeadGradients(head, ctx.needs_input_grad[:3]) if with_gradients else None
        of_loss = [torch.zeros_like(parameter) for parameter in parameters]
        losses = torch.empty(len(hidden), dtype=full_precision(head.dtype), device=hidden.device)
        hits = torch.empty_like(losses, dtype=torch.bool)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks(len(hidden), head.vocab, hidden, task.chunk_size):
                logits = head.logits(rows)
                if gradients is None:
                    losses[rows], hits[rows] = without_gradient(task, logits, rows)
                else:
                    losses[rows], hits[rows], gradient = with_gradient(task, logits, rows, of_loss)
                    gradients.add(rows, gradient)
        if task.weights is not None:
            losses *= task.weights
        if gradients is not None:
            gradients.add_over(task.vocabulary)
            ctx.save_for_backward(*gradients.tensors, hidden, weight, bias, *of_loss, *parameters)
            ctx.task, ctx.dtype = task, head.dtype
        correct = hits.sum()
        ctx.mark_non_differentiable(correct)
        return losses.sum(), correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scales what the forward pass computed; under `create_graph`, computes it again so that it has a graph."""
        gradients, inputs, others = ctx.saved_tensors[:3], ctx.saved_tensors[3:6], ctx.saved_tensors[6:]
        of_loss, parameters = others[: len(others) // 2], others[len(others) // 2 :]
        if torch.is_grad_enabled():
            weights = _factors(ctx.task, upstream)
            results = gradients_with_graph(ctx.task, weights, inputs, parameters, dtype=ctx.dtype)
            return *results[:3], None, *results[3:]
        with torch.no_grad():
            # In place unless the graph is kept for another pass: a second tensor of the weight's size would raise the
            # peak.
            scale = Tensor.mul if graph_is_kept() else Tensor.mul_
            scaled = [
                None if gradient is None else scale(gradient, upstream).to(of.dtype)
                for gradient, of in zip((*gradients, *of_loss), (*inputs, *parameters), strict=True)
            ]
        return *scaled[:3], None, *scaled[3:]


class TokenLossOfHead(torch.autograd.Function):
    """Loss sum of any head (LoRA, quantised, with forward hooks), by calling it. Gradients as in `LinearTokenLoss`.

    Raises `OtherInputsError`, before the loss is called, if the head computes with other trained tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Module, task: LossTask, rows: list[slice], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses and the count of targets whose logit is the largest, both scalars.

        `parameters` are the trained ones of the head, then those of the loss.
        """
        ctx.head, ctx.task, ctx.rows, ctx.full = head, task, rows, full_precision(hidden.dtype)
        with_gradients = task.with_gradients and any(ctx.needs_input_grad)
        own = parameters[: len(parameters) - len(task.parameters)]
        of_hidden = torch.zeros_like(hidden)
        of_head = [torch.zeros_like(p, dtype=full_precision(p.dtype)) for p in own]
        of_loss = [torch.zeros_like(p) for p in task.parameters]
        losses, hits = [], []
        for chunk in rows:
            states = hidden[chunk].detach().requires_grad_(with_gradients)
            with torch.set_grad_enabled(with_gradients):
                logits = call_head(head, states)
            if not with_gradients:
                loss, hit = without_gradient(task, logits, chunk)
            else:
                if chunk is rows[0]:
                    refuse_other_inputs(logits, (states, *own))
                # a copy, since the gradient is computed in place
                loss, hit, gradient = with_gradient(task, logits.detach().clone(), chunk, of_loss)
                of_hidden[chunk] = _add_gradients(logits, gradient.to(logits.dtype), states, own, of_head)
            losses.append(loss)
            hits.append(hit)
        if with_gradients:
            ctx.save_for_backward(of_hidden, *of_head, *of_loss, hidden, *parameters)
        correct = torch.cat(hits).sum() if hits else torch.zeros((), dtype=torch.long, device=hidden.device)
        ctx.mark_non_differentiable(correct)
        if not losses:
            return hidden.new_zeros((), dtype=ctx.full), correct
        joined = torch.cat(losses)
        return (joined if task.weights is None else joined * task.weights).sum(), correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """See `LinearTokenLoss`."""
        half = len(ctx.saved_tensors) // 2
        gradients, (hidden, *parameters) = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        if torch.is_grad_enabled():
            weights = _factors(ctx.task, upstream)
            names = [name for name, p in ctx.head.named_parameters() if p.requires_grad]

            def logits_of(states: Tensor, *values: Tensor) -> Tensor:
                # values beyond those of the head are the loss's
                own = dict(zip(names, values, strict=False))
                return torch.func.functional_call(ctx.head, own, (states,))

            of = Gradients(logits_of, ctx.task, ctx.rows)
            results = GradientsWithGraph.apply(of, weights, hidden, *parameters)
            return results[0], None, None, None, *results[1:]
        with torch.no_grad():
            scaled = [(g * upstream).to(t.dtype) for g, t in zip(gradients, (hidden, *parameters), strict=True)]
        return scaled[0], None, None, None, *scaled[1:]


class OtherInputsError(Exception):
    """A head computes with something trained that is neither its hidden states nor its own parameters."""


def refuse_other_inputs(logits: Tensor, inputs: Sequence[Tensor]) -> None:
    """Looks for leaves of a graph that are not among `inputs`, whose gradients would be lost.

    Hooks of a head may use any tensor, and so may a module of the user's.

    Raises:
        OtherInputsError: there is one.
    """
    known, seen = {id(tensor) for tensor in inputs}, set()
    nodes = [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of the nodes that accumulate gradients
        if leaf is not None and id(leaf) not in known:
            raise OtherInputsError
        nodes += [following for following, _ in node.next_functions]


def _add_gradients(
    logits: Tensor, gradient: Tensor, states: Tensor, parameters: Sequence[Tensor], sums: Sequence[Tensor]
) -> Tensor:
    """Adds the gradients of the parameters of a head to `sums`; returns that of the hidden states of a chunk."""
    of_states, *others = torch.autograd.grad(logits, [states, *parameters], gradient, allow_unused=True)
    for total, other in zip(sums, others, strict=True):
        if other is not None:
            total.add_(other)
    return of_states


@dataclass(frozen=True)
class Gradients:
    """How to compute the gradients of a weighted sum of values per token, a chunk at a time."""

    logits_of: Callable[..., Tensor]
    """Maps hidden states `[rows, hidden]` and the parameters to logits."""
    task: Task
    rows: list[slice]

    def of_chunk(self, rows: slice, weights: Tensor, states: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of a chunk for its hidden states and the parameters, with a graph."""
        values = self.task.values(self.logits_of(states, *parameters), self.task.targets[rows])
        inputs = [states, *parameters]
        # in two steps, since autograd refuses inputs that need no gradient
        asked = [tensor for tensor in inputs if tensor.requires_grad]
        results = iter(torch.autograd.grad((values * weights).sum(), asked, create_graph=True, allow_unused=True))
        gradients = [next(results) if tensor.requires_grad else None for tensor in inputs]
        return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, inputs, strict=True)]


class GradientsWithGraph(torch.autograd.Function):
    """The gradients of a weighted sum of values per token, which can be differentiated again, a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, of: Gradients, weights: Tensor, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of hidden states `[n, hidden]` and parameters, for weights `[n]`."""
        ctx.of = of
        ctx.save_for_backward(weights, hidden, *parameters)
        of_hidden = torch.zeros_like(hidden)
        sums = [torch.zeros_like(p) for p in parameters]
        for rows in of.rows:
            with torch.enable_grad():
                states = hidden[rows].detach().requires_grad_()
                of_hidden[rows], *others = (
                    g.detach() for g in of.of_chunk(rows, weights[rows].detach(), states, parameters)
                )
            for total, other in zip(sums, others, strict=True):
                total.add_(other)
        return of_hidden, *sums

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the product of the second derivatives and `directions`."""
        weights, hidden, *parameters = ctx.saved_tensors
        higher = torch.is_grad_enabled()
        if higher and ctx.of.task.has_parameters:
            raise UserError("derivatives above the second can't be taken of a loss with parameters: compute its logits")
        of_weights, of_hidden = [], []
        sums: list[Tensor] = [torch.zeros_like(p) for p in parameters]
        for rows in ctx.of.rows:
            with torch.enable_grad():
                # copies, so that only this chunk is differentiated; if there is a graph, they stay connected to it
                inputs = [t.view_as(t) if higher else t for t in (weights[rows], hidden[rows], *parameters)]
                if not higher:
                    inputs[:2] = [t.detach().requires_grad_() for t in inputs[:2]]
                asked = [t for t in inputs if t.requires_grad]
                gradients = ctx.of.of_chunk(rows, *inputs[:2], inputs[2:])
                along = [directions[0][rows], *directions[1:]]
                kept = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]  # not those of a constant
                results = iter(
                    torch.autograd.grad(
                        [gradients[i] for i in kept],
                        asked,
                        [along[i] for i in kept],
                        create_graph=higher,
                        allow_unused=True,
                    )
                )
            of_inputs = [next(results) if t.requires_grad else None for t in inputs]
            of_weight, of_states, *others = (
                torch.zeros_like(t) if g is None else g for g, t in zip(of_inputs, inputs, strict=True)
            )
            of_weights.append(of_weight)
            of_hidden.append(of_states)
            sums = [total + other for total, other in zip(sums, others, strict=True)]
        if not ctx.of.rows:
            return None, torch.zeros_like(weights), torch.zeros_like(hidden), *sums
        return None, torch.cat(of_weights), torch.cat(of_hidden), *sums


def gradients_with_graph(
    task: Task,
    weights: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    parameters: Sequence[Tensor] = (),
    *,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients of a linear head that can be differentiated again.

    Args:
        task: What is computed of each token.
        weights: `[n]`, of the tokens' values in the sum that is differentiated.
        inputs: Hidden states `[n, hidden]`, weight `[vocab, hidden]`, and bias `[vocab]` or None.
        parameters: Of the loss.
        dtype: Of the matrix products.

    Returns:
        Those of hidden states, weight, bias and parameters.
    """
    hidden, weight, bias = inputs
    if task.vocabulary is not ALL:
        raise UserError("trainer.strategy.tensor: gradients of gradients need all logits; train without tensor")

    def logits_of(states: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        own = None if bias is None else others[0].to(dtype)
        with torch.autocast(states.device.type, enabled=False):
            return torch.nn.functional.linear(states.to(dtype), weight.to(dtype), own)

    rows = chunks(len(hidden), len(weight), hidden, task.chunk_size)
    of_head = (weight,) if bias is None else (weight, bias)
    results = GradientsWithGraph.apply(Gradients(logits_of, task, rows), weights, hidden, *of_head, *parameters)
    return (*results[:2], None, *results[2:]) if bias is None else results


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


def without_gradient(task: LossTask, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Returns the losses `[n]` of a chunk, and whether each target has the largest logit `[n]`."""
    if task.vocabulary is not ALL:
        return _of_part(task, logits, rows)[:2]
    targets = task.targets[rows]
    logits = transformed(logits, task.transform)
    task.measure(logits, targets, task.weights_of(rows))
    return checked_losses(task.token_loss, logits, targets), is_largest(logits, targets)


def with_gradient(
    task: LossTask, logits: Tensor, rows: slice, of_loss: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the losses `[n]` of a chunk, whether each target has the largest logit, and the gradient of `logits`.

    The gradient is that of the weighted sum; the losses are without weights. Adds the gradients of the parameters of
    the loss to `of_loss`. May overwrite `logits`.
    """
    if task.vocabulary is not ALL:
        return _of_part(task, logits, rows)
    targets, weights = task.targets[rows], task.weights_of(rows)
    quick = None if of_loss else _quick_method(task.token_loss)
    if quick and task.transform is None and device_of(logits).block_elements:
        return _in_place(task, quick, logits, rows)
    leaf, last = (logits, logits) if quick and task.transform is None else leaf_and_logits(logits, task.transform)
    hits = is_largest(last, targets)
    task.measure(last, targets, weights)
    if quick:
        losses, gradient = quick(last if last is logits else last.detach().clone(), targets)
        if weights is not None:
            gradient = gradient * weights.to(gradient.dtype).unsqueeze(-1)
        return losses.detach(), hits, to_leaf(leaf, last, gradient)
    inputs = last.detach().requires_grad_()
    with torch.enable_grad():
        losses = checked_losses(task.token_loss, inputs, targets)
    factors = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    gradient, *others = torch.autograd.grad(losses, [inputs, *task.parameters], factors, allow_unused=True)
    for total, other in zip(of_loss, others, strict=True):
        if other is not None:
            total.add_(other)
    if gradient is None:  # a loss of the targets alone
        gradient = torch.zeros_like(inputs)
    return losses.detach(), hits, to_leaf(leaf, last, gradient)


def _in_place(task: LossTask, quick: QuickMethod, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """What `with_gradient` returns, by a few rows at a time; the gradient overwrites the logits, in their dtype."""
    losses = torch.empty(len(logits), dtype=full_precision(logits.dtype))
    hits = torch.empty(len(logits), dtype=torch.bool)
    height = max(1, (device_of(logits).block_elements or logits.numel()) // logits.shape[1])
    begins = range(0, len(logits), height)
    for begin in begins[:1] if isinstance(logits, FakeTensor) else begins:  # a plan needs the memory of one block
        own = slice(begin, begin + height)
        block = logits[own]
        of_all = slice(rows.start + begin, min(rows.start + begin + height, rows.stop))
        targets, weights = task.targets[of_all], task.weights_of(of_all)
        last = block.to(losses.dtype)
        hits[own] = is_largest(last, targets)
        task.measure(last, targets, weights)
        values, gradient = quick(last, targets)
        losses[own] = values.detach()
        if weights is not None:
            gradient = gradient * weights.to(gradient.dtype).unsqueeze(-1)
        if gradient is not block:
            block.copy_(gradient)
    return losses, hits, logits


def _of_part(task: LossTask, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """What `with_gradient` returns, from the columns of this rank, for losses that have a method `of_part`."""
    leaf, last = (logits, logits) if task.transform is None else leaf_and_logits(logits, task.transform)
    values = last if last is logits else last.detach().clone()
    losses, hits, gradient = cast("Any", task.token_loss).of_part(values, task.targets[rows], task.vocabulary)
    if (weights := task.weights_of(rows)) is not None:
        gradient = gradient * weights.to(gradient.dtype).unsqueeze(-1)
    return losses, hits, to_leaf(leaf, last, gradient)


def _factors(task: LossTask, upstream: Tensor) -> Tensor:
    """The factor of each token's loss in the result of a backward pass, `[n]`."""
    return upstream.expand(len(task.targets)) if task.weights is None else upstream * task.weights


def _quick_method(token_loss: TokenLoss) -> QuickMethod | None:
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


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Returns the dtype of matrix products with a tensor: autocast's if it is active, else that of the tensor."""
    device = hidden.device.type
    # autocast does not cast float64 either
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype
