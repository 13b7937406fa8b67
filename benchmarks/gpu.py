"""Speed, MFU and peak memory on one GPU, beside what `oumi_pl plan` predicts, and DPO against TRL; one table.

    python benchmarks/gpu.py > benchmarks/results/gpu.txt
    python benchmarks/gpu.py --small        the same with tiny models, to try the script on a CPU

The models are random Llamas of the shapes 1b and 8b with 128,256 tokens in bfloat16, the rows random words. Each case
is a `fit` of the command line in a process of its own. Numbers are medians over the updates after the first three, as
the run logs them. Memory is the peak that torch allocated; on a CPU it is that of the process, imports included. MFU
leaves out recomputation and attention scores. TRL trains the same pairs, without recomputation, as ours.
"""

import argparse
import csv
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from oumi_pl.planning.update import Settings, estimate

WARMUP = 3
OPTIMIZER = {"class_path": "AdamW", "init_args": {"lr": 1e-5, "weight_decay": 0.0}}
BYTES = {"class_path": "ByteTokenizer"}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}

COLUMNS = {
    "tokens_per_second": ("tokens/s", 12, "12,.0f"),
    "rows_per_second": ("pairs/s", 12, "12,.1f"),
    "mfu": ("MFU", 8, "8.1%"),
    "peak_memory_gb": ("peak GB", 10, "10.2f"),
    "planned_gb": ("plan GB", 10, "10.2f"),
}
"""Metric -> title, width and format of its column."""


def config_of(shape: str, small: bool) -> dict[str, Any]:
    """The config values of a model."""
    from oumi_pl.models.shapes import shape_config

    return shape_config("1m") | SMALL if small else shape_config(shape) | {"vocab_size": 128256}


def recipes(folder: Path, small: bool, steps: int) -> dict[str, dict[str, Any]]:
    """Name -> recipe."""
    length, rows = (64, 2) if small else (2048, 8)
    precision = {} if small else {"precision": "bf16-true"}
    trainer = {"max_steps": steps, "gradient_clip_val": 1.0, "devices": 1} | precision
    quiet: dict[str, Any] = {
        "checkpoint": {"enabled": False},
        "export": {"enabled": False},
        "report": False,
        "samples": {"rows": 0},
        "val_every": None,
        "seed_everything": 0,
    }

    def recipe(kind: str, data: str, file: str, model: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        data_args = {"train": str(folder / file), "tokenizer": BYTES, "max_length": length, "batch_size": rows}
        return quiet | {
            "model": {"class_path": kind, "init_args": {"optimizer": OPTIMIZER} | model},
            "data": {"class_path": data, "init_args": data_args | arguments},
            "trainer": trainer,
        }

    lora = {"lora": {"r": 16}, "gradient_checkpointing": True}
    one, eight = ({"config": config_of(shape, small)} for shape in ("1b", "8b"))
    saved = {"model": str(folder / "8b")}
    return {
        "pretraining, 1B": recipe("Pretrain", "PretrainData", "text.txt", one, exhausted="restart"),
        "SFT, 8B, LoRA": recipe("SFT", "SFTData", "chats.jsonl", eight | lora, packing=True),
        "SFT, 8B, QLoRA": recipe("SFT", "SFTData", "chats.jsonl", saved | lora | {"quantization": "nf4"}, packing=True),
        "DPO, 1B": recipe("DPO", "DPOData", "pairs.jsonl", {"model": str(folder / "1b")}),
    }


# ---- what is trained on


def write_rows(folder: Path, small: bool) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8))) for _ in range(3000)]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    scale = 1 if small else 16
    turns = [{"prompt": text(2, 6 * scale), "completion": text(2, 6 * scale)} for _ in range(200 * scale)]
    pairs = [{"prompt": text(2, 4 * scale), "chosen": text(2, 4), "rejected": text(2, 4)} for _ in range(200 * scale)]
    (folder / "text.txt").write_text("\n\n".join(text(20, 400) for _ in range(200 * scale)))
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))


