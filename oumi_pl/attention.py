"""Packed documents kept apart in the attention of transformers' models.

A packed batch is one row of documents, one after the other. `register` teaches transformers the attention
implementation `"documents"`; a model loaded with it and called within `packed(document_lengths)` attends within each
document as if it were alone, without a mask of the row's length squared. Outside of `packed` (padded batches,
generation with a cache) it does what transformers' `"sdpa"` does.

How it works: transformers asks for a mask once per forward pass and hands what it gets to every layer. Ours is no
tensor but a `Documents`, which says where documents begin and end. Because it travels as an argument, activation
checkpointing finds it again when it recomputes a layer in the backward pass, where `packed` is no longer in force.

Shapes: `seq` tokens of the row, `docs` documents, `heads`, `dim` of a head.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from oumi_pl.errors import UserError

NAME = "documents"
"""The attention implementation to load a model with, once `register` was called."""
_NO_PACKING = "turn packing off"
_lengths: ContextVar[Sequence[int] | None] = ContextVar("document_lengths", default=None)


@dataclass(frozen=True)
class Documents:
    """Stands where transformers' models expect a mask, and tells the attention function where documents lie.

    starts: `[docs + 1]`, from 0 to `seq`. window: the width of the window or chunk that a layer of this kind looks at,
    None if at everything. masks: per document, None where attention is plainly causal, else `[1, 1, length, length]`
    bool, True where a query may look. cumulative: `starts` as int32 on the model's device.
    """

    starts: tuple[int, ...]
    window: int | None
    masks: tuple[Tensor | None, ...]
    cumulative: Tensor

    @property
    def longest(self) -> int:
        """Length of the longest document."""
        return max(end - start for start, end in pairwise(self.starts))


def register() -> None:
    """Makes the attention implementation `"documents"` known to transformers. Call it before a model is loaded."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


@contextmanager
def packed(document_lengths: Sequence[int] | None) -> Iterator[None]:
    """Says that forward passes within it are of one packed row. None changes nothing, so that padded batches may pass.

    The model is called with `input_ids` `[1, seq]`, `position_ids` that start at 0 in each document, `use_cache=False`
    and no attention mask. The backward pass may run outside.

    Args:
        document_lengths: `[docs]`, in tokens, summing to `seq`.
    """
    token = _lengths.set(document_lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Tensor | Documents | None:
    """Makes what `attend` reads as its mask; registered in transformers' `AttentionMaskInterface`.

    Args:
        batch_size: rows.
        q_length: tokens that ask.
        kv_length: tokens that answer, more than `q_length` where there is a cache.
        mask_function: transformers' rule, from indices of row, head, query and key to whether the key is seen.
        attention_mask: `[batch, kv]`, True where a token is; must be None for packed rows.
        local_size: width of the window or chunk of a layer that looks at neighbours only.
        use_vmap: the rule is more than transformers' own.
        device: the model's.
        settings: the rest of what transformers passes on.

    Raises:
        ValueError: within `packed`, called with anything but one row of the packed documents.
    """
    from transformers.masking_utils import sdpa_mask

    rule: dict[str, Any] = {"mask_function": mask_function, "use_vmap": use_vmap, "device": device}
    lengths = _lengths.get()
    if lengths is None:
        settings |= rule | {"attention_mask": attention_mask, "local_size": local_size}
        return sdpa_mask(batch_size, q_length, kv_length, **settings)
    if batch_size != 1 or not sum(lengths) == q_length == kv_length or attention_mask is not None:
        raise ValueError(
            f"documents of {list(lengths)} tokens are a single row without cache and attention mask; the model was "
            f"called with {batch_size} row(s) of {q_length} queries and {kv_length} keys"
        )

    def mask(start: int, end: int) -> Tensor | None:
        size = end - start
        if not use_vmap and (local_size is None or size <= local_size):
            return None
        return sdpa_mask(1, size, size, q_offset=start, kv_offset=start, allow_is_causal_skip=False, **rule)

    starts = (0, *accumulate(lengths))
    cumulative = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
    window = None if use_vmap else local_size
    return Documents(starts, window, tuple(mask(*border) for border in pairwise(starts)), cumulative)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Documents | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attends within documents if `attention_mask` says where they lie; registered in `AttentionInterface`.

    Args:
        module: the attention layer.
        query: `[batch, heads, seq, dim]`.
        key: as `query`, possibly with fewer heads.
        value: as `key`.
        attention_mask: what `make_mask` returned.
        settings: transformers' further arguments: `dropout`, `scaling`, `sliding_window`, ...

    Returns:
        `[batch, seq, heads, dim]`, and None for the attention weights.

    Raises:
        UserError: the model's attention has a term that scaled dot products don't have.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    documents = attention_mask if isinstance(attention_mask, Documents) else None
    _refuse_unknown_terms(module, settings, documents is not None)
    if documents is None:
        if _lengths.get() is not None:
            name = type(module).__name__
            raise UserError(
                f"{name} ignores transformers' mask functions: its documents can't be packed; {_NO_PACKING}"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)  # type: ignore[arg-type]
    if _varlen_fits(query, value, documents, settings):
        return _attend_varlen(query, key, value, documents, settings.get("scaling")), None
    # One call per document, shaped as if it were alone: the same kernels, the same rounding, no square of `seq`.
    pieces = []
    for (start, end), mask in zip(pairwise(documents.starts), documents.masks, strict=True):
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        pieces.append(sdpa_attention_forward(module, q, k, v, mask, **settings)[0])
    return torch.cat(pieces, dim=1), None


def refuse_unless_isolating(model: nn.Module) -> None:
    """Refuses a model that lets packed documents see each other, found out by trying.

    Runs two documents of a few random tokens alone, packed, and packed with the first one changed, and compares hidden
    states. Leaves the random number generators and each module's training mode as they were.

    Args:
        model: a transformers model, with or without PEFT's layers; run as it will be in training, unsharded.

    Raises:
        UserError: a document's hidden states depend on its neighbours.
    """
    base = _base_model(model)
    weight: Tensor = base.get_input_embeddings().weight
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    implementation = getattr(base.config, "_attn_implementation", None)
    modes = {module: module.training for module in model.modules()}
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(len(weight), (1, n), generator=generator).to(weight.device) for n in (7, 6))
    changed = (first + 1) % len(weight)
    devices = [weight.device] if weight.device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            alone = _hidden_states(base, first), _hidden_states(base, second)
            together = _hidden_states(base, first, second)
            beside_another = _hidden_states(base, changed, second)[:, first.shape[1] :]
    except TypeError as error:  # a forward method without position_ids has no way to tell documents apart
        raise UserError(f"{type(base).__name__} can't be packed ({error}); {_NO_PACKING}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    off = max(_distance(together, torch.cat(alone, 1)), _distance(beside_another, alone[1]))
    if not off <= tolerance:
        others = f"load it with attn_implementation: {NAME!r} or 'flash_attention_2', or "
        remedy = ("" if implementation == NAME else others) + _NO_PACKING
        raise UserError(
            f"{type(base).__name__} with attn_implementation {implementation!r} lets packed documents see each other: "
            f"the hidden states of a document changed by {off:.1e} (relative) beside another one; {remedy}"
        )


def _base_model(model: nn.Module) -> Any:
    unwrap = getattr(model, "get_base_model", None)  # PEFT's
    model = unwrap() if callable(unwrap) else model
    return getattr(model, "base_model", model)


def _hidden_states(base: Any, *documents: Tensor) -> Tensor:
    """Runs documents `[1, length]` packed and returns the last hidden states, `[1, seq, hidden]`."""
    ids = torch.cat(documents, 1)
    lengths = [document.shape[1] for document in documents]
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])[None]
    with packed(lengths):
        output = base(input_ids=ids, position_ids=positions, use_cache=False)
    if not hasattr(output, "last_hidden_state"):
        raise UserError(f"{type(base).__name__} returns no hidden states: its documents can't be packed; {_NO_PACKING}")
    return output.last_hidden_state


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm())


