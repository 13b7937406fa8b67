"""Rewards: functions of a completion and its row, named by their paths, and those that are built in.

A reward is any function `(completion: str, row: dict) -> float`, or a coroutine function of the same arguments; it may
also be a class, whose object is called so. A batched reward takes lists of both and returns a list; mark it with
`@batched`. In a conversation, the completion is the text of the assistant's answer. With an environment it is that of
the last turn, and the row has a column `turns`, the texts of all turns: the policy's, the environment's, and so on.
"""

import asyncio
import functools
import importlib
import inspect
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import takewhile
from math import isfinite, nan
from typing import Any, NamedTuple

import numpy as np

from oumi_pl.errors import UserError, nearest

Reward = Callable[..., Any]


class Batched:
    """A reward of all completions at once: `(completions: list[str], rows: list[dict]) -> list[float]`."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        functools.update_wrapper(self, reward)

    def __call__(self, completions: list[str], rows: list[dict[str, Any]]) -> Any:
        """Calls the function."""
        return self.reward(completions, rows)


def batched(reward: Reward) -> Batched:
    """Marks a function as a reward of all completions at once, as a decorator."""
    return Batched(reward)


class Scored(NamedTuple):
    """A completion, with what a `SampleReward` reads besides its text."""

    prompt: Any
    """The `oumi_pl.data.prompts.Prompt`."""
    completion: Any
    """The `oumi_pl.rollouts.sampling.Completion`."""
    text: str


class SampleReward(ABC):
    """A reward that reads prompts and token ids, such as a reward model."""

    @abstractmethod
    def __call__(self, samples: Sequence[Scored]) -> list[float]:
        """Returns the reward of each sample."""


class Rewards:
    """The rewards of a run, and their weights.

    Args:
        rewards: A reward; or several, by path or as functions, with their weights. A path is `module.function`, or the
            name of one that is built in; with a slash, it is the folder or the hub id of a reward model.
        key: The key that names them, for messages.
        load_model: Creates the reward of a reward model from its path; None refuses them.

    Raises:
        UserError: a path names no function, or a weight is no number.
    """

    def __init__(
        self,
        rewards: str | Reward | Sequence[str | Reward] | Mapping[str, float],
        key: str = "data.reward",
        load_model: Callable[[str], SampleReward] | None = None,
    ) -> None:
        self.key = key
        if isinstance(rewards, Mapping):
            named: list[tuple[str | Reward, float]] = list(rewards.items())
        elif isinstance(rewards, str) or callable(rewards):
            named = [(rewards, 1.0)]
        else:
            named = [(reward, 1.0) for reward in rewards]
        if not named:
            raise UserError(f"{key}: name at least one")
        for reward, weight in named:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight):
                raise UserError(f"{key}: the weight of {reward} is {weight!r}, which is no number")
        functions = [self._resolved(reward, load_model) for reward, _ in named]
        self.functions = {_name(function): function for function in functions}
        self.weights = np.array([weight for _, weight in named], dtype=np.float64)
        if len(self.functions) < len(named):
            raise UserError(f"{key}: two {key.rpartition('.')[2].removesuffix('s')}s have the same name")

    def _resolved(self, reward: str | Reward, load_model: Callable[[str], SampleReward] | None) -> Reward:
        if not isinstance(reward, str):
            return reward
        if not is_model(reward):
            return resolve(reward, self.key)
        if load_model is None:
            raise UserError(
                f"{self.key}: {reward} is a reward model, which only RolloutData has a use for; name functions"
            )
        return load_model(reward)

    @classmethod
    def none(cls) -> "Rewards":
        """No reward: all totals are 0."""
        rewards = cls(exact_match)
        rewards.functions, rewards.weights = {}, np.empty(0)
        return rewards

    @property
    def names(self) -> list[str]:
        """Names of the components."""
        return list(self.functions)

    def components(
        self,
        completions: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        samples: Sequence[Scored] = (),
    ) -> np.ndarray:
        """The value of each reward for each completion, `[completions, rewards]` float64.

        Args:
            completions: Texts.
            rows: Their rows.
            samples: The same completions for reward models, if there are some.

        Raises:
            UserError: a reward fails, or returns something else than a finite number; names the row.
        """
        columns = [
            self._column(f"{self.key}: {name}", f, completions, rows, samples) for name, f in self.functions.items()
        ]
        return np.stack(columns, 1) if columns else np.empty((len(completions), 0))

    def total(self, components: np.ndarray) -> np.ndarray:
        """Weighted sums of components `[..., rewards]`."""
        return components @ self.weights

    def _column(
        self,
        name: str,
        reward: Reward,
        completions: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        samples: Sequence[Scored],
    ) -> np.ndarray:
        if isinstance(reward, SampleReward):
            values = reward(samples)
        elif isinstance(reward, Batched):
            try:
                values = reward(list(completions), [dict(row) for row in rows])
                values = asyncio.run(_awaited(values)) if inspect.isawaitable(values) else values
            except Exception as error:
                raise UserError(f"{name} failed: {type(error).__name__}: {error}") from error
            if len(values) != len(completions):
                raise UserError(f"{name} returned {len(values)} values for {len(completions)} completions")
        elif inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None)):  # noqa: B004
            values = asyncio.run(_gather(name, reward, completions, rows))
        else:
            values = [_called(name, reward, c, row) for c, row in zip(completions, rows, strict=True)]
        return np.array(
            [_number(name, value, c, row) for value, c, row in zip(values, completions, rows, strict=True)],
            dtype=np.float64,
        )


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


async def _gather(name: str, reward: Reward, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Any:
    async def one(completion: str, row: Mapping[str, Any]) -> Any:
        try:
            return await reward(completion, dict(row))
        except Exception as error:
            raise _failed(name, error, completion, row) from error

    return await asyncio.gather(*(one(c, row) for c, row in zip(completions, rows, strict=True)))


def _called(name: str, reward: Reward, completion: str, row: Mapping[str, Any]) -> Any:
    try:
        return reward(completion, dict(row))
    except Exception as error:
        raise _failed(name, error, completion, row) from error


def _failed(name: str, error: Exception, completion: str, row: Mapping[str, Any]) -> UserError:
    where = f" for the row {_short(dict(row))} and the completion {_short(completion)}"
    return UserError(f"{name} failed{where}: {type(error).__name__}: {error}")


def _number(name: str, value: Any, completion: str, row: Mapping[str, Any]) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = nan
    if not isfinite(number):
        raise UserError(
            f"{name} returned {value!r} for the row {_short(dict(row))} and the completion "
            f"{_short(completion)}; a reward is a finite number"
        )
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _name(reward: Reward) -> str:
    return str(getattr(reward, "__name__", type(reward).__name__))


REGEX = "regex:"


def is_model(path: str) -> bool:
    """Whether the path of a reward is that of a reward model: paths of functions have no slash."""
    return "/" in path and not path.startswith(REGEX)


def resolve(path: str, key: str = "data.reward") -> Reward:
    """Finds a reward by the name of a built-in one, by `module.function`, or as `regex:PATTERN` (see `Matches`).

    Raises:
        UserError: there is no such function, or the pattern is no regular expression.
    """
    if path.startswith(REGEX):
        try:
            return Matches(path.removeprefix(REGEX))
        except re.error as error:
            raise UserError(f"{key}: {path} is no regular expression: {error}") from error
    module, _, name = path.rpartition(".")
    try:
        value = getattr(importlib.import_module(module or __name__), name)
    except ImportError as error:
        raise UserError(f"{key}: can't import {module}: {error}") from error
    except AttributeError:
        own = vars(sys.modules[module or __name__])
        known = [n for n, v in own.items() if inspect.isfunction(v) and v.__module__ == own["__name__"] and n[0] != "_"]
        where = f"{module} has no {name}" if module else f"no built-in reward or metric {name!r}"
        where += nearest(name, [n for n in known if module or n not in ("is_model", "resolve")])
        raise UserError(f"{key}: {where}") from None
    if not callable(value):
        raise UserError(f"{key}: {path} is a {type(value).__name__}, not a function")
    return value() if isinstance(value, type) else value


# ---- built in


def answer_of(row: Mapping[str, Any]) -> str:
    """The expected answer of a row: its column `answer`, `completion`, `target` or `solution`, or its last turn.

    Raises:
        UserError: it has none.
    """
    for column in ("answer", "completion", "target", "solution"):
        if column in row:
            value = row[column]
            return str(value[-1]["content"] if isinstance(value, list) else value)
    turns = row.get("messages") or row.get("conversations") or [{}]
    if turns[-1].get("role") == "assistant":
        return str(turns[-1]["content"])
    raise UserError("no column `answer`, `completion`, `target` or `solution`, and no `messages` that end with one")


def exact_match(completion: str, row: Mapping[str, Any]) -> float:
    """1 if the completion is the expected answer, but for white space around both."""
    return float(completion.strip() == answer_of(row).strip())


def common_prefix(completion: str, row: Mapping[str, Any]) -> float:
    """The characters before the first difference from the expected answer, as a share of the longer of both.

    Partial credit: a reward of whole answers alone teaches nothing about prompts that the policy never solves.
    """
    texts = completion.strip(), answer_of(row).strip()
    longest = max(map(len, texts))
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    return same / longest if longest else 1.0


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def gsm8k(completion: str, row: Mapping[str, Any]) -> float:
    """1 if the last number of the completion (after `####` or within a box, if there is one) is that of the answer."""
    expected, got = _last_number(answer_of(row)), _last_number(completion)
    return float(expected is not None and got == expected)


def _last_number(text: str) -> float | None:
    for pattern in (r"####\s*(.*)", r"\\boxed\{([^{}]*)\}"):
        if marked := re.findall(pattern, text):
            text = marked[-1]
            break
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def letter_count(completion: str, row: Mapping[str, Any]) -> float:
    """1 if the last number of the completion (in a box, if there is one) is the row's `letter_count_integer`.

    The data set oumi-ai/oumi-letter-count has this number in a column `metadata`.
    """
    expected = (row.get("metadata") or row)["letter_count_integer"]
    return float(_last_number(completion) == float(expected))


def countdown(completion: str, row: Mapping[str, Any]) -> float:
    """1 if the `<answer>` is an equation that reaches `target` and uses each of `nums` exactly once; else 0."""
    answers = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    if not answers:
        return 0.0
    equation = answers[-1].partition("=")[0].strip()
    if not re.fullmatch(r"[\d\s+\-*/().]+", equation) or "**" in equation or "//" in equation:
        return 0.0
    if sorted(int(n) for n in re.findall(r"\d+", equation)) != sorted(int(n) for n in row["nums"]):
        return 0.0
    value = arithmetic(equation)
    return float(value is not None and abs(value - float(row["target"])) < 1e-5)


def arithmetic(text: str) -> float | None:
    """The value of an expression of numbers, `+ - * /` and parentheses; None if it is none."""
    import ast
    import operator

    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, OverflowError):
        return None


class Matches:
    """1 if the completion matches a regular expression from its beginning to its end.

    Args:
        pattern: The expression; `.` matches newlines too.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern, re.DOTALL)
        self.__name__ = "matches"

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """Returns 1 or 0."""
        return float(self.pattern.fullmatch(completion) is not None)


