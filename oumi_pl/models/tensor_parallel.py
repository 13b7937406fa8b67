"""Divides each layer over a group of ranks that read the same rows (tensor parallelism).

What is divided, and how, is transformers' own plan for the architecture. Weights are DTensors over the group, so that
FSDP2 divides them further, and norms, checkpoints and exports see one weight. Layers compute on this rank's parts as
plain tensors: attention has this rank's heads, and the ranks add up what they computed where the plan says so.

- `colwise`: a rank has some of the outputs of a linear layer. The gradient of its input is the sum over the ranks.
- `rowwise`: a rank has some of the inputs. The output is the sum over the ranks; a bias is added once, after it.
- The embedding and the output head are divided along the vocabulary (`oumi_pl.losses.vocabulary` computes losses so).
- Every other weight is whole on each rank, which computes its whole gradient, or that of its heads (`q_norm`).

The random generators of a group are the same, so dropout is the same on all ranks; within divided layers, heads and
features of different ranks share a mask.
"""

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from oumi_pl.errors import UserError

KEY = "trainer.strategy.tensor"
INSTEAD = "leave it out, and divide the weights over all devices (strategy: fsdp2)"


@dataclass(frozen=True)
class Share:
    """Which part of a divided dimension is this rank's."""

    index: int = 0
    number: int = 1

    def of(self, value: Tensor, dim: int | None) -> Tensor:
        """The part of a tensor, as torch divides it: the last parts may be empty. All of it if `dim` is None."""
        if dim is None or self.number == 1:
            return value
        parts = value.chunk(self.number, dim)
        return parts[self.index] if self.index < len(parts) else value.narrow(dim, 0, 0)


@dataclass(frozen=True)
class DataRanks:
    """The ranks of a run that read rows of their own. Those of a tensor group count as one: they read the same rows."""

    number: int
    index: int
    """Which of them this rank belongs to."""
    group: dist.ProcessGroup | None = None
    """One rank of each tensor group, this one among them: sums over rows are over these. None: all ranks."""

    def total(self, value: Tensor, strategy: Any) -> Tensor:
        """The sum of a tensor over the rows of all ranks, which have to call this."""
        return strategy.reduce(value, group=self.group, reduce_op="sum") if self.number > 1 else value


@dataclass(frozen=True)
class Style:
    """How a module is divided over a tensor group; by default not at all."""

    dim: int | None = None
    """The dimension along which its weight is divided: 0 for outputs or tokens, 1 for inputs."""
    splits_input: bool = False
    """Of a weight divided by inputs: whether the input is whole, so that the module takes its part."""
    gathers_output: bool = False
    """Of a weight divided by outputs: whether the output is put together."""
    sees_own_heads: bool = False
    """Of a weight that is whole: whether each rank applies it to different heads, so that the gradient is a sum."""


STYLES = {
    "colwise": Style(0),
    "colwise_gather_output": Style(0, gathers_output=True),
    "colwise_rep": Style(0, gathers_output=True),
    "embedding_rowwise": Style(0),
    "rowwise": Style(1),
    "rowwise_split_input": Style(1, splits_input=True),
    "rowwise_rep": Style(1, splits_input=True),
    "replicated_with_grad_allreduce": Style(sees_own_heads=True),
    "replicate": Style(),
}
"""transformers' names of the styles that can be trained here."""
WHOLE = Style()
VOCABULARY = Style(0, gathers_output=True)
"""Of the embedding and the output head. Called as a module, the head returns all logits."""


def refuse_undividable(config: Any, size: int) -> None:
    """Refuses a model that can't be divided, by its config: before any weight is loaded.

    Args:
        config: Of transformers.
        size: Ranks of a tensor group.

    Raises:
        UserError: transformers has no plan for it, or the size does not divide its heads.
    """
    text = config.get_text_config()
    if not text.base_model_tp_plan:
        raise UserError(f"{KEY}: transformers has no plan that divides the layers of {text.model_type}; {INSTEAD}")
    names = {"num_attention_heads": "attention heads", "num_key_value_heads": "key-value heads"}
    heads = {name: getattr(text, key) for key, name in names.items() if isinstance(getattr(text, key, None), int)}
    fitting = [n for n in range(2, max(heads.values(), default=1) + 1) if not any(h % n for h in heads.values())]
    for name, number in heads.items():
        if number % size:
            right = f"take one of {', '.join(map(str, fitting))}, or {INSTEAD}" if fitting else INSTEAD
            raise UserError(f"{KEY} is {size}, but has to divide the {number} {name} of {text.model_type}; {right}")


