"""How far rewards take a model that learned from bad answers: quickstart/grpo with several seeds, and a picture.

    python benchmarks/grpo_curve.py [--seeds 3] [--threads 2] [--out benchmarks/results]

Each seed trains its own initial model (`quickstart/grpo_start`: two in ten of its demonstrations spell the word
forwards, and four have a wrong letter), then `quickstart/grpo` from there. Measured on the 240 held-out questions,
whose words are in no training row: the share of right answers, sampled at temperature 1 as in training (four each), and
greedy (every five updates).
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from contenders import versions

START, RECIPE = "quickstart/grpo_start", "quickstart/grpo"
EVERY = 5
"""Updates between two measurements."""
TARGET = 0.9
Curve = dict[int, float]
"""Updates -> share of right answers."""


def run_command(command: list[str], threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])


def fit(recipe: str, folder: Path, threads: int, *options: str) -> Path:
    """Trains in a process of its own; returns the run folder."""
    name = recipe.rpartition("/")[2]
    command = [sys.executable, "-m", "oumi_pl", "fit", "--config", recipe, "--runs_dir", str(folder), "--name", name]
    run_command([*command, *options], threads)
    return folder / name


def column(run: Path, name: str) -> Curve:
    with (run / "metrics.csv").open() as lines:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(lines) if row.get(name)}


def sampled_score(run: Path, folder: Path, threads: int) -> float:
    """The share of right answers to the held-out questions, four samples of each."""
    file = folder / "answers.jsonl"
    file.unlink(missing_ok=True)
    sampling = ["--samples", "4", "--temperature", "1", "--seed", "1", "--max_new_tokens", "12"]
    files = ["--file", "bundled/reversed/heldout", "--output", str(file), "--metric", "exact_match"]
    command = [sys.executable, "-m", "oumi_pl", "generate", "--model", str(run / "model"), *files, *sampling]
    run_command(command, threads)
    scores = [json.loads(line)["exact_match"] for line in file.read_text().splitlines()]
    return sum(scores) / len(scores)


def curves(seed: int, threads: int) -> tuple[Curve, Curve, tuple[float, float]]:
    """Greedy answers of a seed (of the initial model: update 0), samples of training, samples before and after."""
    seeded = ("--seed_everything", str(seed))
    with tempfile.TemporaryDirectory() as folder:
        start = fit(START, Path(folder), threads, *seeded)
        options = ("--model.model", str(start / "model"), "--val_every", str(EVERY), "--report", "false")
        run = fit(RECIPE, Path(folder), threads, *seeded, *options)
        initial = column(start, "val/exact_match")
        greedy = {0: initial[max(initial)]} | column(run, "val/exact_match")
        before, after = (sampled_score(trained, Path(folder), threads) for trained in (start, run))
        return greedy, column(run, "train/reward"), (before, after)


def reached(curve: Curve) -> int | None:
    """The first update from which on the curve never falls below the target."""
    below = [step for step, value in curve.items() if value < TARGET]
    above = [step for step in curve if step > max(below, default=-1)]
    return min(above, default=None)


def picture(runs: list[tuple[Curve, Curve]], out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (greedy, training) in enumerate(runs):
        names = ("held-out questions, greedy", "training questions, sampled") if not number else (None, None)
        axes.plot(list(training), list(training.values()), color="tab:gray", linewidth=0.8, alpha=0.7, label=names[1])
        axes.plot(list(greedy), list(greedy.values()), color="tab:blue", marker="o", markersize=3, label=names[0])
    axes.axhline(TARGET, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="updates", ylabel="share of right answers", xlim=(0, None), ylim=(0, 1.02))
    axes.set_title(f"{RECIPE}, {len(runs)} seeds")
    axes.legend(loc="lower right")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the picture")
    args = parser.parse_args()
    print(versions(("torch", "transformers", "lightning"), args.threads))
    print(f"{'seed':>4}  {'sampled':>14}  {'greedy':>14}  updates until greedy answers stay above {TARGET:.0%}")
    runs = []
    for seed in range(1, args.seeds + 1):
        greedy, training, (before, after) = curves(seed, args.threads)
        runs.append((greedy, training))
        ends = f"{before:.1%} to {after:.1%}", f"{greedy[0]:.1%} to {greedy[max(greedy)]:.1%}"
        steps = reached(greedy)
        print(f"{seed:4}  {ends[0]:>14}  {ends[1]:>14}  {'never' if steps is None else steps}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    picture(runs, args.out / "grpo_curve.png")
    print(f"picture -> {args.out / 'grpo_curve.png'}")


if __name__ == "__main__":
    main()
