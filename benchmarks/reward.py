"""Reward-model pairs per second and peak memory: oumi_pl against TRL on the same pairs and model, in one run.

    python benchmarks/reward.py [--pairs hh.jsonl.gz] [--tokenizer gpt2] [--steps 38] [--threads 2]

Each contender trains the same random Llama (4 layers x 256, feed-forward 1,024, 4 heads, GPT-2's vocabulary; 17 million
parameters, float32, a scalar head) with AdamW on the same tokens of 304 pairs of Anthropic's HH data, cut to 512
tokens, 8 pairs an update (TRL's default), in the order of our plan, in a process of its own. TRL gets the pairs
tokenized and keeps its own collator and defaults, but for float32 and a constant learning rate: once with its default
of gradient checkpointing, and once without. Ours runs with what the command line adds to a run, but for saving, which
TRL doesn't do here either.

Neither computes logits, so what is saved is what isn't computed: padding, and the second copy of each prompt. Pairs per
second, and per second of processor time, which a busy machine disturbs less, are of the updates after the first,
waiting for data included. Memory is the process's peak, and what of it came after the imports. The run stops if the
contenders' losses differ: they would not have done the same work.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo import CLIP, DATA, LLAMA, LR, MAX_LENGTH, TRL, Clock, Result, peak_memory, write_pairs

BATCH = 8
NEAR = {0: 1e-3, -1: 1e-2}
"""By how much the first and the last loss may differ: an update's rounding errors grow from one to the next."""
BASE = "TRL"
PEERS = (BASE, "TRL, checkpointing")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("trl", {}),
    PEERS[1]: ("trl", {"gradient_checkpointing": True}),
    "oumi_pl": ("oumi_pl", {}),
    "oumi_pl, prompts twice": ("oumi_pl", {"share_prompt": False}),
}
RATIOS = ("loop", "per_cpu", "peak", "added")
WIDTHS = {"pairs/s": 10, "/CPU s": 10, "peak GB": 10, "added GB": 10, "tokens": 10}


def result(clock: Clock) -> Result:
    """What a contender did, of the updates after the first."""
    pairs = BATCH * (len(clock.ends) - 1)
    rates = {"loop": clock.ends, "per_cpu": clock.processor}
    return vars(clock) | {name: pairs / (ends[-1] - ends[0]) for name, ends in rates.items()}


def our_data(folder: Path) -> Any:
    from oumi_pl.data.reward import RewardData

    # GPT-2's tokenizer has no chat template, and the plain one adds no token
    names = {"tokenizer": str(folder / "tokenizer"), "template": "plain"}
    return RewardData(str(folder / "pairs.jsonl"), **names, max_length=MAX_LENGTH, batch_size=BATCH, seed=0)


