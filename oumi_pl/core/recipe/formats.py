"""How Oumi's registered datasets read their rows: from a row to a conversation or a pair, as formats of a source."""

from typing import Any

from oumi_pl.data import formats
from oumi_pl.data.preferences import prompt_preference
from oumi_pl.data.turns import text_column, turns_column
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Message, Preference, Row

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
"""The sentences of Stanford's Alpaca (Taori et al. 2023), which Oumi puts into the system turn."""


def alpaca(row: Row) -> Conversation:
    """Reads `instruction`, `output` and perhaps `input`, after a system turn that says what an instruction is.

    Raises:
        UserError: a column isn't text.
    """
    plain = alpaca_without_system(row)
    system: Message = {"role": "system", "content": WITH_INPUT if row.get("input") else WITHOUT_INPUT}
    return Conversation((system, *plain.messages), prompt_messages=2)


def alpaca_without_system(row: Row) -> Conversation:
    """Reads `instruction`, `output` and perhaps `input`, which follows the instruction under a heading.

    Raises:
        UserError: a column isn't text.
    """
    asked = text_column(row, "instruction")
    if row.get("input"):
        asked = f"{asked}\n\n### Input:\n{text_column(row, 'input')}"
    return formats.exchange(asked, text_column(row, "output"))


def text_sft(row: Row) -> Conversation:
    """Reads `messages`, a `conversation` with `messages` in it, or alpaca's columns without headings or system turn.

    Raises:
        UserError: none of these is there, or it isn't what it should be.
    """
    if "messages" in row:
        return formats.messages(row)
    if isinstance(row.get("conversation"), dict):
        return formats.messages(row["conversation"])
    if "instruction" in row:
        asked = f"{text_column(row, 'instruction')}\n\n{row.get('input') or ''}".strip()
        return formats.exchange(asked, text_column(row, "output"))
    raise UserError(
        f"columns {', '.join(sorted(row))}; text_sft reads `messages`, a `conversation`, or `instruction`, `input` and "
        "`output`"
    )


def without_final_answer(row: Row) -> Conversation:
    """Reads `messages` but for the last turn, where that is the assistant's.

    Raises:
        UserError: a turn isn't a turn, or nothing is left.
    """
    turns = turns_column(row, "messages")
    turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if not turns:
        raise UserError("'messages' holds nothing but an answer, which is left out")
    return Conversation(turns)


def dolly(row: Row) -> Conversation:
    """Reads `new-instruction`, `new-context` and `new-response`, else the `original-` columns.

    Raises:
        UserError: a column isn't text.
    """
    return _dolly(row, ("new", "original"))


def dolly_original(row: Row) -> Conversation:
    """Reads `original-instruction`, `original-context` and `original-response`.

    Raises:
        UserError: a column isn't text.
    """
    return _dolly(row, ("original",))


def turns_preference(row: Row) -> Preference:
    """Reads `prompt`, `chosen` and `rejected`: a text is a turn of the user's, or of the assistant's; else turns.

    Responses that are whole conversations are read as `implicit_prompt` does.

    Raises:
        UserError: a turn isn't a turn, or a response doesn't begin with the assistant.
    """
    turns = {name: _turns(row.get(name), "assistant") for name in ("chosen", "rejected")}
    prompt: Any = row.get("prompt")
    return prompt_preference({**row, **turns, "prompt": [prompt] if isinstance(prompt, dict) else prompt})


def _turns(value: Any, role: str) -> Any:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else value


def _dolly(row: Row, prefixes: tuple[str, ...]) -> Conversation:
    instruction, context, response = (
        next((value for prefix in prefixes if (value := _value(row.get(f"{prefix}-{name}")))), "")
        for name in ("instruction", "context", "response")
    )
    if not instruction or not response:
        raise UserError(f"no columns '{prefixes[-1]}-instruction' and '{prefixes[-1]}-response' with text in them")
    return formats.exchange(f"{instruction}\n\n{context}" if context else instruction, response)


def _value(column: Any) -> str:
    """A column's text: annotated ones hold a mapping with a list of values."""
    value = column.get("value") if isinstance(column, dict) else column
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) else ""
