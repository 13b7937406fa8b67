"""Formats of preference data: two responses to one prompt.

Pure functions as in `formats.py`. If a row has no separate prompt, it is the turns that both conversations begin with.
A prompt never ends within a turn, so equal first words of two responses remain part of them. The margin comes from a
column `margin` or from two scores, if a row has them.
"""

import re
from itertools import takewhile
from typing import Any

from oumi_pl.data.formats import (
    AROUND,
    Formats,
    alpaca_question,
    conversation,
    history_column,
    reads,
    refuse_without_template,
)
from oumi_pl.data.turns import Turns, column, is_finite, is_missing, kind_name, text_column, turns_column, turns_of_text
from oumi_pl.errors import UserError
from oumi_pl.types import Preference, Row, Text

_RESPONSES = ("chosen", "rejected")
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
_AROUND = (*(name for name in AROUND if name != "weight"), "margin", *(name for names in _SCORES for name in names))
"""Columns that all formats read besides prompt and responses. Pairs have no weights."""
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


# --- formats ----------------------------------------------------------------------------------------------------------


@reads("prompt", *_RESPONSES, *_AROUND)
def prompt_preference(row: Row) -> Preference:
    """Reads `prompt`, `chosen` and `rejected`: text used without a chat template, or turns; optionally `tools`.

    If some are turns, a text is one turn: the user's in `prompt`, the assistant's in a response. Responses that repeat
    the prompt are read as by `implicit_prompt`.

    Raises:
        UserError: `prompt` and one response are text and the other isn't, a turn isn't a turn, or a response doesn't
            begin with the assistant.
    """
    prompt = column(row, "prompt", (str, list), "text or turns")
    if isinstance(prompt, list) or turns_of_text(prompt):
        return _after(turns_column(row, "prompt"), row)
    chosen, rejected = (column(row, name, (str, list), "text or turns") for name in _RESPONSES)
    are_texts = [isinstance(said, str) and not turns_of_text(said) for said in (chosen, rejected)]
    if are_texts[0] != are_texts[1]:
        raise UserError(
            f"'chosen' holds {kind_name(chosen)} and 'rejected' {kind_name(rejected)}; both must be text, or both turns"
        )
    if all(are_texts):
        refuse_without_template(row, "{question: prompt}")
        return Preference(Text(chosen, prompt), Text(rejected, prompt), _margin(row))
    chosen, rejected = (turns_column(row, name) for name in _RESPONSES)
    if not chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return _whole(chosen, rejected, row)
    return _after(({"role": "user", "content": prompt},), row)


@reads("instruction", "input", "history", *_RESPONSES, *_AROUND)
def alpaca_preference(row: Row) -> Preference:
    """Reads `instruction`, optionally `input` and `history`, as `alpaca`; `chosen` and `rejected`: text or turns.

    Raises:
        UserError: a column isn't text, or a response doesn't begin with the assistant.
    """
    return _after((*history_column(row), alpaca_question(row)), row)


@reads("question", *_RESPONSES, *_AROUND)
def question_preference(row: Row) -> Preference:
    """Reads `question`, the text of a user, and `chosen` and `rejected`: text or turns of an assistant.

    Raises:
        UserError: a column isn't text, or a response doesn't begin with the assistant.
    """
    return _after(({"role": "user", "content": text_column(row, "question")},), row)


@reads("messages", *_RESPONSES, *_AROUND)
def messages_preference(row: Row) -> Preference:
    """Reads `messages`, the turns of the prompt, and `chosen` and `rejected`: text, a turn or turns.

    Raises:
        UserError: a turn isn't a turn, or a response doesn't begin with the assistant.
    """
    return _after(turns_column(row, "messages"), row)


@reads("conversations", *_RESPONSES, *_AROUND)
def sharegpt_preference(row: Row) -> Preference:
    """Reads `conversations`, `chosen` and `rejected` as `messages_preference`, turns with `from` and `value`.

    Raises:
        UserError: a turn isn't a turn, or a response doesn't begin with the assistant.
    """
    return _after(turns_column(row, "conversations"), row)


@reads(*_RESPONSES, *_AROUND)
def implicit_prompt(row: Row) -> Preference:
    """Reads `chosen` and `rejected`, whole conversations: the turns that both begin with are the prompt.

    Texts are read as by `anthropic_hh`.

    Raises:
        UserError: the first turns that differ aren't both the assistant's, or one conversation ends before that.
    """
    chosen, rejected = (column(row, name, (str, list), "turns, or a dialogue as text") for name in _RESPONSES)
    if isinstance(chosen, str) and isinstance(rejected, str) and not turns_of_text(chosen):
        return anthropic_hh(row)
    return _whole(turns_column(row, "chosen"), turns_column(row, "rejected"), row)


