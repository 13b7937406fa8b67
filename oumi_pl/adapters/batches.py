"""Converts micro-batches to the layout that an engine reads, and chains all epochs of a loader."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from oumi_pl.attention.segments import segment_starts
from oumi_pl.errors import UserError
from oumi_pl.models.lm import Arranged, Layout, padded
from oumi_pl.types import IGNORE_INDEX, Batch


class EngineBatch(dict[str, Tensor]):
    """Tensors by name, as an engine passes them to the model and the loss."""

    def __init__(self, tensors: Mapping[str, Tensor], native: Batch | None = None) -> None:
        super().__init__(tensors)
        self.native: Any = native
        """The original `Batch`; None in a copy that an engine made of the tensors."""


def token_inputs(batch: Batch, layout: Layout, *, labels_are_shifted: bool = False) -> EngineBatch:
    """Converts a micro-batch for causal language models of transformers.

    `labels[t]` is the token at `t` itself, and the model shifts them. `shift_labels[t]` is the target of position `t`;
    transformers and TRL count and average by these if present. Only they have a target for the last position of a row,
    when a stream of documents continues in the next row.

    Args:
        batch: A micro-batch.
        layout: `padded`, or `documents` for one packed row, in which transformers finds documents by their positions.
        labels_are_shifted: Whether `labels` equal `shift_labels`, for a loss function that only gets `labels`.
    """
    if "weights" in batch:
        raise UserError(
            "rows say how much they count in the loss, and --engine hf and trl count all tokens alike; leave that out "
            "with `ignore: [weight]`, set the weights of turns to 0 or 1, or train with --engine lightning"
        )
    arranged = layout(batch)
    shift_labels = torch.full_like(arranged.inputs["input_ids"], IGNORE_INDEX)
    shift_labels.view(-1)[_predictors(batch, arranged)] = batch["targets"]
    labels = torch.nn.functional.pad(shift_labels, (1, 0), value=IGNORE_INDEX)[:, :-1]
    inputs: dict[str, Any] = {name: value for name, value in arranged.inputs.items() if isinstance(value, torch.Tensor)}
    inputs |= {"labels": shift_labels if labels_are_shifted else labels, "shift_labels": shift_labels}
    return EngineBatch(inputs, batch)


def distillation_inputs(batch: Batch) -> EngineBatch:
    """Converts a micro-batch for TRL's `GKDTrainer`, one padded row per document, `[rows, seq]`.

    Raises:
        UserError: a row ends with a position that has a target, which TRL would leave out.
    """
    rows = token_inputs(batch, padded)
    if int((rows["labels"] != IGNORE_INDEX).sum()) != len(batch["targets"]):
        raise UserError(
            "data: rows of a stream of documents end with a target in the next row, which TRL's GKDTrainer leaves out; "
            "train with --engine lightning"
        )
    rows.setdefault("attention_mask", torch.ones_like(rows["input_ids"]))
    return rows


def pair_inputs(batch: Batch) -> EngineBatch:
    """Converts a micro-batch of pairs for TRL's `DPOTrainer`, `[2 pairs, seq]`: all chosen rows, then all rejected.

    `completion_mask` is 1 at tokens that carry loss. The prompt is repeated.
    """
    rows = _completions(batch)
    count = len(rows["input_ids"])
    # a rank that ran out of rows has a batch of one row, and TRL needs two
    order = [*range(0, count, 2), *range(1, count, 2)] if batch["sample_ids"] else [0, 0]
    return EngineBatch({name: value[order] for name, value in rows.items()}, batch)


def feedback_inputs(batch: Batch, mismatched: Callable[[list[int]], Batch] | None) -> EngineBatch:
    """Converts a micro-batch of single responses for TRL's `KTOTrainer`, `[rows, seq]`, with a `label` `[rows]` each.

    Args:
        batch: A micro-batch.
        mismatched: Returns the batch of the mismatched rows of some rows, whose tensors are named `KL_...`; None if the
            KL divergence is not estimated.
    """
    rows = _completions(batch)
    if mismatched is not None:
        rows |= {f"KL_{name}": value for name, value in _completions(mismatched(batch["sample_ids"])).items()}
    # the stand-in of a short update has one row, and no labels
    rows["label"] = batch["fields"].get("desirable", torch.zeros(len(rows["input_ids"]))) > 0.5
    return EngineBatch(rows, batch)


def _completions(batch: Batch) -> dict[str, Tensor]:
    """A padded row for each path, with a `completion_mask` that is 1 at tokens that carry loss."""
    arranged = padded(batch)
    ids = arranged.inputs["input_ids"]
    completion_mask = torch.zeros_like(ids)
    completion_mask.view(-1)[_predictors(batch, arranged) + 1] = 1
    attention_mask = arranged.inputs.get("attention_mask", torch.ones_like(ids))
    return {"input_ids": ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


def reward_inputs(batch: Batch, pad: int, *, with_margins: bool) -> EngineBatch:
    """Converts a micro-batch of pairs for TRL's `RewardTrainer`, `[2 pairs, seq]`: all chosen rows, then all rejected.

    Args:
        batch: A micro-batch; the prompt is repeated.
        pad: The pad token, by which transformers finds the last token of a row.
        with_margins: Whether the loss takes the rows' margins.
    """
    arranged = padded(batch)
    ids = arranged.inputs["input_ids"]
    attention_mask = arranged.inputs.get("attention_mask", torch.ones_like(ids))
    order = [*range(0, len(ids), 2), *range(1, len(ids), 2)] if batch["sample_ids"] else [0, 0]
    rows = {"input_ids": torch.where(attention_mask == 1, ids, pad)[order], "attention_mask": attention_mask[order]}
    if with_margins:
        rows["margin"] = batch["fields"].get("margin", torch.zeros(1))
    return EngineBatch(rows, batch)


def rollout_inputs(batch: Any) -> EngineBatch:
    """Converts a micro-batch of groups for TRL's `GRPOTrainer`: prompts `[rows, prompt]`, completions `[rows, seq]`.

    Prompts are padded on the left, and repeated for each completion. `tool_mask` is 0 at completions that are left out
    of the loss. With them come what our data module made of the rewards, and, after the policy has moved, the
    log-probabilities of sampling.
    """
    rows = _completions(batch)
    ids, count = rows["input_ids"], len(batch["lengths"])
    # the stand-in of a rank that ran out of prompts has no completions: its first row counts for nothing
    lengths = [int(length) for length in batch["lengths"]] or [1] * len(ids)
    totals = [int(total) for total in rows["attention_mask"].sum(1)]
    borders = [total - length for total, length in zip(totals, lengths, strict=True)]
    longest, most = max(1, *borders), max(lengths)
    prompt, prompt_mask = ids.new_zeros(len(ids), longest), ids.new_zeros(len(ids), longest)
    completion, completion_mask, loss_mask = (ids.new_zeros(len(ids), most) for _ in range(3))
    for row, (border, total) in enumerate(zip(borders, totals, strict=True)):
        prompt[row, longest - border :], prompt_mask[row, longest - border :] = ids[row, :border], 1
        completion[row, : total - border], completion_mask[row, : total - border] = ids[row, border:total], 1
        loss_mask[row, : total - border] = rows["completion_mask"][row, border:total]
    if not count:
        loss_mask.zero_()
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": completion_mask,
        "tool_mask": loss_mask,
        "advantages": batch["advantages"] if count else torch.zeros(len(ids)),
        "num_items_in_batch": torch.tensor(float(batch["update"].targets)),
    }
    if not batch["on_policy"]:
        inputs["old_per_token_logps"] = completion_values(batch["sampled_logps"], loss_mask)
    return EngineBatch(inputs, batch)


def completion_values(values: Tensor, loss_mask: Tensor) -> Tensor:
    """Lays values `[targets]` out as TRL's completions, `[rows, seq]`."""
    return values.new_zeros(loss_mask.shape).masked_scatter(loss_mask.bool(), values)


