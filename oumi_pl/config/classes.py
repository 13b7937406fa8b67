"""The classes that recipes can name by their short names. A class is known once it is imported: ours all are, here."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator

from oumi_pl import callbacks, data, losses, modules, optim

for _package in (callbacks, data, losses, modules, optim):
    for _module in pkgutil.walk_packages(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)

ACCIDENTAL = ("accelerate", "transformers")
"""Packages that happen to be imported, and define optimizers of the same names as torch's."""


def known_classes(bases: Iterable[type]) -> dict[str, type]:
    """The classes that fit one of `bases`, by the short name that a recipe may use; abstract ones are left out."""
    classes = (cls for base in bases for cls in list(_subclasses(base)) or [base])
    return {
        cls.__name__: cls
        for cls in classes
        if not cls.__name__.startswith("_")
        and not inspect.isabstract(cls)
        and cls.__module__.partition(".")[0] not in ACCIDENTAL
    }


def _subclasses(base: type) -> Iterator[type]:
    """All imported subclasses of a class."""
    cls: type
    for cls in type.__subclasses__(base):
        yield cls
        yield from _subclasses(cls)
