"""Formats: one pure function per format, from a row to a record; and their detection from the columns.

A format reads the columns of a row and returns a `Conversation`, which a chat template renders, or a `Text`, which is
tokenized unchanged. Those of `preferences.py` return a `Preference`, which is two of these. A user's format is a
function `row -> record` that a recipe names by its dotted path.
"""

import contextlib
import difflib
import importlib
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast

from oumi_pl.data.turns import (
    Turns,
    column,
    is_empty,
    kind_name,
    message,
    number,
    optional_json,
    optional_text,
    plain,
    read_turns,
    text_column,
    tools_column,
    turns_column,
    turns_of_text,
)
from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Conversation, Message, Record, Row, Text

Format = Callable[[Row], Record | list[Record] | None]
"""A function that returns the record of a row, a list of them, or None to leave the row out.

It raises `UserError` if the row is invalid.
"""

Formats = tuple[tuple[Format, tuple[str, ...]], ...]
"""Formats with the columns that each needs. The first one whose columns all exist is used."""

F = TypeVar("F", bound=Callable[..., object])

SYSTEM = ("system", "system_prompt")
AROUND = (*SYSTEM, "tools", "functions", "chat_template_kwargs", "weight")
"""Columns that all formats of conversations read beside the turns."""
_AROUND = frozenset(AROUND)


# --- formats ----------------------------------------------------------------------------------------------------------


def reads(*columns: str) -> Callable[[F], F]:
    """Declares all columns that a format may read, so that the data report can name those of a row that it doesn't.

    Formats without it are given all columns and nothing is reported.
    """

    def declare(function: F) -> F:
        function.reads = frozenset(columns)  # type: ignore[attr-defined]
        return function

    return declare


def columns_read(function: Format) -> frozenset[str] | None:
    """The columns that a format reads, as declared by `reads`; None if it doesn't say."""
    return getattr(function, "reads", None)


@reads("messages", *AROUND)
def messages(row: Row) -> Conversation:
    """Reads `messages`: turns with `role` and `content`, as in OpenAI's API.

    Raises:
        UserError: a turn isn't a turn, or its role is unknown.
    """
    return conversation(row, turns_column(row, "messages"))


@reads("conversations", *AROUND)
def sharegpt(row: Row) -> Conversation:
    """Reads `conversations`: turns with `from` and `value` (or `role` and `content`).

    Raises:
        UserError: a turn isn't a turn, or its role is unknown.
    """
    return conversation(row, turns_column(row, "conversations"))


@reads("contents", "systemInstruction", "system_instruction", *AROUND)
def gemini(row: Row) -> Conversation:
    """Reads `contents`: turns with `role` and `parts`, as in Gemini's API; optionally `systemInstruction`.

    Raises:
        UserError: a turn isn't a turn, or its role is unknown.
    """
    given = next((row[name] for name in ("systemInstruction", "system_instruction") if not is_empty(row.get(name))), "")
    if isinstance(given, dict):
        given = message({"role": "system", "parts": given.get("parts")}, "systemInstruction")[0]["content"]
    return conversation(row | {"system": given} if given else row, turns_column(row, "contents"))


@reads("instruction", "input", "output", "history", *AROUND)
def alpaca(row: Row) -> Conversation:
    """Reads `instruction`, `output` and optionally `input`, which follows the instruction after an empty line.

    `history` holds earlier exchanges, `[[question, answer], ...]`, which belong to the prompt.

    Raises:
        UserError: a column isn't text.
    """
    prompt = (*history_column(row), alpaca_question(row))
    return conversation(row, (*prompt, answered(text_column(row, "output"))), len(prompt))


@reads("prompt", "completion", *AROUND)
def prompt_completion(row: Row) -> Record:
    """Reads `prompt` and `completion`: both text (concatenated, without a template), or both lists of turns.

    Raises:
        UserError: one is text and the other isn't, a turn isn't a turn, or there is a system prompt or a tool beside
            texts.
    """
    prompt, completion = (column(row, name, (str, list), "text or turns") for name in ("prompt", "completion"))
    if isinstance(prompt, str) != isinstance(completion, str):
        raise UserError(
            f"'prompt' holds {kind_name(prompt)} and 'completion' {kind_name(completion)}; "
            "both must be text, or both turns"
        )
    if isinstance(prompt, str) and not (turns_of_text(prompt) and turns_of_text(completion)):
        refuse_without_template(row, "{response: completion}")
        return Text(completion, prompt, row_weight(row))
    start = turns_column(row, "prompt")
    return conversation(row, start + turns_column(row, "completion"), len(start))


@reads("prompt", "response", *AROUND)
def prompt_response(row: Row) -> Conversation:
    """Reads `prompt` and `response`, texts of a user and an assistant.

    Raises:
        UserError: a column isn't text.
    """
    return _exchange(row, "prompt", "response")


@reads("question", "answer", *AROUND)
def question_answer(row: Row) -> Conversation:
    """Reads `question` and `answer`, texts of a user and an assistant.

    Raises:
        UserError: a column isn't text.
    """
    return _exchange(row, "question", "answer")


@reads("question", "response", *AROUND)
def question_response(row: Row) -> Conversation:
    """Reads `question` and `response`, texts of a user and an assistant.

    Raises:
        UserError: a column isn't text.
    """
    return _exchange(row, "question", "response")


