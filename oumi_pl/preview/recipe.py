"""Builds the data module of a recipe as `fit` does, without a trainer and without weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oumi_pl.config import files as recipe_files
from oumi_pl.config.cli import CLI, instantiate
from oumi_pl.config.files import PREFIX
from oumi_pl.data.base import TextData
from oumi_pl.errors import UserError
from oumi_pl.runs import folders


class _Settings(CLI):
    """Parses and checks the command line of `fit`, without building the objects that it describes."""

    def instantiate_classes(self) -> None:
        """Instantiates nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def read(configs: Sequence[Path], overrides: Sequence[str]) -> tuple[TextData, list[str]]:
    """Builds the data module that `fit` would train on, and finds its tokenizer.

    Args:
        configs: Recipes; later ones win.
        overrides: `--data.max_length 256` and the like.

    Returns:
        The data with a tokenizer, and notes on where the tokenizer comes from.

    Raises:
        UserError: for every mistake in the settings of model and data that `fit` would report.
    """
    args = [part for path in configs for part in ("--config", str(path))]
    trees = [recipe_files.check(path) for path in configs]
    settings = _Settings(["fit", *args, *overrides], trees=trees).config["fit"]
    module, data = instantiate({"model": settings.model, "data": settings.data})
    data.micro_batches = settings.trainer.accumulate_grad_batches or 1
    data.workers = 0  # starting processes would take longer than a few rows do
    if data.tokenizer_spec is not None or module.tokenizer_name is None:
        return data, []
    data.tokenizer_spec, notes = _tokenizer_of(module.tokenizer_name, Path(settings.runs_dir).expanduser())
    return data, notes


def _tokenizer_of(model: str, root: Path) -> tuple[Any, list[str]]:
    """The tokenizer of a model, and notes. For `recipe:NAME` without a finished run, the tokenizer its model will have.

    Raises:
        UserError: the recipe does not exist, or its tokenizer can't be loaded.
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
            f"model: {model} has no finished run in {root}, and its tokenizer can't be loaded: {error}"
        ) from None
    return tokenizer, [
        f"tokenizer: {model} has no finished run in {root} yet; this is the tokenizer that its model will have"
    ]


def title(configs: Sequence[Path]) -> str:
    """The names of the recipes, joined."""
    return " + ".join(folders.recipe_of(path) or recipe_files.recipe_name(path) for path in configs)
