"""Takes a value to the type of its field: what a YAML file may write for a number, a truth or a name."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from oumi_pl.core.configs.errors import OumiConfigError
from oumi_pl.errors import nearest

TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KINDS = {int: "an int", float: "a float", str: "text", bool: "true or false", list: "a list", dict: "a mapping"}
LONGEST = 80


def hints(cls: Any) -> dict[str, Any]:
    """Fields of a dataclass -> their types."""
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    every = typing.get_type_hints(cls)
    return {field.name: every[field.name] for field in dataclasses.fields(cls)}


def members(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have: `int | None` has two."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def shown(value: Any) -> str:
    """A value as an error quotes it, in YAML's words."""
    words = {"None": "null", "True": "true", "False": "false"}
    text = repr(value.name) if isinstance(value, Enum) else words.get(repr(value), repr(value))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def converted(value: Any, hint: Any, name: str) -> Any:
    """A value in the type of its field.

    Quoted numbers and truths convert, an int becomes a float, members of an enum go by their name; an int takes no
    float, and null is for optional fields.

    Args:
        value: What a file, the command line or Python gave.
        hint: The type of the field.
        name: The field, for the message.

    Raises:
        OumiConfigError: if it can't be taken to that type.
    """
    kinds = members(hint)
    if value is None:
        if type(None) in kinds:
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
        (item,) = typing.get_args(kind)
        return [converted(one, item, f"{name}[{i}]") for i, one in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise OumiConfigError(f"{name}: the key {shown(odd[0])} is not text; quote it")
        return dict(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _member(value, kind, name)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, kind):
        return value
    if origin in PLAIN and (found := PLAIN[origin](value)) is not None:
        return found
    if origin is str and isinstance(value, bool):
        words = "yes and on as true" if value else "no and off as false"
        raise OumiConfigError(f"{name}: {shown(value)} is given, but text is needed; YAML reads {words}, so quote it")
    raise OumiConfigError(f"{name}: {shown(value)} is not {_expected((kind,))}")


def _member(value: Any, kind: type[Enum], name: str) -> Enum:
    asked = value.name if isinstance(value, Enum) else str(value)  # a member may be of an enum alike: PEFT's TaskType
    asked = asked.removeprefix(f"{kind.__name__}.")
    if asked in kind.__members__:
        return kind[asked]
    raise OumiConfigError(f"{name}: {shown(value)} is not a valid value{nearest(asked, kind.__members__)}")


def _int(value: Any) -> int | None:
    if isinstance(value, bool | float) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _bool(value: Any) -> bool | None:
    return TRUTHS.get(str(value).lower())


def _str(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        return None
    return str(value)


PLAIN = {int: _int, float: _float, bool: _bool, str: _str, Any: lambda value: value}


def _expected(kinds: tuple[Any, ...]) -> str:
    named = [typing.get_origin(kind) or kind for kind in kinds]
    return " or ".join(KINDS.get(kind, f"an object of {kind.__name__}") for kind in named if kind is not type(None))
