"""Prints a preview as text: in colour on terminals, with brackets only in pipes."""

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Literal

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from oumi_pl.preview.pieces import CLOSE, OPEN, Piece, visible
from oumi_pl.preview.shown import Histogram, Mark, Packs, Preview, Section, Table, shortened, stretches

# Okabe and Ito's colours, distinct with any colour vision; each on a background of its own
LOSS = ("#000000 on #E69F00", "#000000 on #F0B840")
SPECIAL = "#000000 on #56B4E9"
SPECIAL_LOSS = "bold italic #000000 on #E69F00"
CUT = "bold #000000 on #CC79A7"
FAINT = "dim"
LABEL_ONLY = "→"
BLOCKS = " ▁▂▃▄▅▆▇█"
BAR = 40
"""Characters of the bar of a pack."""
LISTED, LISTED_PACKS = 5, 16
"""Most examples listed per pack, and most packs."""


def show(preview: Preview, *, plain: bool, tokens: bool = False, full: bool = False) -> None:
    """Prints a preview on standard output.

    Args:
        preview: What to show.
        plain: Print without escape codes and wrapping.
        tokens: Show each token in a cell of its own, with position and id.
        full: Show long rows in full.
    """
    try:
        _print(preview, plain, tokens, full)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed the pipe; without this, the interpreter's flush at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(preview: Preview, plain: bool, tokens: bool, full: bool) -> None:
    console = _console(plain)
    for renderable in _all(preview, plain, tokens, full):
        if plain:  # a file has no right edge: lines are neither wrapped nor padded with spaces
            with console.capture() as printed:
                console.print(renderable, soft_wrap=isinstance(renderable, Text))
            lines = printed.get().removesuffix("\n").split("\n")
            sys.stdout.writelines(f"{line.rstrip(' ')}\n" for line in lines)
        else:  # rich copies a text to print it, and the copy loses `no_wrap`
            no_wrap = getattr(renderable, "no_wrap", None)
            console.print(renderable, no_wrap=no_wrap, overflow="ellipsis" if no_wrap else None)


def _console(plain: bool) -> Console:
    width = max(120, shutil.get_terminal_size((120, 40)).columns) if plain else None
    colors: Literal["auto"] | None = None if plain else "auto"
    return Console(
        highlight=False, markup=False, emoji=False, color_system=colors, force_terminal=not plain, width=width
    )


def _all(preview: Preview, plain: bool, tokens: bool, full: bool) -> Iterator[RenderableType]:
    if any(example.sections for example in preview.examples):
        yield legend(preview, plain)
    for example in preview.examples:
        yield Text("")
        yield _heading(example.title, plain)
        yield Text(" · ".join(visible([fact])[0] for fact in example.facts))
        for section in example.sections:
            if section.title:
                yield Text(f"── {section.title}", style=FAINT)
            part = section if full else shortened(section)
            yield _cells(part, plain) if tokens else section_text(part, plain)
    if preview.packs is not None:
        yield Text("")
        yield from _packs(preview.packs, plain)
    for table in preview.tables:
        yield Text("")
        yield _table(table)
    for histogram in preview.histograms:
        yield _histogram(histogram)
    if preview.histograms:
        yield Text("")
    for note in preview.notes:
        yield Text(visible([note])[0])


def _heading(title: str, plain: bool) -> RenderableType:
    return (
        Text(f"━━ {title} " + "━" * max(4, 60 - len(title)))
        if plain
        else Rule(Text(title, style="bold"), align="left", style=FAINT)
    )


def legend(preview: Preview, plain: bool) -> Text:
    """The line that explains the marks of a preview."""
    pieces = [piece for example in preview.examples for section in example.sections for piece in section.pieces]
    marks = {item.kind for e in preview.examples for s in e.sections for item in s.items if isinstance(item, Mark)}
    text = Text()
    text.append(f"{OPEN}carries loss{CLOSE}", style="" if plain else LOSS[0])
    text.append("  read only")
    if any(piece.special for piece in pieces) and not plain:
        text.append("  ").append("special token", style=SPECIAL)
    if any(piece.label_only for piece in pieces):
        text.append(f"  {LABEL_ONLY} predicted, but not an input of this row")
    if "cut" in marks:
        text.append("  ").append("✂ cut off", style="" if plain else CUT)
    text.append("  ⏎ line end  · space" + ("" if plain else "  (shades alternate by token)"))
    return text


