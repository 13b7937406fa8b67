"""Collating examples of segments: each target, what predicts it, and where every token is in its path."""

import random

import numpy as np
import pytest
import torch

from oumi_pl.data import collate as collating
from oumi_pl.data.collate import collate
from oumi_pl.types import Example, Segment
from tests.trees import naive_paths, random_example


def example(ids, mask):
    return Example(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool))


# The token 0 is pad, and a target as well: only positions decide what carries loss.
A = example([5, 6, 0, 8], [0, 0, 1, 1])
B = example([7, 0], [0, 1])


def test_documents_begin_at_position_zero_and_nothing_is_predicted_across_their_borders():
    batch = collate([([0, 1], [A, B]), ([0], [A])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 8, 7, 0, 5, 6, 0, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert batch["segments"] == [Segment(4), Segment(2), Segment(4)]
    assert batch["targets"].tolist() == [0, 8, 0, 0, 8]
    assert batch["predictors"].tolist() == [1, 2, 4, 7, 8]
    assert batch["target_segments"].tolist() == [0, 0, 1, 2, 2]
    assert batch["sample_ids"] == [0, 1, 0]
    assert batch["fields"] == {}


def test_one_example_per_row_and_packed_rows_give_the_same_batch():
    apart, packed = collate([([0], [A]), ([1], [B])], pad_id=0), collate([([0, 1], [A, B])], pad_id=0)
    assert differing(apart, packed) == []


def pair(prompt, chosen, rejected, mask, margin=float("nan")):
    """A prompt with the chosen response, and the rejected response, which continues the prompt."""
    segments = (Segment(len(prompt) + len(chosen)), Segment(len(rejected), parent=0, shared=len(prompt)))
    ids = np.array([*prompt, *chosen, *rejected], dtype=np.int32)
    return Example(ids, np.array([0] * len(prompt) + mask, dtype=bool), segments, {"margin": margin})


P = pair([1, 2], [3, 0], [0, 5, 6], [1, 1, 1, 0, 1], margin=0.5)
R = pair([7], [8], [9], [1, 1])


def test_both_responses_continue_the_prompt_and_are_predicted_from_its_end():
    batch = collate([([4, 0], [P, R]), ([4], [P])], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 5, 6, 7, 8, 9, 1, 2, 3, 0, 0, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 1, 0, 1, 2, 3, 2, 3, 4]]
    expected = [(4, -1, 0), (3, 0, 2), (2, -1, 0), (1, 2, 1), (4, -1, 0), (3, 4, 2)]
    assert batch["segments"] == expected
    assert batch["targets"].tolist() == [3, 0, 0, 6, 8, 9, 3, 0, 0, 6]
    assert batch["predictors"].tolist() == [1, 2, 1, 5, 7, 7, 11, 12, 11, 15]
    assert batch["target_segments"].tolist() == [0, 0, 1, 1, 2, 3, 4, 4, 5, 5]
    assert batch["fields"]["margin"].nan_to_num(-1).tolist() == [0.5, -1, 0.5]
    assert batch["sample_ids"] == [4, 0, 4]


# ---- trees of any depth


def naive_batch(rows):
    """Every path of every example as a sequence of its own, whose tokens remember where in the row they lie."""
    ids, positions, segments, targets = [], [], [], []
    for example in (example for _, row in rows for example in row):
        start, first = len(ids), len(segments)
        ids += example.input_ids.tolist()
        for i, (segment, path) in enumerate(zip(example.segments, naive_paths(example.segments), strict=True)):
            for k in range(segment.shared, len(path)):
                positions.append(k)
                if example.loss_mask[path[k]]:
                    targets.append((int(example.input_ids[path[k]]), start + path[k - 1], first + i))
            segments.append(segment if segment.parent < 0 else segment._replace(parent=segment.parent + first))
    tokens, predictors, owners = zip(*targets, strict=True) if targets else ((), (), ())
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "segments": segments,
        "targets": torch.tensor(tokens, dtype=torch.long),
        "predictors": torch.tensor(predictors, dtype=torch.long),
        "target_segments": torch.tensor(owners, dtype=torch.long),
        "fields": {
            name: torch.tensor([e.fields[name] for _, row in rows for e in row]) for name in rows[0][1][0].fields
        },
        "sample_ids": [i for numbers, _ in rows for i in numbers],
    }


def differing(batch, expected):
    """The entries of two batches that are not equal; NaN equals NaN."""

    def equal(one, other):
        if isinstance(one, torch.Tensor):
            return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.is_floating_point())
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
        return one == other

    assert batch.keys() == expected.keys()
    return [name for name in expected if not equal(batch[name], expected[name])]


def random_rows(seed, depth):
    """Rows of the plan: several examples in some, trees of up to `depth` segments below each other."""
    rng = random.Random(seed)
    depths = [depth, *(rng.randint(1, depth) for _ in range(rng.randint(0, 4)))]
    examples = [random_example(rng, deep, fields=("margin", "score")) for deep in depths]
    split, numbers = rng.randint(0, len(examples) - 1), rng.sample(range(100), len(examples))
    rows = [(numbers[:split], examples[:split]), (numbers[split:], examples[split:])]
    return [row for row in rows if row[0]]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_collate_equals_a_naive_loop_over_the_paths_of_random_trees(depth):
    for seed in range(60):
        rows = random_rows(seed, depth)
        batch = collate(rows, pad_id=0)
        assert differing(batch, naive_batch(rows)) == []
        assert batch["target_segments"].tolist() == sorted(batch["target_segments"].tolist())


def token_before_in_the_row(example, at, starts):
    return at - 1


def end_of_the_parent(example, at, starts):
    """As if each segment continued all of its parent's path."""
    before, ends = at - 1, np.cumsum([segment.length for segment in example.segments])
    for i, segment in enumerate(example.segments):
        if segment.shared:
            before[at == starts[i]] = ends[segment.parent] - 1
    return before


FAULTS = {
    "predictors": [("_predictors", token_before_in_the_row), ("_predictors", end_of_the_parent)],
    "position_ids": [("position_ids", lambda segments: np.arange(sum(s.length for s in segments)))],
    "target_segments": [("segment_starts", lambda segments: [i and 1 << 20 for i in range(len(segments) + 1)])],
}


@pytest.mark.parametrize(("entry", "fault"), [(entry, fault) for entry, faults in FAULTS.items() for fault in faults])
def test_the_naive_loop_catches_planted_faults(monkeypatch, entry, fault):
    monkeypatch.setattr(collating, *fault)
    actual = [differing(collate(rows, pad_id=0), naive_batch(rows)) for rows in (random_rows(s, 3) for s in range(20))]
    assert sum(entry in names for names in actual) > 10


# ---- the stand-in


def test_the_stand_in_has_two_tokens_and_no_targets():
    batch = collate([], pad_id=3)
    assert batch["input_ids"].tolist() == [[3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1]]
    assert batch["segments"] == [Segment(2)]
    for name in ("targets", "predictors", "target_segments"):
        assert batch[name].shape == (0,)
    assert batch["fields"] == {}
    assert batch["sample_ids"] == []


def test_tensors_have_one_type_with_and_without_rows():
    for batch in (collate([], pad_id=3), collate([([0], [R])], pad_id=3), collate([([0], [example([5], [0])])], 3)):
        tensors = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
        names = ("input_ids", "position_ids", "targets", "predictors", "target_segments")
        assert tensors == dict.fromkeys(names, torch.int64)
        assert {value.dtype for value in batch["fields"].values()} <= {torch.float32}
