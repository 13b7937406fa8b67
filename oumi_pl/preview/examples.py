"""Examples of SFT and DPO as their batch shows them: what is marked are the labels, or targets, of that very batch."""

import copy
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from oumi_pl.data.chat import ChatData
from oumi_pl.data.examples import ExampleData
from oumi_pl.errors import UserError
from oumi_pl.preview.pieces import Decoder, Piece
from oumi_pl.preview.rows import Found, row_count, walk
from oumi_pl.preview.shown import Mark, Section, Shown
from oumi_pl.types import IGNORE_INDEX, Example, PreferenceExample

# ---- which


def first(data: ExampleData, split: str, count: int) -> list[Found]:
    """The first examples of a split."""
    return list(itertools.islice(walk(data, split, lambda row, index: index is not None), count))


def numbered(data: ExampleData, split: str, rows: Sequence[int]) -> list[Found]:
    """The rows of these numbers, counted from 1 as they are read.

    Raises:
        UserError: there are fewer rows.
    """
    there = row_count(data, split)
    for row in rows:
        if not 1 <= row <= there:
            raise UserError(f"--row {row}: the {split} split has rows 1 to {there:,}")
    asked = set(rows)
    found = itertools.islice(walk(data, split, lambda row, index: row in asked), len(asked))
    by_number = {row.number: row for row in found}
    return [by_number[row] for row in dict.fromkeys(rows)]


def longest(data: ExampleData, split: str, count: int) -> list[Found]:
    """The examples of the most tokens, the longest first."""
    order = np.argsort(-data.lengths(split), kind="stable")[:count].tolist()
    asked = set(order)
    found = itertools.islice(walk(data, split, lambda row, index: index in asked), len(asked))
    return sorted(found, key=lambda row: order.index(row.example))


def cut(data: ExampleData, split: str, count: int) -> list[Found]:
    """The first examples that tokens were cut off."""
    if not any(store.report["cut"] for store in data.stores(split)):
        return []
    full = data.lengths(split) >= data.max_length  # no shorter one can have been cut
    found = walk(data, split, lambda row, index: index is not None and bool(full[index]))
    return list(itertools.islice((row for row in found if row.cut), count))


def dropped(data: ExampleData, split: str, count: int) -> list[Found]:
    """The first rows that were dropped."""
    missing = row_count(data, split) - sum(map(len, data.stores(split)))
    found = (row for row in walk(data, split, lambda row, index: index is None) if row.example is None)
    return list(itertools.islice(found, min(count, missing)))


# ---- what they are


def shown(data: ExampleData, split: str, row: Found, decoder: Decoder) -> Shown:
    """One row as the model sees it."""
    title = f"{split} row {row.number:,}"
    if row.example is None:
        return Shown(title, [row.origin, f"dropped: {row.reason}"], _dropped_text(data, row, decoder))
    example: Example = data.examples(split)[row.example]
    batch = data.collate([([row.example], [example])])
    targets = pair_targets(batch) if "pair_lengths" in batch else label_targets(batch["labels"][0].numpy())
    ids, positions = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    whole = _whole(data, row) if row.cut else None
    pieces = lambda start, stop: decoder.pieces(ids[start:stop], targets[start:stop], positions[start:stop])  # noqa: E731
    facts = [row.origin, f"{len(ids):,} tokens", f"{int(targets.sum()):,} carry loss"]
    if isinstance(example, PreferenceExample):
        sections, removed = _pair(data, example, whole, pieces)
        facts[1] += " (prompt {:,}, chosen {:,}, rejected {:,})".format(*example.lengths)
        if not math.isnan(example.margin):
            facts.append(f"margin {example.margin:g}")
    else:
        sections, removed = _single(data, len(ids), whole, pieces)
    if row.cut:
        facts.append(f"cut: {removed:,} tokens removed" if removed else "cut")
    if row.straddled:
        facts.append("a token holds characters of both prompt and answer")
    return Shown(title, facts, sections)


