"""GRPO: seconds of generating and of training per update, and peak memory: oumi_pl against TRL in one run.

    python benchmarks/grpo.py [--texts train.jsonl] [--tokenizer gpt2] [--steps 6] [--threads 2]

The model is that of `dpo.py`, a random Llama with 17 million parameters in float32. An update has 2 prompts of 128
tokens with 8 completions of 128 tokens each, in one micro-batch, and the loss is DAPO's without a penalty. Both sample
with transformers' `generate` at temperature 1, and nothing ends a completion, so that both do the same work. TRL keeps
its defaults, but for float32, a constant learning rate and gradient checkpointing, which is off for all.

Seconds are means over the updates after the first, of the wall clock and of processor time, which a busy machine
disturbs less. Generating is what is spent within the sampling calls; training is all the rest. Memory is the process's
peak, and what of it came after the imports. The run stops if the contenders trained on other numbers of tokens. That
losses and gradients are equal on equal completions is asserted in `tests/parity/test_trl_grpo.py`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo import CLIP, DATA, LLAMA, LR, TRL, peak_memory

Result = dict[str, Any]
PROMPTS, GROUP, TOKENS = 2, 8, 128
"""Prompts of an update, completions of each, and tokens of a prompt and of a completion."""
BASE = "TRL"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("trl", {}),
    "oumi_pl": ("oumi_pl", {}),
    "oumi_pl, prompts 8 times": ("oumi_pl", {"share_prompt": False}),
}
COLUMNS = {
    "generating s": "generating", "CPU s": "generating_cpu", "training s": "training", "CPU s ": "training_cpu",
    "update s": "update", "CPU s  ": "update_cpu", "peak GB": "peak", "added GB": "added",
}  # fmt: skip


class Clock:
    """Wall and processor time of the updates, and of what was spent generating in each."""

    def __init__(self) -> None:
        self.updates: list[tuple[float, float]] = []
        self.calls: list[tuple[float, float]] = []
        self.generating: list[tuple[float, float]] = []
        self.tokens = 0

    @staticmethod
    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count as generating."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls.append(tuple(b - a for a, b in zip(start, self.now(), strict=True)))  # type: ignore[arg-type]

        return call

    def end(self) -> None:
        self.updates.append(self.now())
        self.generating.append((sum(wall for wall, _ in self.calls), sum(cpu for _, cpu in self.calls)))
        self.calls = []

    def result(self) -> Result:
        updates = len(self.updates) - 1
        result: Result = {"tokens": self.tokens}
        for i, suffix in enumerate(("", "_cpu")):
            result[f"update{suffix}"] = (self.updates[-1][i] - self.updates[0][i]) / updates
            result[f"generating{suffix}"] = sum(one[i] for one in self.generating[1:]) / updates
            result[f"training{suffix}"] = result[f"update{suffix}"] - result[f"generating{suffix}"]
        return result


def reward(completion: str, row: Any) -> float:
    """Share of different characters."""
    return len(set(completion)) / 100


def prepare(texts: Path, tokenizer: Path, steps: int, folder: Path) -> None:
    """Makes the model, and prompts of exactly so many tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder / "model")
    encoder, prompts, ids = AutoTokenizer.from_pretrained(tokenizer), [], []
    for line in texts.read_text().splitlines():
        ids += encoder(" ".join(json.loads(line).values()))["input_ids"]
        while len(ids) >= TOKENS and len(prompts) < PROMPTS * steps:
            text, ids = encoder.decode(ids[:TOKENS]), ids[TOKENS:]
            if len(encoder(text)["input_ids"]) == TOKENS:
                prompts.append(text)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


# ---- the contenders


