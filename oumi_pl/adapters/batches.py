"""Our micro-batches, all epochs one after the other, in the layout that an engine reads."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from oumi_pl.errors import UserError
from oumi_pl.models.preference import padded
from oumi_pl.types import IGNORE_INDEX, Batch, PreferenceBatch

EngineBatch = dict[str, Tensor]
"""What an engine hands to the model and to its loss, by name."""


def tokens(batch: Batch, own_loss: bool = False) -> EngineBatch:
    """A micro-batch as causal language models of transformers read it.

    Their `labels[t]` is the token at `t` itself, which the model shifts; ours are shifted already. transformers knows
    such labels as `shift_labels` and counts and averages by them. They also say what `labels` can't: what the last
    position of a row predicts, where a stream of documents goes on in the next row.

    Args:
        batch: Padded rows, or packed ones, which transformers tells apart by positions that begin anew.
        own_loss: For a loss function that gets `labels` and not `shift_labels`: the same in both.
    """
    shifted = batch["labels"]
    labels = shifted if own_loss else torch.nn.functional.pad(shifted, (1, 0), value=IGNORE_INDEX)[:, :-1]
    made = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    return made | {"labels": labels, "shift_labels": shifted}


def pairs(batch: PreferenceBatch) -> EngineBatch:
    """A micro-batch of pairs as TRL's `DPOTrainer` reads it, `[2 pairs, seq]`: first the chosen rows, then the others.

    `completion_mask` marks the tokens that carry loss; the prompt is there twice.
    """
    inputs, predictors = padded(batch)
    targets = torch.zeros_like(inputs["input_ids"])
    targets.view(-1)[predictors + 1] = 1  # a target stands behind the position that predicts it
    rows = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "completion_mask": targets,
    }
    return {name: torch.cat([value[0::2], value[1::2]]) for name, value in rows.items()}


def in_our_order(values: Tensor, completion_mask: Tensor) -> Tensor:
    """What TRL found for each token, `[2 pairs, seq - 1]`, as `[targets]` in the order of `PreferenceBatch.targets`."""
    rows = torch.arange(len(values), device=values.device).view(2, -1).T.reshape(-1)
    return values[rows][completion_mask[rows, 1:].bool()]


class Batches:
    """All epochs of a loader in sequence, in the engine's layout. It has no length: the engine goes by `max_steps`.

    Args:
        loader: Our training loader, at the position where training begins.
        convert: From our micro-batch to the engine's.
        epoch: The epoch that the loader stands in.
        handed: Micro-batches of that epoch that lie behind.
    """

    def __init__(self, loader: Any, convert: Callable[[Any], EngineBatch], epoch: int = 0, handed: int = 0) -> None:
        self.loader = loader
        self.convert = convert
        self.epoch = epoch
        self.handed = handed
        self.native: list[Any] = []
        """Our micro-batches that were handed out and not yet taken."""
        self.is_epoch_end = False

    @property
    def length(self) -> int | None:
        """Micro-batches of the epoch; None for a stream whose end isn't known."""
        try:
            return len(self.loader)
        except TypeError:
            return None

    def __iter__(self) -> Iterator[EngineBatch]:
        empty = 0
        while empty < 2:  # one pass may be: a checkpoint can stand at the end of an epoch
            empty += 1
            for batch, is_last in _with_end(iter(self.loader), self.length, self.handed):
                empty = 0
                self.handed += 1
                self.is_epoch_end = is_last
                self.native.append(batch)
                yield self.convert(batch)
            self.epoch, self.handed = self.epoch + 1, 0
            # where Lightning announces an epoch as well
            announced = getattr(self.loader, "batch_sampler", self.loader).sampler
            announced.set_epoch(self.epoch)
        raise UserError("data.train: an epoch has no rows")

    def take(self) -> list[Any]:
        """Our own micro-batches of those that were handed out since the last call."""
        taken, self.native = self.native, []
        return taken


def _with_end(batches: Iterator[Any], length: int | None, handed: int) -> Iterator[tuple[Any, bool]]:
    """Each batch, and whether it is the epoch's last; looks one ahead only where the length isn't known."""
    if length is not None:
        for number, batch in enumerate(batches, handed + 1):
            yield batch, number == length
        return
    ahead = next(batches, None)
    while ahead is not None:
        batch, ahead = ahead, next(batches, None)
        yield batch, ahead is None
