"""What a recipe can contain, read from signatures: the arguments of classes, their types, and the classes that fit."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from torch import Tensor
from torch.optim import Optimizer

from oumi_pl.config.classes import known_classes
from oumi_pl.config.parser import Parser


class Argument(NamedTuple):
    """An argument of a constructor, or an option of the command line."""

    hint: Any
    """Its type."""
    default: Any = None
    doc: str = ""


class Kinds(NamedTuple):
    """A type hint, sorted by what its alternatives look like in a recipe. What there is none of is empty."""

    plain: Any
    """Numbers, text and choices, as a hint."""
    bases: tuple[type, ...]
    """Classes of which a subclass is named by `class_path`."""
    items: Any
    """Type of the items of a list."""
    values: Any
    """Type of the values of a mapping."""


def options(parser: Any) -> dict[str, Argument]:
    """The options of a parser by name, without those that load a file or print help."""
    return {
        action.dest: Argument(action._typehint, action.default, action.help or "")
        for action in parser._actions
        if type(action).__name__ == "ActionTypeHint"
    }


@cache
def arguments(cls: type) -> dict[str, Argument]:
    """What the constructor of a class takes by name, with what it passes on to its bases as `**kwargs`.

    The fields of a dataclass have names with a dot: `theme.description`.
    """
    parser = Parser()
    skip: Any = {1} if issubclass(cls, Optimizer) else None  # the parameters: they come from the model
    try:
        parser.add_class_arguments(cls, "_", skip=skip, fail_untyped=False)
    except (ValueError, TypeError):  # it takes something that no recipe can give
        return {}
    return {name.removeprefix("_."): argument for name, argument in options(parser).items()}


@cache
def kinds(hint: Any) -> Kinds:
    """Sorts the alternatives of a type hint."""
    plain, bases, items, values = [], [], [], []
    for member in members(hint):
        kind, inner = get_origin(member) or member, get_args(member)
        if kind is Callable and inner:  # as with optimizers: the class whose instances it returns is named
            kind = inner[-1]
        if not inspect.isclass(kind):
            plain.append(member if get_origin(member) else Any)  # a choice; others can't be checked
        elif issubclass(kind, Mapping):
            values.append(inner[-1] if inner else Any)
        elif kind.__module__.partition(".")[0] not in sys.stdlib_module_names:
            bases.append(kind)
        elif issubclass(kind, Iterable) and not issubclass(kind, str | bytes):
            items += [item for item in inner if item is not ...] or [Any]
        else:
            plain.append(member)
    return Kinds(_union(plain), tuple(bases), _union(items), _union(values))


def members(hint: Any) -> Iterator[Any]:
    """The alternatives of a type hint, without None and tensors (a learning rate may be one, but not in a recipe)."""
    if get_origin(hint) in (Union, UnionType):
        for member in get_args(hint):
            yield from members(member)
    elif get_origin(hint) is Annotated:
        yield from members(get_args(hint)[0])
    elif hint not in (None, NoneType, Tensor):
        yield hint


def _union(hints: list[Any]) -> Any:
    return Any if Any in hints else Union[tuple(hints)] if hints else None  # noqa: UP007


def type_names(hint: Any) -> list[str]:
    """The alternatives of a type hint as people write them: `int`, `lightning|hf|trl`, `list`."""
    names = []
    for member in members(hint):
        kind = kinds(member)
        if kind.bases or kind.items or kind.values:
            names += [base.__name__ for base in kind.bases] or ["list" if kind.items else "mapping"]
        elif get_origin(member) is Literal:
            names.append("|".join(map(str, get_args(member))))
        else:
            names.append(getattr(member, "__name__", str(member)))
    return list(dict.fromkeys(names))


def places(level: Mapping[str, Argument], above: str = "") -> dict[str, dict[str, type]]:
    """The classes that a recipe can name, by their place in it (`model.optimizer`) and their short name.

    Args:
        level: What a recipe can set at the top, as `model` and `trainer.callbacks`; or the arguments of a class.
        above: Place of that class, with a dot at its end.
    """
    known: dict[str, dict[str, type]] = {}
    for name, argument in level.items():
        place, kind = f"{above}{name}", kinds(argument.hint)
        classes = known_classes(kind.bases or kinds(kind.items).bases)
        if classes:
            known[place] = classes
        # the arguments of Lightning's own parts are many, and few are for recipes
        for cls in classes.values() if place.count(".") < 2 and not place.startswith("trainer.") else ():
            for inner, others in places(arguments(cls), f"{place}.").items():
                known[inner] = known.get(inner, {}) | others
    return known
