"""Windows: every token is a label exactly once, rows are full, isolated documents stay apart; resumable anywhere."""

import random

import numpy as np
import pytest

from oumi_pl.data.plan import pack
from oumi_pl.data.windows import BUFFERED_ROWS, BestFit, Concat
from oumi_pl.types import IGNORE_INDEX

KINDS = [(kind, isolate) for kind in (Concat, BestFit) for isolate in (False, True)]


def numbered(lengths):
    """Documents whose ids count through: a label is right if it is its input plus one."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.uint32) for length, end in zip(lengths, ends, strict=True)]


def ragged(n=60, seed=0, longest=60):
    rng = random.Random(seed)
    return [rng.randint(1, longest) for _ in range(n)]


def rows(windows, documents):
    return [row for ids in documents for row in windows.rows(ids)] + list(windows.finish())


def targets(found):
    return [label for row in found for label in row.labels.tolist() if label != IGNORE_INDEX]


@pytest.mark.parametrize(("kind", "isolate"), KINDS)
@pytest.mark.parametrize("max_length", [1, 7, 16, 200])
def test_every_token_is_a_label_once_and_follows_its_input(kind, isolate, max_length):
    documents = numbered(ragged())
    actual = rows(kind(max_length, isolate), documents)
    firsts = [int(ids[0]) for ids in documents]
    missing = firsts[:1] if kind is Concat and not isolate else firsts
    everything = set(range(int(documents[-1][-1]) + 1))
    assert sorted(targets(actual)) == sorted(everything - set(missing))
    for row in actual:
        assert len(row.input_ids) == len(row.labels) == row.lengths.sum() <= max_length
        carries = row.labels != IGNORE_INDEX
        assert (row.labels[carries] == row.input_ids[carries] + 1).all()


def test_concat_fills_every_row_but_the_last_and_keeps_the_order():
    documents = numbered(ragged())
    actual = rows(Concat(16, False), documents)
    assert [len(row.input_ids) for row in actual[:-1]] == [16] * (len(actual) - 1)
    assert np.concatenate([row.input_ids for row in actual]).tolist() == list(range(int(documents[-1][-1])))


@pytest.mark.parametrize("kind", [Concat, BestFit])
def test_isolated_documents_stay_apart(kind):
    documents = numbered(ragged())
    firsts = {int(ids[0]) for ids in documents}
    for row in rows(kind(16, True), documents):
        assert (row.lengths > 0).all()
        for piece in np.split(row.input_ids, np.cumsum(row.lengths)[:-1]):
            assert (np.diff(piece) == 1).all()
            assert not firsts & set(piece[1:].tolist()), "a document begins in the middle of another"


def test_best_fit_cuts_no_document_that_fits_into_a_row():
    documents = numbered(ragged(300, longest=30))
    for isolate in (False, True):
        actual = rows(BestFit(29 if isolate else 30, isolate), documents)
        starts = {int(piece[0]) for row in actual for piece in np.split(row.input_ids, np.cumsum(row.lengths)[:-1])}
        if isolate:
            assert starts == {int(ids[0]) for ids in documents if len(ids) > 1}
        inputs = [set(row.input_ids.tolist()) for row in actual]
        assert all(any(set(ids.tolist()[:-1]) <= row for row in inputs) for ids in documents)


def test_best_fit_of_a_buffer_fills_nearly_as_well_as_that_of_everything():
    lengths = ragged(4000, longest=60)
    actual = rows(BestFit(64, True), numbered(lengths))
    assert sum(lengths) > 5 * BUFFERED_ROWS * 64, "several buffers"
    sizes = np.array([length - 1 for length in lengths if length > 1])
    best = len(pack(sizes, 64)[1]) - 1
    assert len(actual) <= best * 1.03


@pytest.mark.parametrize(("kind", "isolate"), KINDS)
@pytest.mark.parametrize("max_length", [1, 5, 16])
def test_rows_are_counted_without_making_them(kind, isolate, max_length):
    for seed in range(5):
        lengths = ragged(200, seed)
        expected = rows(kind(max_length, isolate), numbered(lengths))
        assert kind(max_length, isolate).count(iter(lengths)) == len(expected)


@pytest.mark.parametrize(("kind", "isolate"), KINDS)
def test_restored_windows_yield_the_remaining_rows(kind, isolate):
    documents = numbered(ragged(400))
    whole = rows(kind(16, isolate), documents)
    first, second = kind(16, isolate), kind(16, isolate)
    before = [row for ids in documents[:250] for row in first.rows(ids)]
    carried, length = first.state()
    list(first.rows(documents[250]))  # what comes later changes nothing in what was noted
    second.restore([ids.astype(np.int32) for ids in carried[:length]])
    after = rows(second, documents[250:])
    assert [r.input_ids.tolist() for r in before + after] == [r.input_ids.tolist() for r in whole]
    assert [r.labels.tolist() for r in before + after] == [r.labels.tolist() for r in whole]


def test_a_single_token_makes_no_row():
    assert rows(Concat(8, False), numbered([1])) == []
    assert rows(BestFit(8, True), numbered([1, 1])) == []
