"""The loss of a language model's head, five ways: time of a forward and backward pass, and the memory it adds.

    python benchmarks/causal_loss.py --tokens 4096 --hidden 512 --vocab 50257 --threads 1

Every way runs in a process of its own. Time is the best of `--repeats` passes after a warm-up, on the wall and, since
machines may be shared, on the processor; memory is the peak during them minus what the process held before (resident
memory on a CPU, allocated memory on CUDA).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from contenders import processor
from torch import Tensor, nn

Way = Callable[[Tensor, Tensor, nn.Linear], Tensor]


def full_logits(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def ours(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    from oumi_pl.losses.causal import CrossEntropy, token_loss_sum

    return token_loss_sum(hidden, targets, head, CrossEntropy()).loss_sum


def ours_logps(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    from oumi_pl.losses.causal import token_logps

    return -token_logps(hidden, targets, head).sum()


def trl(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # As its trainer for supervised fine-tuning calls it, less the entropy, which the others don't compute either.
    arguments = hidden, head.weight, head.bias, targets, 1.0, TRL_CHUNK, None, 1.0, ("is_top1",)
    return -ChunkedLogProbFunction.apply(*arguments)[0].sum()


def torch_default(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    return F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum")


def torch_chunked(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", options=options)


TRL_CHUNK = 8192
WAYS: dict[str, tuple[str, Way]] = {
    "ours": ("ours, token_loss_sum", ours),
    "ours_logps": ("ours, token_logps (recomputes)", ours_logps),
    "full": ("full logits, F.cross_entropy", full_logits),
    "trl": ("TRL, ChunkedLogProbFunction", trl),
    "torch": ("torch, linear_cross_entropy", torch_default),
    "torch_chunked": ("torch, linear_cross_entropy, chunked", torch_chunked),
}


def resident(peak: bool) -> float:
    """Returns this process's resident memory in MiB, now or at its peak."""
    field = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(way: str, args: argparse.Namespace) -> dict[str, float]:
    """Runs one way in this process and returns seconds, MiB and the loss it computed."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    head = nn.Linear(args.hidden, args.vocab, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(args.vocab, (args.tokens,), device=device)

    def once(n: int) -> tuple[float, float, float]:
        head.weight.grad = hidden.grad = None
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = WAYS[way][1](hidden[:n], targets[:n], head)
        loss.backward()
        value = loss.item()  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - start_cpu, value

    once(8)  # imports and libraries' own buffers are not the loss's memory
    head.weight.grad = hidden.grad = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = resident(peak=False)
    runs = [once(args.tokens) for _ in range(args.repeats + 1)][1:]
    after = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident(peak=True)
    seconds, cpu_seconds, losses = zip(*runs, strict=True)
    loss = losses[0] / args.tokens
    return {"seconds": min(seconds), "cpu": min(cpu_seconds), "mib": after - before, "loss": loss}


def hardware(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores, {args.threads} thread(s)"


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("hidden", 512), ("vocab", 50257), ("threads", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    print(f"{hardware(args)}; " + ", ".join(map(installed, ("torch", "trl", "transformers"))))
    print(f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocab}, {args.dtype}\n")
    print("| way | seconds | processor seconds | added MiB | loss per token |\n|---|---:|---:|---:|---:|")
    for way in args.ways:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {WAYS[way][0]} | {(done.stderr.strip().splitlines() or ['failed'])[-1]} | | | |")
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        cells = f"{row['seconds']:.2f} | {row['cpu']:.2f} | {row['mib']:.0f} | {row['loss']:.6f}"
        print(f"| {WAYS[way][0]} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
