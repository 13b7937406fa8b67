"""Reads prompts for online training: token ids, and the rows that reward functions get."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from oumi_pl.data.duplicates import Keyed, Repeats, RowKeys
from oumi_pl.data.formats import (
    AROUND,
    FORMATS,
    Format,
    Formats,
    alpaca_question,
    conversation,
    history_column,
    reads,
)
from oumi_pl.data.preferences import PREFERENCE_FORMATS
from oumi_pl.data.records import BadRows, OnBadRows, RecordReader
from oumi_pl.data.sources import Source
from oumi_pl.data.splitting import Side
from oumi_pl.data.tokenize import Dropped
from oumi_pl.data.turns import MEDIA, column, text_column, turns_column, turns_of_text
from oumi_pl.errors import UserError
from oumi_pl.types import BadRow, Record, Row


class Prompt(NamedTuple):
    """The token ids of a prompt, and the row that it came from."""

    ids: list[int]
    row: Row
    origin: str
    """File and line."""
    record: Record | None = None
    """What the ids were rendered from, for rewards that render it otherwise."""


@reads("prompt", *AROUND)
def prompt_only(row: Row) -> Record:
    """Reads the column `prompt`: text, which becomes the user's turn, or turns."""
    prompt = column(row, "prompt", (str, list), "text or turns")
    if isinstance(prompt, str) and not turns_of_text(prompt):
        return conversation(row, ({"role": "user", "content": prompt},))
    return conversation(row, turns_column(row, "prompt"))


@reads("question", *AROUND)
def question_only(row: Row) -> Record:
    """Reads `question`, the text of a user."""
    return conversation(row, ({"role": "user", "content": text_column(row, "question")},))


@reads("instruction", "input", "history", *AROUND)
def instruction_only(row: Row) -> Record:
    """Reads `instruction`, and optionally `input` and `history`, as `alpaca` does."""
    return conversation(row, (*history_column(row), alpaca_question(row)))


PROMPT_ONLY: Formats = (
    (prompt_only, ("prompt",)),
    (question_only, ("question",)),
    (instruction_only, ("instruction",)),
)
"""Formats of rows that have no answer."""
PROMPT_FORMATS: Formats = (*PREFERENCE_FORMATS, *FORMATS[:-1], *PROMPT_ONLY, FORMATS[-1])
"""Formats of rows whose prompts are completed, with an answer or without one; `text` is the last."""

OF_ANSWERS = frozenset(
    ("label", "kto_tag", "weight", "loss", "train", "masked", "margin", "reasoning_content", "reasoning", "thinking")
)
"""Columns that say something of a row's answer and nothing of its prompt."""


@dataclass(frozen=True)
class RecordWithRow(Record):
    """A record, together with the row it was read from."""

    record: Record
    row: Row

    def split_key(self) -> str:
        """The split key of the record."""
        return self.record.split_key()

    def content_key(self) -> str:
        """That of the record: the row may have an id of its own."""
        return self.record.content_key()


class RecordsWithRows(RecordReader):
    """Reads records with their rows."""

    def read(self, row: Row) -> Sequence[Record | Dropped]:
        """Returns the records of a row, each together with the row.

        Raises:
            UserError: the row can't be read; see `RecordReader`.
        """
        return [RecordWithRow(one, row) if isinstance(one, Record) else one for one in super().read(row)]


class PromptReader(RecordsWithRows):
    """As `RecordsWithRows`. Columns that the format doesn't read are for the rewards."""

    def _look_at_columns(self, row: Row, convert: Format) -> None:
        super()._look_at_columns({name: value for name, value in row.items() if name in MEDIA}, convert)


class PromptsWithRows(RecordsWithRows):
    """As `RecordsWithRows`. Columns about a row's own answer may be unread, since only its prompt is used."""

    def _look_at_columns(self, row: Row, convert: Format) -> None:
        super()._look_at_columns({name: value for name, value in row.items() if name not in OF_ANSWERS}, convert)


def read_prompts(
    source: Source,
    formats: Formats,
    encode: Callable[[Record], list[int]],
    most: int,
    *,
    keep: Side | None = None,
    bad_rows: OnBadRows = "error",
    before: Sequence[Keyed] | None = None,
) -> tuple[list[Prompt], dict[str, Any], RowKeys]:
    """Reads the prompts of a source with their keys, and counts rows for the data report.

    Args:
        source: The source.
        formats: The formats that its rows may have.
        encode: Turns a record into the token ids of its prompt.
        most: Maximal number of tokens of a prompt; longer prompts are dropped.
        keep: Which rows to use; all when left out.
        bad_rows: `error` stops the run after all rows were read, `drop` leaves unusable rows out.
        before: Prompts that are left out here, and so are those that repeat another one of the source; None: all are
            used.

    Raises:
        UserError: some rows can't be used; lists the reasons, each with file and line of its first rows.
    """
    prompts: list[Prompt] = []
    dropped: Counter[str] = Counter()
    bad, rows, keys = BadRows(), 0, RowKeys()
    reader, repeats = PromptReader(source, formats), Repeats(before)
    for origin, record in repeats.leave_out(reader.records(keep, strict=False)):
        rows += 1
        if isinstance(record, BadRow):
            bad.add(origin, record.reason)
            continue
        if isinstance(record, Dropped):
            dropped[record.reason] += 1
            continue
        assert isinstance(record, RecordWithRow)
        try:
            ids = encode(record.record)
        except UserError as error:
            bad.add(origin, str(error))
            continue
        if not ids:
            bad.add(origin, "the prompt is empty, and the model needs a token to begin with")
        elif len(ids) > most:
            dropped["prompt leaves no room for a completion"] += 1
        else:
            prompts.append(Prompt(ids, record.row, origin, record.record))
            keys.add(origin, record)
    if bad.count and bad_rows == "error":
        raise bad.error(source.title, rows)
    report: dict[str, Any] = {"source": source.title, "rows": rows, "kept": len(prompts), "dropped": dict(dropped)}
    report |= {"cut": 0, "straddled": 0, "empty_answers": 0}
    reader.add_left_out(report, keep)
    bad.add_to(report)
    repeats.add_to(report)
    return prompts, report, keys
