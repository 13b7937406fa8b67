"""How often training rows are drawn and in which order, by a column: `data.sample_by` and `data.order_by`."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from math import isfinite
from typing import Any

import numpy as np

from oumi_pl.data.turns import plain
from oumi_pl.errors import UserError, nearest

SampleBy = str | dict[str, Any]
BALANCED = "balanced"
YAML_BOOLEANS = {"no": "false", "off": "false", "false": "false", "yes": "true", "on": "true", "true": "true"}
"""Unquoted words that YAML 1.1 reads as booleans -> `true` or `false`."""
LISTED = 12
"""Most classes in a report."""


class Draws:
    """How rows are drawn and ordered, as a recipe says.

    Args:
        sample_by: A column with numbers, or a column with classes and the share of each, or `balanced`.
        order_by: A column, with `-` before it to begin with its largest value.

    Raises:
        UserError: it is something else.
    """

    def __init__(self, sample_by: SampleBy | None, order_by: str | None) -> None:
        self.shares: dict[str, float] | None = None
        """Relative share of each class; None for `balanced`, and for numbers."""
        self.has_classes = isinstance(sample_by, Mapping)
        self.sampled = sample_by if isinstance(sample_by, str) else None
        if isinstance(sample_by, Mapping):
            self.sampled, self.shares = _classes(sample_by)
        self.descends = order_by is not None and order_by.startswith("-")
        self.ordered = order_by.removeprefix("-") if order_by is not None else None
        for key, column in (("sample_by", self.sampled), ("order_by", self.ordered)):
            if column is not None and not column.strip():
                raise UserError(f"data.{key} names no column")
        drawn_by: Any = sample_by
        if isinstance(sample_by, Mapping):
            drawn_by = {self.sampled: BALANCED if self.shares is None else _by_class(*sample_by.values())}
        self.identity = [f"{key}: {json.dumps(v)}" for key, v in (("sample_by", drawn_by), ("order_by", order_by)) if v]
        """What a checkpoint keeps of both, to refuse a resume with others."""

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return list(dict.fromkeys(column for column in (self.sampled, self.ordered) if column is not None))

    def weights(self, values: Sequence[Any], sizes: Sequence[int], apart: bool) -> tuple[np.ndarray, np.ndarray]:
        """How often each row is drawn, relative to other rows, `[rows]` float64, and the number of its class.

        Args:
            values: The column `sampled` of each row.
            sizes: Rows of each source.
            apart: Whether each source has a share of its own, so that classes have their shares within it.

        Raises:
            UserError: a value is no number that is at least 0, or a class has no share, or no rows.
        """
        if not self.has_classes:
            weights = np.array([_weight(self.sampled, value) for value in values], dtype=np.float64)
            self.__refuse_zeros(weights, sizes, apart)
            return weights, np.zeros(len(weights), dtype=np.int64)
        classes = [class_of(value) for value in values]
        counts = Counter(classes)
        shares = dict.fromkeys(counts, 1.0) if self.shares is None else self.__as_written(self.shares, counts)
        for name in counts:
            if name not in shares:
                quoted = " in quotes" if name.lower() in YAML_BOOLEANS else ""
                raise UserError(
                    f"data.sample_by: {counts[name]:,} rows have {self.sampled} {name!r}, which has no share"
                    f"{nearest(name, shares)}; add it{quoted} (0 leaves them out)"
                )
        for name, share in shares.items():
            if share and name not in counts:
                raise UserError(f"data.sample_by: no row has {self.sampled} {name!r}{nearest(name, counts)}")
        weights = np.empty(len(classes))
        starts = np.cumsum([0, *sizes]) if apart else np.array([0, len(classes)])
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            here = Counter(classes[start:stop])
            weights[start:stop] = [shares[name] / here[name] for name in classes[start:stop]]
        self.__refuse_zeros(weights, sizes, apart)
        numbers = {name: number for number, name in enumerate(sorted(counts))}
        return weights, np.array([numbers[name] for name in classes], dtype=np.int64)

    def __as_written(self, shares: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
        """The shares of classes, with the names that rows have for those that YAML reads as true or false.

        Raises:
            UserError: rows have several such names.
        """
        named = dict(shares)
        for name in {"true", "false"} & shares.keys() - counts.keys():
            meant = [other for other in counts if other not in shares and YAML_BOOLEANS.get(other.lower()) == name]
            if len(meant) > 1:
                raise UserError(
                    f"data.sample_by: YAML reads {' and '.join(meant)} as {name}, and rows have several of these as "
                    f"{self.sampled}; put the names of classes in quotes, as {meant[0]!r}"
                )
            if meant:
                named[meant[0]] = named.pop(name)
        return named

    def __refuse_zeros(self, weights: np.ndarray, sizes: Sequence[int], apart: bool) -> None:
        parts = np.split(weights, np.cumsum(sizes)[:-1]) if apart else [weights]
        for number, part in enumerate(parts, 1):
            if len(part) and not part.sum():
                where = f"source number {number} of data.train" if apart and len(parts) > 1 else "data.train"
                raise UserError(f"data.sample_by: every row of {where} has the weight 0")

    def ranks(self, values: Sequence[Any]) -> np.ndarray:
        """The place of each row in the order of the column `ordered`, `[rows]` int64; equal values share one.

        Raises:
            UserError: some values are numbers and others text.
        """
        keys = [_sortable(value) for value in values]
        if len({isinstance(key, str) for key in keys}) > 1:  # a number that is written as text among text
            keys = [str(value) for value in values]
            if not all(isinstance(value, str) for value in values):
                raise UserError(f"data.order_by: the column {self.ordered!r} holds both numbers and text")
        places = {key: place for place, key in enumerate(sorted(set(keys), reverse=self.descends))}
        return np.array([places[key] for key in keys], dtype=np.int64)

    def report(self, values: Mapping[str, Sequence[Any]], ids: np.ndarray) -> dict[str, Any]:
        """What an epoch draws, for the data report: `drawn`, rows by class or by how often; and `order`.

        Args:
            values: The columns.
            ids: The rows of the epoch.
        """
        described: dict[str, Any] = {}
        if self.sampled is not None and self.has_classes:
            drawn = Counter(class_of(values[self.sampled][i]) for i in ids.tolist())
            common = drawn.most_common(LISTED)
            described["drawn"] = {f"{self.sampled} {name}": count for name, count in common}
            if len(drawn) > LISTED:
                described["drawn"]["others"] = len(ids) - sum(count for _, count in common)
        elif self.sampled is not None:
            times = np.bincount(ids, minlength=len(values[self.sampled]))
            counts = {"never": times == 0, "once": times == 1, "several times": times > 1}
            described["drawn"] = {f"by {self.sampled}: {name}": int(which.sum()) for name, which in counts.items()}
        if self.ordered is not None and len(ids):
            own = values[self.ordered]
            first, last = ids[0], ids[-1]
            described["order"] = f"by {self.ordered}, from {own[first]} to {own[last]}"
        return described


def class_of(value: Any) -> str:
    """The name of a class: text as it is, another value as JSON writes it (`true`, `3`), a date as ISO 8601."""
    if isinstance(value, date):  # which YAML makes of a class's name without quotes
        return value.isoformat()
    return value if isinstance(value, str) else json.dumps(plain(value))


def _by_class(shares: Mapping[Any, Any]) -> dict[str, Any]:
    return {class_of(name): share for name, share in shares.items()}


def drawn(
    sizes: Sequence[int],
    counts: Sequence[int],
    weights: tuple[np.ndarray, np.ndarray],
    seed: int,
    epoch: int,
    *,
    together: bool,
) -> np.ndarray:
    """Draws the rows of one epoch by their weights; a pure function of its arguments.

    Each row occurs as often as its weight says, rounded down or up: the remainders are drawn systematically (one
    uniform number, then equal steps along the rows), so that every row has exactly its share over many epochs.

    Args:
        sizes: Rows that each source has.
        counts: Rows to draw from each source.
        weights: As of `Draws.weights`.
        seed: Of the run.
        epoch: Counted from 0.
        together: Draw from all sources as if they were one.

    Returns:
        Row numbers `[sum(counts)]`, int64, shuffled.
    """
    rng = np.random.default_rng([seed, epoch, _STREAM])
    if together:
        sizes, counts = [sum(sizes)], [sum(counts)]
    ids, start = [np.empty(0, dtype=np.int64)], 0
    for size, count in zip(sizes, counts, strict=True):
        own, classes = (values[start : start + size] for values in weights)
        if count and size:
            expected = count * own / own.sum()
            # the rows of a class are neighbours, so that it has its share to within a row
            order = rng.permutation(size)
            order = order[np.argsort(classes[order], kind="stable")]
            steps = np.floor(np.cumsum(expected[order]) + rng.random())
            steps[-1] = count  # what rounding of the sum leaves
            times = np.diff(np.minimum(steps, count), prepend=0).astype(np.int64)
            ids.append(np.repeat(order, times) + start)
        start += size
    return rng.permutation(np.concatenate(ids))


_STREAM = 0x6472  # distinguishes these random numbers from others that are seeded with (seed, epoch)


def _classes(sample_by: Mapping[str, Any]) -> tuple[str, dict[str, float] | None]:
    """The column of classes, and their shares; None for equal ones."""
    example = "{lang: {en: 0.7, de: 0.3}}"
    if len(sample_by) != 1:
        raise UserError(f"data.sample_by names {len(sample_by)} columns, and rows are drawn by one: {example}")
    ((column, shares),) = sample_by.items()
    if isinstance(column, bool):
        raise UserError(f"data.sample_by: YAML reads the column's name as {class_of(column)}; put it in quotes")
    if shares == BALANCED:
        return str(column), None
    if not isinstance(shares, Mapping) or not shares:
        raise UserError(f"data.sample_by: {column} is {shares!r}; name the share of each class, {example}, or balanced")
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not isfinite(share) or share < 0:
            raise UserError(f"data.sample_by: the share of {name!r} is {share!r}, and has to be a number of at least 0")
    for name, count in Counter(map(class_of, shares)).items():
        if count > 1:
            hint = (
                "; without quotes, YAML reads no and off as false, yes and on as true" if name in YAML_BOOLEANS else ""
            )
            raise UserError(f"data.sample_by: {column} has {count} shares for the class {name!r}{hint}")
    if not any(shares.values()):
        raise UserError("data.sample_by: all shares are 0")
    return str(column), {name: float(share) for name, share in _by_class(shares).items()}


def _weight(column: str | None, value: Any) -> float:
    number = _sortable(value)
    if isinstance(number, str) or not isfinite(number) or number < 0:
        raise UserError(
            f"data.sample_by: {value!r:.40} in the column {column!r} is no number of at least 0; for a column of "
            f"classes, name their shares: {{{column}: {{...}}}}, or {{{column}: balanced}}"
        )
    return number


def _sortable(value: Any) -> float | str:
    """A number, also one that a text holds, as in CSV files; else the text."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if isfinite(number) else value
    return float(value)
