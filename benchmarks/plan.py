"""Compares the peak memory that `oumi_pl plan` predicts with the peak of real runs on the CPU. Needs a C compiler.

    python benchmarks/plan.py > benchmarks/results/plan_cpu.txt

A real run is `fit --dry_run`: it trains on the largest micro-batch of the data, in one process or in several with gloo.
What is measured is the peak of the bytes that torch's allocator for CPUs holds on rank 0 while it trains, in all
threads, beyond those before the model was built. `allocations.c` counts them in `posix_memalign` and `free`; neither
the planner nor torch takes part in that. `RSS` is the growth of the resident memory to its peak. It also has what
libraries allocate themselves (oneDNN, for products in bfloat16), code that is loaded, and pages that malloc keeps.
"""

import ctypes
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
OPTIMIZER = {"class_path": "AdamW", "init_args": {"lr": 1e-4}}
BYTES = {"class_path": "ByteTokenizer"}
SFT: dict[str, Any] = {
    "model": {"class_path": "SFT", "init_args": {"config": LLAMA, "optimizer": OPTIMIZER}},
    "data": {
        "class_path": "SFTData",
        "init_args": {
            "train": "bundled/instructions",
            "tokenizer": BYTES,
            "max_length": 256,
            "packing": True,
            "batch_size": 4,
        },
    },
    "trainer": {"max_steps": 3, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2, "accelerator": "cpu"},
}
DPO: dict[str, Any] = {
    "model": {"class_path": "DPO", "init_args": {"config": LLAMA, "optimizer": OPTIMIZER}},
    "data": {
        "class_path": "DPOData",
        "init_args": {"train": "bundled/preferences", "tokenizer": BYTES, "max_length": 256, "batch_size": 16},
    },
    "trainer": SFT["trainer"],
}
PRETRAIN: dict[str, Any] = {
    "model": {"class_path": "Pretrain", "init_args": {"config": LLAMA, "optimizer": OPTIMIZER}},
    "data": {
        "class_path": "PretrainData",
        "init_args": {"train": "bundled/shakespeare", "tokenizer": BYTES, "max_length": 256, "batch_size": 4},
    },
    "trainer": SFT["trainer"],
}
RECOMPUTATION = {"model": {"init_args": {"gradient_checkpointing": True}}}
EVERY_SECOND, SELECTIVE = (
    {"model": {"init_args": {"gradient_checkpointing": {"class_path": name}}}} for name in ("EveryNth", "Selective")
)
LORA = {"model": {"init_args": {"lora": {"r": 16}}}}
MIXED, HALF = ({"trainer": {"precision": precision}} for precision in ("bf16-mixed", "bf16-true"))
ONE_DOCUMENT = {"data": {"init_args": {"packing": False}}}


def merged(*trees: Any) -> Any:
    """Nested mappings, of which later ones win."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def sharded(ranks: int) -> dict[str, Any]:
    """The settings of FSDP2 over a number of ranks."""
    sizes = {"data_parallel_size": ranks, "tensor_parallel_size": 1}
    return {"trainer": {"strategy": {"class_path": "ModelParallelStrategy", "init_args": sizes}}}


def divided(shards: int) -> dict[str, Any]:
    """The settings of tensor parallelism over two ranks each."""
    heads = {"init_args": {"config": {"num_key_value_heads": 2}}}
    sizes = {"tensor": 2, "shards": shards}
    return {"model": heads, "trainer": {"strategy": {"class_path": "Sharded", "init_args": sizes}}}


CONFIGURATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "SFT, packed": (1, SFT),
    "SFT, rows of one document": (1, merged(SFT, ONE_DOCUMENT)),
    "SFT, packed, recomputation": (1, merged(SFT, RECOMPUTATION)),
    "SFT, packed, LoRA, bf16-mixed": (1, merged(SFT, LORA, MIXED)),
    "DPO": (1, DPO),
    "pretraining, bf16-true": (1, merged(PRETRAIN, HALF)),
    "SFT, packed, DDP": (2, SFT),
    "SFT, packed, FSDP2": (2, merged(SFT, sharded(2))),
    "SFT, packed, recomputation, bf16-mixed, FSDP2": (2, merged(SFT, RECOMPUTATION, MIXED, sharded(2))),
    "DPO, LoRA, FSDP2": (2, merged(DPO, LORA, sharded(2))),
    "pretraining, FSDP2": (2, merged(PRETRAIN, sharded(2))),
    "SFT, packed, FSDP2 ": (4, merged(SFT, sharded(4))),
    "SFT, packed, tensor parallelism": (2, merged(SFT, divided(1))),
    "DPO, recomputation, tensor parallelism": (2, merged(DPO, RECOMPUTATION, divided(1))),
    "SFT, packed, FSDP2 x tensor parallelism": (4, merged(SFT, divided(2))),
    "SFT, packed, every second layer, FSDP2": (2, merged(SFT, EVERY_SECOND, sharded(2))),
    "SFT, packed, selective, FSDP2": (2, merged(SFT, SELECTIVE, sharded(2))),
    "SFT, packed, LoRA, FSDP2": (4, merged(SFT, LORA, sharded(4))),
    "DPO, FSDP2": (4, merged(DPO, sharded(4))),
    "pretraining, recomputation, bf16-mixed, FSDP2": (4, merged(PRETRAIN, RECOMPUTATION, MIXED, sharded(4))),
}
"""Name -> number of processes, and recipe."""


# ---- in a process of its own


def planned(recipes: Sequence[Path], ranks: Sequence[int]) -> list[dict[str, float]]:
    """Bytes and seconds of plans."""
    from oumi_pl.planning.update import Settings, estimate

    plans = []
    for recipe, count in zip(recipes, ranks, strict=True):
        began = time.process_time()
        result = estimate(Settings((recipe,), (), count, real_rows=True, on_gpu=False))
        plans.append({"peak": result.total, "seconds": time.process_time() - began})
    return plans


def resident(name: str) -> int:
    """A size in `/proc/self/status`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured(recipe: Path, ranks: int) -> dict[str, float]:
    """Bytes at the peak of a real run."""
    import lightning as L

    from oumi_pl.callbacks import dry_run as module
    from oumi_pl.config import files
    from oumi_pl.config.cli import CLI

    module.SECONDS = 0.0  # two updates are enough
    counter = ctypes.CDLL(None)  # of `LD_PRELOAD`
    counter.allocations_peak.restype = counter.allocations_in_use.restype = ctypes.c_int64

    class Begin(L.Callback):
        """Begins to measure before the first micro-batch."""

        def on_train_start(self, *_: Any) -> None:
            counter.allocations_reset_peak()
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident memory

    class Run(CLI):
        """Runs a `fit` as a dry run."""

        def _run_subcommand(self, subcommand: str) -> None:
            trainer: Any = self.trainer
            trainer.callbacks.append(Begin())
            before, resident_before = counter.allocations_in_use(), resident("VmRSS")
            module.dry_run(trainer, self.model, self.datamodule)
            self.peak = counter.allocations_peak() - before
            self.resident = resident("VmHWM") - resident_before

    run = Run(["fit", "--config", str(recipe), "--trainer.devices", str(ranks)], trees=[files.check(recipe)])
    return {"peak": run.peak, "rss": run.resident}


