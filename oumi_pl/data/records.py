"""From the rows of a source to records: which format reads them, which columns it leaves out, which rows are bad."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from oumi_pl.data.duplicates import KeyFiles
from oumi_pl.data.formats import (
    FORMATS,
    Format,
    Formats,
    columns_read,
    find_format,
    format_name,
    raised,
    rename_columns,
    resolve_format,
)
from oumi_pl.data.sources import Source, left_out, rows
from oumi_pl.data.splitting import Side
from oumi_pl.data.tokenize import Dropped
from oumi_pl.data.turns import MEDIA, PLACEHOLDERS, is_empty, is_finite, is_missing, optional_json, plain
from oumi_pl.errors import UserError, nearest
from oumi_pl.types import BadRow, Conversation, Feedback, Preference, Record, Row

OnBadRows = Literal["error", "drop"]

VARIABLES = "chat_template_kwargs"
"""The column with variables of the chat template."""
MEANINGFUL = frozenset(
    (
        *("system", "system_prompt", "system_message", "system_instruction", "systemInstruction"),
        *("tools", "functions", "history", "input", "context", "documents", "chat_template_kwargs"),
        *("reasoning_content", "reasoning", "thinking", *MEDIA),
        *("label", "kto_tag", "weight", "loss", "train", "masked", "margin"),
    )
)
"""Columns that change what a row means. If the format doesn't read one, the run stops, unless the row's is empty."""

LABELS = ("label", "kto_tag")
"""Columns that say of unpaired answers whether they are good."""
GOOD = frozenset((True, "true", "1", "good", "yes", "desirable"))
BAD = frozenset((False, "false", "0", "-1", -1, "bad", "no", "undesirable"))
"""Values of a label for good and for bad answers; texts in lower case."""

LISTED = 5
"""Most rows that are named for a reason."""
KINDS_LISTED = 20
"""Most reasons that a message lists."""


class RecordReader:
    """Reads the records of a source.

    Args:
        source: The source.
        formats: The formats that its rows may have.
        mixed: Whether its rows may have several of them; else all have that of the first.
    """

    def __init__(self, source: Source, formats: Formats = FORMATS, *, mixed: bool = False) -> None:
        self.source = source
        self.formats = formats
        self.mixed = mixed
        self.unread: set[str] = set()
        """Columns of the rows so far that their format doesn't read."""
        self.counts: Counter[str] = Counter()
        """`replaced`: characters that `errors: replace` has put into the rows so far."""
        self._convert = resolve_format(source.format, formats) if source.format else None
        self._ignored = frozenset(source.ignore or ())
        self._filtered = frozenset() if (condition := source.condition) is None else frozenset(condition.columns)
        self._found: dict[frozenset[str], Format | UserError] = {}

    def records(
        self, keep: Side | None = None, *, strict: bool = True, streaming: bool = False
    ) -> Iterator[tuple[str, Record | Dropped | BadRow]]:
        """Yields the records of each row with its origin (file and line), or the reason why it has none.

        A row with several records, such as a pair that gives two responses, counts as several rows.

        Args:
            keep: Which rows to use; all when left out.
            strict: Raise an error at the first bad row instead of yielding a `BadRow`.
            streaming: Read data from the hub without downloading them first.

        Raises:
            UserError: a row does not have the format, if `strict`.
        """
        for origin, row in rows(self.source, streaming=streaming, strict=strict, counts=self.counts):
            if isinstance(row, BadRow):
                yield origin, row
                continue
            try:
                records = self.read(row)
                first = records[0] if isinstance(records[0], Record) else None
                if keep is not None and not keep(row, first):
                    continue
            except UserError as error:
                if strict:
                    raise UserError(f"{origin}: {error}") from None
                if keep is None or keep.counts_bad(row):
                    yield origin, BadRow(str(error))
                continue
            for record in records:
                yield origin, record

    def add_left_out(self, report: dict[str, Any], keep: Side | None) -> None:
        """Adds the rows so far that `where` left out to a report."""
        for reason, number in left_out(self.source, self.counts, keep).items():
            report["rows"] += number
            report["dropped"][reason] = number

    def record(self, row: Row) -> Record | Dropped:
        """The first record that `read` returns for a row."""
        return self.read(row)[0]

    def read(self, row: Row) -> Sequence[Record | Dropped]:
        """The records of a row; `Dropped` if its format returned None, or its label says that it isn't good.

        Raises:
            UserError: it does not have the format, or has a column that carries meaning and isn't read.
        """
        source = self.source
        if source.columns:
            row = rename_columns(row, source.columns)
        if source.template_variables:
            own = optional_json(row, VARIABLES) or {}
            if isinstance(own, dict):  # else the format says what is wrong
                row = row | {VARIABLES: source.template_variables | own}
        if source.label is not None and not _is_good(row):
            return [Dropped("label: not good")]
        used = {name: value for name, value in row.items() if name not in self._ignored} if self._ignored else row
        before = self._convert
        convert = before or self._format_of(used)
        if not self.mixed:
            self._convert = convert
        try:
            self._look_at_columns(row, convert)
            record = self._converted(used, convert)
        except UserError as error:
            other = source.format is None and before is not None and self._other_format(used, convert)
            raise UserError(other or str(error)) from None
        records = record if isinstance(record, list) else [] if record is None else [record]
        if not records:
            return [Dropped(f"the format {format_name(source.format or convert)} returned None")]
        for one in records:
            if not isinstance(one, Record):
                raise UserError(
                    f"{format_name(source.format or convert)} returned a {type(one).__name__} for this row; a format "
                    "returns a Conversation, a Text or a Preference"
                )
        if self._ignored and any(not is_empty(row.get(name)) for name in self._ignored.intersection(MEDIA)):
            for one in records:
                _refuse_placeholders(one)
        return records

    def _converted(self, row: Row, convert: Format) -> Record | list[Record] | None:
        """What the format returns for a row.

        Raises:
            UserError: the row is invalid, or a format of the user failed.
        """
        try:
            return convert(row)
        except Exception as error:
            if isinstance(error, UserError) or self.source.format is None:
                raise
            raise UserError(raised(format_name(self.source.format), error)) from error

    def _format_of(self, row: Row) -> Format:
        """The format that fits a row's columns; looked for once, since finding the nearest names takes a while."""
        columns = frozenset(row)
        if columns not in self._found:
            try:
                self._found[columns] = find_format(columns, self.formats)
            except UserError as error:
                self._found[columns] = error
        if isinstance(found := self._found[columns], UserError):
            raise found
        return found

    def _look_at_columns(self, row: Row, convert: Format) -> None:
        """Notes the columns that the format doesn't read, and refuses those that carry meaning."""
        read = columns_read(convert)
        if read is None or row.keys() <= read:
            return
        unread = row.keys() - read - self._filtered - set(LABELS if self.source.label else ())
        self.unread |= unread
        for name in sorted((unread & MEANINGFUL) - self._ignored):
            if not is_empty(plain(row[name])):
                raise UserError(_refusal(name, convert))

    def _other_format(self, row: Row, before: Format) -> str | None:
        """The message for a row of another format than those before it; None if it has no known format."""
        try:
            own = find_format(row.keys(), self.formats)
        except UserError:
            return None
        if own is before:
            return None
        return (
            f"a row of the format {own.__name__}, and those before it are {before.__name__}; put the rows of each "
            "format in a separate file, and name both as sources"
        )


