"""What all parameters have in common: values are converted and checked as soon as they are given."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from oumi_pl.core.configs.errors import OumiConfigError
from oumi_pl.core.configs.params.values import converted, hints, shown
from oumi_pl.errors import nearest

MISSING: Any = "???"
"""Stands where a value has to be given and is not there yet; told when a file is loaded, or at the end."""


@dataclasses.dataclass
class BaseParams:
    """A section of a configuration."""

    def __post_init__(self) -> None:
        """Converts each value to the type of its field, then looks at them together.

        Raises:
            OumiConfigError: at the first that can't be.
        """
        for name, hint in hints(type(self)).items():
            setattr(self, name, converted(getattr(self, name), hint, name))
        self._check()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field.

        Raises:
            OumiConfigError: there is none of that name: a misspelt one would be set, and never read.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if name not in known:
            raise OumiConfigError(f"{type(self).__name__} has no field {name!r}{nearest(name, known)}")
        super().__setattr__(name, value)

    def finalize_and_validate(self) -> None:
        """Checks all again, for values may have been assigned since, and what depends on the machine as well.

        Raises:
            OumiConfigError: at the first value that can't be.
        """
        for name, value in self:
            for place, part in _parts(name, value):
                try:
                    part.finalize_and_validate()
                except OumiConfigError as error:
                    raise error.at(place) from error
        self.__post_init__()
        self.refuse_missing()
        self._finalize()

    def refuse_missing(self) -> None:
        """Looks for what has to be given and is not.

        Raises:
            OumiConfigError: at the first such field, here or in a section.
        """
        for place in _missing(self):
            raise OumiConfigError(f"{place}: missing, and there is no default")

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Names and values of the fields."""
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)

    def _check(self) -> None:
        """What has to hold of the values alone."""

    def _finalize(self) -> None:
        """What has to hold on this machine."""

    def _at_least(self, least: int, *names: str) -> None:
        """Refuses numbers that are too small; None stands for a default."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise OumiConfigError(f"{name} is {value}, but has to be at least {least}")

    def _one_of(self, name: str, choices: Iterable[str]) -> None:
        """Refuses a name that is not among the choices; None stands for a default."""
        value, names = getattr(self, name), list(choices)
        if value is not None and value not in names:
            raise OumiConfigError(f"{name}: {shown(value)} is not a valid value{nearest(str(value), names)}")


def _missing(params: BaseParams) -> Iterator[str]:
    for name, value in params:
        if value == MISSING:
            yield name
        for place, part in _parts(name, value):
            yield from (f"{place}.{inner}" for inner in _missing(part))


def _parts(name: str, value: Any) -> Iterator[tuple[str, BaseParams]]:
    """The sections inside a field, with their places."""
    if isinstance(value, BaseParams):
        yield name, value
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _parts(f"{name}[{i}]", item)