@reads(*_RESPONSES, *_AROUND)
def anthropic_hh(row: Row) -> Preference:
    r"""Reads `chosen` and `rejected`, dialogues as text: `\n\nHuman: ...\n\nAssistant: ...`, as in Anthropic's HH data.

    The turns, stripped of white space, are then read as by `implicit_prompt`.

    Raises:
        UserError: a text doesn't begin with the human's turn, or as for `implicit_prompt`.
    """
    return _whole(_dialogue(row, "chosen"), _dialogue(row, "rejected"), row)


# `prompt` first: published data often have a column `messages` with the whole chosen conversation besides it.
PREFERENCE_FORMATS: Formats = (
    (prompt_preference, ("prompt", "chosen", "rejected")),
    (sharegpt_preference, ("conversations", "chosen", "rejected")),
    (messages_preference, ("messages", "chosen", "rejected")),
    (alpaca_preference, ("instruction", "chosen", "rejected")),
    (question_preference, ("question", "chosen", "rejected")),
    (implicit_prompt, ("chosen", "rejected")),
    (anthropic_hh, ("chosen", "rejected")),
)


# --- joining and splitting --------------------------------------------------------------------------------------------


def _after(prompt: Turns, row: Row) -> Preference:
    """Joins a prompt with the responses, unless they already begin with it."""
    chosen, rejected = (_response(row, name) for name in _RESPONSES)
    if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        return _whole(chosen, rejected, row)
    for name, response in zip(_RESPONSES, (chosen, rejected), strict=True):
        if (role := response[0]["role"]) != "assistant":
            raise UserError(f"{name}[0] is a turn of {role!r}, but a response begins with a turn of 'assistant'")
    return _preference(prompt, chosen, rejected, row)


def _response(row: Row, name: str) -> Turns:
    response = column(row, name, (str, dict, list), "text or turns")
    if isinstance(response, str) and not turns_of_text(response):
        return ({"role": "assistant", "content": response},)
    return turns_column({name: [response]} if isinstance(response, dict) else row, name)


def _whole(chosen: Turns, rejected: Turns, row: Row) -> Preference:
    """Splits two whole conversations at the first turn that differs."""
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    if chosen == rejected:  # `TokenizePairs` will drop and count it, which needs a response
        shared = max((i for i, turn in enumerate(chosen) if turn["role"] == "assistant"), default=shared)
    for name, turns, other in (("chosen", chosen, "rejected"), ("rejected", rejected, "chosen")):
        if shared == len(turns):
            raise UserError(f"{name!r} ends after turn {shared}, where {other!r} continues: its response is missing")
    roles = chosen[shared]["role"], rejected[shared]["role"]
    if roles != ("assistant", "assistant"):
        raise UserError(
            f"the prompts of chosen and rejected differ in turn {shared + 1} ({roles[0]!r} and {roles[1]!r}); they may "
            "only differ from a turn of 'assistant' on"
        )
    return _preference(chosen[:shared], chosen[shared:], rejected[shared:], row)


def _preference(prompt: Turns, chosen: Turns, rejected: Turns, row: Row) -> Preference:
    row = {name: value for name, value in row.items() if name != "weight"}
    first, second = (conversation(row, prompt + response, len(prompt)) for response in (chosen, rejected))
    return Preference(first, second, _margin(row))


def _dialogue(row: Row, name: str) -> Turns:
    text = column(row, name, str, "a dialogue as text")
    if not text.startswith("\n\nHuman:"):
        raise UserError(
            f"column {name!r} holds text that doesn't begin with an empty line and 'Human:', so it is no dialogue; "
            "a response without its prompt needs a column `prompt`: name it with `columns`, e.g. {prompt: my_column}"
        )
    _, *parts = _SPEAKER.split(text)
    speakers, said = parts[::2], parts[1::2]
    return tuple({"role": _HH_ROLES[who], "content": what.strip()} for who, what in zip(speakers, said, strict=True))


def _margin(row: Row) -> float | None:
    margin = row.get("margin")
    if _is_number(margin):
        return float(row["margin"])
    if not is_missing(margin):
        raise UserError(f"column 'margin' holds {margin!r} instead of a number")
    for better, worse in _SCORES:
        if _is_number(row.get(better)) and _is_number(row.get(worse)):
            difference = float(row[better]) - float(row[worse])
            if not is_finite(difference):
                raise UserError(f"columns {better!r} and {worse!r} differ by more than a number can hold")
            return difference
    return None


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and is_finite(value)
