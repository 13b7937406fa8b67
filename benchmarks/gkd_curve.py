"""On-policy distillation (GKD): what a student that learned from bad answers takes over from a teacher, by `lmbda`.

    python benchmarks/gkd_curve.py [--seeds 3] [--threads 2] [--runs_dir runs] [--out benchmarks/results]

The student is the model of `quickstart/grpo_start`, which learned to spell words backwards from demonstrations of which
six in ten are wrong; the teacher is what `quickstart/grpo` made of it. Both are trained first if they have no finished
run in `--runs_dir`. The student is distilled on its own demonstrations: with `lmbda` 0 on these answers, most of which
are wrong; with 1 on completions that it samples itself; with 0.5 on either. No run sees a right answer but in the
teacher's distributions. Measured on the 240 held-out questions: the share of right answers, sampled at temperature 1
(four each) and greedy.
"""

import argparse
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from grpo_curve import RECIPE, START, Curve, column, fit

from oumi_pl.config.files import trained

LMBDAS = (0.0, 0.5, 1.0)
UPDATES, EVERY = 20, 10
"""Updates of a run, and between two measurements."""


def recipe(student: Path, teacher: Path, lmbda: float) -> dict[str, Any]:
    """The recipe of a student."""
    sampling = {"max_new_tokens": 12}
    answers = {"class_path": "Answers", "init_args": {"rows": 240, "max_new_tokens": 12}}
    samples = {"completions": 4, "pass_at": [1], "sampling": sampling, "rows": 240, "batch_size": 480}
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
            "callbacks": [answers, {"class_path": "PassAtK", "init_args": samples}],
        },
        "val_every": EVERY,
        "report": False,
    }


def curves(student: Path, teacher: Path, seed: int, threads: int) -> dict[float, tuple[Curve, Curve]]:
    """Sampled and greedy right answers of a seed, by `lmbda`."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for lmbda in LMBDAS:
            file = Path(folder) / f"lmbda-{lmbda}.yaml"
            file.write_text(yaml.safe_dump(recipe(student, teacher, lmbda)))
            run = fit(str(file), Path(folder), threads, "--seed_everything", str(seed))
            results[lmbda] = column(run, "val/pass@1"), column(run, "val/exact_match")
    return results


def last(run: Path, name: str) -> float:
    """The last value of a metric of the run that a model is from."""
    values = column(run.parent, name)
    return values[max(values)]


def picture(runs: list[dict[float, tuple[Curve, Curve]]], out: Path) -> None:
    """A line per run of the sampled answers, in a colour per `lmbda`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for lmbda, colour in zip(LMBDAS, ("tab:gray", "tab:orange", "tab:blue"), strict=True):
        for number, run in enumerate(runs):
            sampled, greedy = run[lmbda]
            names = (f"lmbda {lmbda:g}, sampled", f"lmbda {lmbda:g}, greedy") if not number else (None, None)
            axes.plot(list(sampled), list(sampled.values()), color=colour, marker="o", markersize=3, label=names[0])
            axes.plot(list(greedy), list(greedy.values()), color=colour, linestyle=":", label=names[1])
    axes.set(xlabel="updates", ylabel="right answers to held-out questions", ylim=(0, 1.02))
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
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lightning"))
    machine = platform.processor() or platform.machine()
    print(f"{versions}, python {platform.python_version()}; {machine}, {args.threads} threads")
    student, teacher = (trained(name, args.runs_dir, "model").resolve() for name in (START, RECIPE))
    name = "val/exact_match"
    print(f"greedy: student {last(student, name):.1%}, teacher {last(teacher, name):.1%}", flush=True)
    runs = []
    for seed in range(1, args.seeds + 1):
        runs.append(curves(student, teacher, seed, args.threads))
        for lmbda, (sampled, greedy) in runs[-1].items():
            values = ("  ".join(f"{step}: {value:.1%}" for step, value in curve.items()) for curve in (sampled, greedy))
            print(f"{seed:4}  lmbda {lmbda:<4g} sampled {next(values)}; greedy {next(values)}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    picture(runs, args.out / "gkd_curve.png")
    print(f"picture -> {args.out / 'gkd_curve.png'}")


if __name__ == "__main__":
    main()
