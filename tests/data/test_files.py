import gzip
import json
import os
import tracemalloc
from collections import Counter

import pytest
import zstandard

from oumi_pl.data import files
from oumi_pl.data.sources import Source, fingerprint, rows
from oumi_pl.errors import UserError
from tests.data.source_files import ROWS, lines, mistake, read, values, write


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def compressed(name, content):
    if name.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    return zstandard.ZstdCompressor().compress(content)


# --- kinds of file


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL", ".jsonl.gz", ".ndjson.zst", ".json.gz"])
def test_json_lines(suffix):
    content = lines(ROWS).encode()
    write("a" + suffix, compressed(suffix, content) if suffix.endswith(("gz", "zst")) else content)
    assert read("a" + suffix) == [(f"a{suffix}:{i + 1}", row) for i, row in enumerate(ROWS)]


def test_lines_are_counted_with_the_blank_ones_and_line_separators_in_text_end_none():
    write("a.jsonl", '\n{"t": "a\u2028b\x85c"}\r\n   \n{"t": 2}')
    assert read("a.jsonl") == [("a.jsonl:2", {"t": "a\u2028b\x85c"}), ("a.jsonl:4", {"t": 2})]
    write("a.json", '\n{"t": 1}\n\n{"t": 2}')
    assert read("a.json") == [("a.json:2", {"t": 1}), ("a.json:4", {"t": 2})]


def test_rows_keep_the_keys_they_have():
    calls = [{"arguments": {"city": "Rome"}}, {"arguments": {"n": [1, "two"]}}]
    write("a.jsonl", lines(calls))
    assert [row for _, row in read("a.jsonl")] == calls


def test_byte_order_mark_is_skipped():
    write("a.jsonl", b"\xef\xbb\xbf" + lines(ROWS).encode())
    assert values("a.jsonl") == list(range(10))


def test_byte_order_marks_of_files_that_were_put_together_are_skipped():
    write("a.jsonl", b'\xef\xbb\xbf{"n": 1}\n\xef\xbb\xbf{"n": 2}\n')
    assert values("a.jsonl") == [1, 2]


def test_rows_may_be_as_deep_as_any_that_are_published():
    row = {"n": json.loads("[" * 99 + "]" * 99)}
    write("a.jsonl", lines([row]))
    assert [row for _, row in read("a.jsonl")] == [row]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_that_never_ends_is_refused_before_it_fills_the_memory(suffix, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    content = lines(ROWS[:2]).encode() + os.urandom(3_000_000).replace(b"\n", b"")
    write(f"a.jsonl{suffix}", compressed(suffix, content) if suffix else content)
    tracemalloc.start()
    message = mistake(f"a.jsonl{suffix}")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message == f"a.jsonl{suffix}:3: the line has more than 1,000 bytes; a row is one line"
    assert peak < 500_000


def test_a_pipe_is_refused_instead_of_waited_for():
    os.mkfifo("a.jsonl")
    assert mistake("a.jsonl") == "a.jsonl: a pipe or device, not a file; copy its content to a file"


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("document", [ROWS, {"data": ROWS}, {"version": 1, "rows": ROWS, "tags": ["x"]}])
def test_json_document(document, indent):
    write("a.json", json.dumps(document, indent=indent))
    assert read("a.json") == [(f"a.json row {i + 1}", row) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_document_that_is_a_single_row(indent):
    row = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]}
    write("a.json", json.dumps(row, indent=indent))
    assert [row for _, row in read("a.json")] == [row]


def test_csv():
    write("a.csv", 'text,n\r\n"two\nlines, and a ""quote""",1\r\n\r\nNA,\r\n')
    assert read("a.csv") == [
        ("a.csv row 1", {"text": 'two\nlines, and a "quote"', "n": "1"}),
        ("a.csv row 2", {"text": "NA", "n": ""}),
    ]


