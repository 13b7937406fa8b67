"""The attention implementation `"documents"`: the functions for masks and attention that transformers calls."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from oumi_pl.attention.segments import Block, Blocks, current_blocks
from oumi_pl.errors import UserError


def varlen_fits(query: Tensor, value: Tensor, blocks: Blocks, settings: dict[str, Any]) -> bool:
    """Whether one call of PyTorch's variable-length kernel computes the same attention."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not settings.get("dropout")
        # `window` may be the size of a chunk instead; only layers with a true window are called with `sliding_window`.
        and (blocks.causal or (blocks.window is not None and blocks.window == settings.get("sliding_window")))
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _parameters() >= {"window_size", "scale"}
    )


def _parameters() -> set[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return set()
    return set(inspect.signature(varlen_attn).parameters)


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float | None) -> Tensor:
    """Attends in one call and returns `[1, seq, heads, dim]`.

    The kernel aligns a block's last query with its last key. So a block that continues others needs no mask, and the
    window counts positions in its path.
    """
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scale}
    if groups > 1 and "enable_gqa" in _parameters():
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # The kernel's window excludes the query itself, transformers' includes it.
    longest_query, longest = max(b.length for b in blocks.blocks), max(b.keys for b in blocks.blocks)
    window = blocks.window
    options["window_size"] = (-1 if window is None or window >= longest else window - 1, 0)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [seq, heads, dim]
    if blocks.key_positions is not None:
        k, v = k[blocks.key_positions], v[blocks.key_positions]
    output: Any = varlen_attn(q, k, v, *blocks.cumulative, longest_query, longest, **options)
    return output.unsqueeze(0)


NAME = "documents"
"""Value of `attn_implementation` for models that are loaded after `register`."""
NO_PACKING = "set data.packing to false (data.isolate, of PretrainData)"


