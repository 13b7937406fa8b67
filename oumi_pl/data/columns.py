"""Pieces of formats: reads text, turns and tools out of a row's columns, and says what is wrong where they aren't."""

import json
from collections.abc import Callable
from typing import Any, cast

from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Message, Row

ROLES = ("system", "developer", "user", "assistant", "tool")

_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
}


def kind_name(value: Any) -> str:
    """Names a value's kind as a user would."""
    kinds = {str: "text", list: "a list", dict: "a mapping", type(None): "nothing (null)", bool: "true or false"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def column(row: Row, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    """Returns a column's value.

    Raises:
        UserError: the row has no such column (offers the nearest), or its value is of another kind than `wanted` says.
    """
    if name not in row:
        raise UserError(f"no column {name!r}{nearest(name, row)}")
    if not isinstance(row[name], kind):
        raise UserError(f"column {name!r} holds {kind_name(row[name])} instead of {wanted}")
    return row[name]


def text_column(row: Row, name: str) -> str:
    """Returns a column's text; raises `UserError` where it is something else."""
    return cast(str, column(row, name, str, "text"))


def message(turn: Any, where: str) -> Message:
    """Checks a turn with `role` and `content` and returns it without the empty keys that templates would trip over.

    Raises:
        UserError: it isn't a turn; `where` says which.
    """
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {kind_name(turn)} instead of a mapping with role and content")
    # Arrow gives every turn the keys that any turn has: those that this one lacks come as None.
    checked = {key: _without_none(value) for key, value in turn.items() if value is not None}
    role = checked.get("role")
    if not isinstance(role, str):
        raise UserError(f"{where} has no role; keys: {', '.join(map(str, checked))}")
    if role not in ROLES:
        raise UserError(f"{where} has the unknown role {role!r}{nearest(role, ROLES)}")
    if not checked.get("tool_calls"):
        checked.pop("tool_calls", None)
    if "content" not in checked:
        if "tool_calls" not in checked:
            raise UserError(f"{where} ({role}) has no content")
        checked["content"] = None
    elif not isinstance(checked["content"], str):
        checked["content"] = _joined_parts(checked["content"], where)
    return cast(Message, checked)


def sharegpt_message(turn: Any, where: str) -> Message:
    """Checks a turn with `from` and `value` (or `role` and `content`) and returns it as `message` does.

    Raises:
        UserError: it isn't a turn; `where` says which.
    """
    if not isinstance(turn, dict):
        return message(turn, where)
    renamed = {{"from": "role", "value": "content"}.get(k, k): v for k, v in turn.items() if v is not None}
    role = renamed.get("role")
    if isinstance(role, str):
        if role not in _SHAREGPT_ROLES:
            raise UserError(f"{where} has the unknown role {role!r}{nearest(role, _SHAREGPT_ROLES)}")
        renamed["role"] = _SHAREGPT_ROLES[role]
    return message(renamed, where)


def turns_column(row: Row, name: str, read: Callable[[Any, str], Message] = message) -> tuple[Message, ...]:
    """Returns a column's turns, at least one.

    Args:
        row: A row.
        name: The column.
        read: Checks one turn: `message` or `sharegpt_message`.

    Raises:
        UserError: the column holds no list of turns.
    """
    turns = column(row, name, list, "a list of turns")
    if not turns:
        raise UserError(f"column {name!r} holds no turns")
    return tuple(read(turn, f"{name}[{i}]") for i, turn in enumerate(turns))


def tools_column(row: Row) -> tuple[dict[str, Any], ...] | None:
    """Returns the functions that a row's column `tools` lists, as they stand or as JSON; None where there are none.

    Raises:
        UserError: the column holds something else.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"column 'tools' holds text that isn't JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("column 'tools' must hold a list of mappings, one JSON schema each")
    return tuple(_without_none(tool) for tool in tools)


def _joined_parts(content: Any, where: str) -> str:
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise UserError(f"{where}.content is {kind_name(content)} instead of text")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}.content has a part of type {part.get('type')!r}; only text can be trained on, "
                "images and other media aren't supported"
            )
    return "".join(part["text"] for part in content)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
