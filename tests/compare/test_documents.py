"""One update, whatever layout it is read in, has one hash; any token or target that is another has another."""

import numpy as np
import pytest
import torch

from oumi_pl.compare.documents import digest, documents_of
from oumi_pl.data.collate import flatten_pairs, flatten_rows, pad_rows
from oumi_pl.types import Example, PreferenceExample

ROWS = [([i], [Example(np.arange(5, 5 + n), np.arange(n) >= m)]) for i, (n, m) in enumerate([(6, 3), (4, 1), (7, 6)])]
PAIRS = [
    ([0], [PreferenceExample(np.arange(10, 19), np.arange(9) >= 4, chosen_start=4, rejected_start=6)]),
    ([1], [PreferenceExample(np.arange(30, 35), np.arange(5) >= 1, chosen_start=1, rejected_start=3)]),
]


def unshifted(batch):
    """As transformers reads it: labels at the tokens' own positions."""
    labels = torch.full_like(batch["labels"], -100)
    labels[:, 1:] = batch["labels"][:, :-1]
    return {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")} | {"labels": labels}


def hashed(*batches):
    return digest(document for batch in batches for document in documents_of(batch))


def test_padded_packed_and_shuffled_micro_batches_hash_alike():
    whole = hashed(pad_rows(ROWS, 0))
    assert hashed(flatten_rows(ROWS, 0)) == whole
    assert hashed(pad_rows(ROWS[2:], 0), pad_rows(ROWS[:2], 0)) == whole
    assert hashed(unshifted(pad_rows(ROWS, 0))) == whole
    assert hashed(unshifted(flatten_rows(ROWS, 0))) == whole
    assert hashed(pad_rows(ROWS, 0), pad_rows([], 0)) == whole  # the stand-in of a short update


def test_pairs_with_a_shared_prompt_hash_as_two_rows_each():
    rows = []
    for _, (pair,) in PAIRS:
        start, border, n = pair.chosen_start, pair.rejected_start, len(pair.input_ids)
        for own in (np.r_[0:border], np.r_[0:start, border:n]):
            rows.append(([0], [Example(pair.input_ids[own], np.arange(len(own)) >= start)]))
    padded = pad_rows(rows, 0)
    theirs = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
    mask = torch.zeros_like(padded["input_ids"])
    mask[:, 1:] = padded["labels"][:, :-1] != -100
    assert hashed(flatten_pairs(PAIRS, 0)) == hashed(theirs | {"completion_mask": mask})


@pytest.mark.parametrize("change", ["token", "target", "shift"])
def test_whatever_changes_a_loss_changes_the_hash(change):
    batch = pad_rows(ROWS, 0)
    before = hashed(batch)
    if change == "token":
        batch["input_ids"][0, 1] += 1
    elif change == "target":
        batch["labels"][1, 0] = -100
    else:
        batch["labels"] = batch["labels"].roll(1, 1)
    assert hashed(batch) != before


def test_tokens_that_nothing_depends_on_do_not_count():
    batch, longer = pad_rows(ROWS, 0), pad_rows(ROWS, 7)
    longer["input_ids"][:, -1] = 9  # behind the last target of each
    assert hashed(longer) == hashed(batch)
