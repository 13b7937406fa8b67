import gzip
from pathlib import Path

import pytest

from tests.data.source_files import ROWS, lines, mistake, read, values, write


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_directory_reads_all_its_files_in_order():
    write("d/b.jsonl", lines(ROWS[2:4]))
    write("d/sub/c.jsonl.gz", gzip.compress(lines(ROWS[4:6]).encode()))
    write("d/a.ndjson", lines(ROWS[:2]))
    write("d/README.md", "no data")
    write("d/.hidden.jsonl", "broken")
    write("d/.git/x.jsonl", "broken")
    Path("d/directory.jsonl").mkdir()
    assert [origin for origin, _ in read("d")][::2] == ["d/a.ndjson:1", "d/b.jsonl:1", "d/sub/c.jsonl.gz:1"]
    assert values("d/") == list(range(6))


def test_glob_is_sorted_and_skips_what_is_no_data():
    write("d/b.jsonl", lines(ROWS[2:4]))
    write("d/a.jsonl", lines(ROWS[:2]))
    write("d/a.md", "no data")
    assert values("d/*") == [0, 1, 2, 3]
    assert values("**/b*.jsonl") == [2, 3]
    assert values(str(Path.cwd() / "d" / "[a]*")) == [0, 1]
    assert "d/x*.jsonl: no data file matches" in mistake("d/x*.jsonl")
    assert "no data file matches" in mistake("org/train-*")


@pytest.mark.parametrize("path", ["d", "d/*"])
def test_different_kinds_are_not_mixed(path):
    write("d/a.jsonl", lines(ROWS))
    write("d/b.csv", "n\n1\n")
    message = mistake(path)
    assert "different kinds of files (a.jsonl, b.csv)" in message
    assert "glob" in message


def test_splits_of_a_directory():
    write("d/train-00001-of-00002.jsonl", lines(ROWS[3:5]))
    write("d/train-00000-of-00002.jsonl", lines(ROWS[:3]))
    write("d/train/my_test.jsonl", lines(ROWS[5:8]))
    write("d/validation/a.jsonl", lines(ROWS[8:]))
    assert values("d") == [0, 1, 2, 3, 4]
    assert values("d", split="test") == [5, 6, 7]
    assert values("d", split="validation[1:]") == [9]
    assert values("d", split="train[-1:]+test") == [4, 5, 6, 7]
    assert "d: no split 'tset'; did you mean 'test'?" in mistake("d", split="tset")
    write("d/latest.jsonl", lines(ROWS))
    message = mistake("d")
    assert "latest.jsonl is not" in message
    assert "named after a split" in message


def test_file_has_only_train_whatever_its_name():
    write("test.jsonl", lines(ROWS))
    assert len(read("test.jsonl")) == 10
    assert "no split 'test'; known: 'train'" in mistake("test.jsonl", split="test")


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("data/trian.jsonl", ["data/trian.jsonl: no such file", "did you mean 'data/train.jsonl'?"]),
        ("dta/train.jsonl", ["dta/train.jsonl: no such file", "did you mean 'data'?"]),
        ("./nothing", ["./nothing: no such file", "it is looked for in /"]),
        ("~/no-such-directory-here/x", ["no such file"]),
        ("a/b/c", ["a/b/c: no such file"]),
        ("https://example.org/a.jsonl", ["URLs are not read", "download"]),
        ("", ["empty path"]),
        ("empty", ["empty: no data files", ".jsonl"]),
    ],
)
def test_a_missing_file_is_an_error_without_asking_the_hub(path, parts, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: pytest.fail("asked the hub"))
    write("data/train.jsonl", lines(ROWS))
    if path == "empty":
        Path("empty").mkdir()
    message = mistake(path)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("field", ["config", "revision"])
def test_hub_fields_are_refused_for_local_data(field):
    write("a.jsonl", lines(ROWS))
    message = mistake("a.jsonl", **{field: "main"})
    assert f"a.jsonl: '{field}' is for data from the hub" in message


@pytest.fixture
def bundled(monkeypatch):
    monkeypatch.setattr("oumi_pl.data.sources.BUNDLED", Path.cwd() / "package" / "bundled")
    write("package/bundled/instructions/train.jsonl", lines(ROWS))
    write("package/bundled/instructions/heldout.jsonl", lines(ROWS[:2]))


def test_bundled(bundled):
    assert read("bundled/instructions")[1] == ("bundled/instructions/train.jsonl:2", ROWS[1])
    assert values("bundled/instructions/heldout") == [0, 1]
    assert values("bundled/instructions", split="train[:1]") == [0]
    message = mistake("bundled/instrctions")
    assert "bundled/instructions, bundled/instructions/heldout" in message
