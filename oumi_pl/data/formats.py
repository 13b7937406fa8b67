"""From a row to a record: one pure function per format, and how the right one is found.

A format reads the columns of one row and returns a `Conversation`, which a chat template renders, or a `Text`, which
is tokenized as it stands. A format of your own is a function `row -> record` that a recipe names by its dotted path.
"""

import importlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Conversation, Message, Record, Row, Text

Format = Callable[[Row], Record]
"""A function that makes a record of a row and raises `UserError` where the row isn't what it expects."""

ROLES = ("system", "developer", "user", "assistant", "tool")

_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "observation": "tool",
}


# --- formats ----------------------------------------------------------------------------------------------------------


def messages(row: Row) -> Conversation:
    """Reads `messages`: turns with `role` and `content`, as in OpenAI's API; optionally the `tools` they may call.

    Raises:
        UserError: a turn isn't a turn, or its role is unknown.
    """
    return Conversation(_turns(row, "messages"), _tools(row))


def sharegpt(row: Row) -> Conversation:
    """Reads `conversations`: turns with `from` and `value` (or `role` and `content`); optionally `tools`.

    Raises:
        UserError: a turn isn't a turn, or its role is unknown.
    """
    turns = _column(row, "conversations", list, "a list of turns")
    renamed = [_sharegpt_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    return Conversation(_turns({"conversations": renamed}, "conversations"), _tools(row))


def alpaca(row: Row) -> Conversation:
    """Reads `instruction`, `output` and perhaps `input`, which follows the instruction after an empty line.

    Raises:
        UserError: a column isn't text.
    """
    question, context = _text(row, "instruction"), row.get("input")
    if context is not None and not isinstance(context, str):
        raise UserError(f"column 'input' holds {_kind(context)} instead of text")
    return _exchange(f"{question}\n\n{context}" if context else question, _text(row, "output"))


def prompt_completion(row: Row) -> Record:
    """Reads `prompt` and `completion`: both text (joined as they stand), or both lists of turns; optionally `tools`.

    Raises:
        UserError: one is text and the other isn't, or a turn isn't a turn.
    """
    prompt, completion = (_column(row, name, (str, list), "text or turns") for name in ("prompt", "completion"))
    if isinstance(prompt, str) != isinstance(completion, str):
        raise UserError(
            f"'prompt' holds {_kind(prompt)} and 'completion' {_kind(completion)}; both must be text, or both turns"
        )
    if isinstance(prompt, str):
        return Text(text=completion, prompt=prompt)
    start = _turns(row, "prompt")
    return Conversation(start + _turns(row, "completion"), _tools(row), prompt_messages=len(start))


def prompt_response(row: Row) -> Conversation:
    """Reads `prompt` and `response`, texts of a user and an assistant.

    Raises:
        UserError: a column isn't text.
    """
    return _exchange(_text(row, "prompt"), _text(row, "response"))


def question_answer(row: Row) -> Conversation:
    """Reads `question` and `answer`, texts of a user and an assistant.

    Raises:
        UserError: a column isn't text.
    """
    return _exchange(_text(row, "question"), _text(row, "answer"))


def text(row: Row) -> Text:
    """Reads `text`, which no chat template touches.

    Raises:
        UserError: the column isn't text.
    """
    return Text(_text(row, "text"))


# The first whose columns are all there wins: chats before exchanges, and `text`, which many data sets add, last.
FORMATS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    (messages, ("messages",)),
    (sharegpt, ("conversations",)),
    (prompt_completion, ("prompt", "completion")),
    (prompt_response, ("prompt", "response")),
    (question_answer, ("question", "answer")),
    (alpaca, ("instruction", "output")),
    (text, ("text",)),
)


# --- finding one ------------------------------------------------------------------------------------------------------


def find_format(columns: Collection[str]) -> Format:
    """Finds the format that fits a source's columns.

    Raises:
        UserError: none fits; lists the columns, and what each format needs.
    """
    for function, needed in FORMATS:
        if set(needed) <= set(columns):
            return function
    known = "; ".join(f"{_name(function)} ({', '.join(needed)})" for function, needed in FORMATS)
    raise UserError(
        f"no format fits the columns {', '.join(sorted(columns)) or '(none)'}; formats and what they need: {known}; "
        "say which of your columns is which with `columns`, e.g. {question: my_column}"
    )


