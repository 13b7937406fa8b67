"""A recipe as text: short lines, what differs from Oumi beside the keys that it is about."""

import textwrap
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import yaml

WIDTH = 110
BLOCKS = ("model", "model.init_args", "data", "data.init_args", "trainer")
"""Keys whose values take a line each, however short they are."""


def as_yaml(tree: Mapping[str, Any], comments: Mapping[str, list[str]] | None = None, header: str = "") -> str:
    """The text of a recipe that reads back as `tree`.

    Args:
        tree: The recipe.
        comments: Key by its dotted path, empty for the recipe as a whole -> what is noted of it. The notes of a key
            that the recipe lacks are put before the nearest key around it.
        header: Lines at the top.
    """
    notes: dict[str, list[str]] = {}
    for place, texts in (comments or {}).items():
        notes.setdefault(_nearest(place, tree), []).extend(texts)
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    for text in notes.get("", ()):
        lines += _comment(text, 0)
    return "\n".join([*lines, *_mapping(tree, "", 0, notes)]) + "\n"


def _nearest(place: str, tree: Mapping[str, Any]) -> str:
    """The place itself, or the innermost one around it that the tree has."""
    path, level = [], tree
    for key in place.split(".") if place else ():
        if not isinstance(level, Mapping) or key not in level:
            break
        path.append(key)
        level = level[key]
    return ".".join(path[:1] if path[-1:] == ["init_args"] else path)


def _mapping(tree: Mapping[str, Any], place: str, indent: int, notes: Mapping[str, list[str]]) -> list[str]:
    lines = []
    for key, value in tree.items():
        here = f"{place}.{key}" if place else str(key)
        for text in notes.get(here, ()):
            lines += _comment(text, indent)
        start = " " * indent + f"{key}:"
        inner = any(other.startswith(f"{here}.") for other in notes)
        flow = f"{start} {_flow(value)}"
        block = here in BLOCKS or inner
        if not isinstance(value, Mapping | list) or (not block and _is_short(value) and len(flow) <= WIDTH):
            lines.append(flow)
        elif isinstance(value, Mapping):
            lines += [start, *_mapping(value, here, indent + 2, notes)]
        else:
            lines += [start, *(" " * (indent + 2) + f"- {_flow(item)}" for item in value)]
    return lines


def _is_short(value: Any) -> bool:
    """Whether a mapping reads better in one line: classes with arguments and sources do, sections do not."""
    if isinstance(value, list):
        return not any(isinstance(item, Mapping) for item in value)
    return not any(
        isinstance(item, Mapping) and any(isinstance(i, Mapping) for i in item.values()) for item in value.values()
    )


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    # in a list, so that text which a flow style would take apart is quoted
    return yaml.safe_dump([value], default_flow_style=True, width=10**9, allow_unicode=True).strip()[1:-1]


def _number(value: float) -> str:
    """A float as YAML 1.1 reads it back as one: 2e-05 lacks the point that it needs."""
    if 1e-3 <= abs(value) < 1e6 or value == 0:
        return repr(value)
    digits = Decimal(repr(value))
    mantissa, _, exponent = f"{digits:.{max(1, len(digits.as_tuple().digits) - 1)}e}".partition("e")
    return f"{mantissa}e{int(exponent):+d}"


def _comment(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, WIDTH - indent, initial_indent=" " * indent + "# ", subsequent_indent=" " * indent + "# "
    )
