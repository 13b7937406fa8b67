"""The parts of a turn: its text, its reasoning, its calls with their arguments; and which of them a rendering lacks."""

import contextlib
import html
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from oumi_pl.types import Message

_THINK_TAG = re.compile(r"</?(?:think|thinking|thought|reasoning)(?:[\s:][^<>]*)?>", re.IGNORECASE)


class Part(NamedTuple):
    """A text that the rendering of a turn has to contain.

    kind: for counts: "text", "reasoning" or "tool call". name: for messages. value: the text, or a number or constant.
    """

    kind: str
    name: str
    value: Any

    @property
    def size(self) -> int:
        """Characters of the value."""
        return len(self.value if isinstance(self.value, str) else _constant(self.value)[0])

    @property
    def spellings(self) -> tuple[str, ...]:
        """The ways in which templates write the value: as it is, or as JSON, XML or Python."""
        return _spellings(self.value) if isinstance(self.value, str) else _constant(self.value)


def parts_of(message: Message) -> list[Part]:
    """The parts of a turn, in no particular order; empty ones are left out.

    A text with `<think>` tags has several: what is between the tags is reasoning.
    """
    found: list[Part] = []
    content = message.get("content") or ""
    if "<" in content and (tags := list(_THINK_TAG.finditer(content))):
        pieces, thinking, start = [], tags[0].group().startswith("</"), 0
        for tag in tags:
            pieces.append((thinking, content[start : tag.start()]))
            thinking, start = not tag.group().startswith("</"), tag.end()
        pieces.append((thinking, content[start:]))
        for inside, piece in pieces:
            kind, name = ("reasoning", "inline reasoning (<think>)") if inside else ("text", "text")
            found.append(Part(kind, name, piece.strip()))
    else:
        found.append(Part("text", "text", content.strip()))
    found.append(Part("reasoning", "reasoning", (message.get("reasoning_content") or "").strip()))
    for call in message.get("tool_calls") or ():
        found += _parts_of_call(call)
    return [part for part in found if part.value not in ("", None)]


def _parts_of_call(call: dict[str, Any]) -> Iterator[Part]:
    function = call.get("function") or call
    name, arguments = function.get("name") or "", function.get("arguments")
    yield Part("tool call", f"tool call {name}", str(name))
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    named = arguments.items() if isinstance(arguments, dict) else [("", arguments)] if arguments else ()
    for key, value in named:
        label = f"argument {key!r} of tool call {name}" if key else f"arguments of tool call {name}"
        yield Part("tool call", label, str(key))
        for leaf in _leaves(value):
            yield Part("tool call", label, leaf)


def _leaves(value: Any) -> Iterator[Any]:
    """The texts, numbers and constants in a value, with the keys of mappings."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value.strip() if isinstance(value, str) else value


def missing_parts(message: Message, written: str) -> list[Part]:
    """The parts of a turn that a text doesn't contain. Each occurrence in the text stands for one part only.

    Args:
        message: A turn.
        written: What the template wrote for it.
    """
    content = message.get("content")
    if content and not message.get("tool_calls") and not message.get("reasoning_content") and content in written:
        return []
    parts = parts_of(message)
    missing, folded = [], False
    # longest first, and each is taken out, so that a short one isn't found within another part
    for part in sorted(parts, key=lambda part: -part.size):
        rest = _without(written, part)
        if rest is None and not folded:
            # templates may wrap lines or collapse blanks: compare without the difference
            written, folded = " ".join(written.split()), True
        if rest is None:
            rest = _without(written, part._replace(value=_folded(part.value)))
        if rest is None:
            missing.append(part)
        else:
            written = rest
    return [part for part in parts if part in missing]


def _without(written: str, part: Part) -> str | None:
    """The text without one occurrence of a part; None if there is none."""
    value = part.value
    if isinstance(value, str) and (at := written.find(value)) >= 0:  # most are written as they are
        return f"{written[:at]}\0{written[at + len(value) :]}"
    for spelling in part.spellings:
        at = written.find(spelling)
        if at >= 0:
            return f"{written[:at]}\0{written[at + len(spelling) :]}"
    return None


def _folded(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value


def _spellings(text: str) -> tuple[str, ...]:
    if text.isalnum():
        return (text,)
    as_json, ascii_json = (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    twice = json.dumps(as_json, ensure_ascii=False)[1:-1]
    plain = (text, as_json, ascii_json, twice, json.dumps(as_json)[1:-1], repr(text)[1:-1])
    if not any(character in text for character in "&<>\"'"):
        return tuple(dict.fromkeys(plain))
    # XML escapes quotes or leaves them, and Jinja's `escape` writes them as numbers
    bare = [html.escape(spelling, quote=False) for spelling in plain]
    quoted = [spelling.replace('"', "&#34;").replace("'", "&#39;") for spelling in bare]
    return tuple(dict.fromkeys((*plain, *bare, *map(html.escape, plain), *quoted)))


def _constant(value: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys((json.dumps(value, default=str), str(value))))
