"""Reward-model pairs per second and peak memory: oumi_pl against TRL on the same pairs and model, in one run.

    python benchmarks/reward.py [--pairs hh.jsonl.gz] [--tokenizer gpt2] [--steps 38] [--threads 2]

Each contender trains the same random Llama (4 layers x 256, feed-forward 1,024, 4 heads, GPT-2's vocabulary; 17 million
parameters, float32, a scalar head) with AdamW on the same tokens of 304 pairs of Anthropic's HH data, cut to 512
tokens, 8 pairs an update (TRL's default), in the order of our plan, in a process of its own. TRL gets the pairs
tokenized and keeps its own collator and defaults, but for float32 and a constant learning rate: once with its default
of gradient checkpointing, and once without. Ours runs with what the command line adds to a run, but for saving, which
TRL doesn't do here either.

Neither computes logits, so what is saved is what isn't computed: padding, and the second copy of each prompt. The run
stops if the contenders' losses differ: they would not have done the same work. How rates and memory are measured:
`contenders.py`.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from contenders import (
    LLAMA,
    LOSS,
    LR,
    MAX_LENGTH,
    MEMORY,
    RATES,
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

BATCH = 8
NEAR = {("losses", 0): 1e-3, ("losses", -1): 1e-2}
"""By how much the first and the last loss may differ: an update's rounding errors grow from one to the next."""


def arguments(parser: argparse.ArgumentParser) -> None:
    pair_arguments(parser, 38, f" of {BATCH} pairs")


def write(args: argparse.Namespace, folder: Path) -> str:
    """Copies pairs."""
    write_pairs(args, folder, BATCH * args.steps)
    return f"{BATCH * args.steps} pairs, {args.steps} updates"


def our_data(folder: Path) -> Any:
    from oumi_pl.data.reward import RewardData

    # GPT-2's tokenizer has no chat template, and the plain one adds no token
    names = {"tokenizer": str(folder / "tokenizer"), "template": "plain"}
    return RewardData(str(folder / "pairs.jsonl"), **names, max_length=MAX_LENGTH, batch_size=BATCH, seed=0)


def prepare(args: argparse.Namespace, folder: Path) -> None:
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


def run_ours(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    import lightning as L
    import torch

    from oumi_pl.callbacks.advice import PreferenceWarnings
    from oumi_pl.modules.reward import Reward

    clock = Clock()

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            clock.begin()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            clock.end(BATCH)
            clock.losses.append(float(trainer.callback_metrics["train/loss"]))
            clock.positions += int(pl_module.last_update["positions"])  # prompts as often as they are computed
            clock.tokens += int(pl_module.last_update["tokens"])

    trainer = lightning_trainer(clock, scratch, PreferenceWarnings(), Watch())
    adamw = partial(torch.optim.AdamW, lr=LR, weight_decay=0.0)
    module = Reward(str(folder / "model"), optimizer=adamw, **options)
    trainer.fit(module, our_data(folder))
    return clock.result()


def run_trl(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    clock = Clock()

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end(BATCH)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.losses.append(logs["loss"])

    class Timed(RewardTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            clock.positions += inputs["input_ids"].numel()
            clock.tokens += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = TRL | options
    settings |= {"per_device_train_batch_size": BATCH, "max_length": MAX_LENGTH}
    trainer = Timed(
        model=str(folder / "model"),
        args=RewardConfig(output_dir=str(scratch / "trl"), **settings),
        train_dataset=Dataset.from_list(json.loads((folder / "tokenized.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        callbacks=[Watch()],
    )
    trainer.train()
    return clock.result()


def differences(one: Result, two: Result) -> Iterator[str]:
    return far(one, two, NEAR)


BASE, CHECKPOINTING = "TRL", "TRL, checkpointing"
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    BASE: (run_trl, {}),
    CHECKPOINTING: (run_trl, {"gradient_checkpointing": True}),
    "oumi_pl": (run_ours, {}),
    "oumi_pl, prompts twice": (run_ours, {"share_prompt": False}),
}
TABLE = RATES | MEMORY | {"positions": Column("tokens", ",")} | LOSS

if __name__ == "__main__":
    data = (arguments, write, prepare, differences)
    Benchmark(
        __file__, __doc__, "pairs", (BASE, CHECKPOINTING), CASES, *data, columns=TABLE, closing=saved_tokens
    ).main()
