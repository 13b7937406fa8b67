"""The page is whole in itself and harmless, whatever is in the rows; text loses nothing but colour in a pipe."""

import re
from html.parser import HTMLParser

import pytest

from oumi_pl.errors import UserError
from oumi_pl.preview import page, terminal
from oumi_pl.preview.pieces import Piece
from oumi_pl.preview.shown import Histogram, Mark, Pack, Packs, Preview, Section, Shown, Table, shortened

EVIL = "</b><script>alert(1)</script><img src=x onerror='a()'>\"& ]]>"


def preview(items, title="row 1"):
    return Preview(
        EVIL,
        [EVIL],
        [Shown(title, [EVIL], [Section(EVIL, items)])],
        Packs("packs", 8, [Pack([5, 3], [2, 1])]),
        [Table("table", ["", EVIL], [["rows", "1"]])],
        [Histogram("lengths", 1, 9, [3, 0, 1])],
    )


def piece(text, target=False, start=0, **flags):
    return Piece(text, (7,), start, target, **flags)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def parsed(items):
    tags = Tags()
    tags.feed(page.page(preview(items)))
    return tags


def test_rows_cannot_put_anything_into_the_page():
    tags = parsed([piece(EVIL), piece(EVIL, target=True)])
    assert not {"script", "img", "link", "iframe"} & set(tags.tags)
    assert not [name for name, _ in tags.attributes if name.startswith("on") or name in ("src", "href")]
    assert "".join(tags.text).count(EVIL) == 8  # title twice, notes, facts, section, table, both pieces


def test_the_page_asks_for_nothing_else():
    html = page.page(preview([piece("a")]))
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|url\(|@import", html)


def test_tokens_tell_position_and_id_and_carry_a_second_cue():
    html = page.page(preview([piece("read"), piece("said", target=True, start=4)]))
    assert '<i title="position 0, id 7">read</i>' in html
    assert '<b title="position 4, id 7, carries loss">said</b>' in html
    assert "border-bottom" in html.partition("\nb{")[2].partition("}")[0]


def test_what_is_left_out_at_first_is_in_the_page():
    items = [piece(f"w{i}.", target=i > 900, start=i) for i in range(1000)]
    tags = parsed(items)
    assert "details" in tags.tags
    assert all(f"w{i}." in tags.text for i in range(1000))


def test_a_page_is_written_over_and_nothing_else_is(tmp_path):
    file = tmp_path / "rows.html"
    page.write(preview([piece("a")]), file)
    page.refuse_place(file)
    file.write_text("<!doctype html> of the user's")
    for place, what in (
        (file, "exists"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x.html", "no folder"),
    ):
        with pytest.raises(UserError, match=what):
            page.refuse_place(place)


def long_section():
    """A long prompt, an answer, a question, a long answer."""
    runs = [(3000, False), (5, True), (40, False), (2000, True)]
    flags = [flag for length, flag in runs for _ in range(length)]
    return Section("", [piece(f"{i},", flag, i) for i, flag in enumerate(flags)])


def test_the_middle_of_long_stretches_is_left_out_and_every_border_is_kept():
    items = shortened(long_section()).items
    hidden = [item for item in items if isinstance(item, Mark)]
    shown = {item.start for item in items if isinstance(item, Piece)}
    assert len(shown) < 700
    assert len(shown) + sum(len(mark.hidden) for mark in hidden) == 5045
    for border in (3000, 3005, 3045):
        assert {*range(border - 5, border + 5)} <= shown
    assert shortened(Section("", [piece("a")] * 480)).items == [piece("a")] * 480


def test_many_turns_are_shortened_too():
    items = [piece("x", bool(i // 10 % 2), i) for i in range(10_000)]
    kept = shortened(Section("", items)).items
    (mark,) = [item for item in kept if isinstance(item, Mark)]
    assert len(kept) < 400
    assert (
        mark.text
        == f"… {len(mark.hidden):,} tokens not shown here, {sum(p.target for p in mark.hidden):,} of them with loss"
    )


def test_text_for_a_pipe_has_brackets_and_no_codes(capsys):
    items = [
        piece("ask: "),
        piece("yes", True),
        piece("\n", True),
        Mark("cut", "✂ 3 tokens cut off here"),
        piece("\x1b[2J"),
    ]
    terminal.show(preview(items), plain=True)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "ask: ⟦yes⏎⟧\n✂ 3 tokens cut off here\n⟨ESC⟩[2J\n" in out
    assert not re.search(r" $", out, re.MULTILINE)


def test_a_terminal_shows_the_same_text_in_colour(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    items = [piece("ask: "), piece("yes", True), piece("<|end|>", True, special=True)]
    terminal.show(preview(items), plain=False)
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "ask: ⟦yes<|end|>⟧" in re.sub(r"\x1b\[[\d;]*m", "", out)


def test_each_token_in_a_cell_of_its_own(capsys):
    terminal.show(preview([piece("ab", start=11), piece(" c", True, 12)]), plain=True, tokens=True)
    out = capsys.readouterr().out
    assert re.search(r"11 +7 +ab .*12 +7 ⟦·c⟧", out)
