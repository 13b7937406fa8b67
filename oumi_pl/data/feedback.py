"""Formats of feedback on single responses: a prompt, a response, and whether it is desirable.

Pure functions as in `formats.py`. The response is in any format of fine-tuning data that has a prompt, the label in a
column beside it. A pair of responses is a source as well: it gives one desirable and one undesirable response.
"""

import contextlib
from dataclasses import replace
from typing import Any

from oumi_pl.data.formats import FORMATS, Formats, columns_read, find_format, kind_name, reads, text
from oumi_pl.data.preferences import PREFERENCE_FORMATS
from oumi_pl.data.turns import is_finite, is_missing
from oumi_pl.errors import UserError
from oumi_pl.types import Conversation, Feedback, Preference, Record, Row, Text

LABELS = ("label", "kto_tag", "desirable", "thumbs", "feedback", "score", "rating")
"""Columns that may hold the label; the first that a row has is read."""
_WORDS = {
    **dict.fromkeys(("true", "yes", "up", "thumbs up", "good", "desirable", "positive", "like", "chosen", "👍"), True),
    **dict.fromkeys(("false", "no", "down", "thumbs down", "bad", "undesirable", "negative", "dislike"), False),
    **dict.fromkeys(("rejected", "👎"), False),
}
_RESPONSE_FORMATS: Formats = tuple((function, columns) for function, columns in FORMATS if function is not text)


def _read_by(formats: Formats) -> set[str]:
    """The columns that any of these formats reads."""
    return {column for function, _ in formats for column in columns_read(function) or ()}


@reads(*_read_by(PREFERENCE_FORMATS))
def pair_feedback(row: Row) -> list[Record]:
    """Reads a pair in any format of preference data: the chosen response is desirable, the rejected one is not.

    Raises:
        UserError: the row is no pair.
    """
    pair = find_format(row.keys(), PREFERENCE_FORMATS)(row)
    assert isinstance(pair, Preference)
    return [Feedback(pair.chosen, True), Feedback(pair.rejected, False)]


@reads(*LABELS, *_read_by(_RESPONSE_FORMATS))
def feedback(row: Row) -> Feedback:
    """Reads a prompt and a response as fine-tuning data has them, and a column with the label.

    The label is true or false, a word (up, down, good, bad, yes, no, ...) or a number. In a conversation without a
    separate prompt, the response is the last turn.

    Raises:
        UserError: the row has no label, no response, or neither can be read.
    """
    label = _label(row)
    response = find_format(row.keys(), _RESPONSE_FORMATS)(row)
    assert isinstance(response, Conversation | Text)
    return Feedback(_with_prompt(response), label)


FEEDBACK_FORMATS: Formats = (
    *((pair_feedback, columns) for _, columns in PREFERENCE_FORMATS),
    *((feedback, columns) for _, columns in _RESPONSE_FORMATS),
)


def _with_prompt(response: Conversation | Text) -> Conversation | Text:
    if isinstance(response, Text) or response.prompt_messages is not None:
        return response
    last = len(response.messages) - 1
    if not last or response.messages[last]["role"] != "assistant":
        raise UserError("the conversation has to end with a turn of 'assistant' after a prompt: that is what is judged")
    return replace(response, prompt_messages=last)


def _label(row: Row) -> bool | float | None:
    name = next((name for name in LABELS if name in row), None)
    if name is None:
        raise UserError(
            f"no column says whether the response is good; known: {', '.join(LABELS)}; say which of your columns it is "
            "with `columns`, e.g. {label: my_column}"
        )
    return _read(name, row[name])


def _read(name: str, value: Any) -> bool | float | None:
    if is_missing(value):  # an empty cell of a table
        return None
    if is_finite(value):
        return value
    if isinstance(value, str):
        words = value.strip().lower().replace("_", " ").replace("-", " ")
        if words in _WORDS:
            return _WORDS[words]
        with contextlib.suppress(ValueError):
            if is_finite(score := float(words)):
                return score
        raise UserError(
            f"column {name!r} holds {value[:40]!r} instead of a label: true or false, a number, or up and down, "
            "good and bad, yes and no"
        )
    raise UserError(f"column {name!r} holds {kind_name(value)} instead of a label: true or false, a word or a number")