def prepare(folder: Path) -> None:
    """Makes the model, and for TRL the pairs as we tokenize them, in the order of our plan."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from oumi_pl.attention.segments import path_positions

    data = our_data(folder)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA, num_labels=1)
    config.pad_token_id = data.tokenizer.pad_token_id
    LlamaForSequenceClassification(config).save_pretrained(folder / "model")
    rows = []
    for i in data.plan(0).example_ids:
        pair = data.examples("train")[int(i)]
        paths = [pair.input_ids[path_positions(pair.segments, path)].tolist() for path in (0, 1)]
        rows.append(dict(zip(("chosen_ids", "rejected_ids"), paths, strict=True)))
    (folder / "tokenized.json").write_text(json.dumps(rows))


# ---- the contenders


def run_ours(folder: Path, scratch: Path, **options: Any) -> Result:
    import lightning as L
    import torch

    from oumi_pl.callbacks.advice import PreferenceWarnings
    from oumi_pl.callbacks.progress import ProgressLine
    from oumi_pl.callbacks.start import Start
    from oumi_pl.callbacks.stopping import LastStep
    from oumi_pl.callbacks.throughput import Throughput
    from oumi_pl.config.cli import TRAINER_DEFAULTS
    from oumi_pl.modules.reward import Reward
    from oumi_pl.runs.metrics import MetricsCSV

    baseline, clock = peak_memory(), Clock()

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            clock.begun = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            clock.end()
            clock.losses.append(float(trainer.callback_metrics["train/loss"]))
            clock.positions += int(pl_module.last_update["positions"])  # prompts as often as they are computed
            clock.tokens += int(pl_module.last_update["tokens"])

    L.seed_everything(0)
    metrics = MetricsCSV()
    metrics.open(scratch / "metrics.csv")
    adamw = partial(torch.optim.AdamW, lr=LR, weight_decay=0.0)
    module = Reward(str(folder / "model"), optimizer=adamw, **options)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=metrics,
        enable_checkpointing=False,
        gradient_clip_val=CLIP,
        callbacks=[Start(), LastStep(), Throughput(), PreferenceWarnings(), ProgressLine(), Watch()],
        **TRAINER_DEFAULTS,
    )
    trainer.fit(module, our_data(folder))
    return result(clock) | {"baseline": baseline}


def run_trl(folder: Path, scratch: Path, **options: Any) -> Result:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    baseline, clock = peak_memory(), Clock()

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.losses.append(logs["loss"])

    class Timed(RewardTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            clock.positions += inputs["input_ids"].numel()
            clock.tokens += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = TRL | {"learning_rate": LR, "max_grad_norm": CLIP, "weight_decay": 0.0, "logging_steps": 1} | options
    settings |= {"per_device_train_batch_size": BATCH, "max_length": MAX_LENGTH, "num_train_epochs": 1}
    trainer = Timed(
        model=str(folder / "model"),
        args=RewardConfig(output_dir=str(scratch / "trl"), **settings),
        train_dataset=Dataset.from_list(json.loads((folder / "tokenized.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        callbacks=[Watch()],
    )
    trainer.train()
    return result(clock) | {"baseline": baseline}


# ---- the comparison


def child(name: str, threads: int, folder: Path) -> None:
    import torch

    torch.set_num_threads(threads)
    if name == "prepare":
        prepare(folder)
        return
    engine, options = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        result = (run_ours if engine == "oumi_pl" else run_trl)(folder, Path(scratch), **options)
    peak = peak_memory()
    print("RESULT " + json.dumps(result | {"peak": peak, "added": peak - result["baseline"]}))


def in_a_process(name: str, threads: int, folder: Path) -> Result:
    command = [sys.executable, __file__, "--child", name, "--threads", str(threads), "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OUMI_PL_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[0].removeprefix("RESULT ")) if lines else {}


def refuse_different_work(name: str, one: Result, two: Result) -> None:
    """Stops if the first or the last losses differ."""
    for at, tolerance in NEAR.items():
        ours, theirs = one["losses"][at], two["losses"][at]
        if not abs(ours - theirs) <= tolerance:
            sys.exit(f"{name} does other work than {BASE}: losses[{at}] is {ours}, not {theirs}")


def line(name: str, got: Result) -> str:
    return (
        f"{name:24}{got['loop']:10.2f}{got['per_cpu']:10.2f}"
        f"{got['peak']:10.2f}{got['added']:10.2f}{got['positions']:10,}{got['losses'][-1]:11.6f}"
    )


def ratios(results: dict[str, Result]) -> Iterator[str]:
    for peer in PEERS:
        yield f"as a multiple of {peer}"
        for name, got in results.items():
            if name not in PEERS:
                loop, cpu, peak, added = (got[k] / results[peer][k] for k in RATIOS)
                tokens = got["positions"] / results[peer]["positions"]
                yield f"{name:24}{loop:9.2f}x{cpu:9.2f}x{peak:9.2f}x{added:9.2f}x{tokens:9.2f}x"
    shared, apart, padded = (results[name] for name in ("oumi_pl", "oumi_pl, prompts twice", BASE))
    yield (
        f"{1 - shared['positions'] / apart['positions']:.1%} of the tokens are saved by sharing prompts; "
        f"{1 - padded['tokens'] / padded['positions']:.1%} of what TRL reads is padding"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "gpt2-tokenizer", help="directory")
    parser.add_argument("--steps", type=int, default=38, help="updates of 8 pairs; fewer to try it out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.threads, args.folder)
        return
    for missing in (path for path in (args.pairs, args.tokenizer) if not path.exists()):
        sys.exit(f"{missing} is missing: --pairs takes a .jsonl.gz of HH pairs, --tokenizer GPT-2's directory")
    if args.steps < 2:
        sys.exit("--steps: at least 2, since the first update is not timed")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "lightning"))
    machine = platform.processor() or platform.machine()
    print(f"{versions}, python {platform.python_version()}; {machine}, {args.threads} threads")
    print(f"{BATCH * args.steps} pairs, {args.steps} updates", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pairs(args.pairs, BATCH * args.steps, folder / "pairs.jsonl")
        (folder / "tokenizer").symlink_to(args.tokenizer.resolve())
        in_a_process("prepare", args.threads, folder)
        print(" " * 24 + "".join(f"{column:>{width}}" for column, width in WIDTHS.items()) + "  last loss")
        results: dict[str, Result] = {}
        for name in CASES:
            results[name] = in_a_process(name, args.threads, folder)
            refuse_different_work(name, results[name], results[BASE])
            print(line(name, results[name]), flush=True)
    print("\n".join(ratios(results)))


if __name__ == "__main__":
    main()
