"""Host memory and time to build a sharded model: each rank keeps its parts, or loads everything first.

    python benchmarks/building.py [--ranks 4] [--hidden 2048] [--layers 16] [--folder DIR]

Writes a random Llama as a model folder in bfloat16, to train in float32, then starts runs of `--ranks` processes on
the CPU with FSDP2 up to their first update: once as they are built now, and once as before (`every rank`: each loads
all weights, and keeps its shard). Memory is anonymous memory (RssAnon) of a process at its peak, less that before the
model is built; pages of files that are mapped belong to the system's cache, which ranks share. (Weights saved in the
dtype of training are mapped, so that `every rank` shares them, too.) `with checks` is the largest peak of a rank once
the model has run on a few tokens, for which embeddings and head are gathered, as in every update. Also without weights
on disk (`random`), where the first rank draws all of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from contenders import processor

CASES = ("parts", "every rank", "random", "random, every rank")


def anonymous_memory() -> float:
    """Of this process now, in 1e9 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1e9


class Peak(threading.Thread):
    """Samples memory every five milliseconds until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.begun, self.start_memory = time.perf_counter(), anonymous_memory()
        self.highest, self.is_stopped = 0.0, False

    def run(self) -> None:
        while not self.is_stopped:
            self.highest = max(self.highest, anonymous_memory())
            time.sleep(0.005)


def build(case: str, folder: Path, ranks: int) -> None:
    """Builds a model in this rank of a run, and writes what that took."""
    import lightning as L
    import torch

    import oumi_pl.modules.base as base
    from oumi_pl.data.sft import SFTData
    from oumi_pl.data.tokenizers import ByteTokenizer
    from oumi_pl.models.sharding import Loading, Sharded
    from oumi_pl.modules.sft import SFT

    torch.set_num_threads(1)
    if case.endswith("every rank"):
        base.loading_of = lambda *_: Loading()  # type: ignore[assignment]
    config = json.loads((folder / "model" / "config.json").read_text())
    source: dict = {"config": config} if case.startswith("random") else {"model": str(folder / "model")}

    class Measure(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            import transformers.models.llama.modeling_llama  # noqa: F401

            self.peak, shard = Peak(), base.shard
            self.peak.start()

            def measured(*args: Any, **kwargs: Any) -> Any:
                result = shard(*args, **kwargs)
                self.built = self.peak.highest - self.peak.start_memory
                self.seconds = time.perf_counter() - self.peak.begun
                return result

            base.shard = measured

        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.peak.is_stopped = True
            checked = self.peak.highest - self.peak.start_memory
            result = {"seconds": self.seconds, "peak": self.built, "checked": checked, "weights": weights_of(pl_module)}
            (folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))
            trainer.strategy.barrier()
            os._exit(0)  # an update would need gradients and activations

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * (2 * ranks)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SFTData(str(folder / "rows.jsonl"), tokenizer=ByteTokenizer(), max_length=64)
    L.seed_everything(0)
    L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=Sharded(process_group_backend="gloo"),
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[Measure()],
    ).fit(SFT(**source), data)


def weights_of(module) -> float:
    """Memory of this rank's parts of the weights, in 1e9 bytes."""
    from torch.distributed.tensor import DTensor

    local = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return sum(p.numel() * p.element_size() for p in local) / 1e9


def write_model(folder: Path, hidden: int, layers: int, vocabulary: int) -> float:
    """Writes a random Llama in several files, one tensor at a time; returns its billions of parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from oumi_pl.data.tokenizers import ByteTokenizer

    config = AutoConfig.for_model(
        "llama",
        **{"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers},
        **{"num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 256), "vocab_size": vocabulary},
    )
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    ByteTokenizer().build().save_pretrained(folder)
    index, total, groups = {}, 0, list(shapes)
    for number in range(0, len(groups), 20):
        file = f"model-{number:05d}.safetensors"
        part = {name: (torch.randn(shapes[name]) * 0.02).bfloat16() for name in groups[number : number + 20]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
        total += sum(value.numel() for value in part.values())
    content = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--folder", type=Path, help="where to write the model; a temporary folder if left out")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        build(args.case, args.folder, args.ranks)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        billions = write_model(folder / "model", args.hidden, args.layers, args.vocabulary)
        print(
            f"Llama of {billions:.2f}e9 parameters, saved in bfloat16, {4 * billions:.1f} GB in float32, "
            f"{args.ranks} processes; "
            f"{processor()}, {os.cpu_count()} cores, torch {version('torch')}, "
            f"transformers {version('transformers')}, lightning {version('lightning')}"
        )
        print(
            f"{'':24}{'peak GB, rank 0':>18}{'largest other':>16}{'all ranks':>12}{'a shard':>10}{'with checks':>14}"
            f"{'seconds':>10}"
        )
        for case in args.cases:
            command = [sys.executable, __file__, "--case", case, "--folder", str(folder), "--ranks", str(args.ranks)]
            environment = os.environ | {
                "OUMI_PL_CACHE": str(folder / "cache"),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            }
            for old in folder.glob("[0-9]*.json"):
                old.unlink()
            subprocess.run(command, check=True, env=environment, capture_output=True)
            results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(args.ranks)]
            peaks = [result["peak"] for result in results]
            print(
                f"{case:24}{peaks[0]:18.2f}{max(peaks[1:]):16.2f}{sum(peaks):12.2f}{results[0]['weights']:10.2f}"
                f"{max(result['checked'] for result in results):14.2f}{max(r['seconds'] for r in results):10.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
