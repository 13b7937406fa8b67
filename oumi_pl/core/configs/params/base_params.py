"""What all sections have in common: values are converted to their fields' types and checked when they are given."""

import copy
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from oumi_pl.errors import UserError, nearest

MISSING: Any = "???"
"""Default of a required field; reported when a file is loaded, or by `finalize_and_validate`."""
TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KINDS = {int: "an int", float: "a float", str: "text", bool: "true or false", list: "a list", dict: "a mapping"}
LONGEST = 80
"""Characters of a value that an error quotes."""


class OumiConfigError(UserError):
    """A wrong configuration: the message begins with the dotted path of the wrong field.

    A section knows its own fields only, so its message begins with a field's name; whoever holds the section puts the
    rest of the path in front.
    """

    def at(self, place: str) -> Self:
        """The same error with a longer path: `max_steps is 0` at `training` is `training.max_steps is 0`."""
        return type(self)(f"{place}.{self}") if place else self


T = TypeVar("T")
BECOMES = "becomes"
"""Key of a field's metadata."""
SPEED = "it decides on speed or memory alone, and these are chosen here without it"
"""Why a field is harmless."""


class Becomes(NamedTuple):
    """What becomes of a field in a recipe.

    how: `honoured`, `why` names the key of the recipe that says the same; `refused`, unless it has its default, and
    `why` is the reason; `harmless`, what is trained doesn't depend on it, and `why` is the reason.
    """

    how: str
    why: str


def honoured(key: str, default: T) -> T:
    """A field that the recipe says in `key`, with its default."""
    return _field(Becomes("honoured", key), default)


def refused(why: str, default: T) -> T:
    """A field without a counterpart, with its default."""
    return _field(Becomes("refused", why), default)


def harmless(why: str, default: T) -> T:
    """A field that doesn't decide what is trained, with its default."""
    return _field(Becomes("harmless", why), default)


