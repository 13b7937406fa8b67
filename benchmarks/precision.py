"""SFT on a CPU in float32, bf16-mixed and bf16-true: tokens per second, peak memory, and the loss curve, in one run.

    python benchmarks/precision.py [--rows train.jsonl] [--tokenizer FOLDER] [--steps 12] [--threads 2] [--shape 135m]

Each precision trains the same random Llama of `sft.py` on the same packed rows in the same order, in a process of its
own, one after the other. Tokens per second are the median over the updates after the first three; `sft.py` divides all
their tokens by all their time. With 100 updates or more, float32 is run with a second order of the rows as well: how
far the losses of two such runs are apart says what a difference between precisions means. They are compared as means of
20 updates over the second half of the runs. It needs a CPU that multiplies bfloat16 (avx512_bf16 or AMX).
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from contenders import SHAPES, Result, check_steps, child_arguments, contender, report, versions
from sft import LLAMA, MAX_LENGTH, WARMUP, prepare

RUNS = {"32-true": ("32-true", 0), "bf16-mixed": ("bf16-mixed", 0), "bf16-true": ("bf16-true", 0)}
OTHER_SEED = {"32-true, other seed": ("32-true", 1)}
WINDOW = 20


def run(folder: Path, precision: str, seed: int, steps: int, shape: str) -> Result:
    import lightning as L
    import torch

    from oumi_pl.data.sft import SFTData
    from oumi_pl.modules.sft import SFT

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.tokens: list[int] = []
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer, pl_module, *_args) -> None:
            self.times.append(time.perf_counter())
            self.tokens.append(pl_module.last_update["tokens"])
            update = pl_module.last_update
            self.losses.append(update["loss"] / update["targets"])

    clock = Clock()
    L.seed_everything(0)
    data = SFTData(
        str(folder / "rows.jsonl"),
        tokenizer=str(folder / "tokenizer"),
        max_length=MAX_LENGTH,
        packing=True,
        batch_size=2,
        seed=seed,
    )
    module = SFT(config=LLAMA | SHAPES[shape], optimizer=lambda params: torch.optim.AdamW(params, lr=5e-4))
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[clock],
    )
    trainer.fit(module, data)
    seconds = [b - a for a, b in zip(clock.times[WARMUP - 1 :], clock.times[WARMUP:], strict=False)]
    per_second = [tokens / s for tokens, s in zip(clock.tokens[WARMUP:], seconds, strict=True)]
    return {"tokens_per_second": statistics.median(per_second), "losses": clock.losses}


def child(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    precision, seed = (RUNS | OTHER_SEED)[args.child]
    report(run(args.folder, precision, seed, args.steps, args.shape))


def apart(losses: list[float], others: list[float]) -> str:
    """How far two loss curves are apart."""
    means = lambda values: [statistics.mean(values[i : i + WINDOW]) for i in range(0, len(values) - WINDOW + 1, WINDOW)]  # noqa: E731
    half = len(losses) // 2
    differences = [abs(a - b) for a, b in zip(means(losses[half:]), means(others[half:]), strict=True)]
    return f"losses {statistics.mean(differences):.4f} from float32's, {max(differences):.4f} at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="jsonl of question/answer or prompt/completion rows")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer")
    parser.add_argument("--shape", choices=SHAPES, default="17m")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    child_arguments(parser)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    check_steps(args, WARMUP)
    print(f"{versions(('torch', 'transformers', 'lightning'), args.threads)}; Llama {args.shape}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, args.rows, args.tokenizer)
        base: Result = {}
        long = args.steps >= 100
        for name in RUNS | (OTHER_SEED if long else {}):
            result = contender(__file__, name, args, folder)
            base = base or result
            speed, memory = (result[k] / base[k] for k in ("tokens_per_second", "peak"))
            line = f"{name:20} {result['tokens_per_second']:7,.0f} tokens/s ({speed:.2f}x)"
            line += f"  {result['peak']:5.2f} GB ({memory:.2f}x)"
            if long and result is not base:
                line += f"  {apart(result['losses'], base['losses'])}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
