"""An environment with one tool: a calculator."""

import re
from typing import Any

import numpy as np

from oumi_pl.rollouts.environment import Environment, Reply, turn_ids
from oumi_pl.rollouts.rewards import arithmetic
from oumi_pl.types import Conversation

CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
SYSTEM = (
    "Solve the problem step by step. To calculate, end your turn with an expression such as <calc>3 * (4 + 5)</calc>; "
    "you then get its value. When you are done, write the answer after ####."
)


def question(row: dict[str, Any]) -> Conversation:
    """A format: the column `question`, after a system turn that says how to use the calculator."""
    turns: Any = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]})
    return Conversation(turns)


class Calculator(Environment):
    """Answers a turn that has `<calc>3 * (4 + 5)</calc>` with a turn that has the value; a turn without a call is last.

    Anything but numbers, `+ - * /` and parentheses gives `error`.

    Args:
        calls: Most calls of a completion: a turn after so many answers is the last.
        role: Role of the answers in the chat template.
    """

    def __init__(self, calls: int = 4, role: str = "tool") -> None:
        self.calls = calls
        self.role = role

    def start(self, row: dict[str, Any], tokenizer: Any, rng: np.random.Generator) -> Reply:
        """See `Environment`."""
        answered = 0

        def reply(ids: np.ndarray) -> list[int] | None:
            nonlocal answered
            calls = CALL.findall(tokenizer.decode(ids))
            if not calls or answered == self.calls:
                return None
            answered += 1
            return turn_ids(tokenizer, ids, value_of(calls[-1]), self.role)

        return reply


def value_of(text: str) -> str:
    """The value of an expression as text; `error` if it has none."""
    value = arithmetic(text.strip())
    try:
        return "error" if value is None else f"{float(value):.12g}"
    except OverflowError:  # a whole number beyond float
        return "error"