def _field(becomes: Becomes | None, default: Any) -> Any:
    """A field of a dataclass; each section gets a copy of its own of a default that can be changed."""
    metadata = {BECOMES: becomes} if becomes else {}
    if isinstance(default, list | dict | BaseParams):
        return dataclasses.field(default_factory=functools.partial(copy.deepcopy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class BaseParams:
    """A section of a configuration."""

    def __post_init__(self) -> None:
        """Converts each value to the type of its field, then checks them together.

        Raises:
            OumiConfigError: at the first wrong value.
        """
        for name, hint in hints(type(self)).items():
            setattr(self, name, converted(getattr(self, name), hint, name))
        for problem in self._problems():
            raise OumiConfigError(problem)
        self._settle()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field.

        Raises:
            OumiConfigError: there is no such field: a misspelt one would be set and never read.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if name not in known:
            raise OumiConfigError(f"{type(self).__name__} has no field {name!r}{nearest(name, known)}")
        super().__setattr__(name, value)

    def finalize_and_validate(self) -> None:
        """Checks everything again, since values may have been assigned, and also what depends on the machine.

        Sections inside come first, in lists and mappings too, each of them once.

        Raises:
            OumiConfigError: at the first wrong value.
        """
        self._finalize(set())

    def _finalize(self, seen: set[int]) -> None:
        if id(self) in seen:  # sections may hold each other
            return
        seen.add(id(self))
        for name, value in self:
            for place, part in _parts(name, value):
                try:
                    part._finalize(seen)
                except OumiConfigError as error:
                    raise error.at(place) from error
        self.__post_init__()
        self.refuse_missing()
        self.__finalize_and_validate__()
        for problem in self._final_problems():
            raise OumiConfigError(problem)

    def __finalize_and_validate__(self) -> None:
        """What a subclass outside this package checks, under the name that it has in Oumi; raises what it likes."""

    def refuse_missing(self) -> None:
        """Refuses required fields that are not set.

        Raises:
            OumiConfigError: at the first such field, here or in a section.
        """
        for place, value, _ in walk(self):
            if value == MISSING:
                raise OumiConfigError(f"{place}: missing, and there is no default")

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Names and values of the fields."""
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)

    # Problems are messages that begin with the name of a field; the first one is raised.

    def _problems(self) -> Iterable[str]:
        """What is wrong with the values alone."""
        return ()

    def _final_problems(self) -> Iterable[str]:
        """What is wrong with the complete section, on this machine."""
        return ()

    def _settle(self) -> None:
        """Derives values from those that were given, after the checks."""

    def _below(self, least: int, *names: str) -> Iterator[str]:
        """Numbers that are too small; None stands for a default."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} is {value}, but has to be at least {least}"

    def _no_share(self, name: str, hint: str = "") -> Iterator[str]:
        """A number that is not from 0 to 1; None stands for a default."""
        value = getattr(self, name)
        if value is not None and not 0 <= value <= 1:
            yield f"{name} is {value:g}, but has to be between 0 and 1{hint}"

    def _none_of(self, name: str, choices: Iterable[str]) -> Iterator[str]:
        """A name that is not among the choices; None stands for a default."""
        value, names = getattr(self, name), list(choices)
        if value is not None and value not in names:
            yield f"{name}: {shown(value)} is not a valid value{nearest(str(value), names)}"

    def _too_deep(self, name: str) -> Iterator[str]:
        """Keys of a free-form mapping that are fields of the section itself."""
        for key in getattr(self, name):
            if key in hints(type(self)):
                yield f"{name}.{key}: belongs one level higher, beside {name}"


Section = TypeVar("Section", bound=type[BaseParams])


def with_fields(table: Mapping[str, Any]) -> Callable[[Section], Section]:
    """Makes a section of a class and a table of further fields, for blocks that nothing reads and files may name.

    Args:
        table: Name -> default. Where the default does not tell the type (`int | None`): name -> (type, default).
    """

    def decorate(cls: Section) -> Section:
        annotations = dict(inspect.get_annotations(cls))
        for name, value in table.items():
            kind, default = value if isinstance(value, tuple) else (type(value), value)
            annotations[name] = dict[str, Any] if kind is dict else kind
            setattr(cls, name, _field(None, default))
        cls.__annotations__ = annotations
        return typing.cast(Section, dataclasses.dataclass(cls))

    return decorate


def walk(section: Any, place: str = "", around: tuple[int, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """All fields of a section, and of those inside it, as (dotted path, value, default).

    Args:
        section: The section.
        place: Its path, with a point at the end.
        around: Ids of the sections that it is in, which are not walked again.
    """
    around = (*around, id(section))
    for field in dataclasses.fields(section):
        path, value = f"{place}{field.name}", getattr(section, field.name)
        if not isinstance(value, BaseParams):
            yield path, value, default_of(field)
        for inside, part in _parts(path, value):
            if id(part) not in around:
                yield from walk(part, f"{inside}.", around)


def fields_of(cls: type[BaseParams], place: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]"]]:
    """All fields that a section may have, by paths such as `training.max_steps` and `data.train.datasets[0].split`."""
    kinds = hints(cls)
    for field in dataclasses.fields(cls):
        yield f"{place}{field.name}", field
        if section := section_in(kinds[field.name]):
            number = "[0]" if typing.get_origin(kinds[field.name]) is list else ""
            yield from fields_of(section, f"{place}{field.name}{number}.")


def _parts(name: str, value: Any) -> Iterator[tuple[str, BaseParams]]:
    """The sections inside a field, with their places."""
    if isinstance(value, BaseParams):
        yield name, value
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _parts(f"{name}[{i}]", item)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _parts(f"{name}.{key}", item)


# --- values: what a YAML file may write for a number, a truth or a name ----------------------------------------------


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """The default of a field, a new one each time if it can be changed; `dataclasses.MISSING` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def hints(cls: Any) -> dict[str, Any]:
    """Fields of a dataclass -> their types."""
    every = typing.get_type_hints(cls)
    return {field.name: every[field.name] for field in dataclasses.fields(cls)}


def members(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have: `int | None` has two, and so has `Optional[int]`."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def section_in(hint: Any) -> type[BaseParams] | None:
    """The section that a field holds, alone or in a list; None for a plain value."""
    inside = typing.get_args(hint) if typing.get_origin(hint) is list else members(hint)
    return next((kind for kind in inside if isinstance(kind, type) and issubclass(kind, BaseParams)), None)


def shown(value: Any) -> str:
    """A value as an error quotes it, in YAML's words."""
    words = {"None": "null", "True": "true", "False": "false"}
    text = repr(value.name) if isinstance(value, Enum) else words.get(repr(value), repr(value))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def converted(value: Any, hint: Any, name: str) -> Any:
    """A value in the type of its field.

    Quoted numbers and truths are converted, an int becomes a float, and enum members go by their name. An int takes no
    float, and null is for optional fields.

    Args:
        value: From a file, the command line or Python.
        hint: The type of the field.
        name: The field, for the message.

    Raises:
        OumiConfigError: the value can't be converted.
    """
    kinds = members(hint)
    if value is None:
        if type(None) in kinds or Any in kinds:
            return None
        raise OumiConfigError(
            f"{name}: null is given, but {_expected(kinds)} is needed; leave the key out for the default"
        )
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return _single(value, kinds[0], name)
    if type(value) in kinds or (Path in kinds and isinstance(value, Path)):
        return value
    for kind in kinds if isinstance(value, str) else ():
        try:
            return _single(value, kind, name)
        except OumiConfigError:
            continue
    raise OumiConfigError(f"{name}: {shown(value)} is not {_expected(kinds)}")


def _single(value: Any, kind: Any, name: str) -> Any:
    origin = typing.get_origin(kind) or kind
    if origin is list and isinstance(value, list | tuple):
        item = next(iter(typing.get_args(kind)), Any)
        return [converted(one, item, f"{name}[{i}]") for i, one in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise OumiConfigError(f"{name}: the key {shown(odd[0])} is not text; quote it")
        return dict(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _member(value, kind, name)
    is_other = isinstance(kind, type) and kind not in (*PLAIN, str, list, dict)  # a class of a subclass's own field
    if is_other and isinstance(value, kind):
        return value
    if origin in PLAIN and (plain := PLAIN[origin](value)) is not None:
        return plain
    if origin is str and isinstance(value, bool):
        words = "yes and on as true" if value else "no and off as false"
        raise OumiConfigError(f"{name}: {shown(value)} is given, but text is needed; YAML reads {words}, so quote it")
    raise OumiConfigError(f"{name}: {shown(value)} is not {_expected((kind,))}")


def _member(value: Any, kind: type[Enum], name: str) -> Enum:
    given = value.name if isinstance(value, Enum) else str(value)  # it may be of a similar enum: PEFT's TaskType
    given = given.removeprefix(f"{kind.__name__}.")
    if given in kind.__members__:
        return kind[given]
    raise OumiConfigError(f"{name}: {shown(value)} is not a valid value{nearest(given, kind.__members__)}")


def _number(kind: type[int] | type[float], value: Any) -> int | float | None:
    taken = (int, str) if kind is int else (int, float, str)
    if isinstance(value, bool) or not isinstance(value, taken):
        return None
    try:
        return kind(value)
    except (ValueError, OverflowError):
        return None


def _text(value: Any) -> str | None:
    is_text = isinstance(value, str | int | float | Path) and not isinstance(value, bool)
    return str(value) if is_text else None


PLAIN: dict[Any, Callable[[Any], Any]] = {
    int: functools.partial(_number, int),
    float: functools.partial(_number, float),
    bool: lambda value: TRUTHS.get(str(value).lower()),
    str: _text,
    Any: lambda value: value,
    Path: lambda value: Path(value) if isinstance(value, str | Path) else None,
}
"""Type -> the value in it; None if it can't be converted."""


def _expected(kinds: tuple[Any, ...]) -> str:
    named = [typing.get_origin(kind) or kind for kind in kinds]
    return " or ".join(KINDS.get(kind, f"an object of {kind.__name__}") for kind in named if kind is not type(None))