@dataclass(frozen=True)
class RecordWithFields(Record):
    """A record, and numbers of its row by column."""

    record: Record
    fields: dict[str, float]
    columns: dict[str, Any] = field(default_factory=dict, repr=False)
    """Columns that rows are drawn or ordered by; no part of what is trained."""

    def split_key(self) -> str:
        """That of the record."""
        return self.record.split_key()

    def content_key(self) -> str:
        """That of the record, with its fields."""
        return super().content_key() if self.fields else self.record.content_key()


class FieldReader(RecordReader):
    """Reads records with some columns of their rows beside them.

    Args:
        source: See `RecordReader`.
        formats: See `RecordReader`.
        columns: Columns with numbers; they need not be read by the format.
        kept: Columns with numbers or texts that rows are drawn or ordered by.
    """

    def __init__(self, source: Source, formats: Formats, columns: Sequence[str], kept: Sequence[str] = ()) -> None:
        super().__init__(source, formats)
        self.columns = columns
        self.kept = kept

    def read(self, row: Row) -> Sequence[Record | Dropped]:
        """The records of a row, each with the row's numbers.

        Raises:
            UserError: a row can't be read (see `RecordReader`), or a column has no number.
        """
        records = super().read(row)
        if not any(isinstance(record, Record) for record in records):
            return records
        values = {column: _number(row, column) for column in self.columns}
        kept = {column: value_in(row, column) for column in self.kept}
        return [RecordWithFields(one, values, kept) if isinstance(one, Record) else one for one in records]

    def _look_at_columns(self, row: Row, convert: Format) -> None:
        others = {name: value for name, value in row.items() if name not in self.columns and name not in self.kept}
        super()._look_at_columns(others, convert)


