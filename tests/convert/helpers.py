"""Converting small configs, and looking values up in the recipe."""

from functools import cache
from pathlib import Path
from typing import Any

from oumi_pl.config.check import Checker, Parser, options
from oumi_pl.convert import peers
from oumi_pl.convert.settings import Settings
from oumi_pl.data.base import TextData
from oumi_pl.modules.base import LanguageModule


def converted(values: dict[str, Any], trainer: str | None = None, folder: Path = Path()) -> tuple[dict, Settings]:
    library = peers.library_of(values)
    assert library is not None
    return peers.recipe(values, library, folder, trainer, None)


def at(tree: Any, place: str) -> Any:
    """The value at a place such as `model.lora.r`; None if there is none. `init_args` need not be named."""
    for key in place.split("."):
        if isinstance(tree, dict) and key not in tree:
            tree = tree.get("init_args", {})
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


@cache
def checker() -> Checker:
    parser = Parser()
    parser.add_subclass_arguments(LanguageModule, "model", fail_untyped=False)
    parser.add_subclass_arguments(TextData, "data", fail_untyped=False)
    return Checker(options(parser))


def assert_fits(tree: dict[str, Any]) -> None:
    """Module and data have these arguments, of these types."""
    checker().check_recipe({"model": tree["model"], "data": tree["data"]})
