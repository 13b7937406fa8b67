"""Formats: one pure function per format, from a row to a record; and their detection from the columns.

A format reads the columns of a row and returns a `Conversation`, which a chat template renders, or a `Text`, which is
tokenized unchanged. Those of `preferences.py` return a `Preference`, which is two of these. A user's format is a
function `row -> record` that a recipe names by its dotted path.
"""

import difflib
import importlib
import json
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Conversation, Message, Record, Row, Text

Format = Callable[[Row], Record]
"""A function that returns the record of a row, and raises `UserError` if the row is invalid."""

Formats = tuple[tuple[Format, tuple[str, ...]], ...]
"""Formats with the columns that each needs. The first one whose columns all exist is used."""

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
    return Conversation(turns_column(row, "messages"), tools_column(row))


def sharegpt(row: Row) -> Conversation:
    """Reads `conversations`: turns with `from` and `value` (or `role` and `content`); optionally `tools`.

    Raises:
        UserError: a turn isn't a turn, or its role is unknown.
    """
    return Conversation(turns_column(row, "conversations", sharegpt_message), tools_column(row))


def alpaca(row: Row) -> Conversation:
    """Reads `instruction`, `output` and optionally `input`, which follows the instruction after an empty line.

    Raises:
        UserError: a column isn't text.
    """
    question, context = text_column(row, "instruction"), row.get("input")
    if context is not None and not isinstance(context, str):
        raise UserError(f"column 'input' holds {kind_name(context)} instead of text")
    return exchange(f"{question}\n\n{context}" if context else question, text_column(row, "output"))


def prompt_completion(row: Row) -> Record:
    """Reads `prompt` and `completion`: both text (concatenated), or both lists of turns; optionally `tools`.

    Raises:
        UserError: one is text and the other isn't, or a turn isn't a turn.
    """
    prompt, completion = (column(row, name, (str, list), "text or turns") for name in ("prompt", "completion"))
    if isinstance(prompt, str) != isinstance(completion, str):
        raise UserError(
            f"'prompt' holds {kind_name(prompt)} and 'completion' {kind_name(completion)}; "
            "both must be text, or both turns"
        )
    if isinstance(prompt, str):
        return Text(text=completion, prompt=prompt)
    start = turns_column(row, "prompt")
    return Conversation(start + turns_column(row, "completion"), tools_column(row), prompt_messages=len(start))


def prompt_response(row: Row) -> Conversation:
    """Reads `prompt` and `response`, texts of a user and an assistant.

    Raises:
        UserError: a column isn't text.
    """
    return exchange(text_column(row, "prompt"), text_column(row, "response"))


def question_answer(row: Row) -> Conversation:
    """Reads `question` and `answer`, texts of a user and an assistant.

    Raises:
        UserError: a column isn't text.
    """
    return exchange(text_column(row, "question"), text_column(row, "answer"))


def text(row: Row) -> Text:
    """Reads `text`, which is used without a chat template.

    Raises:
        UserError: the column isn't text.
    """
    return Text(text_column(row, "text"))


def exchange(question: str, answer: str) -> Conversation:
    """A user's question and an assistant's answer; the question is the prompt."""
    turns: tuple[Message, ...] = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Conversation(turns, prompt_messages=1)


# The order decides between several fits: chats first, and `text` last, since many data sets have it additionally.
FORMATS: Formats = (
    (messages, ("messages",)),
    (sharegpt, ("conversations",)),
    (prompt_completion, ("prompt", "completion")),
    (prompt_response, ("prompt", "response")),
    (question_answer, ("question", "answer")),
    (alpaca, ("instruction", "output")),
    (text, ("text",)),
)


# --- reading and checking columns: text, turns, tools ---------------------------------------------------------------


