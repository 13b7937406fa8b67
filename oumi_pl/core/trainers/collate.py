"""From rows to a batch, where the user brings no collator."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

logger = logging.getLogger("oumi_pl")

Collator = Callable[[list[Any]], Any]


def default_collator(tokenizer: Any, ignore_index: int = -100, makes_labels: bool = False) -> Collator:
    """How rows become a batch: padded where a tokenizer is given and the rows hold `input_ids`, else stacked.

    Args:
        tokenizer: Whose padding id fills `input_ids`; without one, torch's `default_collate` stacks the rows.
        ignore_index: What fills `labels`.
        makes_labels: Whether rows without `labels` are trained on all their tokens, which a causal model needs.
    """

    def collate(rows: list[Any]) -> Any:
        if tokenizer is not None and isinstance(rows[0], Mapping) and "input_ids" in rows[0]:
            return padded(rows, _padding_id(tokenizer), ignore_index, makes_labels)
        return default_collate(rows)

    return collate


def padded(rows: Sequence[Mapping[str, Any]], padding_id: int, ignore_index: int, makes_labels: bool) -> dict[str, Any]:
    """Pads `input_ids`, `attention_mask`, `labels` and other columns as long as the ids on the right.

    Columns of numbers that are not as long as the ids are stacked; columns of anything else are left out.

    Returns:
        `input_ids`, `attention_mask` and the others, `[batch, seq]` each; always with a mask.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns = {name: list(map(torch.as_tensor, column)) for name, column in columns.items() if _is_numeric(column[0])}
    ids = columns["input_ids"]
    masks = columns.setdefault("attention_mask", [torch.ones_like(row) for row in ids])
    if makes_labels and "labels" not in columns:
        columns["labels"] = [row.masked_fill(mask == 0, ignore_index) for row, mask in zip(ids, masks, strict=True)]
    fills = {"input_ids": padding_id, "labels": ignore_index}
    batch = {}
    for name, column in columns.items():
        as_long = all(value.shape == row.shape for value, row in zip(column, ids, strict=True))
        if as_long or (name == "labels" and column[0].ndim):
            batch[name] = pad_sequence(column, batch_first=True, padding_value=fills.get(name, 0))
        else:
            batch[name] = torch.stack(column)
    return batch


def log_first_example(collate: Collator, tokenizer: Any) -> Collator:
    """A collator that logs one decoded row, once."""
    shown = False

    def showing(rows: list[Any]) -> Any:
        nonlocal shown
        batch = collate(rows)
        if not shown and tokenizer is not None and isinstance(batch, Mapping) and "input_ids" in batch:
            shown = True
            logger.info("an example: %r", tokenizer.decode(batch["input_ids"][0].tolist()))
        return batch

    return showing


def _padding_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        if isinstance(getattr(tokenizer, name, None), int):
            return getattr(tokenizer, name)
    return 0  # masked and without a label: any id will do


def _is_numeric(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int | float | torch.Tensor) or type(value).__module__ == "numpy"