def test_csv_takes_long_cells():
    write("a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(read("a.csv")[0][1]["text"]) == 200_000


def test_text_file_is_one_row():
    write("a.txt", "one\ntwo\n")
    assert read("a.txt") == [("a.txt", {"text": "one\ntwo\n"})]


def test_zst_of_several_frames():
    content = lines(ROWS).encode()
    write("a.jsonl.zst", compressed(".zst", content[:50]) + compressed(".zst", content[50:]))
    assert values("a.jsonl.zst") == list(range(10))


def test_zst_with_a_long_window_and_lines_longer_than_a_chunk():
    window = zstandard.ZstdCompressionParameters(window_log=30)  # as `zstd --long=30` writes it
    writer = zstandard.ZstdCompressor(compression_params=window).compressobj()
    content = lines([{"n": 0, "text": "x" * 300_000}, {"n": 1}]).rstrip().encode()
    write("a.jsonl.zst", writer.compress(content) + writer.flush())
    assert values("a.jsonl.zst") == [0, 1]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_tables(suffix):
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    table = pa.Table.from_pylist(ROWS)
    if suffix == ".parquet":
        pa.parquet.write_table(table, "a.parquet", row_group_size=3)
    else:
        pa.feather.write_feather(table, "a.arrow", chunksize=3)
    assert read("a" + suffix) == [(f"a{suffix} row {i + 1}", row) for i, row in enumerate(ROWS)]
    assert values("a" + suffix, split="train[-2:]") == [8, 9]


def test_tables_of_datasets_keep_their_json_columns():
    import datasets

    calls = [{"arguments": {"city": "Rome"}}, {"arguments": {"n": [1, "two"]}}]
    features = datasets.Features({"arguments": datasets.Json()})
    datasets.Dataset.from_list(calls, features=features).to_parquet("a.parquet")
    assert [row for _, row in read("a.parquet")] == calls


def test_reads_lazily():
    write("a.jsonl", lines(ROWS[:3]) + "broken")
    actual = rows(Source("a.jsonl"))
    assert [next(actual)[1]["n"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"a\.jsonl:4"):
        next(actual)


# --- what is wrong with a file


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"n": 1}\n\n{"n": 2\n', ["a.jsonl:3", "not valid JSON", "column 8"]),
        ("a.jsonl", '{"n": 1}\n[1]\n', ["a.jsonl:2", "expected an object", "a list"]),
        ("a.jsonl", '{"n": 1}\n"x"\n', ["a.jsonl:2", "a string"]),
        ("a.jsonl", '{"n": 1}\nnull\n', ["a.jsonl:2", "null"]),
        ("a.jsonl", '{"n": "\\ud83d"}\n', ["a.jsonl:1", "surrogate"]),
        ("a.jsonl", "[" * 100_000, ["a.jsonl:1", "JSON"]),
        ("a.jsonl", '{"n": ' + "1" * 5000 + "}", ["a.jsonl:1", "JSON"]),
        ("a.jsonl", '{"n": 1}\n{"a": [{"n": 1, "n": 2}]}\n', ["a.jsonl:2", "the key 'n' occurs twice"]),
        ("a.json", '[{"n": 1, "n": 2}]', ["a.json:1", "the key 'n' occurs twice"]),
        ("a.jsonl", '{"n": 1}\n{"n": ' + "[" * 101 + "]" * 101 + "}\n", ["a.jsonl:2", "more than 100 levels deep"]),
        ("a.json", '{"n": ' + "[" * 200 + "]" * 200 + '}\n{"n": 1}\n', ["a.json:1", "more than 100 levels deep"]),
        ("a.json", '{"n": ' + "[" * 100_000 + '\n{"n": 1}\n', ["a.json:1", "more than 100 levels deep"]),
        ("a.jsonl", '{"n": 1}\r{"n": 2}\r', ["a.jsonl:1", "not valid JSON", "CR alone"]),
        ("a.jsonl", '{"n": 1}'.encode("utf-32"), ["a.jsonl:1", "UTF-32"]),
        ("a.jsonl", b'{"n": 1}\n{"n": "\xff"}\n', ["a.jsonl:2", "not UTF-8", "0xff at byte 8"]),
        ("a.jsonl", b'{"n": 1}\n\x00\x01\x02', ["a.jsonl:2", "binary"]),
        ("a.jsonl", '{"n": 1}'.encode("utf-16"), ["a.jsonl:1", "expected UTF-8 text, found UTF-16"]),
        ("a.json", '[{"n": 1},\n {"n": }]', ["a.json:2", "not valid JSON"]),
        ("a.json", '{"n": 1}\n{"n": 2\n', ["a.json:2", "not valid JSON"]),
        ("a.json", '[{"n": 1}, 2]', ["a.json row 2", "expected an object", "a number"]),
        ("a.json", "3", ["a.json", "list of objects", "a number"]),
        ("a.json", '{"a": [{"n": 1}], "b": [{"n": 2}]}', ["a.json", "a, b", "one list"]),
        ("a.csv", "a,b\n1,2\n3\n", ["a.csv row 2", "1 cells under 2"]),
        ("a.csv", "a,a\n1,2\n", ["a.csv:1", "'a'"]),
        ("a.csv", 'a\n1\n"2', ["a.csv:3", "not valid CSV"]),
        ("a.csv", b"a\n\xe9\n", ["a.csv:2", "not UTF-8"]),
        ("a.jsonl.gz", lines(ROWS), ["a.jsonl.gz", "cannot be read: ", "gzip"]),
        ("a.jsonl.gz", compressed(".gz", lines(ROWS).encode())[:-12], ["a.jsonl.gz", "beyond line"]),
        ("a.jsonl.gz", compressed(".gz", b"")[:10] + b"\xff" * 20, ["a.jsonl.gz", "cannot be read: "]),
        ("a.jsonl.zst", lines(ROWS), ["a.jsonl.zst", "cannot be read: "]),
        ("a.jsonl.zst", compressed(".zst", lines(ROWS).encode())[:-12], ["a.jsonl.zst", "too early"]),
        ("a.parquet", b"PAR1nothing", ["a.parquet", "damaged"]),
        ("a.arrow", b"nothing at all", ["a.arrow", "damaged"]),
        ("a.xlsx", b"PK", ["a.xlsx", "no reader for '.xlsx'", ".parquet"]),
        ("a.parquet.gz", b"", ["a.parquet.gz", "no reader"]),
    ],
)
def test_damaged_files_are_an_error_with_the_place(name, content, parts):
    write(name, content)
    message = mistake(name)
    for part in parts:
        assert part in message


