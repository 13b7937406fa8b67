"""PyTorch's attention kernel for rows of variable length, on GPUs."""

import inspect
from typing import Any

import torch
from torch import Tensor

from oumi_pl.attention.blocks import Blocks


def varlen_fits(query: Tensor, value: Tensor, blocks: Blocks, settings: dict[str, Any]) -> bool:
    """Tells whether one call of PyTorch's variable-length kernel computes the same attention."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not settings.get("dropout")
        # A mask may also be that of a chunk; only for a window does the layer tell the width.
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

    The kernel aligns the last query of a block with its last key, so that a block that continues others needs no mask,
    and its window goes by positions in its path.
    """
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scale}
    if groups > 1 and "enable_gqa" in _parameters():
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # The kernel counts how many tokens to look back, transformers how many to look at.
    longest_query, longest = max(b.length for b in blocks.blocks), max(b.keys for b in blocks.blocks)
    window = blocks.window
    options["window_size"] = (-1 if window is None or window >= longest else window - 1, 0)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [seq, heads, dim]
    if blocks.key_positions is not None:
        k, v = k[blocks.key_positions], v[blocks.key_positions]
    output: Any = varlen_attn(q, k, v, *blocks.cumulative, longest_query, longest, **options)
    return output.unsqueeze(0)
