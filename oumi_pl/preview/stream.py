"""Shows rows of pretraining data: rows of the training stream, or windows of held-out documents."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from oumi_pl.data.held_out import HeldOut
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.row_stream import batch_of
from oumi_pl.errors import UserError
from oumi_pl.preview.pieces import Decoder, Piece, Tokens, segments_of
from oumi_pl.preview.shown import Mark, Section, Shown
from oumi_pl.types import Batch

APART = "── another document, which doesn't see the one before ──"
JOINED = "── another document, which also sees the one before ──"


def rows(data: PretrainData, split: str, decoder: Decoder, count: int, numbers: Sequence[int] | None) -> list[Shown]:
    """The first `count` rows of a split, or the rows with these numbers, counted from 1.

    Raises:
        UserError: a number is out of range, or there are no rows.
    """
    wanted = set(range(1, count + 1) if numbers is None else numbers)
    by_number: dict[int, Shown] = {}
    batches = _trained(data) if split == "train" else _held_out(data, split)
    read = 0
    for read, (batch, facts) in enumerate(itertools.islice(batches, max(0, *wanted)), 1):
        if read in wanted:
            by_number[read] = _shown(data, decoder, batch, f"{split} row {read:,}", facts)
    if not read:
        raise UserError(f"data.{split}: the documents don't make a single row: there is nothing to predict in them")
    if numbers is None:
        return list(by_number.values())
    for number in numbers:
        if number not in by_number:
            raise UserError(f"--row {number}: the {split} split has rows 1 to {read:,}")
    return [by_number[number] for number in dict.fromkeys(numbers)]


def _trained(data: PretrainData) -> Iterator[tuple[Batch, list[str]]]:
    """Each row of the first epoch as a batch, in training order. Reads ahead no further than the shuffle buffer."""
    for number, row in enumerate(data.stream(0)):
        yield batch_of([row], [number], data.pad_id), [f"update {number // data.layout.rows_per_update + 1:,}"]


def _held_out(data: PretrainData, split: str) -> Iterator[tuple[Batch, list[str]]]:
    """Each window of a split's documents as a batch, in order."""
    held_out = HeldOut(data.shards(split), data.max_length, data.eval_stride, data.pad_id)
    for source, name in enumerate(data.source_names(split)):
        for number, (document, start, _, end) in enumerate(held_out.windows[source].tolist()):
            where = f"{name}, document {document + 1:,}, its tokens {start + 1:,} to {end:,}"
            yield held_out[source, np.array([number])], [where]


def _shown(data: PretrainData, decoder: Decoder, batch: Batch, title: str, facts: list[str]) -> Shown:
    items: list[Piece | Mark] = []
    documents = 0
    for tokens in segments_of(batch):
        if items:
            items.append(Mark("border", APART))
        parts = _documents(data, tokens, decoder)
        documents += sum(isinstance(item, Mark) for item in parts) + 1
        items += parts
    length, labels = f"{batch['input_ids'].numel():,} tokens", f"{len(batch['targets']):,} labels"
    of = f"{documents:,} documents{', kept apart' if data.isolate else ''}" if documents > 1 else "of one document"
    return Shown(title, [*facts, length, labels, of], [Section("", items)])


def _documents(data: PretrainData, tokens: Tokens, decoder: Decoder) -> list[Piece | Mark]:
    """The pieces of a segment, with marks between documents, and at the end the label that is not an input."""
    ends = (np.flatnonzero(tokens.ids == data.tokenizer.eos_token_id) + 1).tolist()
    borders = [0, *(end for end in ends if end < len(tokens)), len(tokens)]
    items: list[Piece | Mark] = []
    for start, stop in itertools.pairwise(borders):
        items += [Mark("border", JOINED)] if start else []
        part = tokens.part(start, stop)
        items += decoder.pieces(part.ids.tolist(), part.targets, part.positions.tolist())
    if tokens.label is not None:
        items += decoder.pieces([tokens.label], [True], [len(tokens)], label_only=True)
    return items
