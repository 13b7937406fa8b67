"""Rows of pretraining as the model sees them: those of the stream that is trained on, or windows of held-out texts."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from oumi_pl.data.held_out import HeldOut
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.row_stream import batch_of
from oumi_pl.errors import UserError
from oumi_pl.preview.marks import Tokens, segments_of
from oumi_pl.preview.pieces import Decoder, Piece
from oumi_pl.preview.shown import Mark, Section, Shown
from oumi_pl.types import Batch

APART = "── another document, which doesn't see the one before ──"
JOINED = "── another document, which goes on from the one before ──"


def rows(data: PretrainData, split: str, decoder: Decoder, count: int, numbers: Sequence[int] | None) -> list[Shown]:
    """The first rows of a split, or those of some numbers, counted from 1.

    Raises:
        UserError: there are fewer rows, or none.
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
    """Each row of the first epoch, in the order of training, as a batch. Reads ahead by the shuffle buffer alone."""
    for number, row in enumerate(data.stream(0)):
        yield batch_of([row], [number], data.pad_id), [f"update {number // data.layout.rows_per_update + 1:,}"]


def _held_out(data: PretrainData, split: str) -> Iterator[tuple[Batch, list[str]]]:
    """Each window of the documents of a split, in order, as a batch."""
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
    """Pieces of tokens that see each other, with a mark where a document ends, and with the label beyond the last."""
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