def register() -> None:
    """Adds the attention implementation `"documents"` to transformers. Call it before a model is loaded."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


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
) -> Tensor | Blocks | None:
    """Creates the mask argument of `attend`; registered in transformers' `AttentionMaskInterface`.

    Args:
        batch_size: rows.
        q_length: number of queries.
        kv_length: number of keys, more than `q_length` with a cache.
        mask_function: transformers' rule: (row, head, query, key) indices -> whether the query sees the key.
        attention_mask: `[batch, kv]`, True for tokens, False for padding; must be None for packed rows.
        local_size: width of the window or chunk of a layer with local attention.
        use_vmap: the model adds its own rule to the mask function.
        device: the model's.
        settings: transformers' further arguments.

    Raises:
        ValueError: within `packed`, called with anything but one row of the packed blocks.
        UserError: tokens are shared, and the mask is neither causal nor a causal window.
    """
    from transformers.masking_utils import sdpa_mask

    rule: dict[str, Any] = {"mask_function": mask_function, "use_vmap": use_vmap, "device": device}
    blocks = current_blocks.get()
    if blocks is None:
        settings |= rule | {"attention_mask": attention_mask, "local_size": local_size}
        return sdpa_mask(batch_size, q_length, kv_length, **settings)
    lengths = [block.length for block in blocks]
    if batch_size != 1 or not sum(lengths) == q_length == kv_length or attention_mask is not None:
        raise ValueError(
            f"blocks of {lengths} tokens are a single row without cache and attention mask; the model was "
            f"called with {batch_size} row(s) of {q_length} queries and {kv_length} keys"
        )
    if use_vmap and any(block.prefix for block in blocks):
        raise UserError("this model's attention uses a custom mask, which can't be applied to shared prompts")

    def mask_of(block: Block) -> Tensor | None:
        if block.prefix:
            return _continued(block, local_size, device)
        if not use_vmap and (local_size is None or block.length <= local_size):
            return None
        start, size = block.start, block.length
        return sdpa_mask(1, size, size, q_offset=start, kv_offset=start, allow_is_causal_skip=False, **rule)

    longest = max(block.keys for block in blocks)
    causal = not use_vmap and (local_size is None or longest <= local_size)
    return Blocks(blocks, causal, None if use_vmap else local_size, mask_of, device)


def _continued(block: Block, window: int | None, device: torch.device | str) -> Tensor:
    """The mask of a block that continues others, by positions in its path (transformers' rule uses those in the row).

    Returns:
        `[1, 1, length, keys]` bool, True where seen.
    """
    keys = torch.arange(block.keys, device=device)
    queries = keys[block.prefix :, None]
    seen = keys <= queries
    return (seen if window is None else seen & (keys > queries - window))[None, None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Blocks | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attends within the blocks of a packed row; registered in transformers' `AttentionInterface`.

    Args:
        module: the attention layer.
        query: `[batch, heads, seq, dim]`.
        key: as `query`, possibly with fewer heads.
        value: as `key`.
        attention_mask: the return value of `make_mask`; anything but `Blocks` gives plain `sdpa` attention.
        settings: transformers' further arguments: `dropout`, `scaling`, `sliding_window`, ...

    Returns:
        `[batch, seq, heads, dim]`, and None for the attention weights.

    Raises:
        UserError: the attention has a term that scaled dot-product attention does not compute, or is not causal.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # neither a cache, nor a mask of numbers that has the dtype of the queries
    is_whole = query.shape[2] == key.shape[2] and not (
        isinstance(attention_mask, Tensor) and attention_mask.is_floating_point()
    )
    if is_whole and query.device.type == "cpu" and (dtype := _half_precision(query)):
        # torch's attention for CPUs takes longer in bfloat16 than in float32: 3 times as long in the backward pass
        with torch.autocast("cpu", enabled=False):
            output, _ = attend(module, query.float(), key.float(), value.float(), attention_mask, **settings)
        return output.to(dtype), None
    if isinstance(attention_mask, Blocks):
        return _attend_blocks(module, query, key, value, attention_mask, settings), None
    _refuse_unknown_terms(module, settings, None)
    # what is compiled was checked before, and would be interrupted by looking at the variable
    if not torch.compiler.is_compiling() and current_blocks.get() is not None:
        name = type(module).__name__
        raise UserError(f"{name} ignores transformers' mask functions: its documents can't be packed; {NO_PACKING}")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


# compiled layers call it as it is: compiled itself, it would be so again for every number and length of documents
@torch.compiler.disable
def _attend_blocks(  # noqa: PLR0917
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, settings: dict[str, Any]
) -> Tensor:
    """Attends within blocks; arguments and result are those of `attend`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _refuse_unknown_terms(module, settings, blocks)
    if dtype := _half_precision(query):
        # autocast casts for sdpa, but not for the varlen kernel; rotary positions left queries and keys in float32
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if varlen_fits(query, value, blocks, settings):
        return attend_varlen(query, key, value, blocks, settings.get("scaling"))
    # One call per block, with the shapes it would have alone: same kernels, same rounding (but for half precision on a
    # CPU, see `attend`), and no `seq x seq` mask.
    # Split, not sliced: the backward pass of each slice would allocate a gradient of the whole row.
    queries, keys, values = (x.split(blocks.lengths, dim=2) for x in (query, key, value))
    outputs = []
    for i, (block, mask) in enumerate(zip(blocks.blocks, blocks.masks, strict=True)):
        k, v = _along_path(keys, i, block), _along_path(values, i, block)
        outputs.append(sdpa_attention_forward(module, queries[i], k, v, mask, **settings)[0])
    return torch.cat(outputs, dim=1)


def _half_precision(query: Tensor) -> torch.dtype | None:
    """The dtype in which torch's attention would compute, if it has less than 32 bits."""
    device = query.device.type
    is_cast = torch.is_autocast_enabled(device) and query.dtype == torch.float32
    dtype = torch.get_autocast_dtype(device) if is_cast else query.dtype
    return dtype if dtype.itemsize < 4 else None


def _along_path(own: tuple[Tensor, ...], index: int, block: Block) -> Tensor:
    """Keys or values along a block's path, `[batch, heads, keys, dim]`, from the `own` ones of each block."""
    if not block.earlier:
        return own[index]
    return torch.cat([*(own[i][:, :, :length] for i, length in block.earlier), own[index]], dim=2)


def _refuse_unknown_terms(module: nn.Module, settings: dict[str, Any], blocks: Blocks | None) -> None:
    """Refuses terms that `sdpa` would ignore and, for packed rows, terms that are shaped for the whole row."""
    # transformers' sdpa function ignores the first two; it applies the other two, but only to whole rows
    terms = {"s_aux": "attention sinks", "softcap": "a soft cap on attention logits"}
    if blocks is not None:
        terms |= {"position_bias": "a position bias", "head_mask": "a head mask"}
    for argument, term in terms.items():
        if settings.get(argument) is not None:
            raise UserError(
                f"{type(module).__name__} has {term}, which attn_implementation {NAME!r} can't compute; "
                "load the model with attn_implementation: 'flash_attention_2' or 'eager'"
            )
    causal = settings.get("is_causal")
    if blocks is not None and not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UserError(f"{type(module).__name__} is not causal: its documents can't be packed; {NO_PACKING}")
    # See `varlen_fits`: a width without `sliding_window` is the size of a chunk.
    if blocks is not None and blocks.continued and blocks.window not in (None, settings.get("sliding_window")):
        raise UserError(f"{type(module).__name__} attends in chunks, which is not supported for shared prompts")
