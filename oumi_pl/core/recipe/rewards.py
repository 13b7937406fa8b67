"""Oumi's registered rewards, with their values, as rewards of a recipe."""

import math
import re
from collections.abc import Mapping
from typing import Any

from oumi_pl.rollouts.rewards import answer_of, arithmetic

ANSWER = re.compile(r"#### (-?[0-9.,]+)")
BOX = re.compile(r"\\boxed\{([-+]?\d+)\}")


def count_letters(completion: str, row: Mapping[str, Any]) -> float:
    """`1 / (error + 0.5) - 2` for the number in the only box, -3 without one."""
    boxes = BOX.findall(completion)
    if len(boxes) != 1:
        return -3.0
    return 1 / (abs(int(boxes[0]) - int(row["metadata"]["letter_count_integer"])) + 0.5) - 2


def gsm8k(completion: str, row: Mapping[str, Any]) -> float:
    """1 if the last number after `####` is written as in the answer, thousands separators aside."""
    answers, expected = ANSWER.findall(completion), ANSWER.findall(answer_of(row))
    return float(bool(answers) and answers[-1].replace(",", "") == expected[0].replace(",", ""))


def countdown(completion: str, row: Mapping[str, Any]) -> float:
    """1 if the last `<answer>` of the last line is an expression that reaches `target` and uses each of `nums` once."""
    answers = re.findall(r"<answer>(.*?)</answer>", completion.rsplit("\n", maxsplit=1)[-1])
    if not answers or not re.fullmatch(r"[\d+\-*/().\s]+", answers[-1]):
        return 0.0
    if sorted(map(int, re.findall(r"\d+", answers[-1]))) != sorted(int(n) for n in row["nums"]):
        return 0.0
    value = arithmetic(answers[-1].strip())
    return float(value is not None and abs(value - float(row["target"])) < 1e-5)


def _words(completion: str) -> int:
    """Counts as Oumi does: empty parts at the ends as well."""
    return len(re.split(r"\s+", completion))


def _soft(completion: str, wanted: int) -> float:
    share = _words(completion) / wanted
    return share * math.exp(1 - share)


def soft_5tokens_completions(completion: str, row: Mapping[str, Any]) -> float:
    """1 for 5 words, and smoothly less for fewer or more."""
    return _soft(completion, 5)


def soft_10tokens_completions(completion: str, row: Mapping[str, Any]) -> float:
    """1 for 10 words, and smoothly less for fewer or more."""
    return _soft(completion, 10)


def soft_20tokens_completions(completion: str, row: Mapping[str, Any]) -> float:
    """1 for 20 words, and smoothly less for fewer or more."""
    return _soft(completion, 20)


def sharp_5tokens_completions(completion: str, row: Mapping[str, Any]) -> float:
    """Minus the distance to 5 words."""
    return -abs(_words(completion) - 5)


def sharp_10tokens_completions(completion: str, row: Mapping[str, Any]) -> float:
    """Minus the distance to 10 words."""
    return -abs(_words(completion) - 10)


def sharp_20tokens_completions(completion: str, row: Mapping[str, Any]) -> float:
    """Minus the distance to 20 words."""
    return -abs(_words(completion) - 20)
