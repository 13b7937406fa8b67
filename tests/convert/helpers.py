"""Converting small configs, and looking values up in the recipe."""

from pathlib import Path
from typing import Any

from oumi_pl.config.cli import instantiate
from oumi_pl.convert import peers
from oumi_pl.convert.settings import Settings


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


def assert_builds(tree: dict[str, Any]) -> None:
    """Module and data take their arguments, as `fit` builds them before anything is read."""
    instantiate({"model": tree["model"], "data": tree["data"]})
