"""Refuses misspelt keys and classes of a recipe file, key by key, before jsonargparse reads it.

jsonargparse finds most of these too, but takes an unknown section that is empty, and hides an import that fails
behind a page about the types that it tried.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from oumi_pl.config.explain import Classes, classes_at, misspelt, parameters, signature, unknown_key
from oumi_pl.errors import UserError, nearest

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
ARGUMENTS = {"model": ("SFT", "model"), "data": ("SFTData", "train")}
"""Sections that are a class, and which argument of it the name of a model or of a file belongs to."""


def refuse_unknown_keys(tree: Mapping[str, Any], flags: Iterable[str], classes: Classes) -> None:
    """Looks at all keys and class names of a recipe.

    Args:
        tree: The recipe as it was read.
        flags: Options that the command line knows, as `--trainer.max_steps`.
        classes: Classes that a `class_path` may shorten, by their place in a recipe.

    Raises:
        UserError: at the first key or class that there is not; offers the nearest.
    """
    model = tree.get("model")
    if isinstance(tree.get("training"), Mapping) or (isinstance(model, Mapping) and "model_name" in model):
        raise UserError("this is a config of Oumi's, not a recipe: run it with oumi_pl train -c FILE, or convert it")
    known = [f for f in flags if f.startswith("--") and not f.endswith(".help")]
    known = [f for f in known if f not in ("--help", "--config", "--print_config")]
    _check_section(tree, "", known, classes)


def _check_section(section: Mapping[str, Any], prefix: str, flags: list[str], classes: Classes) -> None:
    """A level of a recipe whose keys are options: the top, `trainer`, `checkpoint`."""
    for key, value in section.items():
        place = f"{prefix}{key}"
        if any(flag.startswith(f"--{place}.") for flag in flags):
            if not isinstance(value, Mapping):
                raise UserError(f"{place}: {value!r} is given, but here is a mapping of keys to values")
            _check_section(value, f"{place}.", flags, classes)
        elif f"--{place}" in flags:
            _check_value(value, place, classes)
        else:
            raise UserError(unknown_key(place, flags, classes))


def _check_value(value: Any, place: str, classes: Classes) -> None:
    """A value: a class with its arguments, or something that holds such."""
    if isinstance(value, str) and place in ARGUMENTS and _is_no_class(value, classes_at(place, classes)):
        raise UserError(
            f"{place}: {value!r} is not the name of a class; write "
            f"`{place}: {{class_path: {ARGUMENTS[place][0]}, init_args: {{{ARGUMENTS[place][1]}: {value}}}}}`"
        )
    if isinstance(value, list):
        for number, item in enumerate(value):
            _check_value(item, f"{place}.{number}", classes)
    if not isinstance(value, Mapping):
        return
    here = classes_at(place, classes)
    plain = next((cls for cls in here.values() if dataclasses.is_dataclass(cls)), None)
    if plain is not None and "class_path" not in value:
        _check_arguments(value, plain, place, classes)
    elif here or "class_path" in value:
        _check_class(value, place, classes)
    else:
        for key, item in value.items():
            _check_value(item, f"{place}.{key}", classes)


def _is_no_class(value: str, known: Mapping[str, type]) -> bool:
    """Whether a value is the name of a model or a file: there is such a file, and no class or module of that name."""
    if "/" in value:
        return True
    return Path(value).exists() and value not in known and not _is_in_a_module(value)


def _is_in_a_module(name: str) -> bool:
    module = name.rpartition(".")[0]
    try:
        spec = importlib.util.find_spec(module) if module else None
    except ModuleNotFoundError:
        return False
    except Exception:  # the package around it is there, and can't be imported: told where the class is looked for
        return True
    return spec is not None and spec.origin is not None  # a folder without code has none


def _check_class(value: Mapping[str, Any], place: str, classes: Classes) -> None:
    name = value.get("class_path")
    cls = _class(name, place, classes) if isinstance(name, str) else None
    for key in value:
        if key in CLASS_KEYS:
            continue
        owners = [cls] if cls is not None else classes_at(place, classes).values()
        if any(inspect.isclass(owner) and key in parameters(owner) for owner in owners):
            raise UserError(f"{place}.{key}: belongs one level deeper, under {place}.init_args")
        raise UserError(f"{place}.{key}: unknown key{nearest(str(key), CLASS_KEYS)}")
    _check_arguments(value.get("init_args") or {}, cls, place, classes)


def _check_arguments(arguments: Any, cls: Any, place: str, classes: Classes) -> None:
    if not isinstance(arguments, Mapping):
        raise UserError(f"{place}.init_args: {arguments!r} is given, but here is a mapping of keys to values")
    if inspect.isclass(cls):
        known, all_of_them = signature(cls)
        for key in arguments:
            if all_of_them and key not in known:
                raise UserError(misspelt(f"{place}.{key}", known, classes))
    for key, item in arguments.items():
        _check_value(item, f"{place}.{key}", classes)


def _class(name: str, place: str, classes: Classes) -> Any:
    """The class that a name stands for; None where jsonargparse has to decide."""
    known = classes_at(place, classes)
    if name in known:
        return known[name]
    if "." in name:
        return _imported(name, place)
    if known:
        raise UserError(f"{place}: unknown class {name!r}{nearest(name, known)}")
    return None


def _imported(name: str, place: str) -> Any:
    """Imports a class by its path.

    Raises:
        UserError: if there is no such module or class, or its file has a mistake: tells file and line.
    """
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise UserError(f"{place}: {name}: its module imports {missing!r}, which is not installed") from error
        raise UserError(f"{place}: {name}: there is no module {missing!r}{_beside(missing)}") from error
    except SyntaxError as error:
        raise UserError(f"{place}: {name}: {error.filename} line {error.lineno}: {error.msg}") from error
    except Exception as error:  # whatever a module of the user's does when it is imported
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({frame.filename} line {frame.lineno})"
        raise UserError(f"{place}: {name}: its module can't be imported: {reason}") from error
    if not hasattr(module, attribute):
        own = [n for n, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__]
        raise UserError(f"{place}: module {module_name!r} has no {attribute!r}{nearest(attribute, own)}")
    return getattr(module, attribute)


def _beside(module: str) -> str:
    """Offers the nearest module in the working directory, where classes of one's own lie."""
    near = nearest(module, [path.stem for path in Path.cwd().glob("*.py")])
    return near if near.startswith("; did") else f"; it is looked for in {Path.cwd()} and among what is installed"
