"""Metrics of completions: functions `(completion, row) -> number or mapping`, in bulk and while training."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from oumi_pl.errors import UserError
from oumi_pl.rollouts.rewards import resolve

Metric = Callable[[str, Mapping[str, Any]], Any]
"""A function of a completion and its row that returns a number, or a mapping from name to number."""


def resolve_all(metrics: str | Metric | Sequence[str | Metric], key: str) -> dict[str, Metric]:
    """Finds metrics by their paths, or by the names of those that are built in.

    Args:
        metrics: One or several; see `oumi_pl.rollouts.rewards.resolve`. From Python also functions.
        key: The key that names them, for messages.

    Returns:
        The functions by name.

    Raises:
        UserError: there is no such function, or two have the same name.
    """
    several = [metrics] if isinstance(metrics, str) or callable(metrics) else list(metrics)
    named: dict[str, Metric] = {}
    for metric in several:
        function = resolve(metric, key) if isinstance(metric, str) else metric
        name = str(getattr(function, "__name__", type(function).__name__))
        if name in named:
            raise UserError(f"{key}: two metrics have the name {name}; give one of them another")
        named[name] = function
    return named


def scores(metrics: Mapping[str, Metric], text: str, row: Mapping[str, Any], key: str, place: str) -> dict[str, float]:
    """The values of metrics for a completion, by name; a metric that returns a mapping has several.

    Args:
        metrics: Functions by name.
        text: The completion.
        row: Its row.
        key: The key that names the metrics, for messages.
        place: Which row it is, for messages.

    Raises:
        UserError: a metric fails, or returns something else than numbers.
    """
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        try:
            result = metric(text, dict(row))
        except Exception as error:  # code of the user
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{key}: {name} failed for {place}: {reason}") from error
        named = {f"{name}/{part}": v for part, v in result.items()} if isinstance(result, Mapping) else {name: result}
        for full_name, value in named.items():
            if not isinstance(value, bool | int | float) and hasattr(value, "item"):  # a number of numpy or torch
                with contextlib.suppress(ValueError, RuntimeError):  # several numbers, which is refused below
                    value = value.item()  # noqa: PLW2901
            if not isinstance(value, bool | int | float) or not math.isfinite(value):
                raise UserError(f"{key}: {full_name} is {value!r:.40} for {place}, but has to be a finite number")
            values[full_name] = float(value)
    return values
