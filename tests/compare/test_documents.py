"""One update has one hash in any layout, and another hash if any token or target differs."""

import numpy as np
import pytest
import torch

from oumi_pl.adapters.batches import pair_inputs, token_inputs
from oumi_pl.compare.worker import digest, documents_of
from oumi_pl.data.collate import collate
from oumi_pl.models.lm import documents, padded
from oumi_pl.types import Example, Segment

ROWS = [([i], [Example(np.arange(5, 5 + n), np.arange(n) >= m)]) for i, (n, m) in enumerate([(6, 3), (4, 1), (7, 6)])]
PAIRS = [
    ([0], [Example(np.arange(10, 19), np.arange(9) >= 4, (Segment(6), Segment(3, 0, 4)))]),
    ([1], [Example(np.arange(30, 35), np.arange(5) >= 1, (Segment(3), Segment(2, 0, 1)))]),
]


def theirs(rows, layout=padded):
    """As transformers reads it: labels at the tokens' own positions."""
    batch = token_inputs(collate(rows, 0), layout)
    del batch["shift_labels"]
    return batch


def hashed(*batches):
    return digest(document for batch in batches for document in documents_of(batch))


def test_padded_packed_and_shuffled_micro_batches_hash_alike():
    whole = hashed(collate(ROWS, 0))
    assert hashed(collate(ROWS[2:], 0), collate(ROWS[:2], 0)) == whole
    for layout in (padded, documents):
        assert hashed(token_inputs(collate(ROWS, 0), layout)) == whole
        assert hashed(theirs(ROWS, layout)) == whole
        assert hashed(theirs(ROWS[2:], layout), theirs(ROWS[:2], layout)) == whole
    assert hashed(collate(ROWS, 0), collate([], 0)) == whole  # the stand-in of a short update
    assert hashed(theirs(ROWS), theirs([])) == whole


def test_pairs_with_a_shared_prompt_hash_as_two_rows_each():
    rows = []
    for _, (pair,) in PAIRS:
        (border, *_), (_, _, start), n = *pair.segments, len(pair.input_ids)
        for own in (np.r_[0:border], np.r_[0:start, border:n]):
            rows.append(([0], [Example(pair.input_ids[own], np.arange(len(own)) >= start)]))
    alone = hashed(collate(rows, 0))
    batch = theirs(rows)
    by_mask = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    by_mask["completion_mask"] = (batch["labels"] != -100).long()
    assert hashed(by_mask) == alone
    assert hashed(collate(PAIRS, 0)) == alone
    assert hashed(pair_inputs(collate(PAIRS, 0))) == alone
    assert hashed(pair_inputs(collate(PAIRS, 0)), pair_inputs(collate([], 0))) == alone


def test_a_tree_of_segments_hashes_as_its_paths():
    segments = (Segment(6), Segment(3, 0, 4), Segment(2, 1, 6))
    tree = Example(np.arange(10, 21), np.arange(11) >= 3, segments)
    rows = [
        ([i], [Example(np.array(ids), np.array(mask, dtype=bool))])
        for i, (ids, mask) in enumerate(
            [
                ([10, 11, 12, 13, 14, 15], [0, 0, 0, 1, 1, 1]),
                ([10, 11, 12, 13, 16, 17, 18], [0, 0, 0, 0, 1, 1, 1]),
                ([10, 11, 12, 13, 16, 17, 19, 20], [0, 0, 0, 0, 0, 0, 1, 1]),
            ]
        )
    ]
    whole = hashed(collate(rows, 0))
    assert hashed(collate([([0], [tree])], 0)) == whole
    for layout in (padded, documents):
        assert hashed(theirs([([0], [tree])], layout)) == whole
        assert hashed(token_inputs(collate([([0], [tree])], 0), layout)) == whole


@pytest.mark.parametrize("layout", [None, padded])
@pytest.mark.parametrize("change", ["token", "target", "shift"])
def test_whatever_changes_a_loss_changes_the_hash(change, layout):
    batch = collate(ROWS, 0)
    before = hashed(batch)
    if layout is not None:
        batch = theirs(ROWS, layout)
        assert hashed(batch) == before
    if change == "token":
        batch["input_ids"][0, 1] += 1
    elif layout is None:
        for name in ("targets", "predictors", "target_segments"):
            if change == "target":
                batch[name] = batch[name][1:]
        if change == "shift":
            batch["targets"] = batch["targets"].roll(1)
    elif change == "target":
        batch["labels"][1, 1] = -100
    else:
        batch["labels"] = batch["labels"].roll(1, 1)
    assert hashed(batch) != before


def test_tokens_that_nothing_depends_on_do_not_count():
    """What lies behind the last target of a document, and padding."""
    longer = [(ids, [Example(np.append(row.input_ids, 9), np.append(row.loss_mask, False))]) for ids, (row,) in ROWS]
    assert hashed(collate(longer, 0)) == hashed(collate(ROWS, 0))
    batch = theirs(ROWS)
    batch["input_ids"][batch["attention_mask"] == 0] = 9
    assert hashed(batch) == hashed(collate(ROWS, 0))
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([6, 4, 7]))
