"""DPO pairs per second and peak memory: oumi_pl against TRL on the same pairs, model and machine, in one run.

    python benchmarks/dpo.py [--pairs hh.jsonl.gz] [--tokenizer gpt2] [--steps 75] [--threads 2]
                             [--shape 135m] [--cases TRL oumi_pl]

Each contender trains the same random Llama (4 layers x 256, feed-forward 1,024, 4 heads, GPT-2's vocabulary, embeddings
tied; 17 million parameters, float32; `--shape 135m` is the shape of SmolLM2) with AdamW on the same tokens of 300 pairs
of Anthropic's HH data, cut to 512 tokens, 4 pairs an update, in the order of our plan, in a process of its own. TRL
gets the pairs tokenized and keeps its own collator and defaults, but for float32, a constant learning rate and gradient
checkpointing, which is off for all: with it TRL would need less memory and more time. On a CPU TRL 1.16 computes the
logits of prompts and padding as well, which it doesn't with Triton on a GPU, so the ratios are those of CPUs. Ours runs
with what the command line adds to a run, but for saving, which TRL doesn't do here either.

The run stops if the contenders' losses differ: they would not have done the same work. What is computed beforehand is
the reference. How rates and memory are measured: `contenders.py`.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from contenders import (
    BATCH,
    COLUMNS,
    LLAMA,
    LOSS,
    LR,
    MAX_LENGTH,
    SHAPES,
    TRL,
    Benchmark,
    Clock,
    Column,
    Result,
    far,
    lightning_trainer,
    pair_arguments,
    saved_tokens,
    write_pairs,
)

NEAR = {("losses", 0): 1e-3, ("losses", -1): 1e-2}
"""By how much the first and the last losses may differ: an update's rounding errors grow from one to the next."""
LLAMAS = {"17m": LLAMA, "135m": LLAMA | SHAPES["135m"]}


def arguments(parser: argparse.ArgumentParser) -> None:
    pair_arguments(parser, 75, f" of {BATCH} pairs")
    parser.add_argument("--shape", choices=LLAMAS, default="17m")


def write(args: argparse.Namespace, folder: Path) -> str:
    """Copies pairs."""
    write_pairs(args, folder, BATCH * args.steps)
    return f"{BATCH * args.steps} pairs, {args.steps} updates; Llama {args.shape}"


class PairClock(Clock):
    """With the log-probabilities of chosen responses."""

    def __init__(self) -> None:
        super().__init__()
        self.logps: list[float] = []


def our_data(folder: Path) -> Any:
    from oumi_pl.data.dpo import DPOData

    # GPT-2's tokenizer has no chat template, and the plain one adds no token
    names = {"tokenizer": str(folder / "tokenizer"), "template": "plain"}
    return DPOData(str(folder / "pairs.jsonl"), **names, max_length=MAX_LENGTH, batch_size=BATCH, seed=0)


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Makes the model, and for TRL the pairs as we tokenize them, in the order of our plan."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMAS[args.shape])).save_pretrained(folder / "model")
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


def run_ours(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    import lightning as L
    import torch

    from oumi_pl.callbacks.advice import PreferenceWarnings
    from oumi_pl.modules.dpo import DPO

    clock = PairClock()

    class Timed(DPO):
        def begin_fit(self) -> None:
            start = time.perf_counter()
            super().begin_fit()  # where the reference is computed
            clock.beforehand = time.perf_counter() - start

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            clock.begin()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            clock.end(BATCH)
            clock.losses.append(float(trainer.callback_metrics["train/loss"]))
            clock.logps.append(float(trainer.callback_metrics["train/logps/chosen"]))
            clock.positions += int(pl_module.last_update["positions"])  # prompts as often as they are computed
            clock.tokens += int(pl_module.last_update["tokens"])

    trainer = lightning_trainer(clock, scratch, PreferenceWarnings(), Watch())
    adamw = partial(torch.optim.AdamW, lr=LR, weight_decay=0.0)
    module = Timed(str(folder / "model"), optimizer=adamw, **options)
    trainer.fit(module, our_data(folder))
    return clock.result()


def run_trl(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = PairClock()

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end(BATCH)

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

    settings = TRL | options
    settings |= {"per_device_train_batch_size": BATCH, "max_length": MAX_LENGTH}
    trainer = Timed(
        model=str(folder / "model"),
        args=DPOConfig(output_dir=str(scratch / "trl"), **settings),
        train_dataset=Dataset.from_list(json.loads((folder / "tokenized.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        callbacks=[Watch()],
    )
    trainer.train()
    return clock.result()


def differences(one: Result, two: Result) -> Iterator[str]:
    """Losses, and the log-probabilities under the first one, which is log 2 for every model."""
    nats = NEAR["losses", 0] * abs(two["logps"][0])
    return far(one, two, NEAR | {("logps", 0): nats})


BASE, PRECOMPUTED = "TRL", "TRL, precomputed"
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    BASE: (run_trl, {}),
    PRECOMPUTED: (run_trl, {"precompute_ref_log_probs": True}),
    "oumi_pl": (run_ours, {}),
    "oumi_pl, prompts twice": (run_ours, {"share_prompt": False}),
    "oumi_pl, online": (run_ours, {"reference": "online"}),
}
TABLE = COLUMNS | {"positions": Column("tokens", ",", 0)} | LOSS

if __name__ == "__main__":
    data = (arguments, write, prepare, differences)
    Benchmark(__file__, __doc__, "pairs", (BASE, PRECOMPUTED), CASES, *data, columns=TABLE, closing=saved_tokens).main()
