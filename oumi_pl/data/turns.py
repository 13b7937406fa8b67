"""Columns of a row, and the turns of conversations in the shapes that published data have.

A turn is read into `Message`s, the shape that chat templates read: `role` and `content`, an assistant's `tool_calls`
with arguments as a mapping, its `reasoning_content`, and how much it counts in the loss. One turn may give several
messages (the results of two calls, for example).
"""

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard, cast

import numpy as np

from oumi_pl.data.files import parse_json
from oumi_pl.errors import UserError, nearest
from oumi_pl.types import Message, Row

Turns = tuple[Message, ...]

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE_OF = {
    **{role: role for role in ROLES},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "tool_result", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "function_result"), "tool"),
}
_CALL_ROLES = ("function_call", "tool_call", "function_calls", "tool_calls")
"""Roles of turns in which the assistant calls functions; their text is JSON."""

MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Columns and keys of turns that hold what can't be trained on."""
PLACEHOLDERS = ("<image>", "<audio>", "<video>")
"""Where in a text they belong."""

FLOAT32_MAX = float(np.finfo(np.float32).max)
_CALL_TAGS = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_CALLS = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FLAGS = ("weight", "loss", "train", "training", "masked")
_ARGUMENTS = ("arguments", "parameters", "args", "input")


# --- values -----------------------------------------------------------------------------------------------------------


