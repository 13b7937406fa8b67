"""Rewards: kinds of functions, errors, and the built-in ones."""

import asyncio
import sys

import numpy as np
import pytest

from oumi_pl.errors import UserError
from oumi_pl.rollouts import rewards
from oumi_pl.rollouts.advantages import BatchMean, GroupMean, LeaveOneOut
from oumi_pl.rollouts.rewards import LengthPenalty, Matches, Rewards, batched

ROWS = [{"answer": "yes"}, {"answer": "no"}]


def length(completion, row):
    return len(completion)


async def later(completion, row):
    await asyncio.sleep(0)
    return len(row["answer"])


@batched
def all_at_once(completions, rows):
    return [len(completion) + len(row["answer"]) for completion, row in zip(completions, rows, strict=True)]


class Callable:
    def __call__(self, completion, row):
        return 2


def test_functions_of_all_kinds_and_their_weights():
    actual = Rewards({"tests.rollouts.test_rewards.length": 1, f"{__name__}.later": 0.5, f"{__name__}.Callable": -1})
    assert actual.names == ["length", "later", "Callable"]
    components = actual.components(["a", "bcd"], ROWS)
    assert components.tolist() == [[1, 3, 2], [3, 2, 2]]
    assert actual.total(components).tolist() == [0.5, 2.0]
    assert Rewards([length, all_at_once]).components(["a", "bcd"], ROWS).tolist() == [[1, 4], [3, 5]]
    assert Rewards("exact_match").components(["yes ", "yes"], ROWS).tolist() == [[1], [0]]


def raises(completion, row):
    raise KeyError("solution")


def nothing(completion, row):
    return None


def not_finite(completion, row):
    return float("nan")


@batched
def too_few(completions, rows):
    return [1.0]


MISTAKES = {
    raises: r"raises failed for the row \{'answer': 'yes'\} and the completion 'a': KeyError: 'solution'",
    nothing: r"nothing returned None for the row \{'answer': 'yes'\} .* a reward is a finite number",
    not_finite: r"not_finite returned nan for the row",
    too_few: r"too_few returned 1 values for 2 completions",
}


@pytest.mark.parametrize("reward", MISTAKES)
def test_a_failing_reward_names_the_row(reward):
    with pytest.raises(UserError, match=MISTAKES[reward]):
        Rewards(reward).components(["a", "b"], ROWS)


PATHS = {
    "exakt": "no built-in reward or metric 'exakt'",
    "tests.rollouts.test_rewards.nope": "tests.rollouts.test_rewards has no nope",
    "not_there.f": "can't import not_there",
    "tests.rollouts.test_rewards.ROWS": "is a list, not a function",
}


@pytest.mark.parametrize("path", PATHS)
def test_an_unknown_reward_is_refused(path):
    with pytest.raises(UserError, match=PATHS[path]):
        Rewards(path)


def test_weights_are_numbers():
    with pytest.raises(UserError, match="the weight of exact_match is 'much', which is no number"):
        Rewards({"exact_match": "much"})
    with pytest.raises(UserError, match="two rewards have the same name"):
        Rewards([length, length])


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("... so #### 1,234", "#### 1234", 1),
        ("the answer is \\boxed{7}, not 8", "7", 1),
        ("3 + 4 = 7", "#### 7", 1),
        ("#### 6", "#### 7", 0),
        ("none", "#### 7", 0),
        ("-2.50", "-2.5", 1),
    ],
)
def test_gsm8k(completion, answer, expected):
    assert rewards.gsm8k(completion, {"answer": answer}) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>(6 - 2) * 3</answer>", 1),
        ("<answer>6 * 2 = 12</answer>", 0),
        ("<answer>6 * 3 - 3 * 2</answer>", 0),
        ("<answer>6 + 2 + 3</answer>", 0),
        ("<answer>6 ** 2 - 3</answer>", 0),
        ("<answer>6 / (2 - 2)</answer>", 0),
        ("<answer>__import__('os')</answer>", 0),
        ("(6 - 2) * 3", 0),
    ],
)
def test_countdown(completion, expected):
    assert rewards.countdown(completion, {"nums": [6, 2, 3], "target": 12}) == expected


def test_other_built_in_rewards():
    assert rewards.letter_count("there are \\boxed{3}", {"letter_count_integer": 3}) == 1
    assert rewards.letter_count("2", {"letter_count_integer": 3}) == 0
    assert rewards.letter_count("3 of them", {"metadata": {"letter_count_integer": 3}}) == 1
    assert Matches(r"<think>.*</think>.+")("<think>a\nb</think>c", {}) == 1
    assert Matches(r"<think>.*</think>.+")("c", {}) == 0
    assert LengthPenalty(free=2, scale=4)("a b c d", {}) == -0.5
    assert LengthPenalty(free=2)("a b", {}) == 0


def test_advantages_by_hand():
    values = np.array([[1.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    third, std = 1 / 3, np.sqrt(1 / 3)
    centered = [[2 * third, -third, -third], [0, 0, 0]]
    np.testing.assert_allclose(GroupMean("none")(values), centered)
    np.testing.assert_allclose(GroupMean()(values)[0], np.array(centered[0]) / (std + 1e-4))
    np.testing.assert_allclose(GroupMean()(values)[1], 0)
    np.testing.assert_allclose(GroupMean("batch")(values), np.array(centered) / (values.std(ddof=1) + 1e-4))
    np.testing.assert_allclose(LeaveOneOut()(values), [[1, -0.5, -0.5], [0, 0, 0]])
    np.testing.assert_allclose(BatchMean()(values), values - 7 / 6)
    with pytest.raises(UserError, match="scale: unknown 'grup'; did you mean 'group'"):
        GroupMean("grup")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("curry badge", 1),
        (" curry badge\n", 1),
        ("curry bag", 8 / 11),
        ("curry badges", 11 / 12),
        ("badge", 0),
        ("", 0),
    ],
)
def test_a_common_prefix_gives_partial_credit(completion, expected):
    assert rewards.common_prefix(completion, {"answer": "curry badge"}) == expected


def test_mathematical_equality(monkeypatch):
    pytest.importorskip("math_verify")
    answers = [r"\frac{1}{2}", "0.5", "$x^2+1$", r"thus \boxed{(1,2)}"]
    rows = [{"answer": answer} for answer in answers]
    right, wrong = ["It is $0.5$.", r"\boxed{\frac{2}{4}}", "$1+x^2$", "$(1,2)$"], ["3", "no", "$x$", "$(2,1)$"]
    assert Rewards("math").components(right, rows).T.tolist() == [[1, 1, 1, 1]]
    assert Rewards("math").components(wrong, rows).T.tolist() == [[0, 0, 0, 0]]
    with pytest.raises(UserError, match="the answer '' can't be read as mathematics"):
        Rewards("math").components(["3"], [{"answer": ""}])


def test_without_its_package_mathematical_equality_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(
        UserError, match=r"the reward `math` needs the package math-verify: pip install 'oumi_pl\[math\]'"
    ):
        Rewards("math")