@reads("text", "weight")
def text(row: Row) -> Text:
    """Reads `text`, which is used without a chat template.

    Raises:
        UserError: the column isn't text.
    """
    return Text(text_column(row, "text"), weight=row_weight(row))


# The order decides between several fits: chats first, and `text` last, since many data sets have it additionally.
FORMATS: Formats = (
    (messages, ("messages",)),
    (sharegpt, ("conversations",)),
    (gemini, ("contents",)),
    (prompt_completion, ("prompt", "completion")),
    (prompt_response, ("prompt", "response")),
    (question_answer, ("question", "answer")),
    (question_response, ("question", "response")),
    (alpaca, ("instruction", "output")),
    (text, ("text",)),
)


# --- parts of formats -------------------------------------------------------------------------------------------------


def conversation(row: Row, turns: Turns, prompt_messages: int | None = None) -> Conversation:
    """A conversation with what the columns of `AROUND` say: system turn, tools, template variables, weight.

    Raises:
        UserError: such a column holds something else, or a system turn differs from the one that `turns` begin with.
    """
    if _AROUND.isdisjoint(row):
        return Conversation(turns, prompt_messages=prompt_messages)
    if (system := system_column(row)) and not (turns[0]["role"] == "system" and turns[0]["content"] == system):
        if turns[0]["role"] == "system":
            raise UserError("the first turn is a system turn, and a column holds another system prompt")
        turns = ({"role": "system", "content": system}, *turns)
        prompt_messages = None if prompt_messages is None else prompt_messages + 1
    variables = optional_json(row, "chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise UserError(f"column 'chat_template_kwargs' holds {kind_name(variables)} instead of a mapping")
    return Conversation(turns, tools_column(row), prompt_messages, variables, row_weight(row))


def exchange(question: str, answer: str) -> Conversation:
    """A user's question and an assistant's answer; the question is the prompt."""
    return Conversation(({"role": "user", "content": question}, answered(answer)), prompt_messages=1)


def answered(answer: str) -> Message:
    """A turn of the assistant."""
    return {"role": "assistant", "content": answer}


def _exchange(row: Row, question: str, answer: str) -> Conversation:
    asked: Message = {"role": "user", "content": text_column(row, question)}
    return conversation(row, (asked, answered(text_column(row, answer))), 1)


def alpaca_question(row: Row) -> Message:
    """The user's turn of an alpaca row: `instruction` and, after an empty line, `input`."""
    question, context = text_column(row, "instruction"), optional_text(row, "input")
    return {"role": "user", "content": f"{question}\n\n{context}" if context else question}


def history_column(row: Row) -> Turns:
    """The turns of an alpaca row's `history`: pairs of question and answer, or turns; none if it is missing.

    Raises:
        UserError: it holds something else.
    """
    if "history" not in row:
        return ()
    history = optional_json(row, "history") or []
    if not isinstance(history, list):
        raise UserError(f"column 'history' holds {kind_name(history)} instead of pairs of question and answer")
    if history and all(isinstance(item, dict) for item in history):
        return read_turns(history, "history")
    turns: list[Message] = []
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(said, str) for said in pair):
            raise UserError(f"history[{i}] is {kind_name(pair)} instead of a question and its answer, both text")
        turns += [{"role": "user", "content": pair[0]}, answered(pair[1])]
    return tuple(turns)


def system_column(row: Row) -> str:
    """The system prompt beside turns, in `system` or `system_prompt`; empty if there is none.

    Raises:
        UserError: both columns hold one, and they differ.
    """
    texts = {optional_text(row, name) for name in SYSTEM if name in row} - {""}
    if len(texts) > 1:
        raise UserError(f"the columns {' and '.join(map(repr, SYSTEM))} hold different system prompts")
    return texts.pop() if texts else ""


def row_weight(row: Row) -> float:
    """A row's `weight`, which multiplies the loss of its tokens; 1 if it has none.

    Raises:
        UserError: it isn't a number of at least 0.
    """
    weight = row.get("weight")
    if weight is None or is_empty(weight):
        return 1.0
    if isinstance(weight, str):  # a cell of a CSV file
        with contextlib.suppress(ValueError):
            weight = float(weight)
    return number(plain(weight), "column 'weight'")


def refuse_without_template(row: Row, columns: str) -> None:
    """Refuses a row of texts that are used without a chat template, beside columns that only a template can render.

    Raises:
        UserError: there is such a column; `columns` renames the others to those of a conversation.
    """
    for name in AROUND:
        if name != "weight" and not is_empty(row.get(name)):
            raise UserError(
                f"column {name!r} needs a chat template, and texts of these columns are used without one; make it a "
                f"conversation with `columns: {columns}`, or leave the column out with `ignore: [{name}]`"
            )


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
    if "." not in name:
        raise UserError(f"unknown format {name!r}{nearest(name, known)} (or a path, as 'package.module.function')")
    return cast(Format, function_at(name, "format", known))


def function_at(path: str, what: str, known: Collection[str] = ()) -> Callable[[Row], Any]:
    """The function that a dotted path `package.module.function` names.

    Args:
        path: The path.
        what: The setting that names it, for messages.
        known: Names that may have been meant.

    Raises:
        UserError: there is no such module or function; offers the nearest.
    """
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{what} {path!r} can't be imported: {error}{nearest(attribute, known)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{module_name!r} has no function {attribute!r}{nearest(attribute, own)}")
    return cast("Callable[[Row], Any]", function)


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
