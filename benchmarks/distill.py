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
How rates and memory are measured: `contenders.py`.
"""

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from contenders import (
    BATCH,
    EMPTY,
    LLAMA,
    LR,
    MAX_LENGTH,
    PAIRS,
    TOKENIZER,
    TRL,
    Benchmark,
    Clock,
    Result,
    check,
    lightning_trainer,
    pair_arguments,
)

BETA, TOP_K = 0.5, 64
NEAR = {0: 1e-4, -1: 1e-2}
"""By how much the first and the last loss may differ, as a share: rounding grows from one update to the next."""
TEACHER = LLAMA | {"hidden_size": 512, "intermediate_size": 2048}


def arguments(parser: argparse.ArgumentParser) -> None:
    pair_arguments(parser, 30, f" of {BATCH} rows")


def write(args: argparse.Namespace, folder: Path) -> str:
    """Copies dialogues as prompts and completions."""
    check(args, pairs=PAIRS, tokenizer=TOKENIZER)
    with gzip.open(args.pairs, "rt") as lines:
        texts = [json.loads(line)["chosen"] for line in lines if not EMPTY.search(line)]
    with (folder / "rows.jsonl").open("w") as out:
        for text in islice(texts, BATCH * args.steps):
            prompt, mark, answer = text.rpartition("\n\nAssistant:")
            out.write(json.dumps({"prompt": prompt + mark, "completion": answer}) + "\n")
    (folder / "tokenizer").symlink_to(args.tokenizer.resolve())
    return f"{BATCH * args.steps} rows, {args.steps} updates"


def our_data(folder: Path) -> Any:
    from oumi_pl.data.sft import SFTData

    names = {"tokenizer": str(folder / "tokenizer"), "template": "plain"}
    return SFTData(str(folder / "rows.jsonl"), **names, max_length=MAX_LENGTH, batch_size=BATCH, seed=0)


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Makes the models, and for TRL the rows as we tokenize them, in the order of our plan."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    for name, shape in (("student", LLAMA), ("teacher", TEACHER | {"initializer_range": 0.1})):
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / name)
    data = our_data(folder)
    data.prepare_data()
    data.setup("fit")
    rows = []
    for i in data.plan(0).example_ids:
        example = data.examples("train")[int(i)]
        end = int(example.loss_mask.nonzero()[0][-1]) + 1
        mask = example.loss_mask[:end].astype(int).tolist()
        rows.append({"prompt": "", "input_ids": example.input_ids[:end].tolist(), "completion_mask": mask})
        assert sum(mask) == example.target_tokens == end - mask.index(1)
    (folder / "tokenized.json").write_text(json.dumps(rows))


def run_ours(args: argparse.Namespace, folder: Path, scratch: Path, top_k: int | None) -> Result:
    import lightning as L
    import torch

    from oumi_pl.losses.distillation import JSD
    from oumi_pl.modules.distill import Distill

    clock = Clock()

    class Timed(Distill):
        def begin_fit(self) -> None:
            start = time.perf_counter()
            super().begin_fit()  # where the teacher is opened, or its distributions are computed
            clock.beforehand = time.perf_counter() - start

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            clock.begin()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            clock.end(int(pl_module.last_update["tokens"]))
            clock.losses.append(float(trainer.callback_metrics["train/loss"]))

    trainer = lightning_trainer(clock, scratch, Watch())
    module = Timed(
        str(folder / "student"),
        teacher=str(folder / "teacher"),
        top_k=top_k,
        divergence=JSD(BETA),
        optimizer=partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
    )
    trainer.fit(module, our_data(folder))
    return clock.result() | {"top_k": top_k}


def run_trl(args: argparse.Namespace, folder: Path, scratch: Path) -> Result:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    clock, tokens = Clock(), []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end(sum(tokens))
            tokens.clear()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.losses.append(logs["loss"])

    class Counted(GKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens.append(int(inputs["attention_mask"].sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = TRL | {"per_device_train_batch_size": BATCH, "max_length": MAX_LENGTH}
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = Counted(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=GKDConfig(output_dir=str(scratch / "trl"), lmbda=0.0, beta=BETA, **settings),
        train_dataset=Dataset.from_list(json.loads((folder / "tokenized.json").read_text())),
        processing_class=tokenizer,
        callbacks=[Watch()],
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
    Benchmark(__file__, __doc__, "tokens", (BASE,), CASES, arguments, write, prepare, differences).main()
