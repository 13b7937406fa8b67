"""Of what lies where a path leads nowhere, only what is spelt like it is offered."""

from pathlib import Path

import pytest

from oumi_pl.errors import nearby, reason


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("rwos.jsonl", "; did you mean 'rows.jsonl'?"),
        ("Rows.json", "; did you mean 'rows.jsonl'?"),
        ("dta/rows.jsonl", "; did you mean 'data'?"),
        ("data/x.jsonl", "; it is looked for in HERE/data"),
        ("nope.jsonl", "; it is looked for in HERE"),  # an ending in common is no likeness
        ("nodes.jsonl", "; it is looked for in HERE"),  # notes.md does not fit
        ("rows.jsonl/x", "; rows.jsonl is not a directory"),
    ],
)
def test_nearby(tmp_path, monkeypatch, path, end):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("rows.jsonl", "notes.md"):
        (tmp_path / name).write_text("")
    said = nearby(Path(path), lambda p: p.suffix == ".jsonl")
    assert said.replace(str(tmp_path.resolve()), "HERE") == end


@pytest.mark.parametrize("odd", ["\udcff", "\ud800"])
def test_the_reason_of_a_path_that_is_no_text_can_be_printed(odd):
    try:
        f"/a/{odd}/b".encode()
    except UnicodeEncodeError as error:
        assert reason(error) == f"not UTF-8 text: /a/\\u{ord(odd):04x}/b"
