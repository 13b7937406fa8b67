"""How axolotl and LLaMA-Factory read rows of data that they call `alpaca` and the like: formats of a source."""

from dataclasses import replace
from typing import Any

from oumi_pl.data import formats
from oumi_pl.data.feedback import LABELS
from oumi_pl.data.formats import history_column, reads
from oumi_pl.data.turns import optional_text, text_column
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Feedback, Message, Preference, Row, Text

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
"""The sentences of Stanford's Alpaca (Taori et al. 2023)."""


# --- axolotl: text without a chat template ------------------------------------------------------------------------


@reads("instruction", "input", "output")
def alpaca(row: Row) -> Text:
    """Reads `instruction`, `input` and `output` as axolotl's `alpaca`: Alpaca's text with its headings.

    Raises:
        UserError: a column isn't text.
    """
    return _alpaca(row, "{system}\n\n### Instruction:\n{asked}\n\n{input}### Response:\n", "### Input:\n{input}\n\n")


@reads("instruction", "input", "output")
def alpaca_chat(row: Row) -> Text:
    """Reads `instruction`, `input` and `output` as axolotl's `alpaca:chat`: lines of SYSTEM, USER and ASSISTANT.

    Raises:
        UserError: a column isn't text.
    """
    return _alpaca(row, "SYSTEM: {system}\nUSER: {asked}\n{input}ASSISTANT:", "{input}\n")


@reads("instruction", "input", "output")
def alpaca_chatml(row: Row) -> Text:
    """Reads `instruction`, `input` and `output` as axolotl's `alpaca:chatml`: ChatML's marks, written as text.

    Raises:
        UserError: a column isn't text.
    """
    written = (
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{asked}{input}<|im_end|>\n<|im_start|>assistant\n"
    )
    return _alpaca(row, written, "\n{input}")


@reads("instruction", "input", "output")
def alpaca_phi(row: Row) -> Text:
    """Reads `instruction`, `input` and `output` as axolotl's `alpaca:phi`: the marks of Phi, written as text.

    Raises:
        UserError: a column isn't text.
    """
    if optional_text(row, "input"):
        return _alpaca(row, "<|system|>\n{system}<|end|>\n<|user|>\n{asked}<|end|>{input}<|assistant|>", "{input}")
    return _alpaca(row, "<|system|>\n{system}<|end|>\n<|user|>\n{asked}<|end|>\n<|assistant|>\n", "")


def _alpaca(row: Row, written: str, with_input: str) -> Text:
    asked, extra = text_column(row, "instruction"), optional_text(row, "input")
    system = WITH_INPUT if extra else WITHOUT_INPUT
    prompt = written.format(system=system, asked=asked, input=with_input.format(input=extra) if extra else "")
    return Text(text_column(row, "output"), prompt)


@reads("messages", *formats.AROUND)
def without_system(row: Row) -> Conversation:
    """Reads `messages` without a system turn: axolotl's `drop_system_message`.

    Raises:
        UserError: a turn isn't a turn.
    """
    whole = formats.messages(row)
    return replace(whole, messages=tuple(turn for turn in whole.messages if turn["role"] != "system"))


# --- LLaMA-Factory: alpaca's columns as a conversation ------------------------------------------------------------


@reads("instruction", "input", "output", "history", *formats.AROUND)
def joined_alpaca(row: Row) -> Conversation:
    """Reads `instruction`, `input`, `output` and `history` as LLaMA-Factory: `input` follows on the next line.

    Raises:
        UserError: a column isn't text.
    """
    prompt = _prompt(row)
    return formats.conversation(row, (*prompt, formats.answered(text_column(row, "output"))), len(prompt))


@reads("instruction", "input", "output", *formats.AROUND)
def concatenated_alpaca(row: Row) -> Conversation:
    """Reads `instruction`, `input` and `output` as LLaMA-Factory's `v1`: `input` follows without a space.

    Raises:
        UserError: a column isn't text.
    """
    asked = optional_text(row, "instruction") + optional_text(row, "input")
    turns: tuple[Message, ...] = ({"role": "user", "content": asked}, formats.answered(text_column(row, "output")))
    return formats.conversation(row, turns, 1)


@reads("instruction", "input", "history", "chosen", "rejected", *formats.AROUND)
def joined_alpaca_pair(row: Row) -> Preference:
    """Reads a pair of responses as LLaMA-Factory: texts in `chosen` and `rejected` after the prompt of `joined_alpaca`.

    Raises:
        UserError: a column isn't text.
    """
    prompt = _prompt(row)
    chosen, rejected = (
        formats.conversation(row, (*prompt, formats.answered(text_column(row, name))), len(prompt))
        for name in ("chosen", "rejected")
    )
    return Preference(chosen, rejected)


@reads("instruction", "input", "output", "history", *LABELS, *formats.AROUND)
def joined_alpaca_feedback(row: Row) -> Feedback:
    """Reads a response as `joined_alpaca`, and whether it is good in `label`.

    Raises:
        UserError: a column isn't text, or the label isn't true or false.
    """
    label: Any = row.get("label")
    if not isinstance(label, bool):
        raise UserError(f"column 'label' holds {label!r} instead of true or false")
    return Feedback(joined_alpaca(row), label)


def _prompt(row: Row) -> tuple[Message, ...]:
    parts = [text for name in ("instruction", "input") if (text := optional_text(row, name))]
    return (*history_column(row), {"role": "user", "content": "\n".join(parts)})
