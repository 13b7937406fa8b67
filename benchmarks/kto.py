"""KTO rows per second and peak memory: oumi_pl against TRL on the same rows, model and machine, in one run.

    python benchmarks/kto.py [--pairs hh.jsonl.gz] [--tokenizer gpt2] [--steps 75] [--threads 2]

The model, the data and the settings are those of `dpo.py`: a random Llama with 17 million parameters in float32 on
Anthropic's HH pairs, cut to 512 tokens. Each pair gives one desirable and one undesirable row; an update has 4 rows.
TRL gets the rows tokenized, with our mismatched responses, so that the KL divergence is the same, and keeps its own
collator and defaults, but for float32, a constant learning rate and gradient checkpointing, which is off for all.

Rows per second, and per second of processor time, which a busy machine disturbs less, are of the updates after the
first, waiting for data included; over all, the first update and the reference computed beforehand count too, loading
and tokenizing don't. Memory is the process's peak, and what of it came after the imports. The run stops if losses or
divergences of the contenders differ: they would not have done the same work.
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

from dpo import BATCH, CLIP, DATA, LLAMA, LR, MAX_LENGTH, TRL, Clock, peak_memory, write_pairs

Result = dict[str, Any]
BASE = "TRL"
PEERS = (BASE, "TRL, precomputed")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("trl", {}),
    PEERS[1]: ("trl", {"precompute_ref_log_probs": True}),
    "oumi_pl": ("oumi_pl", {}),
    "oumi_pl, online": ("oumi_pl", {"reference": "online"}),
}
NEAR = {("losses", 0): 1e-4, ("losses", -1): 1e-2, ("kls", 1): 1e-2}
"""By how much losses and divergences may differ: an update's rounding errors grow from one to the next."""
RATIOS = ("loop", "per_cpu", "over_all", "peak", "added")
WIDTHS = {"rows/s": 10, "/CPU s": 10, "over all": 10, "beforehand s": 14, "peak GB": 10, "added GB": 10, "tokens": 10}


class KTOClock(Clock):
    """What the DPO benchmark returns, with the divergences."""

    def __init__(self) -> None:
        super().__init__()
        self.kls: list[float] = []


def our_data(folder: Path) -> Any:
    from oumi_pl.data.kto import KTOData

    # GPT-2's tokenizer has no chat template, and the plain one adds no token
    names = {"tokenizer": str(folder / "tokenizer"), "template": "plain", "overflow": "keep_start"}
    return KTOData(str(folder / "pairs.jsonl"), **names, max_length=MAX_LENGTH, batch_size=BATCH, seed=0)


def prepare(folder: Path) -> None:
    """Makes the model, and for TRL the rows as we tokenize them, in the order of our plan."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "model")
    data = our_data(folder)
    data.prepare_data()
    data.setup("fit")
    rows, examples = [], data.examples("train")
    for i in data.plan(0).example_ids:
        example, mismatched = (examples[int(k)] for k in (i, data.mismatched_ids("train", [i])[0]))
        border = int(example.loss_mask.argmax())
        row = {"prompt_ids": example.input_ids[:border].tolist(), "label": example.fields["desirable"] == 1.0}
        for name, one in (("completion_ids", example), ("KL_completion_ids", mismatched)):
            # what follows the last target is no target for us, and would be one for TRL
            row[name] = one.input_ids[border : border + one.target_tokens].tolist()
            assert one.loss_mask[border : border + one.target_tokens].all()
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
    from oumi_pl.modules.kto import KTO
    from oumi_pl.runs.metrics import MetricsCSV

    baseline, clock = peak_memory(), KTOClock()

    class Timed(KTO):
        def on_fit_start(self) -> None:
            start = time.perf_counter()
            super().on_fit_start()  # where the reference is computed
            clock.beforehand = time.perf_counter() - start

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            clock.begun = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            clock.end()
            clock.losses.append(float(trainer.callback_metrics["train/loss"]))
            clock.kls.append(float(trainer.callback_metrics["train/kl"]))
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
    from trl import KTOConfig, KTOTrainer

    baseline, clock = peak_memory(), KTOClock()

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.losses.append(logs["loss"])
                clock.kls.append(logs["kl"])

    class Timed(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # the rows are tokenized

        def _precompute_ref_logps(self, *args: Any) -> Any:
            start = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            clock.beforehand += time.perf_counter() - start
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            clock.tokens += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = TRL | options | {"learning_rate": LR, "max_grad_norm": CLIP, "weight_decay": 0.0, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": BATCH, "max_length": MAX_LENGTH, "num_train_epochs": 1}
    trainer = Timed(
        model=str(folder / "model"),
        args=KTOConfig(output_dir=str(scratch / "trl"), **settings),
        train_dataset=Dataset.from_list(json.loads((folder / "tokenized.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        callbacks=[Watch()],
    )
    trainer.train()
    return clock.result() | {"baseline": baseline}


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
    """Stops if losses or divergences differ. (Before the second update, every model's loss is 0.5.)"""
    for (what, at), tolerance in NEAR.items():
        if not abs(one[what][at] - two[what][at]) <= tolerance:
            sys.exit(f"{name} does other work than {BASE}: {what}[{at}] is {one[what][at]}, not {two[what][at]}")


def line(name: str, got: Result) -> str:
    return (
        f"{name:24}{got['loop']:10.2f}{got['per_cpu']:10.2f}{got['over_all']:10.2f}{got['beforehand']:14.1f}"
        f"{got['peak']:10.2f}{got['added']:10.2f}{got['tokens']:10,}{got['losses'][-1]:11.6f}{got['kls'][-1]:10.4f}"
    )


def ratios(results: dict[str, Result]) -> Iterator[str]:
    for peer in PEERS:
        yield f"as a multiple of {peer}"
        for name, got in results.items():
            if name not in PEERS:
                loop, cpu, over_all, peak, added = (got[k] / results[peer][k] for k in RATIOS)
                yield f"{name:24}{loop:9.2f}x{cpu:9.2f}x{over_all:9.2f}x{'':14}{peak:9.2f}x{added:9.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "gpt2-tokenizer", help="directory")
    parser.add_argument("--steps", type=int, default=75, help="updates of 4 rows; fewer to try it out")
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
    print(f"{BATCH * args.steps} rows, {args.steps} updates", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pairs(args.pairs, BATCH * args.steps // 2, folder / "pairs.jsonl")
        (folder / "tokenizer").symlink_to(args.tokenizer.resolve())
        in_a_process("prepare", args.threads, folder)
        columns = "".join(f"{column:>{width}}" for column, width in WIDTHS.items())
        print(" " * 24 + columns + "  last loss   last kl")
        results: dict[str, Result] = {}
        for name in CASES:
            results[name] = in_a_process(name, args.threads, folder)
            refuse_different_work(name, results[name], results[BASE])
            print(line(name, results[name]), flush=True)
    print("\n".join(ratios(results)))


if __name__ == "__main__":
    main()