def styles_of(base: nn.Module, size: int, shards: int = 1) -> dict[nn.Module, Style]:
    """How each module of a model of transformers is divided, adapters of LoRA included; others are whole.

    Args:
        base: The model, without PEFT's wrapper.
        size: Ranks of a tensor group.
        shards: Ranks over which FSDP2 divides each part.

    Raises:
        UserError: a module can't be divided.
    """
    plan = cast("Any", base)._tp_plan or {}
    styles: dict[nn.Module, Style] = {}
    for name, module in base.named_modules():
        layer, adapter = _without_adapter(name)
        planned = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", layer))
        is_wrapper = hasattr(module, "base_layer")  # PEFT's, which holds the planned layer
        if planned is None or is_wrapper:
            continue
        if planned not in STYLES:
            raise UserError(f"{KEY}: {name} would be divided as {planned}, which can't be trained here; {INSTEAD}")
        style = STYLES[planned]
        # of an adapter, the matrix next to the divided side of its layer
        if adapter is None or style.dim == {"lora_A": 1, "lora_B": 0}[adapter]:
            styles[module] = style
    styles |= _styles_of_vocabulary(cast("Any", base), size)
    for name, module in base.named_modules():
        if (style := styles.get(module, WHOLE)).dim is not None and hasattr(module, "weight"):
            _refuse_other_layer(name, module, style, size, shards)
    return styles


def _styles_of_vocabulary(base: Any, size: int) -> dict[nn.Module, Style]:
    """How embedding and output head are divided: both by tokens or neither, since they may share a weight."""
    layers = [layer for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer is not None]
    # PEFT wraps a layer, beside an adapter or a copy that is trained
    parts = {module: name for layer in layers for name, module in layer.named_modules()}
    rows = [m for m, name in parts.items() if isinstance(m, nn.Linear | nn.Embedding) and "lora_A" not in name]
    is_divided = bool(rows) and all(len(m.weight) % size == 0 for m in rows)
    return dict.fromkeys(parts, WHOLE) | (dict.fromkeys(rows, VOCABULARY) if is_divided else {})


def _without_adapter(name: str) -> tuple[str, str | None]:
    """The name of a module without what PEFT adds, and `lora_A` or `lora_B` if it is one of these."""
    layer, adapter, _ = name.partition(".lora_A.")
    if adapter:
        return layer, "lora_A"
    layer, adapter, _ = name.partition(".lora_B.")
    if adapter:
        return layer, "lora_B"
    return name.removesuffix(".base_layer"), None


def _refuse_other_layer(name: str, module: nn.Module, style: Style, size: int, shards: int) -> None:
    weight = cast("Tensor", module.weight)
    if not isinstance(module, nn.Linear | nn.Embedding) or not weight.is_floating_point():
        raise UserError(f"{KEY}: {name} is a {type(module).__name__}, which can't be divided; {INSTEAD}")
    sizes = " x ".join(map(str, weight.shape))
    if weight.shape[cast("int", style.dim)] % size:
        raise UserError(f"{KEY} is {size}, but has to divide the weight of {name}, which is {sizes}; {INSTEAD}")
    if style.dim == 0 and weight.shape[1] % shards and weight.shape[0] // size % shards:
        raise UserError(
            f"trainer.strategy: shards {shards} x tensor {size} can't divide the weight of {name}, which is {sizes}; "
            "take fewer shards, and replicas"
        )


def checked_styles(base: Any, size: int, shards: int = 1) -> dict[nn.Module, Style]:
    """The styles of a model that is built, if it can be divided; see `styles_of`.

    Raises:
        UserError: it can't.
    """
    refuse_undividable(base.config, size)
    _refuse_other_adapters(base)
    return styles_of(base, size, shards)


def _refuse_other_adapters(model: nn.Module) -> None:
    """Refuses adapters that read the weights of other layers, which are divided.

    Raises:
        UserError: there is one, such as DoRA, or the rows of added tokens.
    """
    for name, module in model.named_modules():
        is_peft = type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer")
        if not is_peft:
            continue
        if type(module).__name__ != "Linear" or len(cast("Any", module).lora_magnitude_vector):
            raise UserError(
                f"{KEY}: the adapter of {name} can't be divided: plain LoRA of linear layers can, but not DoRA, nor "
                f"adapters of embeddings, rows of added tokens and experts; {INSTEAD}"
            )


