"""Scores of sampled completions of held-out prompts."""

from collections.abc import Iterable

import numpy as np

from oumi_pl.errors import UserError


def pass_at_k(solved: np.ndarray, k: int) -> np.ndarray:
    """Estimates, for each prompt, the probability that at least one of `k` completions solves it.

    The unbiased estimator of Chen et al. 2021 (arXiv:2107.03374): of `n` completions with `c` right ones, the share of
    subsets of `k` that have a right one, `1 - C(n - c, k) / C(n, k)`. `1 - (1 - c / n)^k` would be too low.

    Args:
        solved: `[prompts, n]` bool: which completions are right.
        k: From 1 to `n`.

    Returns:
        `[prompts]` float64.
    """
    n = solved.shape[1]
    wrong = n - solved.sum(1)
    # C(wrong, k) / C(n, k) as a product of factors from 0 to 1, which can't overflow
    draws = np.arange(k)
    return 1 - np.clip((wrong[:, None] - draws) / (n - draws), 0, 1).prod(1)


def checked_ks(ks: Iterable[int] | None, n: int, key: str, completions: str) -> list[int]:
    """The values of k to report: those that are named, else 1 and `n`.

    Args:
        ks: Named values.
        n: Completions per prompt.
        key: The key of `ks`, for messages.
        completions: The key of `n`.

    Raises:
        UserError: a value is below 1 or above `n`.
    """
    chosen = sorted({1, n} if ks is None else {*ks})
    for k in chosen:
        if not 1 <= k <= n:
            raise UserError(f"{key}: {k} is not from 1 to {n}, the {completions}")
    return chosen
