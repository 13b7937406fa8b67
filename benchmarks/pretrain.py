"""Time of a pretraining step: `fit` against a bare PyTorch loop with the same arithmetic, and the machine's own rate.

    python benchmarks/pretrain.py [--steps 20] [--rounds 1] [--threads 2]

Both train the same random Llama on the same rows with the same loss, AdamW and clipping, in one process, and take turns
step by step, so that whatever else the machine does falls on both. The bare loop holds its batches in memory and does
nothing but forward, backward, clip and step; `fit` reads shards, normalises by target tokens, logs, measures its speed
and keeps its place. The ratio is the median over the pairs of steps. The last column is what the arithmetic of a step
(6 FLOPs per parameter and token, and the attention's) comes to in the bare loop's and in our time, as a share of the
rate at which the machine multiplies large float32 matrices.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median

from contenders import versions

WARMUP = 3
VOCABULARY = 8192
CASES = {"1m": (4, 128), "10m": (4, 512), "30m": (4, 512)}
"""Shape -> rows and tokens per step."""


def parts(folder: Path, shape: str):
    """Module and data that both engines train."""
    import lightning as L
    import torch

    from oumi_pl.data.pretrain import PretrainData
    from oumi_pl.data.tokenizers import ByteTokenizer
    from oumi_pl.modules.pretrain import Pretrain

    L.seed_everything(0)
    rows, length = CASES[shape]
    data = PretrainData(
        str(folder / "text.txt"),
        tokenizer=ByteTokenizer(chat_template=False),
        max_length=length,
        batch_size=rows,
        exhausted="restart",
    )
    module = Pretrain(
        shape=shape,  # type: ignore[arg-type]
        config={"vocab_size": VOCABULARY},
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    )
    return module, data


def run(folder: Path, shape: str, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, ours and the bare loop's, one after the other."""
    import lightning as L

    from oumi_pl.callbacks.throughput import Throughput

    step = bare_step(folder, shape, steps)
    times: dict[str, list[float]] = {"fit": [], "bare": []}

    class TakeTurns(L.Callback):
        begun = 0.0

        def on_train_batch_end(self, *_args) -> None:
            ended = time.perf_counter()
            times["fit"].append(ended - self.begun)
            step()
            self.begun = time.perf_counter()
            times["bare"].append(self.begun - ended)

    module, data = parts(folder, shape)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[Throughput(), TakeTurns()],
    )
    trainer.fit(module, data)
    return {name: measured[WARMUP:] for name, measured in times.items()}


def bare_step(folder: Path, shape: str, steps: int) -> Callable[[], None]:
    """A model, an optimizer and batches in memory; each call is a step of a loop without a framework."""
    import torch

    from oumi_pl.optim import parameter_groups

    module, data = parts(folder, shape)
    data.setup("fit")
    batches = iter([batch for batch, _ in zip(data.train_dataloader(), range(steps), strict=False)])
    model = module.build(data.tokenizer)
    optimizer = module.optimizer(parameter_groups(model.named_parameters(), model.vocabulary_weights))

    def step() -> None:
        out = model(next(batches), lambda states: states.loss_sum(module.loss))
        (out.loss_sum / out.target_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def run_matmul() -> list[float]:
    """FLOP/s of a product of two large matrices."""
    import torch

    n = 1536
    a, b = torch.randn(n, n), torch.randn(n, n)
    rates = []
    for _round in range(12):
        start = time.perf_counter()
        torch.mm(a, b)
        rates.append(2 * n**3 / (time.perf_counter() - start))
    return rates[WARMUP:]


def flops(folder: Path, shape: str) -> float:
    """Of forward and backward, with causal attention counted by half of its square."""
    module, data = parts(folder, shape)
    model = module.build(data.tokenizer)
    rows, length = CASES[shape]
    config = model.base.config
    attention = 6 * config.num_hidden_layers * config.hidden_size * length
    return rows * length * (6 * sum(p.numel() for p in model.parameters()) + attention)


def child(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    if args.child == "flops":
        print("RESULT", json.dumps(flops(args.folder, args.shape)))
        return
    result = run_matmul() if args.child == "matmul" else run(args.folder, args.shape, args.steps)
    print("RESULT", json.dumps(result))


def call(what: str, shape: str, args: argparse.Namespace, folder: Path):
    command = [sys.executable, __file__, "--child", what, "--shape", shape, "--folder", str(folder)]
    command += ["--steps", str(args.steps * (10 if shape == "1m" else 1)), "--threads", str(args.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "OUMI_PL_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stderr[-3000:])
    return json.loads(lines[0].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="per round; ten times as many of the smallest model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    for hidden in ("child", "shape"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    print(versions(("torch", "transformers", "lightning"), args.threads) + ", float32")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "text.txt").write_text("".join(f"line {i * i % 7919} of many\n" for i in range(40_000)))
        rate = median(call("matmul", "1m", args, folder))
        print(f"the machine multiplies matrices of 1536 x 1536 at {rate / 1e9:.0f} GFLOP/s")
        for shape, (rows, length) in CASES.items():
            work = call("flops", shape, args, folder)
            rounds = [call("run", shape, args, folder) for _ in range(args.rounds)]
            bare, fit = (median(chain.from_iterable(times[name] for times in rounds)) for name in ("bare", "fit"))
            ratio = median(b / a for times in rounds for a, b in zip(times["bare"], times["fit"], strict=True))
            print(
                f"{shape:4} {rows} x {length:4}: bare loop {1000 * bare:7.1f} ms, fit {1000 * fit:7.1f} ms: "
                f"{ratio:.3f}x ({1000 * (fit - bare):+.1f} ms); {work / bare / rate:.0%} and {work / fit / rate:.0%} "
                f"of the machine's rate",
                flush=True,
            )


if __name__ == "__main__":
    main()