TICKETS = "".join(f"{i},ticket {i}\n" for i in range(1, 40))
BROKEN = f"id,text\n{TICKETS}".splitlines(keepends=True)


@pytest.mark.parametrize("line", ['11,"the screen says no\n', '11,"he said ""no"" and left\n', '"11,ticket 11\n'])
def test_a_quote_that_is_not_closed_is_reported_where_it_opens(line):
    """And not at the last line of the file, up to which all is then part of one cell."""
    write("a.csv", "".join([*BROKEN[:11], line, *BROKEN[12:]]))
    assert mistake("a.csv").startswith('a.csv:12: not valid CSV: the quote (") that opens a cell in this line')
    # cells before it that hold line ends, and a quoted cell after it that seems to close it
    several = ['3,"one\ntwo ""2""\nthree"\n', *BROKEN[1:8], line, *BROKEN[12:20], '21,"quoted"\n', *BROKEN[22:]]
    write("a.csv", "".join([BROKEN[0], *several]))
    assert mistake("a.csv").startswith("a.csv:12: not valid CSV: the quote")


def test_a_quote_that_is_wrong_in_its_own_line_is_reported_as_it_is():
    write("a.csv", 'a,b\n1,"x" y\n2,3\n')
    assert mistake("a.csv") == "a.csv:2: not valid CSV: ',' expected after '\"'"
    write("a.csv", 'a,b\n1,x "y" z\n2,"say ""hi"", you"\n')
    assert [row["b"] for _, row in read("a.csv")] == ['x "y" z', 'say "hi", you']


# --- encodings

WORDS = [{"t": "Größe", "n": "1"}, {"t": "naive “ok”", "n": "2"}]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "mac-roman", "gb18030"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a.csv.zst"])
def test_files_of_other_encodings(name, encoding):
    texts = {
        "csv": "t,n\r\n" + "".join(f"{row['t']},{row['n']}\r\n" for row in WORDS),
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in WORDS),
        "json": json.dumps(WORDS, ensure_ascii=False),
        "txt": "\n".join(row["t"] for row in WORDS),
    }
    content = texts[name.split(".")[1]].encode(encoding)
    write(name, compressed(name, content) if name.endswith(("gz", "zst")) else content)
    expected = [{"text": texts["txt"]}] if name == "a.txt" else WORDS
    assert [row for _, row in rows(Source(name, encoding=encoding))] == expected
    counted = [row for _, row in rows(Source(name, encoding=encoding, split="train[:100%]"))]
    assert counted == expected


def test_bytes_that_an_encoding_does_not_have():
    write("a.csv", b"t\nok\nbad \x81\n")
    with pytest.raises(UserError, match=r"a.csv:3: not CP1252 text \(0x81 at byte 5 of the line, 10 of the file\)"):
        list(rows(Source("a.csv", encoding="cp1252")))
    counts = Counter()
    replaced = rows(Source("a.csv", encoding="cp1252", errors="replace"), counts=counts)
    assert [row["t"] for _, row in replaced] == ["ok", "bad \ufffd"]
    assert counts["replaced"] == 1
    write("b.csv", "t\nok\n".encode("utf-16-le")[:-1])
    with pytest.raises(UserError, match=r"b.csv:2: not utf-16-le text: .*truncated data"):
        list(rows(Source("b.csv", encoding="utf-16-le")))


def test_mistakes_in_the_encoding_are_one_message():
    write("a.csv", "t\nok\n")
    with pytest.raises(UserError, match=r"a.csv: unknown encoding 'cp1225'; did you mean 'cp12"):
        rows(Source("a.csv", encoding="cp1225"))
    with pytest.raises(UserError, match=r"a.csv: unknown encoding 'base64'"):
        rows(Source("a.csv", encoding="base64"))
    with pytest.raises(UserError, match=r"these rows are in none"):
        rows(Source([{"t": "ok"}], encoding="cp1252"))
    plain, named = Source("a.csv"), Source("a.csv", encoding="latin-1")
    assert fingerprint(plain) != fingerprint(named)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.jsonl.zst"])
def test_no_rows(name):
    write(name, b"")
    assert f"{name}: the file is empty" in mistake(name)


def test_unreadable_bytes_between_good_ones_are_found_in_a_gz():
    content = bytearray(gzip.compress(lines([{"n": i} for i in range(50_000)]).encode()))
    content[len(content) // 2] ^= 0xFF
    write("a.jsonl.gz", bytes(content))
    assert "a.jsonl.gz" in mistake("a.jsonl.gz")