def record_reader(
    source: Source, formats: Formats, columns: Sequence[str] = (), kept: Sequence[str] = ()
) -> RecordReader:
    """The reader of a source: a `FieldReader` if some columns are read beside the records."""
    return FieldReader(source, formats, columns, kept) if columns or kept else RecordReader(source, formats)


def value_in(row: Row, column: str) -> Any:
    """The number or text in a column that rows are drawn or ordered by.

    Raises:
        UserError: the row has none.
    """
    if column not in row:
        raise UserError(f"data.sample_by or data.order_by: a row has no column {column!r}{nearest(column, row)}")
    value = plain(row[column])
    if (isinstance(value, str) and value) or is_finite(value):
        return value
    raise UserError(
        f"data.sample_by or data.order_by: {column!r} is {value!r:.40} in a row, and has to be a number or a text; "
        "`where` leaves such rows out"
    )


def _number(row: Row, column: str) -> float:
    """The number in a column; NaN if it is null.

    Raises:
        UserError: the row has no such column, or something else in it.
    """
    if column not in row:
        raise UserError(f"data.fields: a row has no column {column!r}{nearest(column, row)}")
    value = row[column]
    if value is not None and not isinstance(value, bool | int | float):
        raise UserError(f"data.fields: {column!r} is {type(value).__name__} in a row, and a field is a number")
    if is_missing(value):
        return float("nan")
    if not is_finite(value):
        raise UserError(f"data.fields: {column!r} is {str(value)[:40]} in a row, which is no finite number")
    return float(value)


def _refusal(name: str, convert: Format) -> str:
    unread = f"column {name!r} isn't read by the format {convert.__name__}, and usually carries meaning"
    leave_out = f"leave it out with `ignore: [{name}]`"
    if name in MEDIA:
        return f"column {name!r}: images, audio and video can't be trained on yet; {leave_out} to train on text alone"
    if name in LABELS:
        return f"{unread}; `label: keep_good` uses only the rows that it calls good, or {leave_out}"
    return f"{unread}; {leave_out}, or rename it with `columns`"


def _is_good(row: Row) -> bool:
    """Whether a row's label calls its answer good.

    Raises:
        UserError: the row has no label, or none that is true or false.
    """
    name = next((name for name in LABELS if not is_missing(row.get(name))), None)
    if name is None:
        raise UserError("label: keep_good needs a column 'label', and this row has none")
    label = plain(row[name])
    value = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(value, str | int | float) or (value not in GOOD and value not in BAD):
        raise UserError(f"column {name!r} holds {label!r}; label: keep_good reads true and false, 1 and 0")
    return value in GOOD


