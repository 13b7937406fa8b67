"""`model: recipe:NAME`: start from the model that another recipe trains; train that first if needed."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oumi_pl.config import files as recipe_files
from oumi_pl.config.options import value_of
from oumi_pl.errors import UserError
from oumi_pl.runs import folders

PREFIX = "recipe:"
OPTIONS = ("--model.init_args.model", "--model.model")


def with_model(args: list[str], tree: Mapping[str, Any]) -> list[str]:
    """The command line with the folder of the trained model in place of `recipe:NAME`.

    Args:
        args: The command line.
        tree: The content of the recipe.

    Raises:
        UserError: there is no such recipe, or its run did not finish.
    """
    values = [value for option in OPTIONS if (value := value_of(option, args)) is not None]
    name = values[-1] if values else None
    if name is None:
        model = tree.get("model")
        arguments = model.get("init_args") if isinstance(model, Mapping) else None
        name = arguments.get("model") if isinstance(arguments, Mapping) else None
    if not isinstance(name, str) or not name.startswith(PREFIX):
        return args
    root = Path(str(value_of("--runs_dir", args) or tree.get("runs_dir") or "runs")).expanduser()
    return [*args, f"{OPTIONS[0]}={trained(name.removeprefix(PREFIX), root)}"]


def trained(recipe: str, root: Path) -> Path:
    """The model of the newest finished run of a recipe in `root`; the recipe is run if there is none.

    Raises:
        UserError: there is no such recipe, or its run did not finish.
    """
    name = recipe_files.recipe_name(recipe_files.find(recipe))
    if model := folders.last_model(root, name):
        print(f"model: {model}")
        return model
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"model: recipe:{recipe} has no finished run in {root}; train it first, in one process")
    command = [sys.executable, "-m", "oumi_pl", "fit", "--config", recipe, "--runs_dir", str(root)]
    print(f"model: recipe:{recipe} has no finished run in {root}, so it is trained first", flush=True)
    status = subprocess.run(command, check=False).returncode
    model = folders.last_model(root, name)
    if status or model is None:
        raise UserError(f"model: the run of recipe:{recipe} did not finish; run it by itself: fit --config {recipe}")
    return model
