"""Streams: which of them obey escape codes and show colours, and what none of them is given."""

import io
import logging
import sys
import unicodedata

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from oumi_pl.commands import generate, preview, recipes
from oumi_pl.preview import pieces
from oumi_pl.terminal import screen
from oumi_pl.terminal.screen import has_colours, is_terminal, meanwhile
from oumi_pl.terminal.text import visible


class Stream(io.StringIO):
    def __init__(self, tty):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


@pytest.mark.parametrize(
    ("tty", "term", "no_color", "obeys", "colours"),
    [
        (True, "xterm-256color", None, True, True),
        (True, None, None, True, True),
        (True, "xterm", "", True, True),
        (True, "xterm", "1", True, False),
        (True, "dumb", None, False, False),
        (False, "xterm", None, False, False),
    ],
)
def test_every_command_decides_alike_on_colours(monkeypatch, tty, term, no_color, obeys, colours):
    for name, value in {"TERM": term, "NO_COLOR": no_color}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    stream, shown = Stream(tty), []
    assert (is_terminal(stream), has_colours(stream)) == (obeys, colours)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        patch.setattr(recipes, "listing", lambda names, bold=False: str(bold))
        patch.setattr("oumi_pl.preview.recipe.read", lambda *_: (None, []))
        patch.setattr(preview, "_preview", lambda *_: None)
        patch.setattr("oumi_pl.preview.terminal.show", lambda *_, plain, **__: shown.append(not plain))
        recipes.main([])
        preview.main(["--config", "quickstart/sft"])
        shown += ["\033" in generate._dim("a"), "\033" in screen.styled("a", "red"), "True" in stream.getvalue()]
        assert (screen.terminal_width() is not None) == obeys
    assert shown == [colours] * 4


@pytest.mark.parametrize("stream", [object(), None])
def test_what_is_no_stream_is_no_terminal(stream):
    assert not is_terminal(stream)


def test_a_closed_stream_is_no_terminal():
    stream = io.StringIO()
    stream.close()
    assert not is_terminal(stream)


def test_nothing_that_is_shown_drives_a_terminal_or_hides():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = visible(everything)
    odd = {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Co", "Cs", "Cn")}
    assert odd == {"\n", "\t", "\u200c", "\u200d"}
    assert visible("a\x1b[0m\r\n\tb\u202e\ud800") == "a⟨ESC⟩[0m⟨CR⟩\n\tb⟨U+202E⟩⟨U+D800⟩"


def test_what_people_write_stays_as_it_is():
    text = "naïve 你好\u3000世界 10\u00a0€ 👩\u200d👧 ಕ್\u200cಷ ⟦x⟧"
    assert visible(text) == text
    assert pieces.visible([text]) == [
        text.replace("\u3000", "⟨U+3000⟩")
        .replace("\u00a0", "⟨U+00A0⟩")
        .replace("⟦", "⟨U+27E6⟩")
        .replace("⟧", "⟨U+27E7⟩")
    ]


def test_progress_is_shown_on_a_terminal_and_removed(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for tty, expected in ((True, "loading …\r\033[K"), (False, "")):
        monkeypatch.setattr(sys, "stderr", Stream(tty))
        with pytest.raises(KeyError), meanwhile("loading"):
            raise KeyError
        assert sys.stderr.getvalue() == expected


def test_progress_in_a_file_has_the_rows_done_their_total_and_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(screen, "LINE_EVERY", -1)
    assert list(screen.track(iter("abc"), "tokenizing rows.jsonl", total=4)) == ["a", "b", "c"]
    assert "tokenizing rows.jsonl: 2 of 4 rows, about 0 s left" in capsys.readouterr().err
    list(screen.track(iter("abc"), "tokenizing rows.jsonl"))
    assert "tokenizing rows.jsonl: 2 rows\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (-9, "was killed by SIGKILL (often because memory ran out)"),
        (-15, "was killed by SIGTERM"),
        (3, "ended with exit code 3"),
    ],
)
def test_a_process_of_a_run_that_died_is_named_with_its_cause(code, cause, monkeypatch):
    """Lightning says so in a message that is silenced with its others, and kills the rest of the run."""

    class Process:
        pid, returncode = 7, code

        def poll(self):
            return code

    observer = _ChildProcessObserver(main_pid=1, child_processes=[Process()])
    monkeypatch.setattr(observer, "_terminate_all", lambda: None)
    handler = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger(screen.LAUNCHER)
    logger.addHandler(handler)
    try:
        screen.quiet()
        observer._run()
    finally:
        logger.removeHandler(handler)
    expected = f"error: process 1 of the run {cause}; the others are stopped; go on with --resume\n"
    assert handler.stream.getvalue() == expected
