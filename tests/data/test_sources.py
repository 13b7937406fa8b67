from pathlib import Path

import pytest

from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source, as_sources, expected_rows, fingerprint
from oumi_pl.data.splitting import Side
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from tests.data.source_files import ROWS, lines, mistake, read, values, write
from tests.tiny import write_jsonl

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- slices


@pytest.mark.parametrize(
    "split",
    [
        *("train[:3]", "train[4:6]", "train[7:]", "train[-3:]", "train[:-8]", "train[:]", "train[5:100]"),
        *("train[:25%]", "train[50%:75%]", "train[-20%:]", "train[:3]+train[8:]", "train + train"),
    ],
)
def test_slices_mean_what_datasets_means(split):
    import datasets

    write("a.jsonl", lines(ROWS))
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    size = {"train": len(ROWS)}
    pieces = datasets.ReadInstruction.from_spec(split).to_absolute(size)
    expected = [n for piece in pieces for n in range(piece.from_, piece.to)]
    assert values("a.jsonl", split=split) == expected
    assert values("saved", split=split) == expected


def test_a_slice_reads_no_further_than_it_has_to():
    write("a.jsonl", lines(ROWS[:3]).encode() + b"\xff\n")  # what even counting would stumble over
    assert values("a.jsonl", split="train[:3]") == [0, 1, 2]
    assert "a.jsonl:4" in mistake("a.jsonl", split="train[:50%]")


@pytest.mark.parametrize("split", ["train[5]", "train[:5", "train[:200%]", "train[:5%](up)"])
def test_wrong_slices_are_refused(split):
    write("a.jsonl", lines(ROWS))
    message = mistake("a.jsonl", split=split)
    assert f"a.jsonl: no split {split!r}" in message
    assert "train[:100]" in message


def test_slice_without_rows():
    write("a.jsonl", lines(ROWS))
    assert "split 'train[10:]' has no rows" in mistake("a.jsonl", split="train[10:]")


# --- folders of save_to_disk


def test_saved_to_disk():
    import datasets

    part = datasets.Dataset.from_list(ROWS)
    part.save_to_disk("one")
    datasets.DatasetDict(train=part.select(range(3)), test=part.select(range(3, 5))).save_to_disk("two")
    assert read("one")[2] == ("one row 3", ROWS[2])
    assert read("two", split="test")[1] == ("two[test] row 2", ROWS[4])
    assert "two: no split 'tst'; did you mean 'test'?" in mistake("two", split="tst")
    print_of_one = fingerprint(Source("one"))
    data = next(Path("one").glob("*.arrow"))
    data.write_bytes(data.read_bytes().replace(b"row 3", b"row X"))
    assert fingerprint(Source("one")) != print_of_one
    data.write_bytes(b"")
    assert "one: not a complete `save_to_disk` folder" in mistake("one")


# --- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Serves `org/name` from a local directory, so that results and errors are those of `datasets`."""
    import datasets

    head = "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: a.jsonl}\n"
    write("hub/README.md", head + "- config_name: other\n  data_files: b.jsonl\n---\n")
    write("hub/a.jsonl", lines(ROWS))
    write("hub/b.jsonl", '{"n": 1}\n{"n": \n')
    original = datasets.load_dataset

    def load(path, config, *, split, revision):
        assert path == "org/name"
        assert revision is None
        return original(str(tmp_path / "hub"), config, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_hub(hub):
    assert read("org/name", config="main")[4] == ("org/name[train] row 5", ROWS[4])
    assert values("org/name", config="main", split="train[:20%]") == [0, 1]
    one, two = (fingerprint(Source("org/name", config="main", split=split)) for split in ("train", "train[:5]"))
    assert one != two
    assert one == fingerprint(Source("org/name", config="main", weight=2.0))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, ["org/name", "available configs", "'main', 'other'"]),
        ({"config": "mian"}, ["org/name", "config 'mian'", "Available", "'main', 'other'"]),
        ({"config": "main", "split": "test"}, ["org/name", "split 'test'", "'train'"]),
        ({"config": "other"}, ["org/name", "config 'other'", "JSON parse error"]),
    ],
)
def test_mistakes_about_hub_data(hub, fields, parts):
    message = mistake("org/name", **fields)
    assert len(message) < 420
    for part in parts:
        assert part in message