def target_values(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Reorders TRL's values per predicted token, `[2 pairs, seq - 1]`, like `Batch.targets`, `[targets]`."""
    order = torch.arange(len(values), device=values.device).view(2, -1).T.reshape(-1)
    return values[order][completion_mask[order, 1:].bool()]


def _predictors(batch: Batch, arranged: Arranged) -> Tensor:
    """The position before each target, in the row of the target's path: `[targets]`, indices into `[batch x seq]`."""
    predictors = batch["predictors"]
    if arranged.places is None:
        return predictors
    first = torch.tensor(segment_starts(batch["segments"]))[batch["target_segments"]]
    # a predictor may be in a segment that the target's own continues; the row of its path repeats it
    positions = batch["position_ids"][0]
    return arranged.places[first] - positions[first] + positions[predictors]


class EngineLoader:
    """Yields all epochs of a training loader in sequence, converted. Has no length, since engines stop at `max_steps`.

    Args:
        loader: The training loader, at the position where training begins.
        convert: Converts a micro-batch to an engine's batch.
        micro_batches: Micro-batches per update.
        epoch: Current epoch of the loader.
        fetched: Micro-batches of this epoch that have been trained on.
    """

    def __init__(
        self, loader: Any, convert: Callable[[Batch], EngineBatch], micro_batches: int, epoch: int = 0, fetched: int = 0
    ) -> None:
        self.loader = loader
        self.convert = convert
        self.micro_batches = micro_batches
        self.epoch = epoch
        self.fetched = fetched
        self.update: list[EngineBatch] = []
        """The micro-batches of the current update, which engines fetch together."""
        self.is_epoch_end = False

    @property
    def epoch_length(self) -> int | None:
        """Micro-batches of the epoch; None for a stream of unknown length."""
        try:
            return len(self.loader)
        except TypeError:
            return None

    def __iter__(self) -> Iterator[EngineBatch]:
        empty_epochs = 0
        while empty_epochs < 2:  # one may be empty, because a checkpoint can be from the end of an epoch
            empty_epochs += 1
            for batch, is_last in _with_end(iter(self.loader), self.epoch_length, self.fetched):
                empty_epochs = 0
                if self.fetched % self.micro_batches == 0:
                    self.update = []
                self.fetched += 1
                self.is_epoch_end = is_last
                self.update.append(self.convert(batch))
                yield self.update[-1]
            self.epoch, self.fetched = self.epoch + 1, 0
            # the same call as Lightning's
            getattr(self.loader, "batch_sampler", self.loader).sampler.set_epoch(self.epoch)
        raise UserError("data.train: an epoch has no rows")


def _with_end(batches: Iterator[Batch], length: int | None, fetched: int) -> Iterator[tuple[Batch, bool]]:
    """Yields each batch, and whether it is the last of the epoch. Reads one ahead only if the length is unknown."""
    if length is not None:
        for number, batch in enumerate(batches, fetched + 1):
            yield batch, number == length
        return
    ahead = next(batches, None)
    while ahead is not None:
        batch, ahead = ahead, next(batches, None)
        yield batch, ahead is None
