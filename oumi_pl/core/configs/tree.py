"""A configuration as plain mappings and lists, and back again, with the place of whatever is wrong."""

import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from oumi_pl.core.configs.errors import OumiConfigError
from oumi_pl.core.configs.params.base_params import BaseParams
from oumi_pl.core.configs.params.values import hints, members, shown
from oumi_pl.errors import nearest

T = TypeVar("T", bound=BaseParams)


def as_tree(value: Any) -> Any:
    """Sections as mappings, members of enums by their names, paths as text."""
    if isinstance(value, BaseParams):
        return {name: as_tree(item) for name, item in value}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: as_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_tree(item) for item in value]
    return value


def from_tree(cls: type[T], tree: Any) -> T:
    """A configuration of plain mappings and lists.

    Raises:
        OumiConfigError: at the first key that there is not, value that can't be, or value that is missing.
    """
    made = _section(cls, tree, "", list(places(cls)))
    made.refuse_missing()
    return made


def places(cls: type[BaseParams], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields: `training.max_steps`, `data.train.datasets[0].split`."""
    for name, hint in hints(cls).items():
        yield f"{prefix}{name}"
        if section := _class_in(hint):
            is_list = typing.get_origin(hint) is list
            yield from places(section, f"{prefix}{name}{'[0]' if is_list else ''}.")


def _section(cls: type[T], tree: Any, place: str, everywhere: Sequence[str]) -> T:
    if not isinstance(tree, Mapping):
        raise OumiConfigError(f"{place}: {shown(tree)} is given, but here is a mapping of keys to values")
    fields, start = hints(cls), f"{place}." if place else ""
    for key in tree:
        if key not in fields:
            raise OumiConfigError(_unknown(str(key), start, list(fields), everywhere))
    values = {key: _value(value, fields[key], f"{start}{key}", everywhere) for key, value in tree.items()}
    try:
        return cls(**values)
    except OumiConfigError as error:
        raise error.at(place) from error


def _value(value: Any, hint: Any, place: str, everywhere: Sequence[str]) -> Any:
    section = _class_in(hint)
    if section is None or (value is None and type(None) in members(hint)):
        return value
    if typing.get_origin(hint) is not list:
        return _section(section, value, place, everywhere)
    if not isinstance(value, list):
        raise OumiConfigError(f"{place}: {shown(value)} is given, but here is a list")
    return [_section(section, item, f"{place}[{i}]", everywhere) for i, item in enumerate(value)]


def _class_in(hint: Any) -> type[BaseParams] | None:
    """The section that a field holds, alone or in a list; None for a plain value."""
    inside = typing.get_args(hint) if typing.get_origin(hint) is list else members(hint)
    return next((kind for kind in inside if isinstance(kind, type) and issubclass(kind, BaseParams)), None)


def _unknown(key: str, start: str, fields: Sequence[str], everywhere: Sequence[str]) -> str:
    """What to say of an unknown key: the nearest beside it, else where a key of this very name belongs."""
    near = nearest(key, fields)
    elsewhere = next((name for name in everywhere if name.rpartition(".")[2] == key), None)
    if elsewhere and not near.startswith("; did"):
        near = f"; did you mean {elsewhere!r}?"
    return f"{start}{key}: unknown key{near}"
