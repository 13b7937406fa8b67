"""How many updates a student needs with a teacher, and with cross-entropy alone, to predict held-out text as well.

    python benchmarks/distill_curve.py [--seeds 3] [--threads 2] [--runs_dir runs] [--out benchmarks/results]

The student of `quickstart/distill` (443,008 parameters) is trained as the recipe says, from the teacher of
`quickstart/pretrain` (918,656 parameters, trained first if it has no finished run in `--runs_dir`), and with
cross-entropy alone: on the same rows, a tenth of the text that the teacher has read, from the same weights, with the
same optimizer, for as many and for three times as many updates. The schedule has the length of each run. Measured is
the held-out cross-entropy of the next token in nats, which for cross-entropy alone is the loss itself. Both kinds have
the learning rate of 1e-3, 2e-3 and 4e-3 whose lowest cross-entropy is the lowest, with the first seed.

What cross-entropy alone reaches is its lowest value at any time of either run: it learns the rows by heart and gets
worse again. The factor is that of the updates after which it is there, and the updates after which the student with the
teacher is at the same level.
"""

import argparse
import copy
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from contenders import versions

from oumi_pl.config.files import check, find, trained

Curve = dict[int, float]
"""Updates -> held-out cross-entropy."""
RECIPE, LONGER = "quickstart/distill", 3
RATES = (1e-3, 2e-3, 4e-3)
EVERY = 50
"""Updates between two measurements."""


def recipes(teacher: Path) -> dict[str, dict[str, Any]]:
    """The recipe, and what remains of it without a teacher, by the name of its curve."""
    distill = check(find(RECIPE))
    del distill["trainer"]["callbacks"], distill["seed_everything"]
    distill |= {"val_every": EVERY, "report": False, "export": {"enabled": False}}
    distill["model"]["init_args"]["teacher"] = str(teacher)
    alone = copy.deepcopy(distill)
    alone["model"]["class_path"] = "SFT"
    alone["data"]["init_args"]["tokenizer"] = alone["model"]["init_args"].pop("teacher")
    longer = copy.deepcopy(alone)
    longer["trainer"]["max_steps"] *= LONGER
    return {
        "with the teacher": distill,
        "cross-entropy alone": alone,
        f"cross-entropy alone, {LONGER} times as long": longer,
    }


def curve(recipe: dict[str, Any], seed: int, rate: float, threads: int) -> Curve:
    """Trains in a process of its own."""
    recipe = copy.deepcopy(recipe)
    recipe["model"]["init_args"]["optimizer"]["init_args"]["lr"] = rate
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        options = ["--seed_everything", str(seed), "--runs_dir", folder, "--name", "run"]
        command = [sys.executable, "-m", "oumi_pl", "fit", "--config", f"{folder}/recipe.yaml", *options]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        with (Path(folder) / "run" / "metrics.csv").open() as lines:
            return {int(row["step"]): float(row["val/nll"]) for row in csv.DictReader(lines) if row["val/nll"]}


def reached(curve: Curve, level: float) -> float | None:
    """The updates after which a curve is at a level, between two measurements on a line; None if it never is."""
    before: tuple[int, float] | None = None
    for step, value in sorted(curve.items()):
        if value <= level:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - level) / (before[1] - value)
        before = step, value
    return None


def picture(curves: dict[str, list[Curve]], teacher: float, out: Path) -> None:
    """A line per run, in a colour per kind, with the teacher's level."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colours = ("tab:blue", "tab:gray", "tab:orange")
    for (name, runs), colour in zip(curves.items(), colours, strict=True):
        for number, run in enumerate(runs):
            axes.plot(list(run), list(run.values()), color=colour, label=None if number else name, linewidth=1.2)
    axes.axhline(teacher, color="black", linestyle=":", linewidth=1, label="the teacher itself")
    axes.set(xlabel="updates", ylabel="held-out cross-entropy, nats per token", xlim=(0, None))
    axes.set_ylim(teacher - 0.1, 5.2)
    axes.set_title(f"{RECIPE}, {len(next(iter(curves.values())))} seeds")
    axes.legend()
    figure.savefig(out, dpi=110)


def teachers_level(folder: Path) -> float:
    """The teacher's own held-out cross-entropy, from its run."""
    with (folder.parent / "metrics.csv").open() as lines:
        return [float(row["val/nll"]) for row in csv.DictReader(lines) if row["val/nll"]][-1]


def lowest(run: Curve) -> float:
    return min(run.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where the teacher is, or is trained")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the picture")
    args = parser.parse_args()
    print(versions(("torch", "transformers", "lightning"), args.threads))
    teacher = trained("quickstart/pretrain", args.runs_dir, "teacher").resolve()
    curves: dict[str, list[Curve]] = {}
    rates: dict[str, float] = {}
    print(f"{'held-out cross-entropy, nats':44}{'rate':>6}  lowest, by seed (and at the end)", flush=True)
    for name, recipe in recipes(teacher).items():
        kind = recipe["model"]["class_path"]
        tried = {rate: curve(recipe, 1, rate, args.threads) for rate in ([rates[kind]] if kind in rates else RATES)}
        rate = rates[kind] = min(tried, key=lambda rate: lowest(tried[rate]))
        curves[name] = [tried[rate], *(curve(recipe, seed, rate, args.threads) for seed in range(2, args.seeds + 1))]
        values = ", ".join(f"{lowest(run):.3f} ({run[max(run)]:.3f})" for run in curves[name])
        others = ", ".join(f"{lowest(run):.3f} at {r:g}" for r, run in tried.items() if r != rate)
        print(f"{name:44}{rate:6g}  {values}" + (f"; seed 1: {others}" if others else ""), flush=True)
    level = teachers_level(teacher)
    print(f"{'the teacher':44}{'':6}  {level:.3f}")
    distilled, *without = curves.values()
    for seed, ours in enumerate(distilled):
        theirs = min((runs[seed] for runs in without), key=lowest)
        there, at = min(theirs, key=lambda step: theirs[step]), reached(ours, lowest(theirs))
        words = "never" if at is None else f"{at:.0f} updates, {there / at:.1f}x fewer"
        print(f"seed {seed + 1}: {lowest(theirs):.3f} after {there} updates; with the teacher after {words}")
    args.out.mkdir(parents=True, exist_ok=True)
    picture(curves, level, args.out / "distill_curve.png")
    print(f"picture -> {args.out / 'distill_curve.png'}")


if __name__ == "__main__":
    main()
