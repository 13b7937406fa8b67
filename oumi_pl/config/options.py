"""Splits a command line into options and values. Uses the standard library only, because imports cost seconds."""

import re
from collections.abc import Iterable, Sequence

ALONE = {"--dry_run": "true", "--help": "", "--resume": ""}
"""Options that need no value -> their value without one."""
SHORT = {"-c": "--config", "-h": "--help"}
_VALUE = re.compile(r"(?!-)|-[\d.]")
"""The beginning of a value: no dash, unless a number follows."""

Option = tuple[str, str | None]
"""(`--data.batch_size`, `8`); None without a value. An argument that belongs to no option counts as an option."""


def read(args: Sequence[str]) -> list[Option]:
    """Splits a command line into options and values: `--key value`, or `--key=value`."""
    options: list[Option] = []
    rest = list(args)
    while rest:
        flag, equals, attached = rest.pop(0).partition("=")
        flag = SHORT.get(flag, flag)
        value = attached if equals else ALONE.get(flag)
        if not equals and rest and flag.startswith("-") and flag != "--print_config" and _VALUE.match(rest[0]):
            value = rest.pop(0)
        options.append((flag, value))
    return options


def write(options: Iterable[Option]) -> list[str]:
    """The command line that `read` splits into these options."""
    return [flag if value is None else f"{flag}={value}" for flag, value in options]


def value_of(flag: str, args: Sequence[str]) -> str | None:
    """The value of an option on a command line, the last if it is repeated; None without it."""
    return dict(read(args)).get(flag)
