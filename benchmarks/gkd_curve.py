"""On-policy distillation (GKD): what a student that learned from bad answers takes over from a teacher, by `lmbda`.

    python benchmarks/gkd_curve.py [--seeds 3] [--threads 2] [--runs_dir runs] [--out benchmarks/results]

The student is the model of `quickstart/grpo_start`, which learned to spell words backwards from demonstrations of which
six in ten are wrong; the teacher is what `quickstart/grpo` made of it. Both are trained first if they have no finished
run in `--runs_dir`. The student is distilled on its own demonstrations: with `lmbda` 0 on these answers, most of which
are wrong; with 1 on completions that it samples itself; with 0.5 on either. No run sees a right answer but in the
teacher's distributions. Measured on 120 held-out questions: the share of right answers, four samples each at
temperature 1, with the same random numbers in all validations. The seeds are of the distillation: all start from one
student.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from contenders import versions
from grpo_curve import RECIPE, START, Curve, column

from oumi_pl.__main__ import main as command_line
from oumi_pl.config.files import trained

LMBDAS = (0.0, 0.5, 1.0)
UPDATES, EVERY = 20, 5
"""Updates of a run, and between two measurements."""


def recipe(student: Path, teacher: Path, lmbda: float) -> dict[str, Any]:
    """The recipe of a student."""
    sampling = {"max_new_tokens": 12}
    samples = {"completions": 4, "pass_at": [1], "sampling": sampling, "rows": 120, "batch_size": 480}
    return {
        "model": {
            "class_path": "Distill",
            "init_args": {
                "model": str(student),
                "teacher": str(teacher),
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 3e-4, "weight_decay": 0.0}},
            },
        },
        "data": {
            "class_path": "DistillData",
            "init_args": {
                "train": "bundled/reversed/demonstrations",
                "validation": "bundled/reversed/heldout",
                "lmbda": lmbda,
                "sampling": sampling,
                "max_length": 64,
                "batch_size": 32,
                "prompts_per_call": 32,
            },
        },
        "trainer": {
            "max_steps": UPDATES,
            "gradient_clip_val": 1.0,
            "callbacks": [{"class_path": "PassAtK", "init_args": samples}],
        },
        "val_every": EVERY,
        "report": False,
    }


def curves(student: Path, teacher: Path, seed: int) -> dict[float, Curve]:
    """Sampled right answers of a seed, by `lmbda`."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for lmbda in LMBDAS:
            file = Path(folder) / "recipe.yaml"
            file.write_text(yaml.safe_dump(recipe(student, teacher, lmbda)))
            name = f"lmbda-{lmbda}"
            options = ["--seed_everything", str(seed), "--runs_dir", folder, "--name", name]
            # in this process, since most of the time of so small a run would be imports
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as output:
                status = command_line(["fit", "--config", str(file), *options])
            if status:
                sys.exit(output.getvalue()[-3000:])
            results[lmbda] = column(Path(folder) / name, "val/pass@1")
    return results


def last(run: Path, name: str) -> float:
    """The last value of a metric of the run that a model is from."""
    values = column(run.parent, name)
    return values[max(values)]


def picture(runs: list[dict[float, Curve]], out: Path) -> None:
    """A line per run, in a colour per `lmbda`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for lmbda, colour in zip(LMBDAS, ("tab:gray", "tab:orange", "tab:blue"), strict=True):
        for number, run in enumerate(runs):
            label = None if number else f"lmbda {lmbda:g}"
            axes.plot(list(run[lmbda]), list(run[lmbda].values()), color=colour, marker="o", markersize=3, label=label)
    axes.set(xlabel="updates", ylabel="right answers to held-out questions, sampled", ylim=(0, 1.02))
    axes.set_title(f"GKD from a teacher of right answers, {len(runs)} seeds")
    axes.legend(loc="lower right")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Prints a line for each seed and `lmbda`, and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where both models are, or are trained")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the picture")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(versions(("torch", "transformers", "lightning"), args.threads))
    student, teacher = (trained(name, args.runs_dir, "model").resolve() for name in (START, RECIPE))
    name = "val/exact_match"
    print(f"greedy: student {last(student, name):.1%}, teacher {last(teacher, name):.1%}", flush=True)
    runs = []
    for seed in range(1, args.seeds + 1):
        runs.append(curves(student, teacher, seed))
        for lmbda, curve in runs[-1].items():
            values = "  ".join(f"{value:.1%} after {step}" for step, value in curve.items())
            print(f"seed {seed}  lmbda {lmbda:<4g} {values}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    picture(runs, args.out / "gkd_curve.png")
    print(f"picture -> {args.out / 'gkd_curve.png'}")


if __name__ == "__main__":
    main()
