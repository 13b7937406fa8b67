"""Run folders made by hand, as a run leaves them."""

import csv
import json
import math
import time

from oumi_pl.runs import folders

CONFIG = """\
model:
  class_path: SFT
  init_args: {{lr: {lr}, model: null}}
data:
  class_path: SFTData
  init_args: {{train: rows.jsonl, seed: null}}
seed_everything: {seed}
trainer: {{max_steps: {steps}}}
name: {name}
"""
PERCENTILES = ("p0", "p5", "p25", "p50", "p75", "p95", "p100")


def write_metrics(folder, columns):
    """A `metrics.csv` of columns `{name: {step: value}}`."""
    steps = sorted({step for values in columns.values() for step in values})
    with (folder / folders.METRICS).open("w", newline="") as out:
        lines = csv.writer(out)
        lines.writerow(["step", *columns])
        lines.writerows([step, *(values.get(step, "") for values in columns.values())] for step in steps)


def curve(steps, every=1, scale=4.0):
    return {step: scale / math.sqrt(step) for step in range(every, steps + 1, every)}


def columns(steps=40):
    return {
        "train/loss": curve(steps),
        "train/lr": dict.fromkeys(range(1, steps + 1), 1e-3),
        "train/grad_norm": curve(steps, scale=40.0),
        "train/tokens_per_second": dict.fromkeys(range(1, steps + 1), 1e4),
        "train/num_tokens": {step: 100.0 * step for step in range(1, steps + 1)},
        "val/loss": curve(steps, every=10, scale=5.0),
    }


def run_folder(root, name="r", steps=40, lr=0.1, seed=42, **state):
    """A finished run of so many steps, with all its files."""
    folder = root / name
    (folder / folders.CHECKPOINTS).mkdir(parents=True)
    lengths = dict(zip(PERCENTILES, (1, 2, 3, 4, 5, 6, 9), strict=True))
    train = {"rows": 12, "kept": 10, "dropped": {"empty": 2}, "tokens": 400, "lengths": lengths, "fill": 0.75}
    (folder / "data.json").write_text(json.dumps({"train": train}))
    (folder / folders.CONFIG).write_text(CONFIG.format(lr=lr, steps=steps, name=name, seed=seed))
    (folder / folders.RECIPE).write_text(f"# mine\nlr: {lr}\n")
    if steps:
        write_metrics(folder, columns(steps))
    model = {"trainer": "SFT", "architecture": "Llama", "name": None, "parameters": 5, "trainable": 5, "loss": "L"}
    written = {
        "recipe": "r",
        "status": "finished",
        "steps": steps,
        "step": steps,
        "created_ns": time.time_ns(),
        "model": model,
    }
    written |= {"times": {"data": 1.0, "training": 8.0, "validation": 1.0}, "environment": {"packages": {"torch": "2"}}}
    folders.write_state(folder, **(written | state))
    return folder
