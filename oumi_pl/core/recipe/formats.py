"""How Oumi's registered datasets read their rows: from a row to a conversation or a pair, as formats of a source."""

from typing import Any, cast

from oumi_pl.data import formats
from oumi_pl.data.preferences import prompt_preference
from oumi_pl.data.turns import column, is_missing, optional_text, plain, text_column, tools_column, turns_column
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


READ = ("role", "content", "tool_calls", "tool_call_id", "reasoning_content")
"""Keys of a turn that Oumi keeps. Others, such as `weight`, mean nothing there."""


def alpaca(row: Row) -> Conversation:
    """Reads `instruction`, `output` and perhaps `input`, after a system turn that says what an instruction is.

    Raises:
        UserError: a column isn't text.
    """
    asked = alpaca_without_system(row)
    system: Message = {"role": "system", "content": WITH_INPUT if row.get("input") else WITHOUT_INPUT}
    return Conversation((system, *asked.messages), prompt_messages=2)


def alpaca_without_system(row: Row) -> Conversation:
    """Reads `instruction`, `output` and perhaps `input`, which follows the instruction under a heading.

    Raises:
        UserError: a column isn't text.
    """
    asked = text_column(row, "instruction")
    if row.get("input"):
        asked = f"{asked}\n\n### Input:\n{text_column(row, 'input')}"
    return formats.exchange(asked, text_column(row, "output"))


def messages(row: Row) -> Conversation:
    """Reads `messages`, and `tools`; other columns and other keys of turns mean nothing.

    Raises:
        UserError: a turn isn't a turn.
    """
    return _conversation(row, "messages")


def messages_or_nothing(row: Row) -> Conversation:
    """Reads `messages`, in which a turn whose content is null says nothing.

    Raises:
        UserError: a turn isn't a turn.
    """
    return _conversation({**row, "messages": _with_content(row)}, "messages")


def without_final_answer(row: Row) -> Conversation:
    """Reads `messages` as `messages_or_nothing`, but for the last turn, where that is the assistant's.

    Raises:
        UserError: a turn isn't a turn, or nothing is left.
    """
    turns = messages_or_nothing(row).messages
    turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    if not turns:
        raise UserError("'messages' holds nothing but an answer, which is left out")
    return Conversation(turns)


def sharegpt(row: Row) -> Conversation:
    """Reads `conversations`: turns with `from` and `value`; other columns mean nothing.

    Raises:
        UserError: a turn isn't a turn.
    """
    return _conversation(row, "conversations")


def text_sft(row: Row) -> Conversation:
    """Reads `messages`, a `conversation` with `messages` in it, or alpaca's columns without headings or system turn.

    Raises:
        UserError: none of these is there, or it isn't what it should be.
    """
    if "messages" in row:
        return messages(row)
    if isinstance(row.get("conversation"), dict):
        return messages(row["conversation"])
    if "instruction" in row:
        asked = f"{as_text(row, 'instruction')}\n\n{as_text({'input': '', **row}, 'input')}".strip()
        return formats.exchange(asked, text_column(row, "output"))
    raise UserError(
        f"columns {', '.join(sorted(row))}; text_sft reads `messages`, a `conversation`, or `instruction`, `input` and "
        "`output`"
    )


def prompt_response(row: Row) -> Conversation:
    """Reads `prompt` and `response`; numbers and truths are written as Python writes them.

    Raises:
        UserError: a column is missing or null.
    """
    for name in ("prompt", "response"):
        if is_missing(row.get(name)):
            column(row, name, str, "text or a number")
    return formats.exchange(as_text(row, "prompt"), as_text(row, "response"))


def prompt_alone(row: Row) -> Conversation:
    """Reads `prompt`, a user's turn that nothing follows.

    Raises:
        UserError: the column is missing or null.
    """
    if is_missing(row.get("prompt")):
        column(row, "prompt", str, "text or a number")
    return Conversation(({"role": "user", "content": as_text(row, "prompt")},))


def prompt_response_or_nothing(row: Row) -> Conversation:
    """Reads `prompt` and `response`, of which a null one says nothing.

    Raises:
        UserError: a column isn't text.
    """
    return formats.exchange(optional_text(row, "prompt"), optional_text(row, "response"))


