"""Oumi's registry: data sets and models of the user's own files, by the names that a config gives.

Modules are found as Oumi finds them: the file that `OUMI_EXTRA_DEPS_FILE` names lists one Python file per line, and
each is imported by its path, once, before the first look-up. What Oumi itself registers is not here; see
`core/recipe/sources.py`.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from enum import Enum, auto
from pathlib import Path
from typing import Any, TypeVar

from oumi_pl.errors import UserError, nearest

VARIABLE = "OUMI_EXTRA_DEPS_FILE"
"""Environment variable with the path of the list of the user's files."""

T = TypeVar("T")


class RegistryType(Enum):
    """What is registered. Configs of training name data sets and models; the other types can be registered,
    but training ignores them.
    """

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
        """The list whose files were imported."""
        self._is_loading = False
        self._modules: list[str] = []
        """Names of the modules that were imported from it."""

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
        """Forgets everything that was registered; the next look-up runs the user's files again."""
        self._values.clear()
        for name in self._modules:
            sys.modules.pop(name, None)
        self._modules.clear()
        self._loaded = None

    def __getitem__(self, key: tuple[str, RegistryType]) -> Any:
        name, kind = key
        if not self.contains(name, kind):
            raise KeyError(f"no {kind.name.lower()} {name!r}{nearest(name.lower(), self.get_all(kind))}")
        return self.get(name, kind)

    def _load(self) -> None:
        """Imports the user's files, once; after an error, the next look-up tries again."""
        listed = os.environ.get(VARIABLE) or None
        if listed is None or listed == self._loaded or self._is_loading:  # the files themselves may look something up
            return
        self._is_loading = True
        try:
            for path in listed_files(Path(listed).expanduser()):
                self._import(path)
            self._loaded = listed
        finally:
            self._is_loading = False

    def _import(self, path: Path) -> None:
        name = module_name(path)
        self._modules.append(name)
        try:
            import_file(path, name)
        except Exception as error:
            # what it registered before it failed would be taken when it is imported again
            self._values = {
                key: value for key, value in self._values.items() if getattr(value, "__module__", None) != name
            }
            renamed = isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == "oumi"
            remedy = "; write oumi_pl in place of oumi in its imports" if renamed else ""
            raise UserError(f"{VARIABLE}: {path} can't be imported: {type(error).__name__}: {error}{remedy}") from error


REGISTRY = Registry()


def listed_files(requirements: Path) -> Iterator[Path]:
    """The Python files (or folders of packages) that a text file lists, one path per line; `#` begins a comment.

    Raises:
        UserError: there is no such file, or a listed one doesn't exist.
    """
    if not requirements.is_file():
        raise UserError(f"{VARIABLE}: no file {str(requirements)!r}")
    for number, line in enumerate(requirements.read_text(encoding="utf-8").split("\n"), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        path = Path(text).expanduser()
        if not _source(path).is_file():
            raise UserError(f"{VARIABLE}: {requirements}:{number}: no file {text!r}")
        yield path


def module_name(path: Path) -> str:
    """Name of the module of a file: its own if `import` finds this file by it, else one that no other module has.

    With its own name, the user's files can import one another. The folder is added to `sys.path` for that.
    """
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()  # the file may be new
    source = _source(path).resolve()
    name = path.stem
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == source:
        return name
    return f"{name}_{hashlib.blake2b(str(source).encode(), digest_size=8).hexdigest()}"


def import_file(path: Path, name: str) -> None:
    """Imports a file as the module `name`, unless it is imported already."""
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, _source(path))
    assert spec is not None and spec.loader is not None  # its suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise


def _source(path: Path) -> Path:
    """The file of a module, which may be named without its suffix, or by the folder of a package."""
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py")


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
