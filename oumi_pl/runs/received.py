"""Checkpoints that came from somebody else are data: reading one runs none of its code.

A checkpoint holds the recipe of its run, which may name classes and functions of any module; and a sharded one
describes its files in a pickle, which could call anything.
"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from oumi_pl.errors import UserError

METADATA = ".metadata"
"""The file of a sharded checkpoint that says which file holds which part of which tensor."""
PACKAGE = "oumi_pl."
FUNCTIONS = ("architecture", "format", "reward", "metrics")
"""Arguments that name functions or classes by their path."""
ALLOWED = {
    "torch.distributed.checkpoint.metadata": None,  # None: all names
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}
"""Module -> the names that the description of a sharded checkpoint may use."""
VALUES = (torch.dtype, torch.layout, torch.memory_format)


class _Unpickler(pickle.Unpickler):
    """Reads the plain classes that describe a sharded checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """As of its base class.

        Raises:
            pickle.UnpicklingError: for any other name.
        """
        value = getattr(torch, name, None) if module == "torch" else None
        if value is torch.Size or isinstance(value, VALUES):
            return value
        if module in ALLOWED and name.isidentifier() and (ALLOWED[module] is None or name in (ALLOWED[module] or ())):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def refuse_code(path: Path) -> None:
    """Refuses a sharded checkpoint whose description would run code. Call it before torch reads the folder.

    Raises:
        UserError: says what the description names, or that it can't be read.
    """
    try:
        with (path / METADATA).open("rb") as file:
            _Unpickler(file).load()
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path}: can't be read as a checkpoint: {METADATA}: {error}") from error


def refuse_foreign(config: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuses the recipe of a checkpoint that names code outside this package.

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


def _named_code(value: Any, place: str = "") -> Iterator[str]:
    """Yields each place in a recipe that names code of others, with the name."""
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
            yield from (f"{where}: {name}" for name in _paths(item) if not name.startswith(PACKAGE))
        else:
            yield from _named_code(item, where)


def _paths(value: Any) -> Iterator[str]:
    """The dotted names in a value: a name, a list of names, or names with weights."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple | Mapping):
        yield from (name for name in names if isinstance(name, str) and "." in name)