def resolve_format(name: str) -> Format:
    """Returns the built-in format `name`, or the function that the dotted path `package.module.function` names.

    Raises:
        UserError: there is no such format, module or function; offers the nearest.
    """
    known: dict[str, Format] = {_name(function): function for function, _ in FORMATS}
    if name in known:
        return known[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise UserError(f"unknown format {name!r}{nearest(name, known)}; or a path like 'package.module.function'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"format {name!r} can't be imported: {error}{nearest(attribute, known)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{module_name!r} has no function {attribute!r}{nearest(attribute, own)}")
    return cast(Format, function)


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Returns the row with the user's columns under the names that a format reads.

    Args:
        row: A row as it was read.
        columns: Format's field -> user's column, e.g. `{"question": "q_text"}`.

    Raises:
        UserError: the row has no such column; offers the nearest.
    """
    for field, column in columns.items():
        if column not in row:
            raise UserError(f"no column {column!r} (for {field!r}){nearest(column, row)}")
    moved = set(columns.values())
    rest = {name: value for name, value in row.items() if name not in moved}
    return rest | {field: row[column] for field, column in columns.items()}


# --- pieces -----------------------------------------------------------------------------------------------------------


def _name(function: Format) -> str:
    return getattr(function, "__name__", repr(function))


def _kind(value: Any) -> str:
    """Names a value's kind as a user would."""
    kinds = {str: "text", list: "a list", dict: "a mapping", type(None): "nothing (null)", bool: "true or false"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def _column(row: Row, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    if name not in row:
        raise UserError(f"no column {name!r}{nearest(name, row)}")
    if not isinstance(row[name], kind):
        raise UserError(f"column {name!r} holds {_kind(row[name])} instead of {wanted}")
    return row[name]


def _text(row: Row, name: str) -> str:
    return cast(str, _column(row, name, str, "text"))


def _exchange(question: str, answer: str) -> Conversation:
    turns: tuple[Message, ...] = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Conversation(turns, prompt_messages=1)


def _turns(row: Row, name: str) -> tuple[Message, ...]:
    turns = _column(row, name, list, "a list of turns")
    if not turns:
        raise UserError(f"column {name!r} holds no turns")
    return tuple(_message(turn, f"{name}[{i}]") for i, turn in enumerate(turns))


def _message(turn: Any, where: str) -> Message:
    """Checks one turn and returns it without the empty keys that templates would trip over."""
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {_kind(turn)} instead of a mapping with role and content")
    # Arrow gives every turn the keys that any turn has: those that this one lacks come as None.
    message = {key: _without_none(value) for key, value in turn.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str):
        raise UserError(f"{where} has no role; keys: {', '.join(map(str, message))}")
    if role not in ROLES:
        raise UserError(f"{where} has the unknown role {role!r}{nearest(role, ROLES)}")
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    if "content" not in message:
        if "tool_calls" not in message:
            raise UserError(f"{where} ({role}) has no content")
        message["content"] = None
    elif not isinstance(message["content"], str):
        message["content"] = _joined_parts(message["content"], where)
    return cast(Message, message)


def _joined_parts(content: Any, where: str) -> str:
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise UserError(f"{where}.content is {_kind(content)} instead of text")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}.content has a part of type {part.get('type')!r}; only text can be trained on, "
                "images and other media aren't supported"
            )
    return "".join(part["text"] for part in content)


def _sharegpt_turn(turn: Any, where: str) -> Any:
    """Renames keys and role; what else could be wrong, `_message` finds."""
    if not isinstance(turn, dict):
        return turn
    renamed = {{"from": "role", "value": "content"}.get(k, k): v for k, v in turn.items() if v is not None}
    role = renamed.get("role")
    if isinstance(role, str) and role not in _SHAREGPT_ROLES:
        raise UserError(f"{where} has the unknown role {role!r}{nearest(role, _SHAREGPT_ROLES)}")
    return renamed | {"role": _SHAREGPT_ROLES[role]} if isinstance(role, str) else renamed


def _tools(row: Row) -> tuple[dict[str, Any], ...] | None:
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


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
