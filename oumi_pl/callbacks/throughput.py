"""Logs tokens per second, MFU, padding and peak memory of each update."""

import resource
import sys
import time
from typing import Any

import lightning as L
import torch

from oumi_pl.models.lm import LM
from oumi_pl.types import RunModule

# Dense bf16 tensor-core peaks in TFLOP/s, from the vendors' data sheets, without sparsity. The first name that occurs
# in the device's name is taken, so more specific names come first.
PEAK_TFLOPS = {
    "GB300": 2500,
    "GB200": 2500,
    "B300": 2250,
    "B200": 2250,
    "B100": 1750,
    "GH200": 989,
    "H200 NVL": 836,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
    "MI355X": 2300,
    "MI325X": 1307,
    "MI300X": 1307,
    "MI250X": 383,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a device; None if it is not a GPU in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)


def flops_per_token(model: LM) -> float:
    """Model FLOPs per token, forward and backward, without recomputation and attention scores.

    Per parameter 2 forward, 2 for the gradients of activations, and 2 for its own gradient if it is trainable (Kaplan
    et al. 2020, arXiv:2001.08361). Embedding rows are looked up, not multiplied: they count only if tied to the head.
    """
    embedding, head = model.base.get_input_embeddings().weight, model.base.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embedding
    counted = [p for p in model.parameters() if tied or p is not embedding]
    return 4.0 * sum(p.numel() for p in counted) + 2.0 * sum(p.numel() for p in counted if p.requires_grad)


class Throughput(L.Callback):
    """Logs speed, padding and memory of updates from the module's counts, which are sums over all ranks."""

    def __init__(self) -> None:
        self._last = 0.0
        self._flops_per_token: float | None = None
        self._peak: float | None = None

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Starts the clock."""
        self._peak = peak_flops(pl_module.device)
        if self._peak is not None:
            self._flops_per_token = flops_per_token(pl_module.causal_lm)
        self._last = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Restarts the clock: the time of validation does not count."""
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Logs the update that has just ended."""
        if trainer.fit_loop._should_accumulate():
            return
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        counts = pl_module.last_update
        metrics = {
            "train/tokens_per_second": counts["tokens"] / seconds,
            "train/padding": 1 - counts["tokens"] / max(1, counts["positions"]),
            "train/peak_memory_gb": peak_memory(pl_module.device) / 1e9,
        }
        if pl_module.unit == "rows":
            metrics["train/rows_per_second"] = counts["rows"] / seconds
        if self._peak is not None and self._flops_per_token is not None:
            flops = counts["tokens"] * self._flops_per_token / seconds
            metrics["train/mfu"] = flops / (self._peak * trainer.world_size)
        pl_module.log_dict(metrics, batch_size=1)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated on a CUDA device, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes
