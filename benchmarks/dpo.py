"""DPO pairs per second and peak memory: oumi_pl against TRL on the same pairs, model and machine, in one run.

    python benchmarks/dpo.py [--pairs hh.jsonl.gz] [--tokenizer gpt2] [--steps 75] [--threads 2]

Each contender trains the same random Llama (4 layers x 256, feed-forward 1,024, 4 heads, GPT-2's vocabulary, embeddings
tied; 17 million parameters, float32) with AdamW on the same tokens of 300 pairs of Anthropic's HH data, cut to 512
tokens, 4 pairs an update, in the order of our plan, in a process of its own. TRL gets the pairs tokenized and keeps its
own collator and defaults, but for float32, a constant learning rate and gradient checkpointing, which is off for all:
with it TRL would need less memory and more time. On a CPU TRL 1.16 computes the logits of prompts and padding as well,
which it doesn't with Triton on a GPU, so the ratios are those of CPUs. Ours runs with what the command line adds to a
run, but for saving, which TRL doesn't do here either.

Pairs per second, and per second of processor time, which a busy machine disturbs less, are of the updates after the
first, waiting for data included; over all, the first update and the reference computed beforehand count too, loading
and tokenizing don't. Memory is the process's peak, and what of it came after the imports. The run stops if the
contenders' losses differ: they would not have done the same work.
"""

import argparse
import gzip
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

Result = dict[str, Any]
DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
BATCH = 4
MAX_LENGTH = 512
LR, CLIP = 1e-5, 1.0
NEAR = {("losses", 0): 1e-3, ("losses", -1): 1e-2}
"""By how much the first and the last losses may differ: an update's rounding errors grow from one to the next."""
LLAMA = {"vocab_size": 50257, "hidden_size": 256, "intermediate_size": 1024, "tie_word_embeddings": True}
LLAMA |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
TRL = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "train_sampling_strategy": "sequential"}
TRL |= {"lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
EMPTY = re.compile(r'Assistant:(\\n| )*"')
"""Where a response is empty, in a line of JSON."""
BASE = "TRL"
PEERS = (BASE, "TRL, precomputed")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("trl", {}),
    PEERS[1]: ("trl", {"precompute_ref_log_probs": True}),
    "oumi_pl": ("oumi_pl", {}),
    "oumi_pl, prompts twice": ("oumi_pl", {"share_prompt": False}),
    "oumi_pl, online": ("oumi_pl", {"reference": "online"}),
}
RATIOS = ("loop", "per_cpu", "over_all", "peak", "added")
WIDTHS = {"pairs/s": 10, "/CPU s": 10, "over all": 10, "beforehand s": 14, "peak GB": 10, "added GB": 10, "tokens": 10}


class Clock:
    """When the updates ended, what they read, and what came of them."""

    def __init__(self) -> None:
        self.begun = self.beforehand = 0.0
        self.ends: list[float] = []
        self.processor: list[float] = []
        self.losses: list[float] = []
        self.logps: list[float] = []
        self.positions = self.tokens = 0

    def end(self) -> None:
        self.ends.append(time.perf_counter())
        self.processor.append(time.process_time())

    def result(self) -> Result:
        updates = len(self.ends)
        return vars(self) | {
            "loop": BATCH * (updates - 1) / (self.ends[-1] - self.ends[0]),
            "per_cpu": BATCH * (updates - 1) / (self.processor[-1] - self.processor[0]),
            "over_all": BATCH * updates / (self.beforehand + self.ends[-1] - self.begun),
        }


def write_pairs(file: Path, n: int, out: Path) -> None:
    """Copies the first `n` pairs that both have a response."""
    with gzip.open(file, "rt") as lines:
        rows = list(islice((line for line in lines if not EMPTY.search(line)), n))
    if len(rows) < n:
        sys.exit(f"{file} holds {len(rows)} pairs, not {n}")
    out.write_text("".join(rows))


def our_data(folder: Path) -> Any:
    from oumi_pl.data.dpo import DPOData

    # GPT-2's tokenizer has no chat template, and the plain one adds no token
    names = {"tokenizer": str(folder / "tokenizer"), "template": "plain"}
    return DPOData(str(folder / "pairs.jsonl"), **names, max_length=MAX_LENGTH, batch_size=BATCH, seed=0)


def prepare(folder: Path) -> None:
    """Makes the model, and for TRL the pairs as we tokenize them, in the order of our plan."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "model")
    data = our_data(folder)
    data.prepare_data()
    data.setup("fit")
    rows = []
    for i in data.plan(0).example_ids:
        pair = data.examples("train")[int(i)]
        first, second = pair.segments  # the prompt with the chosen response, and the rejected one
        prompt, rejected = second.shared, first.length
        row = {"prompt_ids": pair.input_ids[:prompt].tolist()}
        borders = {"chosen_ids": (prompt, rejected), "rejected_ids": (rejected, len(pair.input_ids))}
        for name, (start, stop) in borders.items():
            # what follows the last target is no target for us, and would be one for TRL
            targets = int(pair.loss_mask[start:stop].sum())
            assert pair.loss_mask[start : start + targets].all()
            row[name] = pair.input_ids[start : start + targets].tolist()
        rows.append(row)
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
    from oumi_pl.modules.dpo import DPO
    from oumi_pl.runs.metrics import MetricsCSV

    baseline, clock = peak_memory(), Clock()

    class Timed(DPO):
        def begin_fit(self) -> None:
            start = time.perf_counter()
            super().begin_fit()  # where the reference is computed
            clock.beforehand = time.perf_counter() - start

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            clock.begun = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            clock.end()
            clock.losses.append(float(trainer.callback_metrics["train/loss"]))
            clock.logps.append(float(trainer.callback_metrics["train/logps/chosen"]))
            clock.positions += int(pl_module.last_update["positions"])  # prompts as often as they are computed
            clock.tokens += int(pl_module.last_update["tokens"])

    L.seed_everything(0)
    metrics = MetricsCSV()
    metrics.open(scratch / "metrics.csv")
    adamw = partial(torch.optim.AdamW, lr=LR, weight_decay=0.0)
    module = Timed(str(folder / "model"), optimizer=adamw, **options)
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
    return clock.result() | {"baseline": baseline}


def run_trl(folder: Path, scratch: Path, **options: Any) -> Result:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    baseline, clock = peak_memory(), Clock()

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.losses.append(logs["loss"])
                clock.logps.append(logs["logps/chosen"])

    class Timed(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # the pairs are tokenized

        def _precompute_ref_logps(self, *args: Any) -> Any:
            start = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            clock.beforehand += time.perf_counter() - start
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            clock.positions += inputs["input_ids"].numel()
            clock.tokens += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = TRL | options | {"learning_rate": LR, "max_grad_norm": CLIP, "weight_decay": 0.0, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": BATCH, "max_length": MAX_LENGTH, "num_train_epochs": 1}
    trainer = Timed(
        model=str(folder / "model"),
        args=DPOConfig(output_dir=str(scratch / "trl"), **settings),
        train_dataset=Dataset.from_list(json.loads((folder / "tokenized.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        callbacks=[Watch()],
    )
    trainer.train()
    return clock.result() | {"baseline": baseline}


def peak_memory() -> float:
    """In 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---- the comparison


def child(name: str, threads: int, folder: Path) -> None:
    import torch

    torch.set_num_threads(threads)
    if name == "prepare":
        prepare(folder)
        return
    engine, options = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        # nothing computed beforehand is found again by the next contender
        os.environ["OUMI_PL_CACHE"] = scratch
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
    """Stops if losses differ, or the log-probabilities under the first one, which is log 2 for every model."""
    nats = NEAR["losses", 0] * abs(two["logps"][0])
    for (what, at), tolerance in (NEAR | {("logps", 0): nats}).items():
        if not abs(one[what][at] - two[what][at]) <= tolerance:
            sys.exit(f"{name} does other work than {BASE}: {what}[{at}] is {one[what][at]}, not {two[what][at]}")


def line(name: str, got: Result) -> str:
    return (
        f"{name:24}{got['loop']:10.2f}{got['per_cpu']:10.2f}{got['over_all']:10.2f}{got['beforehand']:14.1f}"
        f"{got['peak']:10.2f}{got['added']:10.2f}{got['positions']:10,}{got['losses'][-1]:11.6f}"
    )


def ratios(results: dict[str, Result]) -> Iterator[str]:
    for peer in PEERS:
        yield f"as a multiple of {peer}"
        for name, got in results.items():
            if name not in PEERS:
                loop, cpu, over_all, peak, added = (got[k] / results[peer][k] for k in RATIOS)
                yield f"{name:24}{loop:9.2f}x{cpu:9.2f}x{over_all:9.2f}x{'':14}{peak:9.2f}x{added:9.2f}x"
    shared, apart, padded = (results[name] for name in ("oumi_pl", "oumi_pl, prompts twice", BASE))
    yield (
        f"{1 - shared['positions'] / apart['positions']:.1%} of the tokens are saved by sharing prompts; "
        f"{1 - padded['tokens'] / padded['positions']:.1%} of what TRL reads is padding"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "gpt2-tokenizer", help="directory")
    parser.add_argument("--steps", type=int, default=75, help="updates of 4 pairs; fewer to try it out")
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
