"""Collating: labels meet their positions here, and nothing else carries loss."""

import random

import numpy as np
import torch

from oumi_pl.data.collate import flatten_pairs, flatten_rows, pad_rows
from oumi_pl.types import IGNORE_INDEX, Example, PreferenceExample


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


def pair(prompt, chosen, rejected, mask, margin=float("nan")):
    ids, first = [*prompt, *chosen, *rejected], len(prompt)
    added = {"chosen_start": first, "rejected_start": first + len(chosen), "margin": margin}
    return PreferenceExample(np.array(ids, dtype=np.int32), np.array([0] * first + mask, dtype=bool), **added)


P = pair([1, 2], [3, 0], [0, 5, 6], [1, 1, 1, 0, 1], margin=0.5)
R = pair([7], [8], [9], [1, 1])


def test_both_responses_continue_the_prompt_and_are_predicted_from_its_end():
    batch = flatten_pairs([([4, 0], [P, R]), ([4], [P])], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 5, 6, 7, 8, 9, 1, 2, 3, 0, 0, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 1, 0, 1, 2, 3, 2, 3, 4]]
    assert batch["pair_lengths"] == [(2, 2, 3), (1, 1, 1), (2, 2, 3)]
    assert batch["targets"].tolist() == [3, 0, 0, 6, 8, 9, 3, 0, 0, 6]
    assert batch["predictors"].tolist() == [1, 2, 1, 5, 7, 7, 11, 12, 11, 15]
    assert batch["branches"].tolist() == [0, 0, 1, 1, 2, 3, 4, 4, 5, 5]
    assert batch["margins"].nan_to_num(-1).tolist() == [0.5, -1, 0.5]
    assert batch["sample_ids"] == [4, 0, 4]


def naive_pairs(examples):
    """Every branch as a sequence of its own, whose tokens remember where in the row they lie."""
    row, positions, targets = [], [], []
    for i, example in enumerate(examples):
        start, first, second = len(row), example.chosen_start, example.rejected_start
        places = [
            (start + t, int(example.input_ids[t]), bool(example.loss_mask[t])) for t in range(len(example.input_ids))
        ]
        at = {}
        for branch, response in ((0, places[first:second]), (1, places[second:])):
            sequence = places[:first] + response
            at |= {place: position for position, (place, _, _) in enumerate(sequence)}
            for t in range(1, len(sequence)):
                place, token, loss = sequence[t]
                if loss:
                    targets.append((place, token, sequence[t - 1][0], 2 * i + branch))
        row += [token for _, token, _ in places]
        positions += [at[place] for place, _, _ in places]
    return row, positions, [target[1:] for target in sorted(targets)]


def test_flattened_pairs_are_what_a_naive_loop_makes_of_their_branches():
    rng = random.Random(0)

    def ids(most):
        return [rng.randrange(50) for _ in range(rng.randint(1, most))]

    for _ in range(200):
        examples = []
        for _ in range(rng.randint(1, 5)):
            prompt, chosen, rejected = ids(6), ids(6), ids(6)
            # the first token of a response always carries loss
            masks = [[1] + [rng.randint(0, 1) for _ in response[1:]] for response in (chosen, rejected)]
            examples.append(pair(prompt, chosen, rejected, [*masks[0], *masks[1]]))
        numbers = list(range(len(examples)))
        split = rng.randint(0, len(examples))
        rows = [(numbers[:split], examples[:split]), (numbers[split:], examples[split:])]
        batch = flatten_pairs(rows, pad_id=0)
        row, positions, targets = naive_pairs(examples)
        assert batch["input_ids"].tolist() == [row]
        assert batch["position_ids"].tolist() == [positions]
        made = (batch["targets"].tolist(), batch["predictors"].tolist(), batch["branches"].tolist())
        assert list(zip(*made, strict=True)) == targets
        assert made[2] == sorted(made[2])
        assert batch["pair_lengths"] == [example.lengths for example in examples]
        assert batch["sample_ids"] == numbers


def test_the_stand_in_for_pairs_is_one_pair_without_targets():
    batch = flatten_pairs([], pad_id=3)
    assert batch["input_ids"].tolist() == [[3, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 1]]
    assert batch["pair_lengths"] == [(1, 1, 1)]
    for name in ("targets", "predictors", "branches"):
        assert batch[name].shape == (0,)
    assert batch["margins"].isnan().tolist() == [True]
    assert batch["sample_ids"] == []


def test_the_tensors_of_pairs_have_one_type_with_and_without_rows():
    for batch in (flatten_pairs([], pad_id=3), flatten_pairs([([0], [R])], pad_id=3)):
        assert {name: v.dtype for name, v in batch.items() if isinstance(v, torch.Tensor)} == {
            **dict.fromkeys(("input_ids", "position_ids", "targets", "predictors", "branches"), torch.int64),
            "margins": torch.float32,
        }
