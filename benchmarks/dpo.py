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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contenders import (
    BATCH,
    COLUMNS,
    LLAMA,
    LOSS,
    SHAPES,
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
    save_llama,
    saved_positions,
    trl_data,
    trl_settings,
    trl_watch,
    trl_with_reference,
    write_pairs,
    write_tokenized,
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


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Makes the model, and for TRL the pairs as we tokenize them, in the order of our plan."""
    from oumi_pl.data.dpo import DPOData

    save_llama(folder, LLAMAS[args.shape])
    data = our_data(DPOData, folder / "pairs.jsonl")
    rows = []
    for i in planned_ids(data):
        pair = data.examples("train")[i]
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
    write_tokenized(folder, rows)


def run_ours(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    from oumi_pl.callbacks.advice import PreferenceWarnings
    from oumi_pl.data.dpo import DPOData
    from oumi_pl.modules.dpo import DPO

    clock = Clock(BATCH)

    class Timed(DPO):
        begin_fit = clock.before(DPO.begin_fit)  # where the reference is computed

    watch = our_watch(clock, logps="train/logps/chosen")
    trainer = lightning_trainer(clock, scratch, PreferenceWarnings(), watch)
    module = Timed(str(folder / "model"), optimizer=adamw(), **options)
    trainer.fit(module, our_data(DPOData, folder / "pairs.jsonl"))
    return clock.result()


def run_trl(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    from trl import DPOConfig, DPOTrainer

    clock = Clock(BATCH)
    trainer = trl_with_reference(DPOTrainer, clock)(
        model=str(folder / "model"),
        args=DPOConfig(**trl_settings(scratch, **options)),
        callbacks=[trl_watch(clock, logps="logps/chosen")],
        **trl_data(folder),
    )
    trainer.train()
    return clock.result()


def differences(one: Result, two: Result) -> Iterator[str]:
    """Compares losses, and also log-probabilities in the first update, where the loss is log 2 for any model."""
    tolerance = NEAR["losses", 0] * abs(two["logps"][0])
    return far(one, two, NEAR | {("logps", 0): tolerance})


BASE, PRECOMPUTED = "TRL", "TRL, precomputed"
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    BASE: (run_trl, {}),
    PRECOMPUTED: (run_trl, {"precompute_ref_log_probs": True}),
    "oumi_pl": (run_ours, {}),
    "oumi_pl, prompts twice": (run_ours, {"share_prompt": False}),
    "oumi_pl, online": (run_ours, {"reference": "online"}),
}
TABLE = COLUMNS | {"positions": Column("positions", ",", 0)} | LOSS

if __name__ == "__main__":
    Benchmark(
        file=__file__,
        description=__doc__,
        unit="pairs",
        peers=(BASE, PRECOMPUTED),
        cases=CASES,
        arguments=arguments,
        write=write,
        prepare=prepare,
        differences=differences,
        columns=TABLE,
        closing=saved_positions,
    ).main()
