"""SFT steps per second and peak memory: oumi_pl against TRL on the same rows, model and machine, in one run.

    python benchmarks/sft.py [--rows train.jsonl] [--steps 12] [--threads 2] [--shape 135m]

Each engine trains the same random Llama (17m: 4 layers x 256; 135m: the shape of SmolLM2; both with a vocabulary of
GPT-2's size) on the same prompt/completion rows with the same tokenizer, in a process of its own: `packed`, or
`padded`, which means eight rows a step without packing: TRL pads them, ours computes them side by side. Tokens per
second are all tokens of the steps after the first three, divided by the time of these steps, waiting for data
included; memory is the process's peak. TRL's defaults recompute activations in the backward pass; ours is measured with
recomputation as well.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

from contenders import SHAPES, VOCABULARY, Result, check_steps, child_arguments, contender, report, versions

WARMUP = 3
MAX_LENGTH = 1024
LLAMA = {
    "model_type": "llama",
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY,
}
ENGINES = {
    "oumi_pl": {},
    "trl": {"gradient_checkpointing": False},
    "oumi_pl (recomputes)": {"gradient_checkpointing": True},
    "trl (its defaults)": {},
}
CASES = ("packed", "padded")


def make_rows(file: Path, n: int = 2000) -> None:
    """Rows of GSM8K's lengths, when no file is given."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8))) for _ in range(3000)]
    text = lambda low, high: " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))  # noqa: E731
    with file.open("w") as out:
        for _ in range(n):
            out.write(json.dumps({"prompt": text(10, 40), "completion": " " + text(20, 80)}) + "\n")


def make_tokenizer(directory: Path, rows: Path) -> None:
    """A byte-level BPE trained on the rows, padded with unused tokens to GPT-2's size."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((row for row in rows.read_text().splitlines()), vocab_size=8000, special_tokens=["<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        directory
    )


def prepare(folder: Path, rows: Path | None, tokenizer: Path | None) -> None:
    """Writes `rows.jsonl` and `tokenizer`: the given ones, or made ones."""
    if rows:
        given = [json.loads(line) for line in rows.read_text().splitlines()]
        keys = ("prompt", "completion") if "prompt" in given[0] else ("question", "answer")
        lines = [json.dumps({"prompt": r[keys[0]] + "\n", "completion": r[keys[1]]}) + "\n" for r in given]
        (folder / "rows.jsonl").write_text("".join(lines))
    else:
        make_rows(folder / "rows.jsonl")
    if tokenizer:
        (folder / "tokenizer").symlink_to(tokenizer.resolve())
    else:
        make_tokenizer(folder / "tokenizer", folder / "rows.jsonl")


def run_ours(folder: Path, packing: bool, steps: int, config: dict, **options: bool) -> Result:
    import lightning as L
    import torch

    from oumi_pl.data.sft import SFTData
    from oumi_pl.modules.sft import SFT

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.tokens = 0

        def on_train_batch_end(self, trainer, pl_module, *_args) -> None:
            self.times.append(time.perf_counter())
            if len(self.times) > WARMUP:
                self.tokens += pl_module.last_update["tokens"]

    clock = Clock()
    L.seed_everything(0)
    data = SFTData(
        str(folder / "rows.jsonl"),
        tokenizer=str(folder / "tokenizer"),
        max_length=MAX_LENGTH,
        packing=packing,
        batch_size=2 if packing else 8,
        group_by_length=False,
    )
    module = SFT(config=config, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4), **options)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[clock],
    )
    trainer.fit(module, data)
    return {"tokens_per_second": clock.tokens / (clock.times[-1] - clock.times[WARMUP - 1])}


def run_trl(folder: Path, packing: bool, steps: int, config: dict, **options: bool) -> Result:
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.tokens: list[float] = []

        def on_step_end(self, args, state, control, **kwargs) -> None:
            self.times.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if logs and "num_tokens" in logs:
                self.tokens.append(logs["num_tokens"])

    clock = Clock()
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=2 if packing else 8,
        packing=packing,
        max_length=MAX_LENGTH,
        use_cpu=True,
        bf16=False,
        learning_rate=1e-4,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    tokens = clock.tokens[-1] - clock.tokens[WARMUP - 1]
    return {"tokens_per_second": tokens / (clock.times[-1] - clock.times[WARMUP - 1])}


def child(args: argparse.Namespace) -> None:
    """Runs the case and the engine that `main` names, "packed: trl"."""
    import torch

    torch.set_num_threads(args.threads)
    case, _, engine = args.child.partition(": ")
    run = run_ours if engine.startswith("oumi_pl") else run_trl
    report(run(args.folder, case == "packed", args.steps, LLAMA | SHAPES[args.shape], **ENGINES[engine]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="jsonl of question/answer or prompt/completion rows")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer")
    parser.add_argument("--shape", choices=SHAPES, default="17m")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    child_arguments(parser)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    check_steps(args, WARMUP)
    print(f"{versions(('torch', 'transformers', 'trl', 'lightning'), args.threads)}; Llama {args.shape}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, args.rows, args.tokenizer)
        for case in args.cases:
            ours: Result = {}
            for engine in ENGINES:
                got = contender(__file__, f"{case}: {engine}", args, folder)
                ours = got if engine.startswith("oumi_pl") else ours
                speed, memory = (ours[k] / got[k] for k in ("tokens_per_second", "peak"))
                line = f"{case:8} {engine:20} {got['tokens_per_second']:9,.0f} tokens/s  {got['peak']:5.2f} GB"
                compared = f"   ours is {speed:.2f}x as fast, with {memory:.2f}x the memory" if got is not ours else ""
                print(line + compared, flush=True)


if __name__ == "__main__":
    main()
