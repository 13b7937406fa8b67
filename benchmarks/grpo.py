"""GRPO: seconds of generating and of training per update, and peak memory: oumi_pl against TRL in one run.

    python benchmarks/grpo.py [--texts train.jsonl] [--tokenizer gpt2] [--steps 6] [--threads 2]

The model is that of `dpo.py`, a random Llama with 17 million parameters in float32. An update has 2 prompts of 128
tokens with 8 completions of 128 tokens each, in one micro-batch, and the loss is DAPO's without a penalty. Both sample
with transformers' `generate` at temperature 1, and nothing ends a completion, so that both do the same work. TRL keeps
its defaults, but for float32, a constant learning rate and gradient checkpointing, which is off for all.

Seconds are means over the updates, the first included, of the wall clock and of processor time, which a busy machine
disturbs less. Generating is what is spent within the sampling calls; training is all the rest. Memory is the process's
peak, and what of it came after the imports. The run stops if the contenders trained on other numbers of tokens. That
losses and gradients are equal on equal completions is asserted in `tests/parity/test_trl_grpo.py`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from contenders import (
    DATA,
    LLAMA,
    MEMORY,
    TEXTS,
    TOKENIZER,
    TRL,
    Benchmark,
    Clock,
    Column,
    Result,
    adamw,
    check_files,
    check_steps,
    common_arguments,
    lightning_trainer,
    save_llama,
)

PROMPTS, GROUP, TOKENS = 2, 8, 128
"""Prompts of an update, completions of each, and tokens of a prompt and of a completion."""


class GRPOClock(Clock):
    """With wall and processor time of what was spent generating in each update."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[float, float]] = []
        self.generating: list[tuple[float, float]] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count as generating."""

        def call(*args: Any, **kwargs: Any) -> Any:
            wall, processor = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls.append((time.perf_counter() - wall, time.process_time() - processor))

        return call

    def end(self) -> None:
        super().end()
        self.generating.append((sum(wall for wall, _ in self.calls), sum(cpu for _, cpu in self.calls)))
        self.calls = []

    def result(self) -> Result:
        """Seconds per update. The first end is the start of training, so the first update is counted too."""
        updates = len(self.ends) - 1
        result: Result = {"tokens": self.tokens, "baseline": self.baseline}
        for i, (suffix, ends) in enumerate({"": self.ends, "_cpu": self.processor}.items()):
            result[f"update{suffix}"] = (ends[-1] - ends[0]) / updates
            result[f"generating{suffix}"] = sum(one[i] for one in self.generating[1:]) / updates
            result[f"training{suffix}"] = result[f"update{suffix}"] - result[f"generating{suffix}"]
        return result


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--texts", type=Path, default=DATA / "gsm8k" / "train.jsonl", help="rows of texts")
    common_arguments(parser, 6, "")


def write(args: argparse.Namespace, folder: Path) -> str:
    """Links the tokenizer."""
    check_steps(args, 0)
    check_files(args, texts=TEXTS, tokenizer=TOKENIZER)
    (folder / "tokenizer").symlink_to(args.tokenizer.resolve())
    return f"{args.steps} updates of {PROMPTS} prompts x {GROUP} completions, {TOKENS} tokens each"


def reward(completion: str, row: Any) -> float:
    """Share of different characters."""
    return len(set(completion)) / 100


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Makes the model, and prompts of exactly `TOKENS` tokens."""
    from transformers import AutoTokenizer

    save_llama(folder, LLAMA)
    wanted = PROMPTS * args.steps
    encoder, prompts, ids = AutoTokenizer.from_pretrained(args.tokenizer), [], []
    for line in args.texts.read_text().splitlines():
        ids += encoder(" ".join(json.loads(line).values()))["input_ids"]
        while len(ids) >= TOKENS and len(prompts) < wanted:
            text, ids = encoder.decode(ids[:TOKENS]), ids[TOKENS:]
            if len(encoder(text)["input_ids"]) == TOKENS:
                prompts.append(text)
    if len(prompts) < wanted:
        sys.exit(f"{args.texts} gives {len(prompts)} prompts of {TOKENS} tokens, and this run takes {wanted}")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def run_ours(args: argparse.Namespace, folder: Path, scratch: Path, **options: Any) -> Result:
    import lightning as L

    from oumi_pl.core.recipe.formats import prompt
    from oumi_pl.data.rollouts import RolloutData
    from oumi_pl.data.sources import Source
    from oumi_pl.losses.policy import DAPOLoss
    from oumi_pl.modules.grpo import GRPO
    from oumi_pl.rollouts.sampling import Generate, Sampling

    clock = GRPOClock()

    class Endless(Generate):
        def sample(self, *args: Any, **kwargs: Any) -> Any:
            return super().sample(*args, **kwargs | {"ends": ()})

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            clock.end()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            clock.end()
            clock.tokens += int(pl_module.last_update["targets"])

    trainer = lightning_trainer(clock, scratch, Watch())
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
    trainer.fit(GRPO(str(folder / "model"), loss=DAPOLoss(0.2, 0.2), optimizer=adamw(), **options), data)
    return clock.result()


def run_trl(args: argparse.Namespace, folder: Path, scratch: Path) -> Result:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = GRPOClock()

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

    settings = {key: value for key, value in TRL.items() if key != "train_sampling_strategy"} | {
        "per_device_train_batch_size": PROMPTS * GROUP,
        "num_generations": GROUP,
        "max_completion_length": TOKENS,
        "temperature": 1.0,
        "loss_type": "dapo",
        "disable_dropout": True,
    }
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
    return clock.result()


def differences(one: Result, two: Result) -> Iterator[str]:
    if one["tokens"] != two["tokens"]:
        yield f"it trained on {one['tokens']} tokens, not {two['tokens']}"


BASE = "TRL"
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    BASE: (run_trl, {}),
    "oumi_pl": (run_ours, {}),
    "oumi_pl, prompts 8 times": (run_ours, {"share_prompt": False}),
}
SECONDS = {
    f"{what}{suffix}": Column(title, ratio=-1)
    for what, short in (("generating", "generate s"), ("training", "train s"), ("update", "update s"))
    for suffix, title in (("", short), ("_cpu", "CPU s"))
}
TABLE = SECONDS | MEMORY | {"tokens": Column("tokens", ",", 0)}

if __name__ == "__main__":
    Benchmark(
        file=__file__,
        description=__doc__,
        unit="",
        peers=(BASE,),
        cases=CASES,
        arguments=arguments,
        write=write,
        prepare=prepare,
        differences=differences,
        columns=TABLE,
        compared="{peer} as a multiple; memory as a share of {peer}'s",
    ).main()