def label_targets(labels: np.ndarray) -> np.ndarray:
    """Which tokens carry loss, `[seq]` bool, by the labels of a row, `[seq]`: position `t` predicts token `t + 1`."""
    targets = np.zeros(len(labels), dtype=bool)
    targets[1:] = labels[:-1] != IGNORE_INDEX
    return targets


def pair_targets(batch: Any) -> np.ndarray:
    """Which tokens of a batch of one pair carry loss, `[seq]` bool: what its `predictors` predict, in their branch."""
    prompt, chosen, _ = batch["pair_lengths"][0]
    targets = np.zeros(batch["input_ids"].shape[1], dtype=bool)
    for predictor, branch in zip(batch["predictors"].tolist(), batch["branches"].tolist(), strict=True):
        # the prompt's last position predicts the first token of both responses
        targets[prompt + chosen if branch and predictor == prompt - 1 else predictor + 1] = True
    return targets


def _single(data: Any, tokens: int, whole: Any, pieces: Any) -> tuple[list[Section], int]:
    if whole is None:
        return [Section("", pieces(0, tokens))], 0
    kept = data.tokenize.kept(whole.input_ids, int(whole.loss_mask.argmax()))
    return [Section("", _with_cuts(kept, len(whole.input_ids), pieces, 0))], len(whole.input_ids) - len(kept)


def _pair(data: Any, pair: PreferenceExample, whole: Any, pieces: Any) -> tuple[list[Section], int]:
    a, b, end = pair.chosen_start, pair.rejected_start, len(pair.input_ids)
    parts: list[list[Piece | Mark]] = [pieces(0, a), pieces(a, b), pieces(b, end)]
    removed = 0
    if whole is not None:
        prompt, chosen, rejected = whole.lengths
        longer = whole.input_ids[: prompt + max(chosen, rejected)]  # only its length and its first id count
        kept = data.tokenize.kept(longer, prompt)
        parts[0] = _with_cuts(kept[kept < prompt], prompt, pieces, 0)
        for i, missing in ((1, chosen - (b - a)), (2, rejected - (end - b))):
            parts[i] += [_cut_mark(missing)] if missing else []
        removed = len(whole.input_ids) - end
    titles = (
        "prompt, the same for both",
        f"chosen ({b - a:,} tokens)",
        f"rejected ({end - b:,} tokens)",
    )
    return [Section(title, part) for title, part in zip(titles, parts, strict=True)], removed


def _whole(data: Any, row: Found) -> Any:
    """The example as it was before anything was cut off; None where the data don't say how they tokenize."""
    if not isinstance(data, ChatData):
        return None
    tokenize = copy.copy(data.tokenize)
    tokenize.max_length = sys.maxsize
    found = tokenize([row.record])[0]
    return found if isinstance(found, Example) else None


def _dropped_text(data: Any, row: Found, decoder: Decoder) -> list[Section]:
    """What a dropped row would have been, where it is only too long; nothing of it is trained, so nothing is marked."""
    if (whole := _whole(data, row)) is None:
        return []
    ids = whole.input_ids.tolist()
    pieces = decoder.pieces(ids, [False] * len(ids), range(len(ids)))
    return [Section(f"not trained on: {len(ids):,} tokens", [*pieces])]


def _with_cuts(kept: np.ndarray, length: int, pieces: Any, start: int) -> list[Piece | Mark]:
    """The pieces of the kept ones of `length` tokens, and a mark wherever some are missing."""
    items: list[Piece | Mark] = []
    borders = [0, *(np.flatnonzero(np.diff(kept) > 1) + 1).tolist(), len(kept)]
    before = -1
    for first_, last in itertools.pairwise(borders):
        if first_ == last:
            continue
        if missing := int(kept[first_]) - before - 1:
            items.append(_cut_mark(missing))
        items += pieces(start + first_, start + last)
        before = int(kept[last - 1])
    if missing := length - before - 1:
        items.append(_cut_mark(missing))
    return items


def _cut_mark(tokens: int) -> Mark:
    return Mark("cut", f"✂ {tokens:,} token{'s' if tokens > 1 else ''} cut off here")
