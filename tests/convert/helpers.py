"""Converting small configs, and looking values up in the recipe."""

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from oumi_pl.config.check import Checker, Parser, options
from oumi_pl.convert import peers
from oumi_pl.convert.settings import Keys, Settings
from oumi_pl.data.base import TextData
from oumi_pl.errors import UserError
from oumi_pl.modules.base import LanguageModule


def converted(
    values: dict[str, Any], trainer: str | None = None, folder: Path = Path(), devices: int | None = None
) -> tuple[dict, Settings]:
    library = peers.library_of(values)
    assert library is not None
    return peers.recipe(values, library, folder, trainer, devices)


def silent_keys(base: dict[str, Any], samples: dict[str, Any], keys: Keys, **how: Any) -> list[str]:
    """Keys whose sample changes neither the recipe nor its comments, and that are not named with a reason either."""
    silent = []
    for key, value in samples.items():
        rest = {name: one for name, one in base.items() if name != key}
        try:
            without, unset = converted(rest, **how)
            tree, settings = converted(rest | {key: value}, **how)
        except (UserError, AssertionError):  # refused, or without it the config is of no library
            continue
        changed = (tree, settings.notes.comments) != (without, unset.notes.comments)
        named = [one for name, one in settings.notes.became.items() if name.split(".")[0].split("[")[0] == key]
        if not changed and not any(one.startswith("nothing: ") for one in named):
            silent.append(key)
    assert samples.keys() >= {key for key in keys.translated if "*" not in key} - {"plugins"}, "a key without a sample"
    return silent


def changed_by_null(base: dict[str, Any], samples: dict[str, Any], keys: Keys, **how: Any) -> set[str]:
    """Keys for which null is another value than the default."""
    changed = set()
    for key in samples:
        rest = {name: one for name, one in base.items() if name != key}
        try:
            without, unset = converted(rest, **how)
        except (UserError, AssertionError):
            continue
        tree, settings = converted(rest | {key: None}, **how)
        if (tree, settings.notes.comments) != (without, unset.notes.comments):
            changed.add(key)
    return changed


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


OF_ANY_TYPE = (3, "x", [3], {"a": 1}, True)


def refuse_in_one_message(base: dict[str, Any], keys: Keys, within: str | None = None, **how: Any) -> None:
    """Values of any type are converted, or refused as a mistake of the user: no other error comes.

    within: key of a list of which the first entry is changed, instead of the config itself.
    """
    for key in (key for key in keys.translated if "*" not in key):
        for value in OF_ANY_TYPE:
            values = base | ({key: value} if within is None else {within: [base[within][0] | {key: value}]})
            if peers.library_of(values) is not None:
                with suppress(UserError):
                    converted(values, **how)
