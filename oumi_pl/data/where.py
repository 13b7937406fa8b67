"""Filters of rows: `where`, an expression over their columns or a function of a row.

An expression is a small part of Python: columns by name, numbers, texts, lists, `and or not`, comparisons, `in`, `is
None`, arithmetic, `meta['key']`, `len(text)`, and a few methods of text (`lower`, `upper`, `strip`, `startswith`,
`endswith`). Nothing else is evaluated, so that an expression can't run code. Cells of CSV files are text; compared with
numbers, they count as the numbers that they hold.
"""

import ast
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

from oumi_pl.data.code import code_of
from oumi_pl.data.formats import format_name, function_at, raised
from oumi_pl.errors import UserError, nearest
from oumi_pl.types import BadRow, Row

Filter = Callable[[Row], bool]
"""A function that says whether a row is used."""

WHERE = "where: "
"""Beginning of the reason for leaving out a row, as it is in reports."""
LOOKED_AT = 1000
"""Rows one of which has to have a column that an expression names."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|`([^`]+)`""")
_COMPARED: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_COMPUTED: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_METHODS = ("lower", "upper", "strip", "startswith", "endswith")
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0", "")


class Where:
    """A filter of rows.

    Args:
        where: An expression, the dotted path of a function `row -> bool`, or from Python the function itself.

    Raises:
        UserError: the expression holds something else than the module's docstring lists.
    """

    def __init__(self, where: str | Filter) -> None:
        self.text = where if isinstance(where, str) else format_name(where)  # type: ignore[arg-type]
        self.columns: set[str] = set()
        """The columns that the expression names; empty for a function."""
        self._where = where
        self._value: Callable[[Row], Any] | None = None
        if isinstance(where, str) and not _PATH.fullmatch(where.strip()):
            self._value = _Expression(where, self.columns).value

    @cached_property
    def _function(self) -> Filter:
        """The function, which is imported when rows are read: that runs code."""
        return function_at(self._where.strip(), "where") if isinstance(self._where, str) else self._where

    def key(self) -> list[str]:
        """Identifies the filter: its text, and the code of a function.

        Raises:
            UserError: there is no such function.
        """
        return [self.text, code_of(self._function)] if self._value is None else [self.text]

    def __call__(self, row: Row) -> bool:
        """Whether a row is used.

        Raises:
            UserError: a value can't be compared as the expression says, or the function fails.
        """
        if self._value is not None:
            return _is_true(self._value(row))
        function = self._function
        try:
            value: Any = function(row)
        except UserError:
            raise
        except Exception as error:
            raise UserError(raised(f"where: {self.text}", error)) from error
        if type(value).__name__ not in ("bool", "bool_"):  # also numpy's
            raise UserError(f"where: {self.text} returned {value!r} for this row; it returns True or False")
        return bool(value)

    def used(
        self, rows: Iterator[tuple[str, Row | BadRow]], title: str, counts: Counter[str], strict: bool
    ) -> Iterator[tuple[str, Row | BadRow]]:
        """Yields the rows that are used, and bad ones.

        Args:
            rows: Rows with their origins, from the start of the source.
            title: Name of the source, for messages.
            counts: `where` counts the rows that are left out; several passes are counted once.
            strict: Raise an error for a row that can't be compared, instead of yielding a `BadRow` in its place.

        Raises:
            NoColumnError: none of the first rows has a column that the expression names.
        """
        missing, known = set(self.columns), set[str]()
        looked_at = left_out = 0
        for origin, row in rows:
            if isinstance(row, BadRow):
                yield origin, row
                continue
            if missing:
                looked_at += 1
                known |= row.keys()
                missing -= row.keys()
                if missing and looked_at == LOOKED_AT:
                    raise _no_column(title, missing, known)
            try:
                if self(row):
                    yield origin, row
                    continue
            except UserError as error:
                if strict:
                    raise UserError(f"{origin}: {error}") from None
                yield origin, BadRow(str(error))
                continue
            left_out += 1
            counts["where"] = max(counts["where"], left_out)
        if missing and looked_at:
            raise _no_column(title, missing, known)