def _refuse_placeholders(record: Record) -> None:
    """Refuses texts that refer to a medium of a column that is left out."""
    sides: tuple[Record, ...] = (record,)
    if isinstance(record, Preference):
        sides = record.chosen, record.rejected
    elif isinstance(record, Feedback):
        sides = (record.response,)
    for side in sides:
        for i, turn in enumerate(side.messages if isinstance(side, Conversation) else ()):
            for mark in PLACEHOLDERS:
                if mark in (turn["content"] or ""):
                    raise UserError(f"turn {i + 1} refers to what is left out: its text holds {mark}")


# --- bad rows ---------------------------------------------------------------------------------------------------------


class BadRows:
    """Bad rows by the kind of their reason: reasons that differ only in numbers are of one kind."""

    def __init__(self) -> None:
        self.count = 0
        self._kinds: dict[str, tuple[str, list[str], int]] = {}  # the first reason, the first origins, the number

    def add(self, origin: str, reason: str) -> None:
        """Counts a row."""
        kind = re.sub(r"-?\d+(\.\d+)?", "#", reason)
        first, origins, rows = self._kinds.get(kind, (reason, [], 0))
        self._kinds[kind] = first, [*origins, origin][:LISTED], rows + 1
        self.count += 1

    def report(self) -> dict[str, dict[str, Any]]:
        """The number of rows and the first of them, by reason."""
        return {reason: {"rows": rows, "first": origins} for reason, origins, rows in self._kinds.values()}

    def add_to(self, report: dict[str, Any]) -> None:
        """Adds the bad rows to a report, by reason."""
        if self.count:
            report["bad_rows"] = self.report()
            report["dropped"] |= {reason: kind["rows"] for reason, kind in report["bad_rows"].items()}

    def error(self, name: str, rows: int) -> UserError:
        """The message that lists all kinds; for a single row, its reason.

        Args:
            name: The source.
            rows: Number of rows that were read.
        """
        kinds = sorted(self._kinds.values(), key=lambda kind: -kind[2])
        if self.count == 1:
            ((reason, (origin,), _),) = kinds
            return UserError(f"{origin}: {reason}")
        remedy = "`data.bad_rows: drop` leaves such rows out and counts them"
        if len(kinds) == 1:
            ((reason, origins, count),) = kinds
            others = f"all {rows:,}" if count == rows else f"{count:,} of {rows:,}"
            return UserError(f"{origins[0]}: {reason} ({others} rows: {_named(origins, count)}; {remedy})")
        lines = [f"  {count:,}: {reason} ({_named(origins, count)})" for reason, origins, count in kinds[:KINDS_LISTED]]
        if len(kinds) > KINDS_LISTED:
            lines.append(f"  and {len(kinds) - KINDS_LISTED:,} more reasons")
        return UserError("\n".join([f"{name}: {self.count:,} of {rows:,} rows can't be used; {remedy}", *lines]))


class RowCounts(Counter[str]):
    """Counts of rows by what became of them, and the bad ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.bad = BadRows()
        self.dropped: Counter[str] = Counter()
        """Rows that a format or `where` left out, by reason."""
        self.held_out: list[str] = []
        """File and line of each row that is used, if these are held-out rows of a source."""
        self.row_keys: KeyFiles | None = None
        """Gets the keys of the rows that are used."""
        self.duplicates: dict[str, Any] = {}
        """As `Repeats.add_to` adds it to a report."""

    def add_bad(self, origin: str, reason: str) -> None:
        """Adds a row that can't be used."""
        self["rows"] += 1
        self.bad.add(origin, reason)

    def add_dropped(self, reasons: Mapping[str, int]) -> int:
        """Adds rows that a format or `where` left out, by reason; returns how many."""
        self.dropped.update(reasons)
        return sum(reasons.values())


def _named(origins: list[str], count: int) -> str:
    return ", ".join(origins) + (", ..." if count > len(origins) else "")
