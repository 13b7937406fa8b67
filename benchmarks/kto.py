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
    TRL,
    Benchmark,
    Clock,
    Column,
    Result,
    far,
    lightning_trainer,
    pair_arguments,
    write_pairs,
)

NEAR = {("losses", 0): 1e-4, ("losses", -1): 1e-2, ("kls", 1): 1e-2}
"""By how much losses and divergences may differ: an update's rounding errors grow from one to the next."""


def arguments(parser: argparse.ArgumentParser) -> None:
    pair_arguments(parser, 75, f" of {BATCH} rows")


def write(args: argparse.Namespace, folder: Path) -> str:
    """Copies pairs, of which each becomes two rows."""
    write_pairs(args, folder, BATCH * args.steps // 2)
    return f"{BATCH * args.steps} rows, {args.steps} updates"


class KTOClock(Clock):
    """With the divergences."""

    def __init__(self) -> None:
        super().__init__()
        self.kls: list[float] = []

    def result(self) -> Result:
        return super().result() | {"kl": self.kls[-1]}


def our_data(folder: Path) -> Any:
    from oumi_pl.data.kto import KTOData

    # GPT-2's tokenizer has no chat template, and the plain one adds no token
    names = {"tokenizer": str(folder / "tokenizer"), "template": "plain", "overflow": "keep_start"}
    return KTOData(str(folder / "pairs.jsonl"), **names, max_length=MAX_LENGTH, batch_size=BATCH, seed=0)


def prepare(args: argparse.Namespace, folder: Path) -> None:
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


def run_ours(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    import lightning as L
    import torch

    from oumi_pl.callbacks.advice import PreferenceWarnings
    from oumi_pl.modules.kto import KTO

    clock = KTOClock()

    class Timed(KTO):
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
            clock.kls.append(float(trainer.callback_metrics["train/kl"]))
            clock.tokens += int(pl_module.last_update["tokens"])

    trainer = lightning_trainer(clock, scratch, PreferenceWarnings(), Watch())
    adamw = partial(torch.optim.AdamW, lr=LR, weight_decay=0.0)
    module = Timed(str(folder / "model"), optimizer=adamw, **options)
    trainer.fit(module, our_data(folder))
    return clock.result()


def run_trl(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import KTOConfig, KTOTrainer

    clock = KTOClock()

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end(BATCH)

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

    settings = TRL | options
    settings |= {"per_device_train_batch_size": BATCH, "max_length": MAX_LENGTH}
    trainer = Timed(
        model=str(folder / "model"),
        args=KTOConfig(output_dir=str(scratch / "trl"), **settings),
        train_dataset=Dataset.from_list(json.loads((folder / "tokenized.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        callbacks=[Watch()],
    )
    trainer.train()
    return clock.result()


def differences(one: Result, two: Result) -> Iterator[str]:
    """Losses and divergences. (Before the second update, every model's loss is 0.5.)"""
    return far(one, two, NEAR)


BASE, PRECOMPUTED = "TRL", "TRL, precomputed"
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    BASE: (run_trl, {}),
    PRECOMPUTED: (run_trl, {"precompute_ref_log_probs": True}),
    "oumi_pl": (run_ours, {}),
    "oumi_pl, online": (run_ours, {"reference": "online"}),
}
TABLE = COLUMNS | {"tokens": Column("tokens", ",", 0)} | LOSS | {"kl": Column("last kl", ".4f", 0)}

if __name__ == "__main__":
    data = (arguments, write, prepare, differences)
    Benchmark(__file__, __doc__, "rows", (BASE, PRECOMPUTED), CASES, *data, columns=TABLE).main()
