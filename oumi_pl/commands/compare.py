"""Train a recipe on several engines, step by step from the same weights. Exit code 1 if they differ."""

import argparse
import contextlib
import copy
import shutil
from pathlib import Path
from typing import Any

import yaml

from oumi_pl.commands.parser import Parser
from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError, nearest
from oumi_pl.terminal.text import echo

ENGINES = ("lightning", "hf", "trl")
FITS = dict.fromkeys(("DPO", "KTO", "GRPO", "Reward", "Distill"), ("trl",)) | {
    "SFT": ("hf", "trl"),
    "Pretrain": ("hf",),
}
"""Trainer type -> the engines that can train it besides Lightning."""
BFLOAT16 = 2.0**-8
"""Relative rounding of bfloat16."""


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code: 1 if an engine differs from the first by more than the tolerance."""
    parser = Parser("compare", __doc__)
    parser.add_argument("--config", action="append", required=True, help="a recipe; several merge, the later wins")
    parser.add_argument("--engines", help="two or more of lightning,hf,trl; the others are compared with the first")
    parser.add_argument(
        "--steps",
        type=int,
        default=50,
        help="optimizer steps; the learning rate schedule is fitted to them (default: 50)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest relative difference (default: 1e-5, or 4 times the first engine's own rounding, which is "
        "measured by cutting its updates into other micro-batches)",
    )
    parser.add_argument("--output", type=Path, help="folder for table, picture and runs (default: runs/RECIPE-compare)")
    options, overrides = parser.parse_known_args(args)
    if options.steps < 1:
        raise UserError(f"--steps is {options.steps}, but has to be at least 1")
    paths = [recipe_files.find(name) for name in options.config]
    recipe = recipe_files.merged(map(recipe_files.check, paths))
    engines = _engines(options.engines, recipe)
    options.optimizer = str(((recipe.get("model") or {}).get("init_args") or {}).get("optimizer"))
    title = "-".join(map(recipe_files.recipe_name, paths))
    folder = (options.output or Path("runs") / f"{title}-compare").expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {folder} is not empty; name another folder")
    overrides = recipe_files.with_model(overrides, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(_bare(recipe), sort_keys=False), encoding="utf-8")
    try:
        return _compare(title, [str(folder / "recipe.yaml"), *overrides], engines, options, folder)
    except UserError:
        shutil.rmtree(folder)  # nothing was compared
        with contextlib.suppress(OSError):  # it has other runs, or does not exist
            folder.parent.rmdir()
        raise


def _compare(title: str, recipe: list[str], engines: list[str], options: argparse.Namespace, folder: Path) -> int:
    from oumi_pl.compare import report
    from oumi_pl.compare.run import TOLERANCE, compare

    tolerance = TOLERANCE if options.tolerance is None else options.tolerance
    updates = max(tolerance, BFLOAT16) if "Muon" in options.optimizer else None
    how = {"tolerance": options.tolerance, "update_tolerance": updates}
    results, outcomes = compare(recipe, engines, options.steps, folder, **how)
    report.write_csv(results, folder / "steps.csv")
    report.picture(results, f"{title}: {', '.join(engines)}", folder / "compare.png", tolerance)
    echo(report.table(results))
    if updates is not None:
        echo(f"tolerance of updates: {updates:g}; Muon computes them in bfloat16, whose rounding amplifies differences")
    for other, outcome in zip(results[1:], outcomes, strict=True):
        echo(report.verdict(other.name, results[0].name, len(results[0].held), outcome, options.tolerance))
    echo(f"all steps -> {folder / 'steps.csv'}, picture -> {folder / 'compare.png'}")
    return int(any(outcome.difference for outcome in outcomes))


def _bare(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without parts that take time and do not affect updates: validation, callbacks, checkpoints."""
    bare = copy.deepcopy(recipe)
    data = bare.get("data") or {}
    for section, keys in (
        (bare, ("val_every", "engine", "name", "runs_dir", "checkpoint", "export", "max_tokens")),
        (bare.get("trainer") or {}, ("callbacks", "logger", "max_steps", "max_epochs", "val_check_interval")),
        (data, ("validation", "test", "predict")),
        (data.get("init_args") or {}, ("validation", "test", "predict")),
    ):
        for key in keys:
            section.pop(key, None)
    return bare


def _engines(wanted: str | None, recipe: dict[str, Any]) -> list[str]:
    """The engines to run: the requested ones, or all that can train the recipe's module."""
    module = str((recipe.get("model") or {}).get("class_path", "")).rsplit(".", 1)[-1]
    if wanted is None:
        return ["lightning", *FITS.get(module, ("hf",))]
    engines = [name.strip() for name in wanted.split(",")]
    for name in engines:
        if name not in ENGINES:
            raise UserError(f"--engines: unknown engine {name!r}{nearest(name, ENGINES)}")
        if name != "lightning" and name not in FITS.get(module, ENGINES):
            raise UserError(f"--engines: {name} can't train {module}; these can: lightning, {', '.join(FITS[module])}")
    if len(engines) < 2 or len(set(engines)) < len(engines):
        raise UserError(f"--engines: name two or three different ones of {', '.join(ENGINES)}")
    return engines
