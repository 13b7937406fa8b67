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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contenders import (
    LLAMA,
    LOSS,
    MEMORY,
    RATES,
    Benchmark,
    Clock,
    Column,
    Result,
    adamw,
    far,
    lightning_trainer,
    our_data,
    our_watch,
    pair_arguments,
    planned_ids,
    saved_positions,
    trl_counted,
    trl_data,
    trl_settings,
    trl_watch,
    write_pairs,
    write_tokenized,
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


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Makes the model, and for TRL the pairs as we tokenize them, in the order of our plan."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from oumi_pl.attention.segments import path_positions
    from oumi_pl.data.reward import RewardData

    data = our_data(RewardData, folder / "pairs.jsonl", BATCH)
    ids = planned_ids(data)
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA, num_labels=1)
    config.pad_token_id = data.tokenizer.pad_token_id
    LlamaForSequenceClassification(config).save_pretrained(folder / "model")
    rows = []
    for i in ids:
        pair = data.examples("train")[i]
        paths = [pair.input_ids[path_positions(pair.segments, path)].tolist() for path in (0, 1)]
        rows.append(dict(zip(("chosen_ids", "rejected_ids"), paths, strict=True)))
    write_tokenized(folder, rows)


def run_ours(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    from oumi_pl.callbacks.advice import PreferenceWarnings
    from oumi_pl.data.reward import RewardData
    from oumi_pl.modules.reward import Reward

    clock = Clock(BATCH)
    trainer = lightning_trainer(clock, scratch, PreferenceWarnings(), our_watch(clock))
    module = Reward(str(folder / "model"), optimizer=adamw(), **options)
    trainer.fit(module, our_data(RewardData, folder / "pairs.jsonl", BATCH))
    return clock.result()


def run_trl(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    from trl import RewardConfig, RewardTrainer

    clock = Clock(BATCH)
    trainer = trl_counted(RewardTrainer, clock)(
        model=str(folder / "model"),
        args=RewardConfig(**trl_settings(scratch, BATCH, **options)),
        callbacks=[trl_watch(clock)],
        **trl_data(folder),
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
TABLE = RATES | MEMORY | {"positions": Column("positions", ",")} | LOSS

if __name__ == "__main__":
    Benchmark(
        file=__file__,
        description=__doc__,
        unit="pairs",
        peers=(BASE, CHECKPOINTING),
        cases=CASES,
        arguments=arguments,
        write=write,
        prepare=prepare,
        differences=differences,
        columns=TABLE,
        closing=saved_positions,
    ).main()
