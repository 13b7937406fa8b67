"""How Oumi's registered datasets read their rows: from a row to a conversation or a pair, as formats of a source."""

from typing import Any

from oumi_pl.data import formats
from oumi_pl.data.preferences import prompt_preference
from oumi_pl.data.turns import text_column, turns_column
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Message, Preference, Record, Row, Text

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


def prompt(row: Row) -> Record:
    """Reads `prompt`: turns, or text that no chat template renders, as in TRL.

    Raises:
        UserError: it is neither.
    """
    if isinstance(row.get("prompt"), str):
        return Text(text_column(row, "prompt"))
    return Conversation(turns_column(row, "prompt"))


COUNTDOWN = """A conversation between User and Assistant. The user asks a question, and the Assistant solves it. \
The assistant first thinks about the reasoning process in the mind and then provides the user with the answer.
User: Using the numbers {nums}, create an equation that equals {target}. You can use basic arithmetic operations \
(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the final \
answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.
Assistant: Let me solve this step by step.
<think>"""
"""The prompt of TinyZero (Pan et al. 2025), which Oumi puts into the user's turn."""
STEP_BY_STEP = 'Let\'s think step by step and output the final answer after "####".'
"""What verl and Oumi add to GSM8K's questions."""
BOXED = (
    "Your final answer should be an integer written as digits and formatted as "
    r'"\boxed{your_answer}". For example, if the answer is 42, you should output "\boxed{42}".'
)
"""The system turn of Oumi's letter counting."""
AS_JSON = (
    "Your final answer should be formatted as ```json YOUR_ANSWER```. "
    'For example, if the answer is {"a": 1}, you should output ```json {"a": 1}}```.'
)
"""The system turn of Oumi's BerryBench, with its brace too many."""


def countdown(row: Row) -> Conversation:
    """Reads `nums` and `target`: an equation is asked for.

    Raises:
        UserError: one of them is missing, or is no number.
    """
    try:
        nums, target = [int(n) for n in row["nums"]], int(row["target"])
    except (KeyError, TypeError, ValueError):
        raise UserError("'nums' has to be a list of whole numbers, and 'target' one") from None
    return Conversation(({"role": "user", "content": COUNTDOWN.format(nums=nums, target=target)},))


def gsm8k(row: Row) -> Conversation:
    """Reads `question`, and asks for the answer after `####`.

    Raises:
        UserError: it isn't text.
    """
    return Conversation(({"role": "user", "content": f"{text_column(row, 'question')} {STEP_BY_STEP}"},))


def letter_count(row: Row) -> Conversation:
    """Reads the first turn of `messages`, after a system turn that asks for a box.

    Raises:
        UserError: a turn isn't a turn.
    """
    return Conversation(({"role": "system", "content": BOXED}, turns_column(row, "messages")[0]))


def berry_bench(row: Row) -> Conversation:
    """Reads the first turn of `messages`, after a system turn that asks for JSON.

    Raises:
        UserError: a turn isn't a turn.
    """
    return Conversation(({"role": "system", "content": AS_JSON}, turns_column(row, "messages")[0]))


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