def run_ours(folder: Path, scratch: Path, **options: Any) -> Result:
    import lightning as L
    import torch

    from oumi_pl.callbacks.progress import ProgressLine
    from oumi_pl.callbacks.start import Start
    from oumi_pl.callbacks.stopping import LastStep
    from oumi_pl.callbacks.throughput import Throughput
    from oumi_pl.config.cli import TRAINER_DEFAULTS
    from oumi_pl.core.recipe.formats import prompt
    from oumi_pl.data.rollouts import RolloutData
    from oumi_pl.data.sources import Source
    from oumi_pl.losses.policy import DAPOLoss
    from oumi_pl.modules.grpo import GRPO
    from oumi_pl.rollouts.sampling import Generate, Sampling
    from oumi_pl.runs.metrics import MetricsCSV

    baseline, clock = peak_memory(), Clock()

    class Endless(Generate):
        def sample(self, *args: Any, **kwargs: Any) -> Any:
            return super().sample(*args, **kwargs | {"ends": ()})

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            clock.end()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            clock.end()
            clock.tokens += int(pl_module.last_update["targets"])

    L.seed_everything(0)
    metrics = MetricsCSV()
    metrics.open(scratch / "metrics.csv")
    adamw = partial(torch.optim.AdamW, lr=LR, weight_decay=0.0)
    data = RolloutData(
        Source(str(folder / "prompts.jsonl"), format=prompt),
        tokenizer=str(folder / "tokenizer"),
        template="plain",
        reward=reward,
        completions=GROUP,
        sampling=Sampling(TOKENS),
        engine=Endless(),
        max_length=2 * TOKENS,
        batch_size=PROMPTS,
        seed=0,
    )
    data.engine.sample = clock.timed(data.engine.sample)  # type: ignore[method-assign]
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=metrics,
        enable_checkpointing=False,
        gradient_clip_val=CLIP,
        callbacks=[Start(), LastStep(), Throughput(), ProgressLine(), Watch()],
        **TRAINER_DEFAULTS,
    )
    trainer.fit(GRPO(str(folder / "model"), loss=DAPOLoss(0.2, 0.2), optimizer=adamw, **options), data)
    return clock.result() | {"baseline": baseline}


def run_trl(folder: Path, scratch: Path) -> Result:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    baseline, clock = peak_memory(), Clock()

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.end()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    class Counted(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            clock.tokens += int(inputs["completion_mask"].sum())
            return super()._compute_loss(model, inputs)

    def rewards(completions: list[str], **_: Any) -> list[float]:
        return [reward(completion, None) for completion in completions]

    settings = {key: value for key, value in TRL.items() if key != "train_sampling_strategy"}
    settings |= {"learning_rate": LR, "max_grad_norm": CLIP, "weight_decay": 0.0, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": PROMPTS * GROUP, "num_generations": GROUP, "num_train_epochs": 1}
    settings |= {"max_completion_length": TOKENS, "temperature": 1.0, "loss_type": "dapo", "disable_dropout": True}
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    trainer = Counted(
        model=str(folder / "model"),
        reward_funcs=rewards,
        args=GRPOConfig(output_dir=str(scratch / "trl"), **settings),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        callbacks=[Watch()],
    )
    trainer.eos_token_ids, trainer.generation_config.eos_token_id = [], None
    trainer.generation_kwargs["eos_token_id"] = None
    trainer._generate_single_turn = clock.timed(trainer._generate_single_turn)
    trainer.train()
    return clock.result() | {"baseline": baseline}


# ---- the comparison


def child(name: str, threads: int, folder: Path) -> None:
    import torch

    torch.set_num_threads(threads)
    engine, options = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
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
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def ratios(results: dict[str, Result]) -> Iterator[str]:
    yield f"{BASE} as a multiple; memory as a share of {BASE}'s"
    for name, got in results.items():
        if name != BASE:
            parts = [
                got[key] / results[BASE][key] if "GB" in column else results[BASE][key] / got[key]
                for column, key in COLUMNS.items()
            ]
            yield f"{name:26}" + "".join(f"{part:13.2f}x" for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=DATA / "gsm8k" / "train.jsonl", help="rows of texts")
    parser.add_argument("--tokenizer", type=Path, default=DATA / "gpt2-tokenizer", help="directory")
    parser.add_argument("--steps", type=int, default=6, help="updates; fewer to try it out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.threads, args.folder)
        return
    for missing in (path for path in (args.texts, args.tokenizer) if not path.exists()):
        sys.exit(f"{missing} is missing: --texts takes a .jsonl of texts, --tokenizer GPT-2's directory")
    if args.steps < 2:
        sys.exit("--steps: at least 2, since the first update is not timed")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "lightning"))
    machine = platform.processor() or platform.machine()
    print(f"{versions}, python {platform.python_version()}; {machine}, {args.threads} threads")
    print(f"{args.steps} updates of {PROMPTS} prompts x {GROUP} completions, {TOKENS} tokens each", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "tokenizer").symlink_to(args.tokenizer.resolve())
        prepare(args.texts, args.tokenizer, args.steps, folder)
        print(" " * 26 + "".join(f"{column.strip():>14}" for column in COLUMNS) + f"{'tokens':>10}")
        results: dict[str, Result] = {}
        for name in CASES:
            results[name] = got = in_a_process(name, args.threads, folder)
            print(f"{name:26}" + "".join(f"{got[key]:14.2f}" for key in COLUMNS.values()) + f"{got['tokens']:10,}")
            sys.stdout.flush()
            if got["tokens"] != results[BASE]["tokens"]:
                sys.exit(f"{name} does other work than {BASE}: {got['tokens']} and {results[BASE]['tokens']} tokens")
    print("\n".join(ratios(results)))


if __name__ == "__main__":
    main()
