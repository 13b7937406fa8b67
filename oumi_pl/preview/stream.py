"""Rows of pretraining as the model sees them: those of the stream that is trained on, or windows of held-out texts."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from oumi_pl.data.held_out import HeldOut
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.rows import Row
from oumi_pl.errors import UserError
from oumi_pl.preview.examples import label_targets
from oumi_pl.preview.pieces import Decoder, Piece
from oumi_pl.preview.shown import Mark, Section, Shown
from oumi_pl.types import IGNORE_INDEX

APART = "── another document, which doesn't see the one before ──"
JOINED = "── another document, which goes on from the one before ──"


def rows(data: PretrainData, split: str, decoder: Decoder, count: int, numbers: Sequence[int] | None) -> list[Shown]:
    """The first rows of a split, or those of some numbers, counted from 1.

    Raises:
        UserError: there are fewer rows, or none.
    """
    wanted = set(range(1, count + 1) if numbers is None else numbers)
    made: dict[int, Shown] = {}
    found = _trained(data) if split == "train" else _held_out(data, split)
    read = 0
    for read, (row, facts) in enumerate(itertools.islice(found, max(0, *wanted)), 1):
        if read in wanted:
            made[read] = _shown(data, decoder, row, f"{split} row {read:,}", facts)
    if not read:
        raise UserError(f"data.{split}: the documents don't make a single row: there is nothing to predict in them")
    if numbers is None:
        return list(made.values())
    for number in numbers:
        if number not in made:
            raise UserError(f"--row {number}: the {split} split has rows 1 to {read:,}")
    return [made[number] for number in dict.fromkeys(numbers)]


def _trained(data: PretrainData) -> Iterator[tuple[Row, list[str]]]:
    """The rows of the first epoch in the order of training; nothing beyond them is read but the shuffle buffer."""
    for number, row in enumerate(data.stream(0)):
        yield row, [f"update {number // data.layout.rows_per_update + 1:,}"]


def _held_out(data: PretrainData, split: str) -> Iterator[tuple[Row, list[str]]]:
    """The windows of each document of a split, in order."""
    held_out = HeldOut(data.shards(split), data.max_length, data.eval_stride, data.pad_id)
    for source, name in enumerate(data.source_names(split)):
        for number, (document, start, _, end) in enumerate(held_out.windows[source].tolist()):
            batch = held_out[source, np.array([number])]
            ids, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
            where = f"{name}, document {document + 1:,}, its tokens {start + 1:,} to {end:,}"
            yield Row(ids, labels, np.array([len(ids)])), [where]


def _shown(data: PretrainData, decoder: Decoder, row: Row, title: str, facts: list[str]) -> Shown:
    items: list[Piece | Mark] = []
    start = documents = 0
    for length in row.lengths.tolist():
        ids, labels = row.input_ids[start : start + length], row.labels[start : start + length]
        if start:
            items.append(Mark("border", APART))
        parts = _documents(data, ids, labels, decoder)
        documents += sum(isinstance(item, Mark) for item in parts) + 1
        items += parts
        start += length
    loss = int((row.labels != IGNORE_INDEX).sum())
    counted = f"{len(row.input_ids):,} tokens"
    in_it = f"{documents:,} documents{', kept apart' if data.isolate else ''}" if documents > 1 else "of one document"
    return Shown(title, [*facts, counted, f"{loss:,} labels", in_it], [Section("", items)])


def _documents(data: PretrainData, ids: np.ndarray, labels: np.ndarray, decoder: Decoder) -> list[Piece | Mark]:
    """Pieces of tokens that see each other, with a mark where a document ends, and with the label beyond the last."""
    targets, positions = label_targets(labels), np.arange(len(ids) + 1)
    ends = (np.flatnonzero(ids == data.tokenizer.eos_token_id) + 1).tolist()
    borders = [0, *(end for end in ends if end < len(ids)), len(ids)]
    items: list[Piece | Mark] = []
    for start, stop in itertools.pairwise(borders):
        items += [Mark("border", JOINED)] if start else []
        items += decoder.pieces(ids[start:stop].tolist(), targets[start:stop].tolist(), positions[start:stop].tolist())
    if labels[-1] != IGNORE_INDEX:
        items += decoder.pieces([int(labels[-1])], [True], [len(ids)], label_only=True)
    return items
