"""A sample has exactly as many rows as it should, however many the source has."""

from collections import Counter

import pytest

from oumi_pl.data.sources import Source, fingerprint, rows, sampled
from oumi_pl.errors import UserError
from tests.tiny import write_jsonl


def take(size, sample, seed=None):
    return list(sampled(lambda: iter(range(size)), sample, seed))


def test_without_a_seed_the_first_rows_are_taken_and_repeated():
    assert take(5, 3) == [0, 1, 2]
    assert take(3, 8) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert take(0, 3) == []


def test_with_a_seed_rows_are_drawn_and_keep_their_order():
    drawn = take(100, 10, seed=1)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn != take(100, 10, seed=2)
    assert drawn == take(100, 10, seed=1)
    assert drawn != list(range(10))


def test_each_row_is_taken_equally_often_and_some_once_more():
    counts = Counter(take(4, 10, seed=0))
    assert sum(counts.values()) == 10
    assert sorted(counts.values()) == [2, 2, 3, 3]
    assert take(0, 3, seed=0) == []


def test_less_than_one_row_is_refused():
    with pytest.raises(UserError, match="sample is 0"):
        take(3, 0)


def test_a_source_takes_a_sample_of_its_slice(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"n": i} for i in range(9)])
    assert [row["n"] for _, row in rows(Source(path, sample=2, split="train[4:]"))] == [4, 5]
    assert [origin[-2:] for origin, _ in rows(Source(path, sample=2))] == [":1", ":2"]


def test_a_sample_has_another_fingerprint_than_the_whole(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"n": i} for i in range(9)])
    keys = [Source(path), Source(path, sample=3), Source(path, sample=3, sample_seed=1), Source(path, sample=4)]
    assert len({fingerprint(source) for source in keys}) == 4
