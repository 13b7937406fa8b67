"""From rows to a batch, where the user brings no collator."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
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
    ids = [_tensor(row["input_ids"]) for row in rows]
    columns: dict[str, Any] = {"input_ids": _stack(ids, padding_id)}
    masks = [
        _tensor(row["attention_mask"]) if "attention_mask" in row else torch.ones_like(i)
        for row, i in zip(rows, ids, strict=True)
    ]
    columns["attention_mask"] = _stack(masks, 0)
    if "labels" in rows[0]:
        labels = [_tensor(row["labels"]) for row in rows]
        columns["labels"] = _stack(labels, ignore_index) if labels[0].ndim else torch.stack(labels)
    elif makes_labels:
        columns["labels"] = _stack(
            [i.masked_fill(m == 0, ignore_index) for i, m in zip(ids, masks, strict=True)], ignore_index
        )
    for name in rows[0].keys() - columns.keys():
        values = [row[name] for row in rows]
        if not _is_numeric(values[0]):
            continue
        tensors = [_tensor(value) for value in values]
        as_long = all(t.ndim == 1 and len(t) == len(i) for t, i in zip(tensors, ids, strict=True))
        columns[name] = _stack(tensors, 0) if as_long else torch.stack(tensors)
    return columns


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


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)


def _stack(rows: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


def _is_numeric(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, int | float | torch.Tensor) or type(value).__module__ == "numpy"