def test_hub_out_of_reach_or_without_the_data(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def failing(error):
        def load(*args, **kw):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)

    Path("gsm8k").mkdir()
    failing(ConnectionError("Couldn't reach 'gsm8' on the Hub (LocalEntryNotFoundError)"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    message = mistake("gsm8")
    for part in ("gsm8: no such file or directory", "did you mean 'gsm8k'?", "can't be reached", "HF_HUB_OFFLINE=1"):
        assert part in message
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "unset HF_HUB_OFFLINE" in mistake("gsm8")
    failing(DatasetNotFoundError("Dataset 'org/nmae' doesn't exist on the Hub or cannot be accessed."))
    message = mistake("org/nmae")
    assert "no such file or directory" in message
    assert "doesn't exist on the Hub" in message
    assert "hf auth login" in message


# --- fingerprints, held-out rows, entries


def test_fingerprint_follows_content_not_names():
    write("a.jsonl", lines(ROWS))
    write("elsewhere/b.jsonl", lines(ROWS))
    write("c.jsonl", lines(ROWS).replace("row 3", "row X"))
    write("a.txt", lines(ROWS))
    base = fingerprint(Source("a.jsonl"))
    assert len(base) == 32
    assert fingerprint(Source("elsewhere")) == base
    assert fingerprint(Source("a.jsonl", weight=3.0, format="alpaca", columns={"a": "b"})) == base
    others = [Source("c.jsonl"), Source("a.txt"), Source("a.jsonl", split="train[:5]"), Source("*.jsonl")]
    assert len({base, *map(fingerprint, others)}) == 5
    with pytest.raises(UserError, match="no such file"):
        fingerprint(Source("missing.jsonl"))


def test_as_sources():
    source = Source("b", weight=0.5)
    assert as_sources("a") == [Source("a")]
    assert as_sources(source) == [source]
    assert as_sources(["a", source]) == [Source("a"), source]
    with pytest.raises(UserError, match="a list of sources is empty"):
        as_sources([])


def test_source_from_yaml(tmp_path):
    from jsonargparse import ArgumentParser

    def train(train: str | Source | list[str | Source]):
        return train

    parser = ArgumentParser()
    parser.add_function_arguments(train)
    parser.add_argument("--config", action="config")
    write("a.yaml", "train: [a.jsonl, {path: org/name, split: 'train[:5%]', weight: 2, columns: {q: prompt}}]")
    config = parser.instantiate_classes(parser.parse_args(["--config", "a.yaml"]))
    expected = Source("org/name", split="train[:5%]", weight=2.0, columns={"q": "prompt"})
    assert as_sources(config.train) == [Source("a.jsonl"), expected]


@pytest.mark.skipif(not SHARED.exists(), reason="the shared folder of real data is absent")
def test_real_files():
    assert len(read(str(SHARED / "gsm8k"))) == 7473
    assert len(read(str(SHARED / "gsm8k"), split="test")) == 1319
    assert len(read(str(SHARED / "hh-rlhf" / "*.jsonl.gz"))) == 2312
    assert len(read(str(SHARED / "tinyshakespeare" / "input.txt"))) == 1


def test_the_rows_of_a_source_are_known_before_they_are_tokenized(tmp_path, monkeypatch):
    """For the progress of preparing: with samples, fractions and several files; None where it would be a guess."""
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Q{i}", "completion": "A"} for i in range(40)])
    assert expected_rows(Source(file)) == 40
    assert expected_rows(Source(str(tmp_path)), Side(0.1, is_held_out=True)) == 4
    assert expected_rows(Source(file, sample=10), Side(0.1, is_held_out=False)) == 9
    assert expected_rows(Source([{"text": "a"}] * 3)) == 3
    assert expected_rows(Source(file, where="prompt == 'Q1'")) is None
    assert expected_rows(Source(file, split="train[:5]")) is None
    totals = []
    monkeypatch.setattr("oumi_pl.data.store.track", lambda items, what, total: totals.append(total) or items)
    data = SFTData(file, 0.1, tokenizer=ByteTokenizer())
    data.setup("fit")
    assert totals == [36, 4]