def dolly(row: Row) -> Conversation:
    """Reads `new-instruction`, `new-response` and, if it isn't empty, `new-context`.

    Raises:
        UserError: a column is missing, or isn't text.
    """
    return _dolly(row, "new")


def dolly_original(row: Row) -> Conversation:
    """Reads `original-instruction`, `original-response` and, if it isn't empty, `original-context`.

    Raises:
        UserError: a column is missing, or isn't text.
    """
    return _dolly(row, "original")


CHATQA_CONTEXT = "Only use the information from the user provided context to answer the question."
_SHORT = "Answer the following question with a short span"


def chatqa(row: Row) -> Conversation:
    """Reads `messages`, the first of `answers` and perhaps a `document`, as of ChatQA's subset `sft`.

    Raises:
        UserError: a column is missing, or isn't what it should be.
    """
    return _chatqa(row)


def chatqa_full(row: Row) -> Conversation:
    """Reads the subset `synthetic_convqa` of ChatQA, as `chatqa` after a system turn."""
    return _chatqa(row, "Please give a full and complete answer for the question.")


def chatqa_number(row: Row) -> Conversation:
    """Reads the subset `tatqa` of ChatQA, as `chatqa` after a system turn."""
    return _chatqa(row, "Answer the following question with a number from context or the math arithmetic")


def chatqa_span(row: Row) -> Conversation:
    """Reads the subset `tatqa-others` of ChatQA, as `chatqa` after a system turn."""
    return _chatqa(row, f"{_SHORT}, or a full and complete answer")


def chatqa_short(row: Row) -> Conversation:
    """Reads the subsets of ChatQA that ask for a short answer, as `chatqa` after a system turn."""
    return _chatqa(row, f"{_SHORT}.")


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


def _conversation(row: Row, name: str) -> Conversation:
    turns = turns_column(row, name)
    kept = tuple(cast(Message, {key: said for key, said in turn.items() if key in READ}) for turn in turns)
    return Conversation(kept, tools_column({"tools": row["tools"]} if "tools" in row else {}))


def _with_content(row: Row) -> Any:
    """The turns of `messages`, in which null contents are empty."""
    turns = plain(row.get("messages"))
    if not isinstance(turns, list):
        return turns
    return [{**turn, "content": turn.get("content") or ""} if isinstance(turn, dict) else turn for turn in turns]


def as_text(row: Row, name: str) -> str:
    """A column's text; numbers and truths as Python writes them, empty if it is null.

    Raises:
        UserError: it is missing, or holds something else.
    """
    value = plain(row.get(name))
    if isinstance(value, int | float) and not is_missing(value):
        return str(value)
    return optional_text(row, name) if name in row else text_column(row, name)


def _dolly(row: Row, prefix: str) -> Conversation:
    instruction, context, response = (
        _value(row, f"{prefix}-{name}") for name in ("instruction", "context", "response")
    )
    return formats.exchange(f"{instruction}\n\nContext: {context}" if context else instruction, response)


def _value(row: Row, name: str) -> str:
    """A column's text: annotated ones hold a mapping with a list of values, of which the first counts.

    Raises:
        UserError: there is none.
    """
    value = plain(row.get(name))
    value = value.get("value") if isinstance(value, dict) else value
    value = value[0] if isinstance(value, list) and value else value
    return text_column({name: value} if name in row else row, name)


def _chatqa(row: Row, system: str = "") -> Conversation:
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    if document := optional_text(row, "document"):
        turns.append({"role": "system", "content": CHATQA_CONTEXT})
        turns.append({"role": "user", "content": f"<context>{document}</document>"})  # so in Oumi
    answers = plain(row.get("answers"))
    answer = answers[0] if isinstance(answers, list) and answers else None
    answer = answer[0] if isinstance(answer, list) and answer else answer  # subset narrativeqa
    answer = answer.get("text") if isinstance(answer, dict) else answer  # subsets squad1.1 and squad2.0
    turns += [
        *messages({"messages": row.get("messages")}).messages,
        formats.answered(text_column({"answers": answer}, "answers")),
    ]
    return Conversation(tuple(turns), prompt_messages=len(turns) - 1)
