"""How an output head is computed on each type of device."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """What is fast on a type of device, and how much memory a head may use for it."""

    chunk_elements: int
    """Logits alive at a time."""
    columns: int | None = None
    """Columns of the logits per matrix product; None for all."""
    block_elements: int | None = None
    """Logits per step of a softmax; None for a whole chunk."""
    kept_elements: int = 0
    """Entries of a softmax that are kept for the backward pass; the rest is recomputed."""
    row_multiple: int = 1
    """Chunks have a multiple of so many rows, but for the last one and those of a size that the user sets. Products in
    half precision get rows of zeros up to such a multiple."""
    is_in_place: bool = False
    """Whether a softmax overwrites the logits."""
    has_mixed_addmm: bool = False
    """Whether `addmm` adds a product in half precision to a sum in float32."""


CPU = Device(
    chunk_elements=2**24,  # 64 MB of float32; larger chunks ran no faster
    columns=2048,  # so that what a product reads and writes stays in a processor's cache
    block_elements=2**18,  # a softmax makes several passes over 1 MB of float32
    kept_elements=2**25,  # 128 MB of float32; recomputing a matrix product is expensive
    row_multiple=64,  # oneDNN compiles a kernel for each number of rows in half precision
    is_in_place=True,  # allocating costs more than another pass
)
GPU = Device(chunk_elements=2**26, has_mixed_addmm=True)
DEVICES = {"cpu": CPU, "cuda": GPU}
OTHER = replace(GPU, has_mixed_addmm=False)


def device_of(tensor: torch.Tensor) -> Device:
    """How a head is computed on the device of a tensor."""
    return DEVICES.get(tensor.device.type, OTHER)


def row_multiple(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Products in `dtype` get rows of zeros up to a multiple of this on the device of a tensor; 1 if they get none."""
    return device_of(tensor).row_multiple if dtype in (torch.bfloat16, torch.float16) else 1
