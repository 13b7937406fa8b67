"""A preview as one HTML page that needs nothing else: no request, no script, dark and light, any width."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from oumi_pl.errors import UserError
from oumi_pl.preview.pieces import Piece, visible
from oumi_pl.preview.shown import Histogram, Mark, Packs, Preview, Shown, Table, shortened, stretches
from oumi_pl.runs.folders import refuse_unwritable

SIGN = '<meta name="generator" content="oumi_pl preview">'
"""What tells a page of ours, which may be written over, from a file of the user's."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1b1b;--faint:#5f6368;--line:#d8d8d8;--even:#fff;--odd:#eeeeee;
--loss:#fbd58c;--loss2:#f6bd52;--special:#a9d6f5;--cut:#8f3f6f;--rule:#a35c00;--bar:#0072b2;--bar2:#56b4e9}
@media(prefers-color-scheme:dark){:root{--bg:#16181c;--fg:#e6e6e6;--faint:#a0a5ab;--line:#3a3d42;--even:#16181c;
--odd:#24272c;--loss:#6b4600;--loss2:#855900;--special:#0a4a75;--cut:#e39ac4;--rule:#ffb939}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.3rem;margin:.2rem 0}h2{font-size:1.05rem;margin:1.8rem 0 .2rem}h3{font-size:.9rem;margin:.7rem 0 .2rem;
color:var(--faint);font-weight:600}
p{margin:.2rem 0}.facts,.legend,footer,figcaption,caption{color:var(--faint);font-size:.87rem}
.text{font:13.5px/1.75 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
border:1px solid var(--line);border-radius:6px;padding:.6rem .75rem;margin:0}
b,i,em{font-weight:inherit;font-style:normal;background:var(--even)}b:nth-of-type(even),i:nth-of-type(even)
{background:var(--odd)}
b{background:var(--loss);border-bottom:2px solid var(--rule);padding-bottom:1px}
b:nth-of-type(even){background:var(--loss2)}
.s,i.s:nth-of-type(n){background:var(--special);border-radius:3px}b.s:nth-of-type(n){background:var(--loss2);
font-weight:700;box-shadow:inset 0 0 0 2px var(--special)}
.text :is(b,i):hover{outline:2px solid var(--fg)}
.text :is(b,i):hover::after{content:attr(title);position:fixed;left:.75rem;bottom:.75rem;background:var(--fg);
color:var(--bg);padding:.3rem .6rem;border-radius:6px;font:13px/1.4 system-ui,sans-serif;z-index:1}
.m{display:block;color:var(--faint);font-style:italic;font-size:.85em}.m.cut{color:var(--cut);font-weight:700}
details{display:inline}summary{display:block;cursor:pointer;color:var(--faint);font-size:.85em;font-style:italic}
summary::before{content:"▸ "}details[open]>summary::before{content:"▾ "}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.18rem .7rem .18rem 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--line)}
th{overflow-wrap:normal}@media(max-width:480px){table{font-size:.87rem}}
th:first-child,td:first-child{text-align:left}caption{text-align:left;font-weight:600}
figure{margin:.8rem 0}.hist{display:flex;align-items:flex-end;gap:1px;height:64px;max-width:32rem;
border-bottom:1px solid var(--line)}.hist span{flex:1;background:var(--bar)}.ends{display:flex;max-width:32rem;
justify-content:space-between;font-size:.8rem;color:var(--faint)}
.pack{display:flex;height:1.3rem;max-width:48rem;background:var(--odd);margin:.15rem 0;font-size:.72rem;color:#fff;
overflow:hidden}.pack span{background:var(--bar);overflow:hidden;white-space:nowrap;padding:0 .2rem;
border-right:1px solid var(--bg)}.pack span:nth-child(even){background:var(--bar2);color:#000}
"""


def refuse_place(file: Path) -> None:
    """Tells early, and without writing anything, that no page can be written there.

    Raises:
        UserError: the folder isn't there or can't be written to, or another kind of file has this name.
    """
    if file.is_dir():
        raise UserError(f"--html: {file} is a folder; name a file")
    if not file.parent.is_dir():
        raise UserError(f"--html: there is no folder {file.parent}")
    if file.exists() and SIGN not in file.read_bytes()[:1000].decode(errors="replace"):
        raise UserError(f"--html: {file} is there already, and no page of a preview; name another file")
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
    """The page's HTML."""
    return "\n".join(_lines(preview)) + "\n"


def _lines(preview: Preview) -> Iterator[str]:
    title = f"What the model will see: {_text(preview.title)}"
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8">{SIGN}'
    yield '<meta name="viewport" content="width=device-width,initial-scale=1">'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    yield f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
    if any(example.sections for example in preview.examples):
        yield '<p class="legend"><b>underlined: carries loss</b> · <i>read only</i> · <i class="s">special token</i> · '
        yield "two shades tell tokens apart · ⏎ line end, · space, ⇥ tab · "
        yield "✂ cut off · → predicted, and no input of the row · "
        yield "point at a token, or tap it, for its position and id</p>"
    for example in preview.examples:
        yield from _example(example)
    if preview.packs is not None:
        yield from _packs(preview.packs)
    yield "<h2>Data</h2>"
    yield from map(_table, preview.tables)
    yield from map(_histogram, preview.histograms)
    yield from (f"<p>{_text(note)}</p>" for note in preview.notes)
    yield "</body></html>"


def _example(example: Shown) -> Iterator[str]:
    yield f'<h2>{_text(example.title)}</h2><p class="facts">{" · ".join(map(_text, example.facts))}</p>'
    for section in example.sections:
        if section.title:
            yield f"<h3>{_text(section.title)}</h3>"
        yield f'<div class="text">{"".join(_items(shortened(section).items))}</div>'


def _items(items: Iterable[Piece | Mark]) -> Iterator[str]:
    for stretch in stretches(items):
        if not isinstance(stretch, Mark):
            yield from _pieces(stretch)
        elif stretch.hidden:
            yield f"<details><summary>{_text(stretch.text)}</summary>{''.join(_pieces(stretch.hidden))}</details>"
        else:
            yield f'<span class="m {stretch.kind}">{_text(stretch.text)}</span>'


def _pieces(pieces: Sequence[Piece]) -> Iterator[str]:
    for piece, written in zip(pieces, visible([piece.text for piece in pieces]), strict=True):
        tag, kind = "b" if piece.target else "i", ' class="s"' if piece.special else ""
        arrow = "→" if piece.label_only else ""
        yield f'<{tag}{kind} title="{escape(piece.described)}">{arrow}{escape(written)}</{tag}>'


def _packs(packs: Packs) -> Iterator[str]:
    yield f"<h2>{_text(packs.title)}</h2>"
    for pack in packs.packs:
        spans = []
        for length, row in zip(pack.lengths, pack.rows, strict=True):
            what = f"{length:,} tokens" + (f", row {row:,}" if row else "")
            spans.append(f'<span style="width:{100 * length / packs.capacity:.3f}%" title="{what}">{length:,}</span>')
        yield f'<div class="pack">{"".join(spans)}</div>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<div class="wide"><table><caption>{_text(table.title)}</caption><tr>{head}</tr>{rows}</table></div>'


def _histogram(histogram: Histogram) -> str:
    most = max(histogram.counts)
    bars = "".join(
        f'<span style="height:{100 * count / most:.1f}%" title="{count:,}"></span>' for count in histogram.counts
    )
    ends = f'<div class="ends"><span>{histogram.low:,}</span><span>{histogram.high:,} tokens</span></div>'
    caption = f"<figcaption>lengths of {_text(histogram.title)}</figcaption>"
    return f'<figure>{caption}<div class="hist">{bars}</div>{ends}</figure>'


def _text(text: str) -> str:
    return escape(visible([text])[0])