@contextmanager
def noting_styles(size: int, shards: int) -> Iterator[dict[nn.Module, Style]]:
    """Yields the styles of all modules of transformers' models that are built within, before weights are loaded."""
    from transformers import PreTrainedModel

    styles: dict[nn.Module, Style] = {}
    if size == 1:  # nothing is divided, so nothing has to be refused
        yield styles
        return
    post_init = PreTrainedModel.post_init

    def noted(model: Any) -> None:
        post_init(model)
        styles.update(styles_of(model, size, shards))

    PreTrainedModel.post_init = noted  # type: ignore[method-assign]
    try:
        yield styles
    finally:
        PreTrainedModel.post_init = post_init  # type: ignore[method-assign]


def divided_dim(style: Style, name: str) -> int | None:
    """The dimension along which a parameter of a module is divided over the tensor group.

    Biases are whole: FSDP2 would have to divide the single dimension of a divided one again.
    """
    return style.dim if name == "weight" else None


def sharded_dim(divided: int | None, shape: torch.Size, shards: int) -> int:
    """The dimension along which FSDP2 divides a weight further.

    If the tensor group divides the rows, FSDP2 divides the columns. It can only divide them evenly, which the rank of
    an adapter may not allow; then it divides the rows again.
    """
    return 1 if divided == 0 and shape[1] % shards == 0 else 0


# ---- modules


def divide(model: nn.Module, styles: dict[nn.Module, Style], mesh: DeviceMesh) -> None:
    """Makes all parameters DTensors over a tensor group, and lets modules compute on this rank's parts.

    Args:
        model: Its parameters are on the meta device, or whole and equal on all ranks of the group.
        styles: See `styles_of`.
        mesh: The ranks of the group.
    """
    share = Share(mesh.get_local_rank(), mesh.size())
    divided: dict[int, nn.Parameter] = {}
    copies = _Copies(mesh.get_group())
    for module in model.modules():
        style = styles.get(module, WHOLE)
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in divided:
                dim = divided_dim(style, name)
                local = share.of(weight.detach(), dim).contiguous()
                placement = Replicate() if dim is None else Shard(dim)
                of_group = DTensor.from_local(local, mesh, [placement], run_check=False)
                divided[id(weight)] = nn.Parameter(of_group, weight.requires_grad)
            module._parameters[name] = divided[id(weight)]
        if any(weight is not None for weight in module._parameters.values()):
            cast("Any", module).forward = _forward_of(module, style)(module, style, share, copies)


class _Forward:
    """The `forward` of a module of a tensor group."""

    def __init__(self, module: nn.Module, style: Style, share: Share, copies: "_Copies") -> None:
        self.module, self.run, self.style, self.share, self.copies = module, module.forward, style, share, copies
        self.group = copies.group


class _Whole(_Forward):
    """Of a module that is whole on each rank.

    Plans name norms of single heads, whose gradients are terms of a sum, but not all such modules: activations with
    parameters, for example. So the ranks compare what they see when the module is first called.
    """

    def __init__(self, module: nn.Module, style: Style, share: Share, copies: "_Copies") -> None:
        super().__init__(module, style, share, copies)
        self.sees_own_heads: bool | None = style.sees_own_heads or None
        """Whether the ranks apply it to different inputs; None if that is not known yet."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.sees_own_heads is None:
            self.sees_own_heads = _differ((*args, *kwargs.values()), self.group)
        with _local_parameters(self.module, Partial() if self.sees_own_heads else Replicate()):
            return self.run(*args, **kwargs)


class _Columns(_Forward):
    """Of a linear layer that is divided by outputs."""

    def __call__(self, x: Tensor) -> Tensor:
        with _local_parameters(self.module, Partial()) as local:
            if "bias" in local:
                self.module._parameters["bias"] = cast("Any", self.share.of(local["bias"], 0))
            output = self.run(self.copies.of(x))
        return _Gathered.apply(output, self.share, self.group) if self.style.gathers_output else output


class _Rows(_Forward):
    """Of a linear layer that is divided by inputs."""

    def __call__(self, x: Tensor) -> Tensor:
        with _local_parameters(self.module, Replicate()) as local:
            if "bias" in local:
                self.module._parameters["bias"] = None
            output = self.run(_Split.apply(x, self.share, self.group) if self.style.splits_input else x)
        total = _Added.apply(output, self.group)
        return total + local["bias"].to(total.dtype) if "bias" in local else total


class _Tokens(_Forward):
    """Of an embedding that is divided by tokens."""

    def __init__(self, module: Any, style: Style, share: Share, copies: "_Copies") -> None:
        super().__init__(module, style, share, copies)
        self.number = module.num_embeddings // share.number
        self.start = share.index * self.number
        if module.padding_idx is not None:  # of the whole table; this part may lack it
            own = module.padding_idx - self.start
            module.padding_idx = own if 0 <= own < self.number else None

    def __call__(self, ids: Tensor) -> Tensor:
        own = ids - self.start
        is_own = (own >= 0) & (own < self.number)
        with _local_parameters(self.module, Replicate()):
            vectors = self.run(own.where(is_own, 0))
        return _Added.apply(vectors.masked_fill(~is_own.unsqueeze(-1), 0), self.group)


def _forward_of(module: nn.Module, style: Style) -> type[_Forward]:
    """The class of a module's `forward`."""
    if style.dim is None:
        return _Whole
    if isinstance(module, nn.Embedding):
        return _Tokens
    return _Columns if style.dim == 0 else _Rows