def kind_name(value: Any) -> str:
    """A value's type in words for messages."""
    kinds = {str: "text", list: "a list", dict: "a mapping", type(None): "nothing (null)", bool: "true or false"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def column(row: Row, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    """Returns a column's value.

    Raises:
        UserError: the row has no such column (offers the nearest), or its value has another type than `wanted` says.
    """
    if name not in row:
        raise UserError(f"no column {name!r}{nearest(name, row)}")
    if not isinstance(row[name], kind):
        raise UserError(f"column {name!r} holds {kind_name(row[name])} instead of {wanted}")
    return row[name]


def text_column(row: Row, name: str) -> str:
    """Returns a column's text; raises `UserError` if it is something else."""
    return cast(str, column(row, name, str, "text"))


def message(turn: Any, where: str) -> Message:
    """Checks a turn with `role` and `content` and returns it without keys whose value is None.

    Raises:
        UserError: it isn't a turn; `where` says which.
    """
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {kind_name(turn)} instead of a mapping with role and content")
    # Arrow gives each turn the keys of all turns, with None for missing ones; templates would render those as "None".
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
    """Returns the functions that a row's column `tools` lists, as a list or as JSON; None if there are none.

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


# --- detection --------------------------------------------------------------------------------------------------------


def find_format(columns: Collection[str], formats: Formats = FORMATS) -> Format:
    """Finds the format that fits a source's columns.

    Raises:
        UserError: none fits. If a column that all of `formats` need is missing, names it (and the nearest one);
            else lists the columns and what each format needs.
    """
    for function, needed in formats:
        if set(needed) <= set(columns):
            return function
    for name in sorted(set.intersection(*(set(needed) for _, needed in formats)) - set(columns)):
        raise UserError(
            f"no column {name!r}{nearest(name, columns)}; say which of your columns it is with `columns`, "
            f"e.g. {{{name}: my_column}}"
        )
    if meant := _nearest_format(columns, formats):
        raise UserError(f"no format fits the columns {', '.join(sorted(columns))}; {meant}")
    known = "; ".join(f"{_name(function)} ({', '.join(needed)})" for function, needed in formats)
    raise UserError(
        f"no format fits the columns {', '.join(sorted(columns)) or '(none)'}; formats and what they need: {known}; "
        "say which of your columns is which with `columns`, e.g. {question: my_column}"
    )


def _nearest_format(columns: Collection[str], formats: Formats) -> str | None:
    """The advice if the columns are nearly those of a format (misspelt, or with other capitals); else None."""
    by_case = {column.casefold(): column for column in columns}
    for function, needed in formats:
        close = {name: difflib.get_close_matches(name, by_case, n=1, cutoff=0.7) for name in needed}
        if len(needed) > 1 and all(close.values()):
            theirs = {name: by_case[matches[0]] for name, matches in close.items()}
            renamed = ", ".join(f"{name}: {own}" for name, own in theirs.items() if own != name)
            return f"{_name(function)} needs {' and '.join(needed)}: give the source columns: {{{renamed}}}"
    return None


def format_name(source_format: str | Format) -> str:
    """The name of a source's format in messages: as a recipe gives it, or that of a function."""
    return source_format if isinstance(source_format, str) else _name(source_format)


def resolve_format(name: str | Format, formats: Formats = FORMATS) -> Format:
    """Returns the format `name` of `formats`, or the function that the dotted path `package.module.function` names.

    From Python, `name` may be the function itself.

    Raises:
        UserError: there is no such format, module or function; offers the nearest.
    """
    if callable(name):
        return name
    known: dict[str, Format] = {_name(function): function for function, _ in formats}
    if name in known:
        return known[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise UserError(f"unknown format {name!r}{nearest(name, known)} (or a path, as 'package.module.function')")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"format {name!r} can't be imported: {error}{nearest(attribute, known)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{module_name!r} has no function {attribute!r}{nearest(attribute, own)}")
    return cast(Format, function)


def raised(name: str, error: Exception) -> str:
    """The message for a user's format function that raised an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{name} raised {type(error).__name__}: {error} ({frame.filename} line {frame.lineno})"


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Returns the row with the user's columns under the names that a format reads.

    Args:
        row: A row as it was read.
        columns: Format's field -> user's column, e.g. `{"question": "q_text"}`.

    Raises:
        UserError: the row has no such column; offers the nearest.
    """
    for field, name in columns.items():
        if name not in row:
            raise UserError(f"no column {name!r} (for {field!r}){nearest(name, row)}")
    moved = set(columns.values())
    rest = {name: value for name, value in row.items() if name not in moved}
    return rest | {field: row[name] for field, name in columns.items()}


def _name(function: Format) -> str:
    return getattr(function, "__name__", repr(function))