def kind_name(value: Any) -> str:
    """A value's type in words for messages."""
    if isinstance(value, float) and math.isnan(value):
        return "nothing (NaN)"
    kinds = {str: "text", list: "a list", dict: "a mapping", type(None): "nothing (null)", bool: "true or false"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, or the NaN of a table."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a number, true or false, and neither NaN nor beyond float32, in which it is stored."""
    return isinstance(value, bool | int | float) and abs(value) <= FLOAT32_MAX


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: missing, an empty text or list, or a list of such."""
    if isinstance(value, list):
        return all(is_empty(item) for item in value)
    return is_missing(value) or (isinstance(value, str | dict) and not value)


def plain(value: Any) -> Any:
    """A value with arrays as lists and numbers of numpy as Python's, at every depth."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def cleaned(value: Any) -> Any:
    """A value as `plain`, without the keys of mappings that hold nothing, at every depth.

    Arrow gives each mapping the keys of all others, with None for missing ones; templates would render these as "None".
    """
    kind = type(value)
    if kind is str:
        return value
    if kind is dict:  # the test for what is missing is written out: as a call, it takes most of the time
        return {
            key: item if type(item) is str else cleaned(item)
            for key, item in value.items()
            if item is not None and (type(item) is not float or not math.isnan(item))
        }
    if kind is list:
        return [item if type(item) is str else cleaned(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | dict | tuple):
        return cleaned(plain(value))
    return value


# --- columns ----------------------------------------------------------------------------------------------------------


def column(row: Row, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    """Returns a column's value.

    Raises:
        UserError: the row has no such column (offers the nearest), or its value has another type than `wanted` says.
    """
    value = row.get(name)
    if isinstance(value, kind):
        return value
    if name not in row:
        raise UserError(f"no column {name!r}{nearest(name, row)}")
    if isinstance(value := plain(value), kind):
        return value
    raise UserError(f"column {name!r} holds {kind_name(value)} instead of {wanted}")


def text_column(row: Row, name: str) -> str:
    """Returns a column's text; raises `UserError` if it is something else."""
    text: str = column(row, name, str, "text")
    return text


def optional_text(row: Row, name: str) -> str:
    """Returns a column's text, empty if the column is missing or empty.

    Raises:
        UserError: it holds something else.
    """
    value = row.get(name)
    if isinstance(value, str):
        return value
    return "" if is_missing(value) else text_column(row, name)


def optional_json(row: Row, name: str) -> Any:
    """Returns a column's value as `cleaned`, parsed if it is JSON text; None if the column is missing or empty.

    Raises:
        UserError: it is text, and not JSON.
    """
    value = row.get(name)
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = parse_json(value)
        except ValueError as error:
            raise UserError(f"column {name!r} holds text that isn't JSON: {error}") from error
    return None if is_missing(value) else cleaned(value)


def turns_column(row: Row, name: str) -> Turns:
    """Returns a column's turns, at least one; also of turns as JSON text, as arrays, or as a mapping of lists.

    Raises:
        UserError: the column holds no list of turns.
    """
    value = row.get(name)
    if name in row and not isinstance(value, list):
        if isinstance(value, str):
            turns = turns_of_text(value)
            value = value if turns is None else turns
        else:
            value = _of_lists(plain(value))
        row = {name: value}
    return read_turns(column(row, name, list, "a list of turns"), name)


def turns_of_text(text: str) -> list[Any] | None:
    """The turns that a text holds as JSON, or as Python's notation of a list of mappings; None if it holds none.

    Pandas writes lists in Python's notation into CSV files.

    Raises:
        UserError: it is JSON that can't be used: a key occurs twice, for example.
    """
    if not text.lstrip().startswith("["):
        return None
    for read in (parse_json, ast.literal_eval):
        try:
            turns = read(text.strip())
        except (json.JSONDecodeError, SyntaxError, RecursionError, MemoryError):
            continue
        except ValueError as error:
            if read is ast.literal_eval:
                continue
            raise UserError(f"turns as JSON text: {error}") from error
        if isinstance(turns, list) and all(isinstance(turn, dict) and _raw_role(turn) is not None for turn in turns):
            return turns
    return None


def _of_lists(value: Any) -> Any:
    """The turns of a mapping of lists, `{"role": [...], "content": [...]}`, which older versions of `datasets` make."""
    if not isinstance(value, dict) or not isinstance(_raw_role(value), list):
        return value
    if not all(isinstance(items, list) for items in value.values()):
        return value
    return [dict(zip(value, items, strict=False)) for items in zip(*value.values(), strict=False)]


def tools_column(row: Row) -> tuple[dict[str, Any], ...] | None:
    """Returns the functions that a row's column `tools` or `functions` describes; None if there are none.

    They are a list, or JSON text; each is `{"type": "function", "function": {...}}`, or the function alone.

    Raises:
        UserError: the column holds something else.
    """
    if "tools" not in row and "functions" not in row:
        return None
    for name in ("tools", "functions"):
        tools = optional_json(row, name)
        if not tools:
            continue
        if isinstance(tools, list):
            tools = [cleaned(_parsed(tool, f"column {name!r}")) if isinstance(tool, str) else tool for tool in tools]
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UserError(f"column {name!r} must hold a list of mappings, one JSON schema each")
        return tuple(described for tool in tools for described in _described(tool))
    return None


def _described(tool: dict[str, Any]) -> Iterable[dict[str, Any]]:
    declared = tool.get("functionDeclarations", tool.get("function_declarations"))  # Gemini's
    if isinstance(declared, list):
        return [{"type": "function", "function": function} for function in declared]
    if "name" in tool and "function" not in tool and tool.get("type", "function") == "function":
        return [{"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}]
    return [tool]


# --- turns ------------------------------------------------------------------------------------------------------------


def read_turns(turns: Any, where: str) -> Turns:
    """Reads a list of turns, at least one.

    Calls that follow the assistant's words, or another call, in a turn of their own (`function_call`) belong to the
    same message: the model writes them without a pause.

    Raises:
        UserError: one isn't a turn; `where` names the list.
    """
    if not turns:
        raise UserError(f"column {where!r} holds no turns")
    messages: list[Message] = []
    called: list[str] = []  # functions that are called in turns of their own, whose results have no names
    for i, turn in enumerate(turns):
        # the shapes of most turns, read at once: the rest of this module takes several times as long
        if type(turn) is dict and len(turn) == 2:
            role, content = turn.get("role"), turn.get("content")
            if content is None:
                role, content = turn.get("from"), turn.get("value")
            if type(content) is str and type(role) is str and (known := _ROLE_OF.get(role)) is not None:
                messages.append({"role": known, "content": content})
                continue
        read = message(turn, f"{where}[{i}]")
        if not _is_call(turn):
            messages += read
            continue
        called += [call["function"]["name"] for call in read[0]["tool_calls"]]
        if messages and _goes_on(messages[-1], read[0]):
            messages[-1] = _joined(messages[-1], read[0])
        else:
            messages += read
    return tuple(_with_names(messages, called) if called else messages)


def _is_call(turn: Any) -> bool:
    """Whether a turn is a call by its role."""
    return isinstance(turn, dict) and _key(str(_raw_role(turn))) in _CALL_ROLES


def _goes_on(before: Message, call: Message) -> bool:
    """Whether a call belongs to the message before it."""
    same_weight = "spans" not in before and before.get("weight") == call.get("weight")
    return before["role"] == "assistant" and same_weight


def _with_names(messages: list[Message], called: list[str]) -> Iterator[Message]:
    """Names the results of calls, in the order of the calls, which some templates write."""
    names = iter(called)
    for said in messages:
        is_nameless = said["role"] == "tool" and not {"name", "tool_call_id"} & said.keys()
        name = next(names, None) if is_nameless else None
        yield said if name is None else {**said, "name": name}


def _joined(before: Message, call: Message) -> Message:
    return cast(Message, {**before, "tool_calls": [*before.get("tool_calls", ()), *call["tool_calls"]]})


def message(turn: Any, where: str) -> Turns:
    """Reads a turn: its message, or the messages that it is made of, without keys that hold nothing.

    Role and text are `role` and `content`, or `from` and `value`, or `role` and `parts`; roles by any of the usual
    names. Text may be in parts. Calls are in `tool_calls`, `function_call`, parts, or the JSON text of a turn with the
    role `function_call`; their arguments may be JSON text. `reasoning` and `thinking` become `reasoning_content`.

    Raises:
        UserError: it isn't a turn; `where` says which.
    """
    turn = turn if isinstance(turn, dict) else plain(turn)
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {kind_name(turn)} instead of a mapping with role and content")
    given = cleaned(turn)
    role = _role(given, where)
    if not given.keys().isdisjoint(MEDIA):
        for name in MEDIA:
            if not is_empty(given.pop(name, None)):
                raise UserError(f"{where}.{name}: images and other media can't be trained on yet")
    content = given.pop("content") if "content" in given else _first(given, ("value", "parts"))
    calls: list[dict[str, Any]] = []
    if not given.keys().isdisjoint(_CALLS):
        calls = [call for key in _CALLS if key in given for call in _calls(given.pop(key), where)]
    if role in _CALL_ROLES:
        role, calls, content = "assistant", calls + _calls(content, where), None
        if not calls:
            raise UserError(f"{where} has no call; its text is JSON with name and arguments")
    thoughts = "" if given.keys().isdisjoint(_REASONING) else _first_text(given, _REASONING, where)
    read: dict[str, Any] = {"role": role, "content": content, **given}
    results: list[Message] = []
    if content is not None and not isinstance(content, str):
        parts = _Parts(content, role, where)
        read["content"], results = parts.text, parts.results
        calls, thoughts = calls + parts.calls, thoughts or parts.thoughts
    if calls:
        read["tool_calls"] = calls
        read["content"] = read["content"] or None  # one form of "no text", so that equal calls are equal messages
    if thoughts:
        read["reasoning_content"] = thoughts
    if read["content"] is None and not calls and not thoughts:
        raise UserError(f"{where} ({role}) has no content")
    if not given.keys().isdisjoint(_FLAGS):
        _weigh(read, where)
    return (*results, cast(Message, read)) if read["content"] or not results else tuple(results)


def _key(role: str) -> str:
    return role.strip().lower().replace(" ", "_").replace("-", "_")


def _raw_role(turn: dict[str, Any]) -> Any:
    return turn.get("role") if turn.get("role") is not None else turn.get("from")


def _role(given: dict[str, Any], where: str) -> str:
    role = given.pop("role") if "role" in given else given.pop("from", None)
    if not isinstance(role, str):
        raise UserError(f"{where} has no role; keys: {', '.join(map(str, given))}")
    if role in ROLES:
        return role
    key = _key(role)
    if key in _CALL_ROLES:
        return key
    if (known := _ROLE_OF.get(key)) is None:
        # never the role of a result for what looks like a call
        names = _CALL_ROLES if "call" in key else (*_ROLE_OF, *_CALL_ROLES)
        raise UserError(f"{where} has the unknown role {role!r}{nearest(role, names)}")
    return known


def _first(given: dict[str, Any], names: Iterable[str]) -> Any:
    """Removes and returns the first of some keys that is there; None if none is."""
    return next((given.pop(name) for name in names if name in given), None)


def _first_text(given: dict[str, Any], names: Iterable[str], where: str) -> str:
    """Removes keys that hold text and returns it, empty if there is none.

    Raises:
        UserError: two of them hold different texts.
    """
    texts = {name: given.pop(name) for name in names if isinstance(given.get(name), str)}
    texts = {name: text for name, text in texts.items() if text}
    if len(set(texts.values())) > 1:
        raise UserError(f"{where}: {' and '.join(map(repr, texts))} hold different texts")
    return next(iter(texts.values()), "")


# --- calls ------------------------------------------------------------------------------------------------------------


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a message, in OpenAI's shape; `value` is one or several, or their JSON text."""
    if isinstance(value, str):
        texts = [text.strip() for text in _CALL_TAGS.findall(value) or [value]]
        parsed = [_parsed(text, where) for text in texts if text]
        if any(isinstance(call, str) for call in parsed):
            raise UserError(f"{where} is text that isn't JSON: a call is a mapping with name and arguments")
        value = parsed[0] if len(parsed) == 1 else parsed
    calls = value if isinstance(value, list) else [value] if value else []
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    call = _parsed(call, where) if isinstance(call, str) else call
    if not isinstance(call, dict):
        raise UserError(f"{where}: a call is {kind_name(call)} instead of a mapping with name and arguments")
    function = call.get("function")
    if isinstance(function, dict):
        around = call
    else:
        function = {"name": function} | call if isinstance(function, str) else call
        around = {"id": call["id"]} if "id" in call else {}
    if not isinstance(name := function.get("name"), str) or not name:
        raise UserError(f"{where}: a call has no name; keys: {', '.join(map(str, function))}")
    arguments: Any = next((function[key] for key in _ARGUMENTS if key in function), {})
    arguments = _mapping(arguments, f"{where}: the arguments of {name!r}")
    # in this order, and that of the row, since templates may write the whole call as JSON
    return around | {"type": around.get("type", "function"), "function": {"name": name, "arguments": arguments}}


def _mapping(arguments: Any, what: str) -> dict[str, Any]:
    """The arguments of a call: a mapping, or its JSON text, which templates that write JSON would encode once more."""
    while isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise UserError(f"{what} are text that isn't JSON: {error}") from error
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise UserError(f"{what} are {kind_name(arguments)} instead of a mapping")
    return arguments


def _parsed(text: str, where: str) -> Any:
    """The value of JSON text; the text itself if it isn't JSON."""
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        return text
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


# --- parts ------------------------------------------------------------------------------------------------------------


class _Parts:
    """A content in parts, as in the APIs of OpenAI, Anthropic (`tool_use`, `thinking`) and Gemini (`functionCall`).

    text: joined. thoughts: reasoning, joined. calls: as in `tool_calls`. results: messages with the results of calls.
    """

    def __init__(self, content: Any, role: str, where: str) -> None:
        self.where = where
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.results: list[Message] = []
        if isinstance(content, dict) and role == "tool":
            self.texts.append(_as_json(content))
            return
        if not isinstance(content, list) or not all(isinstance(part, dict | str) for part in content):
            raise UserError(f"{where}.content is {kind_name(content)} instead of text")
        if role == "tool" and not all(_text_of(part) is not None or "functionResponse" in part for part in content):
            self.texts.append(_as_json(content))
            return
        for part in content:
            self._add(part)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def thoughts(self) -> str:
        return "\n".join(self.reasoning)

    def _add(self, part: Any) -> None:
        text, kind = _text_of(part), part.get("type") if isinstance(part, dict) else None
        if text is not None:
            (self.reasoning if isinstance(part, dict) and part.get("thought") is True else self.texts).append(text)
        elif kind in {"thinking", "reasoning"} and isinstance(thought := part.get(kind, part.get("text")), str):
            self.reasoning.append(thought)
        elif (call := part.get("functionCall", part.get("function_call"))) is not None or kind == "tool_use":
            given = {key: part[key] for key in ("id", "name", "input") if key in part} if call is None else call
            self.calls += _calls(given, self.where)
        elif isinstance(result := part.get("functionResponse", part.get("function_response")), dict):
            self._add_result(result.get("response"), {"name": result.get("name"), "tool_call_id": result.get("id")})
        elif kind == "tool_result":
            self._add_result(part.get("content"), {"tool_call_id": part.get("tool_use_id")})
        else:
            name = kind if kind is not None else next(iter(part), None)
            raise UserError(
                f"{self.where}.content has a part of type {name!r}; only text can be trained on, "
                "images and other media aren't supported"
            )

    def _add_result(self, value: Any, names: dict[str, Any]) -> None:
        if isinstance(value, list) and all(_text_of(part) is not None for part in value):
            value = "".join(_text_of(part) or "" for part in value)
        content = value if isinstance(value, str) else "" if value is None else _as_json(value)
        read = {"role": "tool", "content": content} | {key: name for key, name in names.items() if name is not None}
        self.results.append(cast(Message, read))


def _text_of(part: Any) -> str | None:
    """The text of a part; None if it is no text."""
    if isinstance(part, str):
        return part
    if part.get("type", "text") not in {"text", "input_text", "output_text"}:
        return None
    return next((part[key] for key in ("text", "value", "content") if isinstance(part.get(key), str)), None)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- how much a turn counts -------------------------------------------------------------------------------------------


def _weigh(read: dict[str, Any], where: str) -> None:
    """Replaces the keys that say how much a turn counts (`weight`, `loss`, `train`, `masked`) by `weight` and `spans`.

    Several of them multiply: `{"weight": 2, "train": false}` counts 0.
    """
    given = {name: read.pop(name) for name in _FLAGS if name in read}
    weight = 1.0
    for name, value in given.items():
        if isinstance(value, list) and name in {"train", "training", "loss"}:
            read["spans"] = _spans(value, read["content"] or "", f"{where}.{name}")
        elif name == "masked":
            weight *= not number(value, f"{where}.{name}")
        else:
            weight *= number(value, f"{where}.{name}")
    read["weight"] = weight


def number(value: Any, what: str) -> float:
    """A weight: a number of at least 0, or true (1) or false (0).

    Raises:
        UserError: it is something else.
    """
    if is_finite(value) and value >= 0:
        return float(value)
    raise UserError(f"{what} is {value!r:.40}, but has to be true, false, or a number of at least 0")


def _spans(value: list[Any], content: str, what: str) -> list[tuple[int, int]]:
    spans = []
    for span in value:
        whole = isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
        if not whole or not 0 <= span[0] < span[1] <= len(content):
            raise UserError(
                f"{what} holds {span!r}; a span is [start, end], in characters of the content, which has {len(content)}"
            )
        spans.append((span[0], span[1]))
    return sorted(spans)