def save_models(folder: Path, small: bool) -> None:
    """Random models for what starts from saved weights, and a tokenizer for TRL."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from oumi_pl.data.tokenizers import ByteTokenizer

    for shape in ("1b", "8b"):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
        values = config_of(shape, small)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        model.save_pretrained(folder / shape)
    ByteTokenizer().build().save_pretrained(folder / "tokenizer")


# ---- the contenders


def fit(folder: Path, name: str, recipe: dict[str, Any]) -> dict[str, float]:
    """Medians of what a run logs, and what `plan` predicts."""
    file = folder / f"{name}.yaml".replace(" ", "-")
    file.write_text(yaml.safe_dump(recipe))
    planned = estimate(Settings((file,), real_rows=True, on_gpu=recipe["trainer"].get("precision") == "bf16-true"))
    command = [sys.executable, "-m", "oumi_pl", "fit", "--config", str(file), "--name", file.stem]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    with (folder / "runs" / file.stem / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))[WARMUP:]
    keys = ("tokens_per_second", "rows_per_second", "mfu", "peak_memory_gb")
    columns = {key: [float(row[f"train/{key}"]) for row in rows if row.get(f"train/{key}")] for key in keys}
    result = {key: median(values) for key, values in columns.items() if values}
    return result | {"planned_gb": planned.total / 1e9, "peak_memory_gb": max(columns["peak_memory_gb"])}


def trl_dpo(folder: Path, small: bool, steps: int) -> dict[str, float]:
    """Pairs per second and peak memory of TRL's DPOTrainer."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from oumi_pl.callbacks.throughput import peak_memory

    class Clock(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    batch = 2 if small else 8
    args = DPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        max_length=64 if small else 2048,
        bf16=False,
        use_cpu=small,
        gradient_checkpointing=False,
        learning_rate=1e-5,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32" if small else "bfloat16"},
    )
    trainer = DPOTrainer(
        model=str(folder / "1b"),
        args=args,
        train_dataset=load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [later - earlier for earlier, later in zip(Clock.ends[WARMUP - 1 :], Clock.ends[WARMUP:], strict=False)]
    device = torch.device("cpu" if small else "cuda")
    return {"rows_per_second": batch / median(seconds), "peak_memory_gb": peak_memory(device) / 1e9}


def in_a_process(name: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Calls this file for what needs the memory of a device for itself."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--steps", str(args.steps)]
    done = subprocess.run(command + ["--small"] * args.small, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row_of(name: str, result: dict[str, float]) -> str:
    """A line of the table."""
    cells = [f"{result[key]:{form}}" if key in result else " " * width for key, (_, width, form) in COLUMNS.items()]
    return f"{name:20}" + "".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="tiny models in float32, on a CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "models":
        save_models(args.folder, args.small)
        print("{}")
        return
    if args.child == "trl":
        print(json.dumps(trl_dpo(args.folder, args.small, args.steps)))
        return
    import torch

    if not (args.small or torch.cuda.is_available()):
        sys.exit("no CUDA device; --small tries the script on a CPU")
    os.environ["HF_HUB_OFFLINE"] = "1"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "lightning"))
    machine = "CPU, tiny models" if args.small else torch.cuda.get_device_name()
    print(f"{versions}, python {platform.python_version()}; {machine}")
    print(" " * 20 + "".join(f"{title:>{width}}" for title, width, _ in COLUMNS.values()), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["OUMI_PL_CACHE"] = str(folder / "cache")
        write_rows(folder, args.small)
        in_a_process("models", args, folder)
        for case, recipe in recipes(folder, args.small, args.steps).items():
            print(row_of(case, fit(folder, case, recipe)), flush=True)
        print(row_of("DPO, 1B, TRL", in_a_process("trl", args, folder)), flush=True)


if __name__ == "__main__":
    main()
