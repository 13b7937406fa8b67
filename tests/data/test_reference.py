"""Cached reference log-probabilities: read by example, in whole chunks, and only for the model and data they are of."""

import numpy as np
import pytest

from oumi_pl.data import reference
from oumi_pl.data.reference import ReferenceLogps
from tests.tiny import dpo_data

COUNTS = np.array([3, 1, 4, 1, 5, 9, 2])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 3)


def numbers(store, chunk):
    """Of token `t` of example `i`: `i + t / 10`."""
    return np.concatenate([i + np.arange(COUNTS[i]) / 10 for i in store.examples(chunk)]).astype(np.float32)


@pytest.fixture
def store():
    built = ReferenceLogps({"model": "a"}, COUNTS)
    for chunk in range(built.chunks):
        built.write(chunk, numbers(built, chunk))
    return built


def test_chunks_cover_the_examples_in_order(store):
    assert [list(store.examples(chunk)) for chunk in range(store.chunks)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_examples_may_be_read_in_any_order(store):
    again = ReferenceLogps({"model": "a"}, COUNTS)
    assert again.missing() == []
    for ids in ([0], [6, 0, 5], [4, 4], range(7), []):
        expected = [i + t / 10 for i in ids for t in range(COUNTS[i])]
        actual = again.logps(ids)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_chunks_that_were_not_written_are_missing():
    store = ReferenceLogps({"model": "a"}, COUNTS)
    assert store.missing() == [0, 1, 2]
    store.write(1, numbers(store, 1))
    assert store.missing() == [0, 2]
    assert ReferenceLogps({"model": "a"}, COUNTS).missing() == [0, 2]
    assert ReferenceLogps({"model": "b"}, COUNTS).missing() == [0, 1, 2]
    assert ReferenceLogps({"model": "a", "precision": "32-true"}, COUNTS).missing() == [0, 1, 2]


@pytest.mark.parametrize("damage", [lambda content: content[:-4], lambda content: content + bytes(4), lambda _: b""])
def test_a_file_of_another_size_is_missing(store, damage):
    file = store.directory / "000001.bin"
    file.write_bytes(damage(file.read_bytes()))
    again = ReferenceLogps({"model": "a"}, COUNTS)
    assert again.missing() == [1]
    again.write(1, numbers(again, 1))
    assert again.missing() == []
    assert again.logps([5]).tolist() == pytest.approx([5 + t / 10 for t in range(9)])


def test_a_flipped_bit_anywhere_makes_a_chunk_missing(store, capsys):
    file = store.directory / "000001.bin"
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert ReferenceLogps({"model": "a"}, COUNTS).missing() == [1], place
    assert "000001.bin is damaged; its reference log-probabilities are computed again" in capsys.readouterr().err
    file.write_bytes(whole)
    assert ReferenceLogps({"model": "a"}, COUNTS).missing() == []


def test_a_chunk_of_an_older_version_has_no_checksum_and_is_read(store):
    file = store.directory / "000001.bin"
    file.write_bytes(file.read_bytes()[: -len(reference.MARK) - 4])
    again = ReferenceLogps({"model": "a"}, COUNTS)
    assert again.missing() == []
    assert again.logps([5]).tolist() == pytest.approx([5 + t / 10 for t in range(9)])


def test_a_kill_while_writing_leaves_the_chunk_missing(monkeypatch):
    store = ReferenceLogps({"model": "a"}, COUNTS)

    def killed(*_):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("os.fsync", killed)
        store.write(0, numbers(store, 0))
    assert store.missing() == [0, 1, 2]
    store.write(0, numbers(store, 0))
    assert store.logps([1]).tolist() == [1.0]


def test_higher_precision_is_kept_as_float32():
    store = ReferenceLogps({"model": "a"}, COUNTS)
    store.write(2, np.array([0.1, 0.2], dtype=np.float64))
    assert store.missing() == [0, 1]
    assert store.logps([6]).tolist() == np.array([0.1, 0.2], dtype=np.float32).tolist()


def test_the_directory_says_what_the_numbers_were_made_from(store):
    assert '"model": "a"' in (store.directory / "made_from.json").read_text()


def test_other_pairs_have_another_directory(tmp_path):
    def place(**kwargs):
        return dpo_data(tmp_path, **{"n": 6} | kwargs).reference_logps("train", {"model": "a"}).directory

    expected = place()
    assert place() == place(batch_size=1, packing=True) == expected
    others = [place(seed=1), place(n=5), place(max_length=60), place(template="plain"), place(overflow="drop")]
    assert len({expected, *others}) == 1 + len(others)


def test_there_is_a_number_for_every_target_of_every_source(tmp_path):
    data = dpo_data(tmp_path, 6)
    data.sources["train"] = [data.sources["train"], dpo_data(tmp_path, 5, seed=2).sources["train"]]
    store, examples = data.reference_logps("train", {}), data.examples("train")
    assert np.diff(store.offsets).tolist() == [examples[i].target_tokens for i in range(11)]