def _refuse_unknown_terms(module: nn.Module, settings: dict[str, Any], is_packed: bool) -> None:
    """Refuses what scaled dot products would ignore, and for packed rows what is laid out for a whole row."""
    # transformers' own function ignores sinks, and knows how to apply the other terms to whole rows.
    terms = {"s_aux": "attention sinks", "softcap": "a soft cap on attention logits"}
    if is_packed:
        terms |= {"position_bias": "a position bias", "head_mask": "a head mask"}
    for argument, term in terms.items():
        if settings.get(argument) is not None:
            raise UserError(
                f"{type(module).__name__} has {term}, which attn_implementation {NAME!r} can't compute; "
                "load the model with attn_implementation: 'flash_attention_2' or 'eager'"
            )
    causal = settings.get("is_causal")
    if is_packed and not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UserError(f"{type(module).__name__} is not causal: its documents can't be packed; {_NO_PACKING}")


def _varlen_fits(query: Tensor, value: Tensor, documents: Documents, settings: dict[str, Any]) -> bool:
    """Tells whether one call of PyTorch's variable-length kernel computes the same attention."""
    plain = all(mask is None for mask in documents.masks)
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not settings.get("dropout")
        # A mask may also be that of a chunk; only for a window does the layer tell the width.
        and (plain or (documents.window is not None and documents.window == settings.get("sliding_window")))
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _varlen_parameters() >= {"window_size", "scale"}
    )


def _varlen_parameters() -> set[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return set()
    return set(inspect.signature(varlen_attn).parameters)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scale}
    if groups > 1 and "enable_gqa" in _varlen_parameters():
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # The kernel counts how many tokens to look back, transformers how many to look at.
    window, longest = documents.window, documents.longest
    options["window_size"] = (-1 if window is None or window >= longest else window - 1, 0)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [seq, heads, dim]
    borders = documents.cumulative
    output: Any = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
    return output.unsqueeze(0)
