"""The data of a recipe, read as `fit` reads it, without a trainer and without weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oumi_pl.config import files as recipe_files
from oumi_pl.config.cli import CLI, instantiate
from oumi_pl.data.base import TextData
from oumi_pl.errors import UserError
from oumi_pl.runs import folders

PREFIX = "recipe:"


class _Settings(CLI):
    """The command line of `fit`, parsed and checked, without the objects that it describes."""

    def instantiate_classes(self) -> None:
        """Instantiates nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def read(configs: Sequence[Path], overrides: Sequence[str]) -> tuple[TextData, list[str]]:
    """Builds the data module that `fit` would train on, and finds its tokenizer.

    Args:
        configs: Recipes; the later wins.
        overrides: `--data.max_length 256` and the like.

    Returns:
        The data with a tokenizer, and notes on where the tokenizer comes from.

    Raises:
        UserError: whatever `fit` would find wrong with the settings of model and data.
    """
    args = [part for path in configs for part in ("--config", str(path))]
    trees = [recipe_files.check(path) for path in configs]
    settings = _Settings(["fit", *args, *overrides], trees=trees).config["fit"]
    module, data = instantiate({"model": settings.model, "data": settings.data})
    data.micro_batches = settings.trainer.accumulate_grad_batches or 1
    data.workers = 0  # for a handful of rows, starting processes takes longer than the work
    if data.tokenizer_spec is not None or module.model_name is None:
        return data, []
    data.tokenizer_spec, notes = _tokenizer_of(module.model_name, Path(settings.runs_dir).expanduser())
    return data, notes


def _tokenizer_of(model: str, root: Path) -> tuple[Any, list[str]]:
    """The tokenizer of a model; of a recipe that was not run yet, the one that its model will have.

    Raises:
        UserError: there is no such recipe.
    """
    if not model.startswith(PREFIX):
        return model, []
    name = model.removeprefix(PREFIX)
    path = recipe_files.find(name)
    if folder := folders.last_model(root, recipe_files.recipe_name(path)):
        return str(folder), [f"tokenizer: of {folder}, the newest model of {model}"]
    try:
        data, _ = read([path], [])
        tokenizer = data.tokenizer
    except UserError as error:
        raise UserError(
            f"model: {model} has no finished run in {root}, and its tokenizer can't be had: {error}"
        ) from None
    return tokenizer, [
        f"tokenizer: {model} has no finished run in {root} yet; this is the tokenizer that its model will have"
    ]


def title(configs: Sequence[Path]) -> str:
    """The names of the recipes."""
    return " + ".join(folders.recipe_of(path) or recipe_files.recipe_name(path) for path in configs)