class rouge_l:  # noqa: N801
    """ROUGE-L of the completion and the expected answer: the F-measure of their longest common subsequence of words.

    Needs the package rouge-score, the extra `metrics`. Words are those of its tokenizer, without stemming.
    """

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise UserError("rouge_l needs the package rouge-score: pip install 'oumi_pl[metrics]'") from None
        self._scorer = RougeScorer(["rougeL"])
        self.__name__ = "rouge_l"

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """Returns a value from 0 to 1."""
        return float(self._scorer.score(answer_of(row), completion)["rougeL"].fmeasure)


class chrf:  # noqa: N801
    """chrF2 of the completion and the expected answer: the F-score of their n-grams of characters, from 0 to 100.

    Needs the package sacrebleu, the extra `metrics`.
    """

    def __init__(self) -> None:
        try:
            from sacrebleu.metrics import CHRF
        except ImportError:
            raise UserError("chrf needs the package sacrebleu: pip install 'oumi_pl[metrics]'") from None
        self._metric = CHRF()
        self.__name__ = "chrf"

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """Returns a value from 0 to 100."""
        return float(self._metric.sentence_score(completion, [answer_of(row)]).score)


class math:  # noqa: N801
    """1 if the last expression of the completion is mathematically equal to the answer, in LaTeX or plain.

    Needs the package math-verify, the extra `math`.
    """

    def __init__(self) -> None:
        try:
            from math_verify import parse, verify
        except ImportError:
            raise UserError("the reward `math` needs the package math-verify: pip install 'oumi_pl[math]'") from None
        self._parse, self._verify = parse, verify
        self.__name__ = "math"

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """Returns 1 or 0."""
        answer = answer_of(row)
        expected = self._parse(answer) if "$" in answer or "\\boxed" in answer else self._parse(f"${answer}$")
        if not expected:
            raise UserError(f"the answer {_short(answer)} can't be read as mathematics")
        return float(self._verify(expected, self._parse(completion)))


class LengthPenalty:
    """`-max(0, words - free) / scale`.

    Args:
        free: Words that cost nothing.
        scale: Words beyond that cost 1.
    """

    def __init__(self, free: int = 100, scale: float = 100.0) -> None:
        self.free, self.scale = free, scale
        self.__name__ = "length_penalty"

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """Returns 0 or less."""
        return -max(0, len(completion.split()) - self.free) / self.scale
