"""Distillation, tokens per second and peak memory: oumi_pl against TRL's GKDTrainer, which keeps all logits.

    python benchmarks/distill.py [--pairs hh.jsonl.gz] [--tokenizer gpt2] [--steps 30] [--threads 2]

Each contender trains the same random Llama (4 layers x 256, feed-forward 1,024, 4 heads, GPT-2's vocabulary, embeddings
tied; 17 million parameters, float32) on what a random one of twice that width says (43 million), with the generalised
Jensen-Shannon divergence (beta 0.5, GKD's default), AdamW, and the same tokens: the last answers of chosen dialogues of
Anthropic's HH data, cut to 512 tokens, 4 rows an update, in the order of our plan, in a process of its own. TRL's
`lmbda` is 0, so nothing is generated; it gets the rows tokenized and keeps its own collator and defaults, but for
float32, a constant learning rate and gradient checkpointing, which is off for all. Tokens are those read, prompts
included, padding not.

The run stops if losses differ, but for the top 64, where all other tokens are one outcome: there the loss is another.
What is computed beforehand is the top 64 of all rows; loading the teacher isn't timed. How rates and memory are
measured: `contenders.py`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contenders import (
    BATCH,
    LLAMA,
    Benchmark,
    Clock,
    Result,
    adamw,
    lightning_trainer,
    our_data,
    our_watch,
    pair_arguments,
    pair_lines,
    planned_ids,
    trl_counted,
    trl_data,
    trl_settings,
    trl_watch,
    write_tokenized,
)

BETA, TOP_K = 0.5, 64
NEAR = {0: 1e-4, -1: 1e-2}
"""By how much the first and the last loss may differ, as a share: rounding grows from one update to the next."""
TEACHER = LLAMA | {"hidden_size": 512, "intermediate_size": 2048}


def arguments(parser: argparse.ArgumentParser) -> None:
    pair_arguments(parser, 30, f" of {BATCH} rows")


def write(args: argparse.Namespace, folder: Path) -> str:
    """Copies dialogues as prompts and completions, and links the tokenizer."""
    n = BATCH * args.steps
    with (folder / "rows.jsonl").open("w") as out:
        for line in pair_lines(args, n):
            prompt, mark, answer = json.loads(line)["chosen"].rpartition("\n\nAssistant:")
            out.write(json.dumps({"prompt": prompt + mark, "completion": answer}) + "\n")
    (folder / "tokenizer").symlink_to(args.tokenizer.resolve())
    return f"{n} rows, {args.steps} updates"


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Makes the models, and for TRL the rows as we tokenize them, in the order of our plan."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from oumi_pl.data.sft import SFTData

    torch.manual_seed(0)
    for name, shape in (("student", LLAMA), ("teacher", TEACHER | {"initializer_range": 0.1})):
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / name)
    data = our_data(SFTData, folder / "rows.jsonl")
    rows = []
    for i in planned_ids(data):
        example = data.examples("train")[i]
        end = int(example.loss_mask.nonzero()[0][-1]) + 1
        mask = example.loss_mask[:end].astype(int).tolist()
        rows.append({"prompt": "", "input_ids": example.input_ids[:end].tolist(), "completion_mask": mask})
        assert sum(mask) == example.target_tokens == end - mask.index(1)
    write_tokenized(folder, rows)


def run_ours(args: argparse.Namespace, folder: Path, scratch: Path, top_k: int | None) -> Result:
    from oumi_pl.data.sft import SFTData
    from oumi_pl.losses.distillation import JSD
    from oumi_pl.modules import distill

    clock = Clock()
    distill.precompute = clock.before(distill.precompute)  # without loading the teacher, which isn't timed for TRL
    trainer = lightning_trainer(clock, scratch, our_watch(clock))
    module = distill.Distill(
        str(folder / "student"),
        teacher=str(folder / "teacher"),
        top_k=top_k,
        divergence=JSD(BETA),
        optimizer=adamw(),
    )
    trainer.fit(module, our_data(SFTData, folder / "rows.jsonl"))
    return clock.result() | {"top_k": top_k}


def run_trl(args: argparse.Namespace, folder: Path, scratch: Path) -> Result:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    clock, data = Clock(), trl_data(folder)
    tokenizer = data["processing_class"]
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl_counted(GKDTrainer, clock)(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=GKDConfig(lmbda=0.0, beta=BETA, **trl_settings(scratch)),
        callbacks=[trl_watch(clock)],
        **data,
    )
    trainer.train()
    return clock.result()


def differences(one: Result, two: Result) -> Iterator[str]:
    for at, tolerance in NEAR.items() if not (one.get("top_k") or two.get("top_k")) else ():
        ours, theirs = one["losses"][at], two["losses"][at]
        if not abs(ours - theirs) <= tolerance * theirs:
            yield f"losses[{at}] is {ours}, not {theirs}"


BASE = "TRL, all logits"
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    BASE: (run_trl, {}),
    "oumi_pl": (run_ours, {"top_k": None}),
    f"oumi_pl, top {TOP_K} cached": (run_ours, {"top_k": TOP_K}),
}

if __name__ == "__main__":
    Benchmark(
        file=__file__,
        description=__doc__,
        unit="tokens",
        peers=(BASE,),
        cases=CASES,
        arguments=arguments,
        write=write,
        prepare=prepare,
        differences=differences,
    ).main()
