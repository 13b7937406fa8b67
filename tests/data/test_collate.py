"""Collating: labels meet their positions here, and nothing else carries loss."""

import numpy as np

from oumi_pl.data.collate import flatten_rows, pad_rows
from oumi_pl.types import IGNORE_INDEX, Example


def example(ids, mask):
    return Example(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool))


# the token 0 is pad, and a target as well: only positions decide
A = example([5, 6, 0, 8], [0, 0, 1, 1])
B = example([7, 0], [0, 1])


def test_padded_labels_are_shifted_once_and_pad_ids_that_are_targets_stay():
    batch = pad_rows([([0], [A]), ([1], [B])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 8], [7, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 8, -100], [0, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch["sample_ids"] == [0, 1]


def test_flattened_documents_start_at_position_zero_and_predict_nothing_across_borders():
    batch = flatten_rows([([0, 1], [A, B]), ([0], [A])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 8, 7, 0, 5, 6, 0, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 0, 8, -100, 0, -100, -100, 0, 8, -100]]
    assert batch["document_lengths"] == [4, 2, 4]
    assert "attention_mask" not in batch


def test_an_empty_micro_batch_has_no_targets():
    for collate in (pad_rows, flatten_rows):
        batch = collate([], pad_id=3)
        assert (batch["labels"] == IGNORE_INDEX).all()
        assert batch["sample_ids"] == []
