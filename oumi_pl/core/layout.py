"""Adds to a finished run folder the files of an Oumi output directory, where its users look for them."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.runs.checksums import model_files
from oumi_pl.runs.folders import CHECKPOINTS, read_state

NAMES = {"train/loss": "loss", "train/grad_norm": "grad_norm", "train/lr": "learning_rate"}
"""Columns of `metrics.csv` that Oumi's rows know by another name; `train/x` else is `x`, `val/x` is `eval_x`."""


def write_layout(run: Path, config: TrainingConfig, world_size: int = 1, summary: str = "") -> None:
    """Puts model, tokenizer, checkpoints, logged metrics and telemetry where Oumi's trainers would.

    Files of `model/` are there twice by name and once on the disk, as far as the file system allows.

    Args:
        run: Folder of a run that has ended.
        config: The config of the run.
        world_size: Number of processes.
        summary: The modules of the model, written where the config asks for it.
    """
    for file in sorted((run / "model").rglob("*")) if (run / "model").is_dir() else []:
        if file.is_file():
            _link(file, run / file.relative_to(run / "model"))
    for folder in sorted((run / CHECKPOINTS).glob("checkpoint-*")):
        _point(run / folder.name, folder)
    rows = _rows(run / "metrics.csv")
    with (run / "metrics_rank0000.jsonl").open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    last = rows[-1] if rows else {}
    state = {"global_step": read_state(run).get("step", 0), "epoch": last.get("epoch"), "log_history": rows}
    (run / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")
    if (name := config.training.telemetry.telemetry_dir) is not None:
        folder = run / name
        folder.mkdir(parents=True, exist_ok=True)
        config.to_yaml(folder / "training_config.yaml")
        (folder / "world_size.json").write_text(json.dumps({"WORLD_SIZE": world_size}) + "\n")
        if config.training.log_model_summary:
            (folder / "model_summary.txt").write_text(summary + "\n")


def write_base(run: Path, model: Any) -> None:
    """Puts the model under an adapter beside it, without a trace of the adapter.

    Args:
        run: Folder of a run that has ended.
        model: What was trained, in PEFT's wrapping.
    """
    if not (run / "adapter_config.json").exists():  # it was merged, or nothing was to be saved
        return
    from oumi_pl.core.trainers.kinds import bare
    from oumi_pl.core.trainers.saving import base_state

    with model_files(run):
        bare(model).save_pretrained(run, state_dict=base_state(model))


def _rows(metrics: Path) -> list[dict[str, Any]]:
    """A row of training per step and, where there was one, a row of evaluation after it, under Oumi's names."""
    rows: list[dict[str, Any]] = []
    if not metrics.is_file():  # stopped before the first update
        return rows
    with metrics.open(newline="") as lines:
        for line in csv.DictReader(lines):
            values = {name: float(value) for name, value in line.items() if value}
            position = {"epoch": values.pop("epoch", 0.0), "step": int(values.pop("step"))}
            train = {n.removeprefix("train/"): v for n, v in values.items() if n.startswith("train/")}
            train = {NAMES.get(f"train/{name}", name): value for name, value in train.items()}
            held_out = {"eval_" + n.removeprefix("val/"): v for n, v in values.items() if n.startswith("val/")}
            rows += [row | position for row in (train, held_out) if row]
    return rows


def _link(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        place.hardlink_to(file)
    except OSError:  # another file system, or one without links
        shutil.copy2(file, place)


def _point(place: Path, folder: Path) -> None:
    if not place.is_symlink() and not place.exists():
        place.symlink_to(os.path.relpath(folder, place.parent), target_is_directory=True)
