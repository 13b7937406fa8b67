"""Random trees of segments, and what their paths are by definition: the reference of collating, stores and layouts."""

import random

import numpy as np
import torch

from oumi_pl.data.collate import collate
from oumi_pl.types import Batch, Example, Segment


def random_tree(rng: random.Random, depth: int, segments: int = 6, longest: int = 5) -> tuple[Segment, ...]:
    """Segments of one example, up to `depth` below each other; some continue only the beginning of their parent."""
    tree = [Segment(rng.randint(1, longest))]
    depths, paths = [1], [tree[0].length]
    while len(tree) < segments and (max(depths) < depth or rng.random() < 0.7):
        able = [i for i in range(len(tree)) if depths[i] < depth]
        if not able:
            break
        parent = len(tree) - 1 if max(depths) < depth else rng.choice(able)
        shared = rng.randint(1, paths[parent])
        tree.append(Segment(rng.randint(1, longest), parent, shared))
        depths.append(depths[parent] + 1)
        paths.append(shared + tree[-1].length)
    assert max(depths) == depth
    return tuple(tree)


def random_example(
    rng: random.Random, depth: int = 1, vocabulary: int = 50, fields: tuple[str, ...] = (), longest: int = 5
) -> Example:
    """A tree of random tokens, about half of which carry loss; the first of the root doesn't."""
    tree = random_tree(rng, depth, max(depth, rng.randint(1, 6)) if depth > 1 else 1, longest)
    tokens = sum(segment.length for segment in tree)
    return Example(
        np.array([rng.randrange(vocabulary) for _ in range(tokens)], dtype=np.int32),
        np.array([False] + [rng.random() < 0.5 for _ in range(tokens - 1)]),
        tree,
        {name: rng.choice([float("nan"), rng.uniform(-2, 2)]) for name in fields},
    )


def naive_paths(segments) -> list[list[int]]:
    """For each segment, the positions in the row of all tokens of its path, by walking up the parents."""
    paths: list[list[int]] = []
    start = 0
    for length, parent, shared in segments:
        before = paths[parent][:shared] if shared else []
        paths.append([*before, *range(start, start + length)])
        start += length
    return paths


def pair_lengths(example: Example) -> tuple[int, int, int]:
    """Tokens of the prompt, the chosen and the rejected response of a preference pair."""
    (first, parent, shared), (rejected, of_first, prompt) = example.segments
    assert (parent, shared, of_first) == (-1, 0, 0)
    return prompt, first - prompt, rejected


def batch_of(*examples: Example) -> Batch:
    """A batch of examples, numbered from 0."""
    return collate([([i], [example]) for i, example in enumerate(examples)], pad_id=0)


def batch_of_rows(input_ids: torch.Tensor, labels: torch.Tensor) -> Batch:
    """A batch of documents of equal length, with something to predict at every position. Both `[rows, length]`."""
    rows, length = input_ids.shape
    return {
        "input_ids": input_ids.reshape(1, -1),
        "position_ids": torch.arange(length).repeat(rows)[None],
        "segments": [Segment(length)] * rows,
        "targets": labels.flatten(),
        "predictors": torch.arange(rows * length),
        "target_segments": torch.arange(rows).repeat_interleave(length),
        "fields": {},
        "sample_ids": list(range(rows)),
    }