# ---- the table


def in_processes(command: Sequence[Any], folder: Path, ranks: int, environment: Mapping[str, str] = {}) -> Any:
    """Runs this file in one process or in several ranks; returns what rank 0 prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(ranks):
        env = dict(os.environ, OMP_NUM_THREADS="1", **environment)
        if ranks > 1:
            sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
            env |= sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "MASTER_ADDR": "localhost"}
            env |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "benchmark", "TORCHELASTIC_RESTART_COUNT": "0"}
        call = [sys.executable, __file__, *map(str, command)]
        started.append(subprocess.Popen(call, env=env, cwd=folder, text=True, stdout=-1, stderr=-1))
    outputs = [process.communicate() for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{command}:\n" + "\n".join(error for _, error in outputs))
    return json.loads(outputs[0][0].splitlines()[-1])


def main() -> None:
    """Prints the table."""
    import torch
    import yaml
    from contenders import processor

    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores of {processor()}")
    print("MB at the peak of rank 0, planned on fake tensors and measured in a real run; seconds of a core per plan\n")
    print(f"{'':46}{'ranks':>5} {'planned':>8} {'measured':>8} {'error':>7} {'RSS':>6} {'plan':>6}")
    wanted = {k: v for k, v in CONFIGURATIONS.items() if not sys.argv[1:] or any(part in k for part in sys.argv[1:])}
    errors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counter, source = folder / "allocations.so", Path(__file__).with_name("allocations.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", counter, source, "-ldl", "-lpthread"], check=True)
        recipes, counts = [], [ranks for ranks, _ in wanted.values()]
        for i, (_, tree) in enumerate(wanted.values()):
            recipes.append(folder / f"{i}.yaml")
            recipes[-1].write_text(yaml.safe_dump({"seed_everything": 1} | tree))
        plans = in_processes(["planned", *recipes, *counts], folder, 1)
        for name, recipe, ranks, plan in zip(wanted, recipes, counts, plans, strict=True):
            run = in_processes(["measured", recipe, ranks], folder, ranks, {"LD_PRELOAD": str(counter)})
            errors.append(plan["peak"] / run["peak"] - 1)
            sizes = f"{plan['peak'] / 1e6:8.1f} {run['peak'] / 1e6:8.1f} {errors[-1]:+7.1%} {run['rss'] / 1e6:6.0f}"
            print(f"{name.strip():46}{ranks:5} {sizes} {plan['seconds']:4.1f} s", flush=True)
    print(f"\nlargest error {max(errors, key=abs):+.1%} over {len(errors)} configurations")


if __name__ == "__main__":
    kind, *rest = sys.argv[1:] or [""]
    if kind == "planned":
        half = len(rest) // 2
        print(json.dumps(planned([Path(recipe) for recipe in rest[:half]], [int(ranks) for ranks in rest[half:]])))
    elif kind == "measured":
        print(json.dumps(measured(Path(rest[0]), int(rest[1]))))
    else:
        main()