# ---- tokens


def section_text(section: Section, plain: bool) -> Text:
    """The text of a section: targets in brackets, and on terminals in colour; shades alternate from token to token."""
    text = Text()
    for stretch in stretches(section.items):
        if isinstance(stretch, Mark):
            if text.plain and not text.plain.endswith("\n"):
                text.append("\n")
            how = " (--full shows them)" if stretch.kind == "hidden" else ""
            style = "" if plain else CUT if stretch.kind == "cut" else FAINT
            text.append(stretch.text + how, style=style).append("\n")
        else:
            _add_pieces(text, stretch, plain)
    text.rstrip()
    return text


def _add_pieces(text: Text, pieces: list[Piece], plain: bool) -> None:
    inside = False
    written = visible([piece.text for piece in pieces])
    for number, (piece, shown) in enumerate(zip(pieces, written, strict=True)):
        if inside != piece.target:
            _bracket(text, OPEN if piece.target else CLOSE, plain)
            inside = piece.target
        arrow = LABEL_ONLY if piece.label_only else ""
        text.append(arrow + shown, style="" if plain else _style(piece, number))
    if inside:
        _bracket(text, CLOSE, plain)


def _bracket(text: Text, bracket: str, plain: bool) -> None:
    style = "" if plain else "bold"
    if bracket == CLOSE and text.plain.endswith("\n"):  # the bracket is easier to see before it
        text.right_crop(1)
        text.append(CLOSE, style=style).append("\n")
    else:
        text.append(bracket, style=style)


def _style(piece: Piece, number: int) -> str:
    if piece.special:
        return SPECIAL_LOSS if piece.target else SPECIAL
    return LOSS[number % 2] if piece.target else ("", FAINT)[number % 2]


def _cells(section: Section, plain: bool) -> RenderableType:
    """A cell per token: position, id and text."""
    parts: list[RenderableType] = []
    for stretch in stretches(section.items):
        if isinstance(stretch, Mark):
            parts.append(Text(stretch.text, style="" if plain else CUT if stretch.kind == "cut" else FAINT))
            continue
        cells = [_cell(piece, plain) for piece in stretch]
        parts.append(Columns(cells, padding=(0, 2), column_first=True, equal=True))
    return Group(*parts)


def _cell(piece: Piece, plain: bool) -> Text:
    (written,) = visible([piece.text])
    written = written.replace("\n", "")  # the symbol ⏎ stays
    cell = Text(f"{piece.start:>5} {'+'.join(map(str, piece.ids)):>6} ", style=FAINT)
    shown = Text(f"{OPEN}{written}{CLOSE}" if piece.target else f" {written} ", style="" if plain else _style(piece, 0))
    return cell.append_text(shown)


# ---- packs and report


def _packs(packs: Packs, plain: bool) -> Iterator[RenderableType]:
    yield Text(packs.title, style="" if plain else "bold")
    for number, pack in enumerate(packs.packs[:LISTED_PACKS], 1):
        text, drawn, end = Text(f"{number:>4} ", no_wrap=not plain), 0, 0
        for i, length in enumerate(pack.lengths):
            end += length
            width = round(end / packs.capacity * BAR) - drawn
            text.append("█▒"[i % 2] * width, style="" if plain else ("#0072B2", "#56B4E9")[i % 2])
            drawn += width
        text.append("·" * (BAR - drawn), style=FAINT)
        text.append(f" {end:,}: ")
        names = zip(pack.rows[:LISTED], pack.lengths[:LISTED], strict=True)
        text.append(", ".join(f"{length:,} (row {row:,})" if row else f"{length:,}" for row, length in names))
        if (more := len(pack.lengths) - LISTED) > 0:
            text.append(f", and {more:,} more")
        yield text
    if (more := len(packs.packs) - LISTED_PACKS) > 0:
        yield Text(f"     and {more:,} more packs")


def _table(table: Table) -> RenderableType:
    drawn = RichTable(box=box.SIMPLE_HEAD, title=table.title, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, visible(row)))
    return drawn


def _histogram(histogram: Histogram) -> Text:
    most = max(histogram.counts)
    bars = "".join(BLOCKS[-(-count * (len(BLOCKS) - 1) // most)] for count in histogram.counts)
    return Text(f"lengths of {histogram.title}: {histogram.low:,} ▏{bars}▕ {histogram.high:,} tokens")
