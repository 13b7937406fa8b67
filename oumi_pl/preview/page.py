"""Writes a preview as one self-contained HTML page, without scripts and requests."""

from pathlib import Path

from oumi_pl.errors import UserError
from oumi_pl.preview.pieces import visible
from oumi_pl.preview.shown import Preview, shortened, stretches
from oumi_pl.report.page import render
from oumi_pl.runs.folders import refuse_unwritable

TEMPLATE = Path(__file__).with_name("preview.html")
SIGN = '<meta name="generator" content="oumi_pl preview">'
"""Marks our pages, which may be overwritten; other files of users may not."""


def refuse_place(file: Path) -> None:
    """Checks, without writing anything, that a page can be written to `file`.

    Raises:
        UserError: the folder does not exist or is not writable, or `file` exists and is not a page of a preview.
    """
    if file.is_dir():
        raise UserError(f"--html: {file} is a folder; name a file")
    if not file.parent.is_dir():
        raise UserError(f"--html: there is no folder {file.parent}")
    if file.exists() and SIGN not in file.read_bytes()[:1000].decode(errors="replace"):
        raise UserError(f"--html: {file} exists and is not a page of a preview; name another file")
    refuse_unwritable(file.parent, "--html")


def write(preview: Preview, file: Path) -> None:
    """Writes a preview to a file.

    Raises:
        UserError: it can't be written.
    """
    try:
        file.write_text(page(preview), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: can't write to {file}: {error.strerror}") from error


def page(preview: Preview) -> str:
    """The HTML of the page."""
    shown = lambda text: visible([text])[0]  # noqa: E731
    tables = [
        ([*map(shown, t.columns)], [[*map(shown, row)] for row in t.rows], shown(t.title)) for t in preview.tables
    ]
    return render(
        TEMPLATE,
        {"visible": shown, "count": lambda number: f"{number:,}"},
        title=f"What the model will see: {shown(preview.title)}",
        preview=preview,
        tables=tables,
        has_text=any(example.sections for example in preview.examples),
        parts=lambda section: stretches(shortened(section).items),
        # all texts of a stretch at once: whether a space has to be made visible depends on its neighbours
        written=lambda pieces: zip(pieces, visible([piece.text for piece in pieces]), strict=True),
    )
