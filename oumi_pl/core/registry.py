"""Oumi's registry: data sets and models of the user's own files, by the names that a config gives.

Modules are found as Oumi finds them: the file that `OUMI_EXTRA_DEPS_FILE` names lists one Python file per line, and
each is imported once before the first look-up. What Oumi itself registers is not here; see `core/recipe/sources.py`.
"""

import importlib
import os
import sys
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import Any, TypeVar

from oumi_pl.errors import UserError, nearest

VARIABLE = "OUMI_EXTRA_DEPS_FILE"
"""Environment variable with the path of the list of the user's files."""

T = TypeVar("T")


class RegistryType(Enum):
    """What is registered. Configs of training name data sets and models; the others are kept for the user's files."""

    CLOUD = auto()
    DATASET = auto()
    METRICS_FUNCTION = auto()
    REWARD_FUNCTION = auto()
    ROLLOUT_FUNCTION = auto()
    MODEL_CONFIG = auto()
    MODEL = auto()
    JUDGE_CONFIG = auto()
    EVALUATION_FUNCTION = auto()
    SAMPLE_ANALYZER = auto()


class Registry:
    """Objects by name and type; names are compared in lower case."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, RegistryType], Any] = {}
        self._loaded: str | None = None

    def register(self, name: str, type: RegistryType, value: Any) -> None:
        """Adds an object.

        Raises:
            UserError: the name is taken.
        """
        key = (name.lower(), type)
        if key in self._values:
            raise UserError(f"{name!r} is already registered as {self._values[key]}; choose another name")
        self._values[key] = value

    def contains(self, name: str, type: RegistryType) -> bool:
        """Whether there is such an object."""
        self._load()
        return (name.lower(), type) in self._values

    def get(self, name: str, type: RegistryType) -> Any:
        """The object; None if there is none."""
        self._load()
        return self._values.get((name.lower(), type))

    def get_all(self, type: RegistryType) -> dict[str, Any]:
        """All objects of a type, by name."""
        self._load()
        return {name: value for (name, kind), value in self._values.items() if kind is type}

    def get_dataset(self, name: str, subset: str | None = None) -> Any:
        """The data set of a subset, else of the name; None if there is none."""
        specific = self.get(f"{name}/{subset}", RegistryType.DATASET) if subset else None
        return specific or self.get(name, RegistryType.DATASET)

    def get_model(self, name: str) -> Any:
        """The class of a model; None if there is none."""
        return self.get(name, RegistryType.MODEL)

    def clear(self) -> None:
        """Forgets everything that was registered."""
        self._values.clear()

    def __getitem__(self, key: tuple[str, RegistryType]) -> Any:
        name, kind = key
        if not self.contains(name, kind):
            raise KeyError(f"no {kind.name.lower()} {name!r}{nearest(name.lower(), self.get_all(kind))}")
        return self.get(name, kind)

    def _load(self) -> None:
        """Imports the user's files, once."""
        listed = os.environ.get(VARIABLE) or None
        if listed is not None and listed != self._loaded:
            self._loaded = listed  # first: the files themselves may look something up
            load_files(Path(listed).expanduser())


REGISTRY = Registry()


def load_files(requirements: Path) -> None:
    """Imports the Python files that a text file lists, one path per line; `#` begins a comment.

    Raises:
        UserError: there is no such file, or a module can't be imported.
    """
    if not requirements.is_file():
        raise UserError(f"{VARIABLE}: no file {str(requirements)!r}")
    for line in requirements.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        path = Path(text).expanduser()
        folder = str(path.parent)
        if folder not in sys.path:
            sys.path.append(folder)
        try:
            importlib.import_module(path.stem)
        except Exception as error:
            renamed = isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == "oumi"
            remedy = "; write oumi_pl in place of oumi in its imports" if renamed else ""
            raise UserError(f"{VARIABLE}: {text} can't be imported: {type(error).__name__}: {error}{remedy}") from error


def register(registry_name: str, registry_type: RegistryType) -> Callable[[T], T]:
    """Registers the class or function that it decorates."""

    def decorate(value: T) -> T:
        REGISTRY.register(registry_name, registry_type, value)
        return value

    return decorate


def register_dataset(registry_name: str, subset: str | None = None) -> Callable[[T], T]:
    """Registers a class of data sets by the name that a config gives as `dataset_name`."""
    return register(f"{registry_name}/{subset}" if subset else registry_name, RegistryType.DATASET)


def register_evaluation_function(registry_name: str) -> Callable[[T], T]:
    """Registers a function; training has no use for it."""
    return register(registry_name, RegistryType.EVALUATION_FUNCTION)


def register_sample_analyzer(registry_name: str) -> Callable[[T], T]:
    """Registers a class; training has no use for it."""
    return register(registry_name, RegistryType.SAMPLE_ANALYZER)
