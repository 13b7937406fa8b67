"""Keeps checkpoints from untrusted sources from running code when they are read.

A checkpoint holds its run's recipe, which may name classes and functions of any module. A sharded checkpoint describes
its files in a pickle, which could call any function.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch

from oumi_pl.errors import UserError

METADATA = ".metadata"
"""File of a sharded checkpoint that says which file holds which part of which tensor: its description."""
PACKAGE = "oumi_pl."
LIBRARIES = ("torch.optim.", "torchao.optim.", "lightning.")
"""Packages whose classes recipes commonly name."""
FUNCTIONS = ("architecture", "format", "where", "reward", "metrics")
"""Recipe keys whose values are paths of functions or classes."""
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
"""A name in a module. Other values of these keys are names of the package, folders and expressions."""
ALLOWED = {
    "torch.distributed.checkpoint.metadata": None,  # None allows every name
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}
"""Module -> the names that the description of a sharded checkpoint may use."""
ENUM_MEMBER = ("builtins", "getattr")
"""How Python 3.11.2 pickles a member of an enum, whereas 3.11.7 calls the enum with the member's value."""
VALUES = (torch.dtype, torch.layout, torch.memory_format)


class _Unpickler(pickle.Unpickler):
    """Loads only the classes that describe a sharded checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns a class or function that the pickle names.

        Raises:
            pickle.UnpicklingError: the name is not in `ALLOWED`.
        """
        value = getattr(torch, name, None) if module == "torch" else None
        if value is torch.Size or isinstance(value, VALUES):
            return value
        if module in ALLOWED and name.isidentifier() and (ALLOWED[module] is None or name in (ALLOWED[module] or ())):
            return super().find_class(module, name)
        if (module, name) == ENUM_MEMBER:
            return _member
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _member(enum: Any, name: Any) -> Any:
    """A member of an enum, in the place of `getattr`, which finds anything."""
    if not isinstance(enum, EnumMeta) or name not in enum.__members__:
        raise pickle.UnpicklingError(f"it names getattr({enum!r}, {name!r}), which no checkpoint needs")
    return enum[name]


def refuse_code(path: Path) -> None:
    """Refuses a sharded checkpoint whose description would run code. Call this before torch reads the folder.

    Raises:
        UserError: says what the description names, or that it can't be read.
    """
    try:
        with (path / METADATA).open("rb") as file:
            _Unpickler(file).load()
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path}: can't be read as a checkpoint: {METADATA}: {error}") from error


def refuse_foreign(config: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuses a checkpoint whose recipe names code outside this package.

    Args:
        config: The recipe.
        checkpoint: Where it came from, for the message.

    Raises:
        UserError: lists what would run.
    """
    named = [*_named_code({key: config.get(key) for key in ("model", "data")})]
    if named:
        raise UserError(
            f"--checkpoint: loading {checkpoint} would run code that its recipe names ({', '.join(named)}); if you "
            "trust where it comes from, add --trust"
        )


def code_of_run(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """What a run's config would run that is in none of the libraries, and not in the recipe that the user has named.

    A run folder that came from somebody else may name any code.

    Args:
        config: Content of the run's `config.yaml`.
        recipe: Content of the recipe beside `--resume`; empty if there is none.

    Returns:
        `key path: name` of each.
    """
    own = {named.partition(": ")[2] for named in _named_code(recipe)}
    named = {one: one.partition(": ")[2] for one in _named_code(config)}
    return [one for one, name in named.items() if name not in own and not name.startswith(LIBRARIES)]


def _named_code(value: Any, place: str = "") -> Iterator[str]:
    """Yields `key path: name` for each class, function or setting in a recipe that would run foreign code."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _named_code(item, place)
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        where = place if key == "init_args" else f"{place}.{key}".lstrip(".")
        if key == "class_path" and "." in str(item) and not str(item).startswith(PACKAGE):
            yield f"{where}: {item}"
        elif key == "trust_remote_code" and item:
            yield f"{where}: true"
        elif key in FUNCTIONS:
            yield from (f"{where}: {name}" for name in foreign_functions(item))
        else:
            yield from _named_code(item, where)


def foreign_functions(value: Any) -> Iterator[str]:
    """Yields the paths of code outside this package in a value: a name, a list of names, or a mapping from names.

    A filter may also be an expression, such as `score >= 3.5`, which is no code.
    """
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple | Mapping):
        texts = (name for name in names if isinstance(name, str))
        yield from (name for name in texts if DOTTED.fullmatch(name) and not name.startswith(PACKAGE))