class NoColumnError(UserError):
    """An expression names a column that no row has."""


def _no_column(title: str, missing: set[str], known: set[str]) -> NoColumnError:
    name = min(missing)
    return NoColumnError(f"{title}: where: no row has a column {name!r}{nearest(name, known)}")


class _Expression:
    """An expression as a function of a row.

    Args:
        text: The expression. A column whose name is no name in Python is written in backticks.
        columns: Gets the columns that it names.
    """

    def __init__(self, text: str, columns: set[str]) -> None:
        self.text = text
        self._columns = columns
        self._names: dict[str, str] = {}  # stand-in for a column in backticks -> column
        try:
            tree = ast.parse(_QUOTED.sub(self._stand_in, text).strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else error
            raise UserError(
                f"where: {text!r} can't be read: {reason}; write for example \"lang == 'en' and quality >= 3\""
            ) from error
        self.value = self._compiled(tree.body)

    def _stand_in(self, match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        name = f"__column_{len(self._names)}"
        self._names[name] = match[1]
        return name

    def _compiled(self, node: ast.expr) -> Callable[[Row], Any]:
        """The function that evaluates a part of the expression.

        Raises:
            UserError: it is something that filters don't have.
        """
        value = self._part(node)
        if value is None:
            raise UserError(
                f"where: {self._source(node)!r} is not available in filters; they compare columns, numbers, texts and "
                "lists, as in \"lang in ['en', 'de'] and len(text) < 2000\"; for more, name a function of a row "
                "(package.module.function)"
            )
        return value

    def _source(self, node: ast.expr) -> str:
        text = ast.unparse(node)
        for name, column in self._names.items():
            text = text.replace(name, f"`{column}`")
        return text

    def _part(self, node: ast.expr) -> Callable[[Row], Any] | None:  # noqa: PLR0911
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return lambda row: value
            case ast.Name(id=name):
                column = self._names.get(name, name)
                self._columns.add(column)
                return lambda row: _plain(row.get(column))
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                items = [self._compiled(item) for item in parts]
                return lambda row: [item(row) for item in items]
            case ast.BoolOp(op=op, values=parts):
                operands, combine = [self._compiled(part) for part in parts], all if isinstance(op, ast.And) else any
                return lambda row: combine(_is_true(operand(row)) for operand in operands)
            case ast.UnaryOp():
                return self._unary(node)
            case ast.BinOp():
                return self._computed(node)
            case ast.Compare():
                return self._comparison(node)
            case ast.Subscript(slice=ast.Constant(value=int() | str() as key)):
                return self._item(self._compiled(node.value), key)
            case ast.Call(keywords=[]):
                return self._call(node)
        return None

    def _unary(self, node: ast.UnaryOp) -> Callable[[Row], Any] | None:
        part = self._compiled(node.operand)
        if isinstance(node.op, ast.Not):
            return lambda row: not _is_true(part(row))
        if not isinstance(node.op, ast.USub):
            return None
        return lambda row: None if (number := _number(part(row))) is None else -number

    def _computed(self, node: ast.BinOp) -> Callable[[Row], Any] | None:
        left, right, compute = self._compiled(node.left), self._compiled(node.right), _COMPUTED.get(type(node.op))
        if compute is None:
            return None

        def value(row: Row) -> Any:
            numbers = _number(left(row)), _number(right(row))
            if None in numbers:
                return None
            try:
                return compute(*numbers)
            except (ZeroDivisionError, OverflowError) as error:
                raise UserError(f"where: {self._source(node)}: {error}") from error

        return value

    def _comparison(self, node: ast.Compare) -> Callable[[Row], bool]:
        operands = [self._compiled(part) for part in (node.left, *node.comparators)]
        tests = [partial(self._compared, op, self._source(node)) for op in node.ops]
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.Is | ast.IsNot) and not (isinstance(right, ast.Constant) and right.value is None):
                raise UserError(f"where: {self._source(node)!r}: `is` compares with None only; use ==")

        def holds(row: Row) -> bool:
            values = [operand(row) for operand in operands]
            return all(test(*pair) for test, pair in zip(tests, itertools.pairwise(values), strict=True))

        return holds

    @staticmethod
    def _compared(op: ast.cmpop, text: str, left: Any, right: Any) -> bool:
        if isinstance(op, ast.Is | ast.IsNot):
            return (left is None) == isinstance(op, ast.Is)
        if isinstance(op, ast.Eq | ast.NotEq):
            return _equal(left, right) == isinstance(op, ast.Eq)
        try:
            if isinstance(op, ast.In | ast.NotIn):
                return _contains(right, left) == isinstance(op, ast.In)
            if isinstance(left, str) and isinstance(right, str):
                return _COMPARED[type(op)](left, right)
            numbers = _number(left), _number(right)
            return None not in numbers and _COMPARED[type(op)](*numbers)
        except UserError as error:
            raise UserError(f"{error} ({text})") from None

    @staticmethod
    def _item(holder: Callable[[Row], Any], key: str | int) -> Callable[[Row], Any]:
        def value(row: Row) -> Any:
            try:
                return _plain(holder(row)[key])
            except (KeyError, IndexError, TypeError):  # as a column that the row lacks
                return None

        return value

    def _call(self, node: ast.Call) -> Callable[[Row], Any] | None:
        arguments = [self._compiled(argument) for argument in node.args]
        if isinstance(node.func, ast.Name) and node.func.id == "len" and len(arguments) == 1:
            return lambda row: len(value) if isinstance(value := arguments[0](row), str | list | dict) else None
        if not (isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS):
            return None
        text, method = self._compiled(node.func.value), node.func.attr
        if len(arguments) != (1 if method.endswith("with") else 0):
            return None

        def value(row: Row) -> Any:
            own, others = text(row), [argument(row) for argument in arguments]
            if not all(isinstance(part, str) for part in (own, *others)):
                return None
            return getattr(own, method)(*others)

        return value


def _plain(value: Any) -> Any:
    """A value of a column: NaN, as tables have it in empty cells, is nothing."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_true(value: Any) -> bool:
    """Whether a value counts as true; cells of CSV files are text.

    Raises:
        UserError: it is neither.
    """
    if value is None or isinstance(value, bool | int | float):
        return bool(value)
    word = value.strip().lower() if isinstance(value, str) else None
    if word not in _TRUE and word not in _FALSE:
        raise UserError(f"where: {value!r} is neither true nor false; compare it with something")
    return word in _TRUE


def _number(value: Any) -> float | int | None:
    """A value as a number, also a text that holds one; None for nothing and empty text.

    Raises:
        UserError: it is no number.
    """
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            return float(value)
        except ValueError:
            pass
    raise UserError(f"where: {value!r} is no number")


def _equal(left: Any, right: Any) -> bool:
    """Whether two values are equal; a text equals the number, or the truth value, that it holds."""
    if isinstance(left, str) == isinstance(right, str):
        return bool(left == right)
    text, other = (left, right) if isinstance(left, str) else (right, left)
    if isinstance(other, bool):
        return str(text).strip().lower() == str(other).lower()
    if not isinstance(other, int | float):
        return False
    try:
        return float(text) == other
    except ValueError:
        return False


def _contains(holder: Any, value: Any) -> bool:
    if isinstance(holder, str) and isinstance(value, str):
        return value in holder
    if holder is None or isinstance(holder, str):
        return False
    if not isinstance(holder, list | dict):
        raise UserError(f"where: {holder!r} is neither a list nor a text to look in")
    return any(_equal(item, value) for item in holder)
