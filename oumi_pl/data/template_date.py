"""The date that chat templates write as today's: fixed, so that the same rows give the same tokens on another day."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from datetime import date as Date
from typing import Any

from oumi_pl.data.store import cache_key, cache_root
from oumi_pl.data.template import DATE, writes_date
from oumi_pl.errors import UserError
from oumi_pl.terminal.text import echo


def template_date(template: Any, variables: Mapping[str, Any], sources: Sequence[str]) -> Date | None:
    """The day that a template gets as today; None if it doesn't ask for it.

    Args:
        template: A template, or several by name.
        variables: `template_variables` of the recipe. `date` is the day, as a date or as `YYYY-MM-DD`.
        sources: Names of the sources. Without `date`, it is the day on which they were first prepared with this
            template, which is kept in the cache.

    Raises:
        UserError: `date` is not a date.
    """
    if not writes_date(template):
        return None
    if DATE in variables:
        try:
            return Date.fromisoformat(str(variables[DATE])[:10])
        except ValueError as error:
            raise UserError(
                f"template_variables.date is {variables[DATE]!r}, but has to be a date: YYYY-MM-DD"
            ) from error
    folder = cache_root() / "dates"
    folder.mkdir(exist_ok=True)
    file = folder / cache_key(str(template), list(sources))
    with contextlib.suppress(FileExistsError), file.open("x") as new:  # two processes may come at once
        new.write(Date.today().isoformat())
    try:
        return Date.fromisoformat(file.read_text() or Date.today().isoformat())
    except ValueError:  # damaged
        echo(f"{file} is damaged: it is no date; the date of today is taken", file=sys.stderr)
        file.write_text(Date.today().isoformat())
        return Date.today()
