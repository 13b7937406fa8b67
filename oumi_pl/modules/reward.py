"""Reward models: a score for each response, learned from pairs or from outcomes."""

from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from oumi_pl.errors import UserError
from oumi_pl.losses.reward import BradleyTerry, OutcomeLoss, PairLoss
from oumi_pl.models.lm import LM, ScoringLM, disable_dropout
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.update import Split
from oumi_pl.types import SPLITS, Batch, Sums

OF_SOURCE = "source {}: "
"""Prefix of the names of sums over one held-out source."""


class Reward(LanguageModule):
    """Trains a score of whole responses, normalised by the rows of the update. Dropout is off.

    The model is transformers' sequence-classification model of the architecture, with one label. Its head `score` reads
    the last token of a response; it is random unless `model` already is a reward model.

    Args:
        model: Hub id or directory of a pretrained causal language model, of a reward model, or of an adapter.
        config: `model_type` and values of a config to start from; with `model`, values to override.
        loss: Loss of a pair; `BradleyTerry` when left out.
        outcome_loss: Loss of a response with an outcome: `BCE` for outcomes of 0 and 1, `MSE` for scores. Only needed
            if rows have outcomes.
        share_prompt: Compute the prompt of a pair once for both responses. `auto`: if the model can do so exactly.
        kwargs: See `LanguageModule`.
    """

    unit = "rows"
    branching = True
    generates = False
    scoring = True
    details: ClassVar[tuple[str, ...]] = (
        *("rewards/chosen_std", "rewards/rejected_std"),
        *("outcomes/mean", "outcomes/std"),
    )
    validation_metrics = (
        "val/loss",
        *("val/rewards/chosen", "val/rewards/rejected", "val/rewards/margins", "val/rewards/accuracies"),
        *("val/outcomes/accuracies", "val/outcomes/errors"),
        *(f"val/{name}" for name in details),
    )

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        *,
        loss: PairLoss | None = None,
        outcome_loss: OutcomeLoss | None = None,
        share_prompt: Literal["auto"] | bool = "auto",
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-5, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, config, optimizer=optimizer, **kwargs)
        self.loss: PairLoss = loss or BradleyTerry()
        self.outcome_loss = outcome_loss
        self.share_prompt = share_prompt

    # ---- model

    def configure_model(self) -> None:
        """Compares the rows with the losses; see `LanguageModule`.

        Raises:
            UserError: the losses do not fit the rows.
        """
        if self.model is None and self.data is not None:
            self.__refuse_other_rows()
        super().configure_model()

    def __refuse_other_rows(self) -> None:
        data, outcome = self.data, self.outcome_loss
        assert data is not None
        report = data.report()
        for split in SPLITS.get(str(self.trainer.state.fn and self.trainer.state.fn.value), ()):
            rows = report.get(split)
            if rows is None:
                continue
            if "pairs" not in rows:
                raise UserError(f"data: {type(data).__name__} makes no rows for a reward model; use RewardData")
            if self.loss.needs_margins and rows["pairs_without_margin"]:
                raise UserError(
                    f"model.loss: {type(self.loss).__name__} needs the margin of each pair, and "
                    f"{rows['pairs_without_margin']:,} of {rows['pairs']:,} in data.{split} have none: give each a "
                    "`margin`, or leave margin out"
                )
            outcomes = rows.get("outcomes")
            if outcomes is None:
                continue
            kind = "BCE (for 0 and 1)" if outcomes["min"] >= 0 and outcomes["max"] <= 1 else "MSE (for scores)"
            if outcome is None:
                raise UserError(
                    f"model.outcome_loss: {outcomes['rows']:,} rows in data.{split} have an outcome and are no pairs; "
                    f"set it to {kind}"
                )
            if outcomes["min"] < outcome.least or outcomes["max"] > outcome.most:
                raise UserError(
                    f"model.outcome_loss: {type(outcome).__name__} takes outcomes from {outcome.least:g} to "
                    f"{outcome.most:g}, and those in data.{split} are from {outcomes['min']:g} to "
                    f"{outcomes['max']:g}; use {kind}"
                )

    def build(self, tokenizer: Any, *args: Any, **kwargs: Any) -> LM:
        """Puts the tokenizer's pad token in the config and turns dropout off; see `LanguageModule`.

        transformers finds the last token of a padded row by the pad token.
        """
        model = super().build(tokenizer, *args, **kwargs)
        if tokenizer is not None:
            config = model.base.config
            config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
        disable_dropout(model)  # which would give the responses of a pair different models
        return model

    @property
    def notes(self) -> list[str]:
        """Adds the loss of outcomes; see `LanguageModule`."""
        outcome = self.outcome_loss
        return super().notes + ([] if outcome is None else [f"outcomes: {type(outcome).__name__}"])

    # ---- loss

    def loss_sums(self, batch: Batch, split: Split) -> Sums:
        """Sums over the rows of losses and metrics."""
        model = self.causal_lm
        assert isinstance(model, ScoringLM)
        scores = model(batch, model.scores)
        pair_roots, pair_rows, single_roots, single_rows = kinds(batch)
        fields = batch["fields"]
        none = scores[:0].detach()
        chosen, rejected = scores[pair_roots], scores[[root + 1 for root in pair_roots]]
        rewards = scores[single_roots]
        losses = scores[:0]
        if pair_roots:
            margins = fields.get("margin", none)[pair_rows]
            losses = self.__checked(self.loss, self.loss(chosen, rejected, margins), chosen)
        sums = {"loss": losses.sum()} | pair_sums(chosen, rejected)
        outcomes, quality = none, none
        if single_roots and self.outcome_loss is not None:
            outcomes = fields["outcome"][single_rows]
            quality = self.outcome_loss.quality(rewards.detach(), outcomes)
            single = self.__checked(self.outcome_loss, self.outcome_loss(rewards, outcomes), rewards)
            sums["loss"] = sums["loss"] + single.sum()
        sums |= outcome_sums(rewards, quality)
        for i in range(len(self.__source_names(split))):
            is_of = fields["source"][pair_rows] == i if pair_rows else none.bool()
            sums[OF_SOURCE.format(i) + "pairs"] = is_of.double().sum()
            sums[OF_SOURCE.format(i) + "right"] = ((chosen > rejected) & is_of).double().sum()
        return sums

    def __source_names(self, split: Split) -> list[str]:
        names = [] if self.data is None or split == "train" else self.data.source_names(split)
        return names if len(names) > 1 else []

    def metrics(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """Means over rows, pairs and rows with an outcome; in evaluation also the accuracy of each source."""
        metrics = {"loss": sums["loss"] / sums["rows"].clamp(min=1)}
        if sums["pairs"] > 0:
            metrics |= _means(sums, "rewards/", sums["pairs"], ("chosen", "rejected"), ("margins", "accuracies"))
        if sums["rated"] > 0 and self.outcome_loss is not None:
            means = _means(sums, "outcomes/", sums["rated"], ("",), ("quality",))
            metrics["outcomes/mean"], metrics["outcomes/std"] = means["outcomes/"], means["outcomes/_std"]
            metrics[f"outcomes/{self.outcome_loss.metric}"] = means["outcomes/quality"]
        for i, name in enumerate(self.__source_names(split)):
            pairs = sums[OF_SOURCE.format(i) + "pairs"]
            if pairs > 0:
                metrics[f"rewards/accuracies/{name}"] = sums[OF_SOURCE.format(i) + "right"] / pairs
        return metrics

    def __checked(self, loss: Any, losses: Tensor, rewards: Tensor) -> Tensor:
        """The losses of rows.

        Raises:
            UserError: a loss of the user returned another shape, or no gradient.
        """
        key, name = "loss" if loss is self.loss else "outcome_loss", type(loss).__name__
        if losses.shape != rewards.shape:
            raise UserError(
                f"model.{key}: {name} returned a tensor of shape {list(losses.shape)} for {len(rewards)} rows; it has "
                "to return one loss per row, neither summed nor averaged"
            )
        if rewards.requires_grad and not losses.requires_grad:
            raise UserError(f"model.{key}: {name} returned losses without a gradient: something in it detaches rewards")
        return losses


def kinds(batch: Batch) -> tuple[list[int], list[int], list[int], list[int]]:
    """Finds the pairs and the single responses of a batch; a pair is a root and the segment that continues it.

    Returns:
        For pairs the index of the root segment of each, and its row; the same for single responses.
    """
    pair_roots, pair_rows, single_roots, single_rows = [], [], [], []
    segments = batch["segments"] if batch["sample_ids"] else []  # the stand-in has no rows
    borders = [*(i for i, segment in enumerate(segments) if segment.parent < 0), len(segments)]
    for row, (root, end) in enumerate(pairwise(borders)):
        if end - root == 2:
            pair_roots.append(root)
            pair_rows.append(row)
        else:
            single_roots.append(root)
            single_rows.append(row)
    return pair_roots, pair_rows, single_roots, single_rows


@torch.no_grad()
def pair_sums(chosen: Tensor, rejected: Tensor) -> Sums:
    """Sums over pairs of what is logged, from the rewards `[pairs]` of the responses."""
    chosen, rejected = chosen.double(), rejected.double()
    margins = chosen - rejected
    of_pairs = {
        "pairs": torch.ones_like(chosen),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/chosen_squares": chosen.square(),
        "rewards/rejected_squares": rejected.square(),
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).double() + 0.5 * (margins == 0).double(),
    }
    return {name: values.sum() for name, values in of_pairs.items()}


@torch.no_grad()
def outcome_sums(rewards: Tensor, quality: Tensor) -> Sums:
    """Sums over the responses with an outcome of what is logged."""
    rewards = rewards.double()
    of_rows = {
        "rated": torch.ones_like(rewards),
        "outcomes/": rewards,
        "outcomes/_squares": rewards.square(),
        "outcomes/quality": quality.double(),
    }
    return {name: values.sum() for name, values in of_rows.items()}


def _means(
    sums: Sums, prefix: str, count: Tensor, spread: tuple[str, ...], others: tuple[str, ...]
) -> dict[str, Tensor]:
    """Means by name, and for those in `spread` also the standard deviation."""
    means = {prefix + name: sums[prefix + name] / count for name in (*spread, *others)}
    for name in spread:
        variance = sums[f"{prefix}{name}_squares"] / count - means[prefix + name].square()
        means[f"{prefix}{name}_std"] = variance.clamp(min=0).sqrt()
    return means
