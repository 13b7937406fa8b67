"""KTO rows per second and peak memory: oumi_pl against TRL on the same rows, model and machine, in one run.

    python benchmarks/kto.py [--pairs hh.jsonl.gz] [--tokenizer gpt2] [--steps 75] [--threads 2]

The model, the data and the settings are those of `dpo.py`: a random Llama with 17 million parameters in float32 on
Anthropic's HH pairs, cut to 512 tokens. Each pair gives one desirable and one undesirable row; an update has 4 rows.
TRL gets the rows tokenized, with our mismatched responses, so that the KL divergence is the same, and keeps its own
collator and defaults, but for float32, a constant learning rate and gradient checkpointing, which is off for all.

The run stops if losses or divergences of the contenders differ: they would not have done the same work. What is
computed beforehand is the reference. How rates and memory are measured: `contenders.py`.
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
    trl_data,
    trl_settings,
    trl_watch,
    trl_with_reference,
    write_pairs,
    write_tokenized,
)

NEAR = {("losses", 0): 1e-4, ("losses", -1): 1e-2, ("kls", 1): 1e-2}
"""By how much losses and divergences may differ: an update's rounding errors grow from one to the next."""
OVERFLOW = "keep_start"


def arguments(parser: argparse.ArgumentParser) -> None:
    pair_arguments(parser, 75, f" of {BATCH} rows")


def write(args: argparse.Namespace, folder: Path) -> str:
    """Copies pairs, of which each becomes two rows."""
    write_pairs(args, folder, BATCH * args.steps // 2)
    return f"{BATCH * args.steps} rows, {args.steps} updates"


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Makes the model, and for TRL the rows as we tokenize them, in the order of our plan."""
    from oumi_pl.data.kto import KTOData

    save_llama(folder, LLAMA)
    data = our_data(KTOData, folder / "pairs.jsonl", overflow=OVERFLOW)
    rows, ids = [], planned_ids(data)
    examples = data.examples("train")
    for i in ids:
        example, mismatched = (examples[int(k)] for k in (i, data.mismatched_ids("train", [i])[0]))
        border = int(example.loss_mask.argmax())
        row = {"prompt_ids": example.input_ids[:border].tolist(), "label": example.fields["desirable"] == 1.0}
        for name, one in (("completion_ids", example), ("KL_completion_ids", mismatched)):
            # what follows the last target is no target for us, and would be one for TRL
            row[name] = one.input_ids[border : border + one.target_tokens].tolist()
            assert one.loss_mask[border : border + one.target_tokens].all()
        rows.append(row)
    write_tokenized(folder, rows)


def run_ours(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    from oumi_pl.callbacks.advice import PreferenceWarnings
    from oumi_pl.data.kto import KTOData
    from oumi_pl.modules.kto import KTO

    clock = Clock(BATCH)

    class Timed(KTO):
        begin_fit = clock.before(KTO.begin_fit)  # where the reference is computed

    watch = our_watch(clock, kls="train/kl")
    trainer = lightning_trainer(clock, scratch, PreferenceWarnings(), watch)
    module = Timed(str(folder / "model"), optimizer=adamw(), **options)
    trainer.fit(module, our_data(KTOData, folder / "pairs.jsonl", overflow=OVERFLOW))
    return clock.result()


def run_trl(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    from trl import KTOConfig, KTOTrainer

    clock = Clock(BATCH)
    trainer = trl_with_reference(KTOTrainer, clock)(
        model=str(folder / "model"),
        args=KTOConfig(**trl_settings(scratch, **options)),
        callbacks=[trl_watch(clock, kls="kl")],
        **trl_data(folder),
    )
    trainer.train()
    return clock.result()


def differences(one: Result, two: Result) -> Iterator[str]:
    """Compares losses and divergences. (Before the second update, every model's loss is 0.5.)"""
    return far(one, two, NEAR)


BASE, PRECOMPUTED = "TRL", "TRL, precomputed"
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    BASE: (run_trl, {}),
    PRECOMPUTED: (run_trl, {"precompute_ref_log_probs": True}),
    "oumi_pl": (run_ours, {}),
    "oumi_pl, online": (run_ours, {"reference": "online"}),
}
TABLE = COLUMNS | {"tokens": Column("tokens", ",", 0)} | LOSS | {"last kls": Column("last kl", ".4f", 0)}

if __name__ == "__main__":
    Benchmark(
        file=__file__,
        description=__doc__,
        unit="rows",
        peers=(BASE, PRECOMPUTED),
        cases=CASES,
        arguments=arguments,
        write=write,
        prepare=prepare,
        differences=differences,
        columns=TABLE,
    ).main()
