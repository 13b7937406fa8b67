"""A preview as one HTML page that needs nothing else: no request, no script, dark and light, any width."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from oumi_pl.errors import UserError
from oumi_pl.preview.pieces import Piece, visible
from oumi_pl.preview.shown import Histogram, Mark, Packs, Preview, Shown, Table, shortened, stretches
from oumi_pl.report import html
from oumi_pl.runs.folders import refuse_unwritable

SIGN = '<meta name="generator" content="oumi_pl preview">'
"""What tells a page of ours, which may be written over, from a file of the user's."""

STYLE = """
:root{--even:#fff;--odd:#eee;--loss:#fbd58c;--loss2:#f6bd52;--special:#a9d6f5;--cut:#8f3f6f;--rule:#a35c00;
--bar:#0072b2;--bar2:#56b4e9}
@media(prefers-color-scheme:dark){:root{--even:#16181c;--odd:#24272c;--loss:#6b4600;--loss2:#855900;--special:#0a4a75;
--cut:#e39ac4;--rule:#ffb939}}
main{max-width:72rem}h3{font-size:.9rem;margin:.7rem 0 .2rem;color:var(--quiet);font-weight:600}
.text{border:1px solid var(--edge);border-radius:6px;padding:.6rem .75rem;line-height:1.75}
b,i{font-weight:inherit;font-style:normal;background:var(--even)}
b:nth-of-type(even),i:nth-of-type(even){background:var(--odd)}
b{background:var(--loss);border-bottom:2px solid var(--rule);padding-bottom:1px}
b:nth-of-type(even){background:var(--loss2)}
.s,i.s:nth-of-type(n){background:var(--special);border-radius:3px}b.s:nth-of-type(n){background:var(--loss2);
font-weight:700;box-shadow:inset 0 0 0 2px var(--special)}
.text :is(b,i):hover{outline:2px solid var(--ink)}
.text :is(b,i):hover::after{content:attr(title);position:fixed;left:.75rem;bottom:.75rem;background:var(--ink);
color:var(--page);padding:.3rem .6rem;border-radius:6px;font:13px/1.4 system-ui,sans-serif;z-index:1}
.m{display:block;color:var(--quiet);font-style:italic;font-size:.85em}.m.cut{color:var(--cut);font-weight:700}
details{display:inline}summary{display:block;color:var(--quiet);font-size:.85em;font-style:italic}
summary::before{content:"▸ "}details[open]>summary::before{content:"▾ "}
figure{max-width:34rem;margin:.8rem 0}figcaption{color:var(--quiet);font-size:13px}
.hist{display:flex;align-items:flex-end;gap:1px;height:64px;border-bottom:1px solid var(--edge)}
.hist span{flex:1;background:var(--bar)}.ends{display:flex;justify-content:space-between}
.pack{display:flex;height:1.3rem;max-width:48rem;background:var(--odd);margin:.15rem 0;font-size:.72rem;color:#fff;
overflow:hidden}.pack span{background:var(--bar);overflow:hidden;white-space:nowrap;padding:0 .2rem;
border-right:1px solid var(--page)}.pack span:nth-child(even){background:var(--bar2);color:#000}
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
    title = f"What the model will see: {_text(preview.title)}"
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    body = "\n".join([f"<h1>{title}</h1>", *_body(preview)])
    return html.document(title, body, STYLE, SIGN + policy)


def _body(preview: Preview) -> Iterator[str]:
    if any(example.sections for example in preview.examples):
        yield '<p class="quiet small"><b>underlined: carries loss</b> · <i>read only</i> · '
        yield '<i class="s">special token</i> · '
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


def _example(example: Shown) -> Iterator[str]:
    yield f'<h2>{_text(example.title)}</h2><p class="quiet small">{" · ".join(map(_text, example.facts))}</p>'
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
    return html.table(map(_text, table.columns), (map(_text, row) for row in table.rows), _text(table.title))


def _histogram(histogram: Histogram) -> str:
    most = max(histogram.counts)
    bars = "".join(
        f'<span style="height:{100 * count / most:.1f}%" title="{count:,}"></span>' for count in histogram.counts
    )
    ends = f'<div class="ends quiet small"><span>{histogram.low:,}</span><span>{histogram.high:,} tokens</span></div>'
    caption = f"<figcaption>lengths of {_text(histogram.title)}</figcaption>"
    return f'<figure>{caption}<div class="hist">{bars}</div>{ends}</figure>'


def _text(text: str) -> str:
    return escape(visible([text])[0])