@torch.no_grad()
def _differ(inputs: tuple[Any, ...], group: dist.ProcessGroup) -> bool | None:
    """Whether the ranks of a group see different inputs of a module; None if none has a value but 0 yet."""
    tensors = [x.double() for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    if not tensors:  # tokens and positions are the same
        return False
    own = torch.stack([torch.stack([x.sum(), x.square().sum(), x.abs().sum()]) for x in tensors])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    if not any(values.any() for values in every):
        return None
    return any(not torch.allclose(values, every[0], rtol=1e-5) for values in every)


@contextmanager
def _local_parameters(module: nn.Module, of_whole: Placement) -> Iterator[dict[str, Tensor]]:
    """Puts this rank's parts in place of a module's parameters.

    Args:
        module: FSDP2 has gathered its parameters, if it divides them.
        of_whole: What a rank's gradient of a parameter that is whole is: `Replicate` for all of it, `Partial` for a
            term of it. FSDP2 adds up the terms.
    """
    before = {name: weight for name, weight in module._parameters.items() if isinstance(weight, DTensor)}
    local = {name: _local(cast("DTensor", weight), of_whole) for name, weight in before.items()}
    module._parameters.update(cast("Any", local))
    try:
        yield local
    finally:
        module._parameters.update(before)


def _local(weight: DTensor, of_whole: Placement) -> Tensor:
    (placement,) = weight.placements
    return weight.to_local(grad_placements=[placement if isinstance(placement, Shard) else of_whole])


# ---- between the ranks of a group


def _sum(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _join(value: Tensor, number: int, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(number)]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts, -1)


class _Copies:
    """Whole tensors that go into divided layers. Layers with the same input share a copy, and the sum of its gradient.

    For queries, keys and values that is one sum instead of three.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._source: weakref.ref[Tensor] | None = None
        self._copy: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The copy of a tensor, the last one if that is of the same tensor."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        copy = self._copy
        if copy is None or self._source is None or self._source() is not x:
            copy = _Copied.apply(x, self.group)
            # the source first: dropping the last copy may free the last source, which is forgotten then
            self._source, self._copy = weakref.ref(x, self._forget), copy
        return copy

    def _forget(self, source: "weakref.ref[Tensor]") -> None:
        if source is self._source:
            self._source = self._copy = None


class _Copied(torch.autograd.Function):
    """A whole tensor that goes into a divided computation: its gradient is the sum of those of the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.detach()  # not a view, which would keep its source alive

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(gradient, ctx.group), None


class _Added(torch.autograd.Function):
    """The sum of the ranks' terms, whole on each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


class _Gathered(torch.autograd.Function):
    """The ranks' parts of the last dimension, put together; what follows is the same on all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share, group: dist.ProcessGroup) -> Tensor:
        ctx.share = share
        return _join(x, share.number, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.share.of(gradient, -1).contiguous(), None, None


class _Split(torch.autograd.Function):
    """The part of a rank along the last dimension of a tensor that is whole on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share, group: dist.ProcessGroup) -> Tensor:
        ctx.share, ctx.group = share, group
        return share.of(x, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _join(gradient, ctx.share.number, ctx.group), None, None
