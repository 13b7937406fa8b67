"""Batches as engines read them, against tables written by hand; and the loader that goes through all epochs."""

import pytest
import torch

from oumi_pl.adapters.batches import EngineLoader, pair_inputs, target_values, token_inputs
from oumi_pl.data.collate import collate
from oumi_pl.data.row_stream import batch_of
from oumi_pl.data.windows import Row
from oumi_pl.errors import UserError
from oumi_pl.models.lm import documents, padded
from oumi_pl.types import Example, Segment
from tests.tiny import data

NO = -100


def example(ids, targets, *segments):
    """Targets are the positions of the tokens that carry loss."""
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[list(targets)] = True
    return Example(torch.tensor(ids).numpy(), mask.numpy(), segments)


ROWS = [([0], [example([11, 12, 13], [1, 2])]), ([1], [example([21, 22, 23, 24], [3])])]
PAIRS = [
    ([0], [example([1, 2, 31, 32, 41], [2, 3, 4], Segment(4), Segment(1, 0, 2))]),
    ([1], [example([5, 51, 61, 62], [1, 2, 3], Segment(2), Segment(2, 0, 1))]),
]


def lists(batch):
    return {name: value.tolist() for name, value in batch.items()}


def test_padded_rows():
    assert lists(token_inputs(collate(ROWS, 0), padded)) == {
        "input_ids": [[11, 12, 13, 11], [21, 22, 23, 24]],  # padding repeats any token
        "position_ids": [[0, 1, 2, 3]] * 2,
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[NO, 12, 13, NO], [NO, NO, NO, 24]],
        "shift_labels": [[12, 13, NO, NO], [NO, NO, 24, NO]],
    }


def test_a_packed_row():
    expected = {
        "input_ids": [[11, 12, 13, 21, 22, 23, 24]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3]],
        "labels": [[NO, 12, 13, NO, NO, NO, 24]],
        "shift_labels": [[12, 13, NO, NO, NO, 24, NO]],
    }
    assert lists(token_inputs(collate(ROWS, 0), documents)) == expected
    own_loss = token_inputs(collate(ROWS, 0), documents, labels_are_shifted=True)
    assert lists(own_loss) == expected | {"labels": expected["shift_labels"]}


def test_shared_tokens_are_repeated():
    """The first token of a segment is predicted in its own row, and not in that of the segment which it continues."""
    tree = [([0], [example([1, 2, 31, 32, 41], [1, 2, 3, 4], Segment(4), Segment(1, 0, 2))])]
    batch = lists(token_inputs(collate(tree, 0), documents))
    assert batch["input_ids"] == [[1, 2, 31, 32, 1, 2, 41]]
    assert batch["labels"] == [[NO, 2, 31, 32, NO, NO, 41]]


def test_the_last_position_of_a_row_predicts_the_next_rows_first_token():
    stream = [Row(*(torch.tensor(x).numpy() for x in row)) for row in (([1, 2], [2, 3], [2]), ([3, 4], [4, 5], [2]))]
    batch = lists(token_inputs(batch_of(stream, [0, 1], 0), padded))
    assert batch["input_ids"] == [[1, 2], [3, 4]]
    assert batch["labels"] == [[NO, 2], [NO, 4]]
    assert batch["shift_labels"] == [[2, 3], [4, 5]]


def test_pairs():
    native = collate(PAIRS, 0)
    batch = pair_inputs(native)
    assert lists(batch) == {
        "input_ids": [[1, 2, 31, 32], [5, 51, 1, 1], [1, 2, 41, 1], [5, 61, 62, 1]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]],
        "completion_mask": [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]],
    }
    assert torch.equal(target_values(batch["input_ids"][:, 1:], batch["completion_mask"]), native["targets"])


def test_the_stand_in_of_a_short_update_has_no_targets():
    assert set(token_inputs(collate([], 0), padded)["shift_labels"].view(-1).tolist()) == {NO}
    batch = pair_inputs(collate([], 0))
    assert len(batch["input_ids"]) == 2  # TRL takes the first half as chosen
    assert not batch["completion_mask"].any()
    assert len(target_values(batch["input_ids"][:, 1:], batch["completion_mask"])) == 0


def test_all_epochs_in_sequence(tmp_path):
    rows = data(tmp_path, 10, batch_size=2)
    rows.micro_batches = 3
    rows.prepare_data()
    rows.setup("fit")
    loader = EngineLoader(rows.train_dataloader(), lambda batch: token_inputs(batch, padded), 3)
    steps = []
    for i, batch in zip(range(12), loader, strict=False):
        assert batch is loader.update[i % 3]
        steps.append((loader.epoch, loader.fetched, loader.is_epoch_end, len(batch.native["sample_ids"])))
    # two updates of three micro-batches: the last update has 4 rows
    sizes = [2, 2, 2, 2, 2, 0]
    assert steps == [(epoch, i + 1, i == 5, sizes[i]) for epoch in (0, 1) for i in range(6)]


def test_an_epoch_without_rows():
    class Empty:
        def __init__(self):
            self.sampler = self

        def __iter__(self):
            return iter(())

        def set_epoch(self, epoch):
            pass

    with pytest.raises(UserError, match="an epoch has no rows"):
        next(iter(EngineLoader(Empty(), token_inputs, 1)))
