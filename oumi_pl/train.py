"""`train(config)`: a whole Oumi training config, from its data to the files that it leaves."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.core.layout import write_layout
from oumi_pl.core.recipe import Engine, Recipe, to_recipe
from oumi_pl.errors import UserError

LENGTH = ("max_steps", "max_epochs")


def train(config: TrainingConfig, engine: Engine | None = None, verbose: bool = False) -> None:
    """Trains what an Oumi config describes, as the native recipe that it becomes.

    Args:
        config: The config. Its paths are not looked at before they are read; `finalize_and_validate` does that.
        engine: `lightning`, `trl` or `hf`; what Oumi's trainer type stands for when left out.
        verbose: Print what each key of the config became.

    Raises:
        UserError: a key has no counterpart, or whatever else is wrong with config or data.
    """
    recipe = to_recipe(config, engine)
    if verbose:
        print(listing(recipe), file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        name = str(recipe.tree.get("name", "output"))
        file = Path(scratch) / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe.tree, sort_keys=False), encoding="utf-8")
        run, ranks = _fit(file, recipe, name)
    if run is not None and int(os.environ.get("RANK", "0")) == 0:
        write_layout(run, config, ranks)
        print(f"output -> {run}")


def listing(recipe: Recipe) -> str:
    """What each key of the config became, one line each, and what is done otherwise than Oumi does it."""
    width = max(map(len, recipe.became), default=0)
    lines = [f"{key:{width}}  {became}" for key, became in recipe.became.items()]
    return "\n".join([*lines, *(f"note: {text}" for texts in recipe.comments.values() for text in texts)])


def _fit(file: Path, recipe: Recipe, name: str) -> tuple[Path | None, int]:
    """Runs the recipe, or goes on with the run that it names; returns the run's folder and the number of processes."""
    from oumi_pl.callbacks.run_folder import RunFolder
    from oumi_pl.cli import CLI
    from oumi_pl.config import files, resuming

    args, tree, folder = ["--config", str(file)], files.check(file), None
    if recipe.resume is not None:
        # the run's own config is the record of what it does; how long may have changed
        args += [f"--trainer.{key}={tree['trainer'][key]}" for key in LENGTH if key in tree["trainer"]]
        try:
            folder, name, args = resuming.arguments("fit", recipe.resume, name, args, tree)
            tree = files.check(folder / "config.yaml")
        except UserError as error:
            if recipe.resume:  # a run that was named has to be there
                raise
            print(f"{error}; starting anew", file=sys.stderr)
    made: Any = CLI(["fit", *args], recipe=name, resume=folder, trees=[tree])
    found = next((c for c in made.trainer.callbacks if isinstance(c, RunFolder)), None)
    return (None if found is None else found.directory), made.trainer.world_size
