"""KTO: training on single responses that are desirable or not, against a reference."""

from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from oumi_pl.errors import UserError
from oumi_pl.losses.responses import KTOLoss
from oumi_pl.models.build import DType
from oumi_pl.models.lm import States
from oumi_pl.models.sharding import data_ranks
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.reference import Reference
from oumi_pl.modules.update import Split
from oumi_pl.types import Batch, ResponseLoss, Responses, Sums

BALANCED = (0.9, 1.45)
"""Weighted ratios of desirable to undesirable rows without advice: the paper's 1 to 4/3, and some tolerance."""


class KTO(LanguageModule):
    """Trains on responses that are desirable or not, normalised by their number over the whole update. Dropout is off.

    The loss compares each response's reward with the average reward of the policy, its KL divergence from the reference
    times beta. The divergence is estimated on mismatched rows (the prompt of each row of the update with the response
    to another prompt), without gradient, before the update's first micro-batch: one estimate for all its micro-batches
    and ranks, at least 0. So an update does not depend on how it is divided. (TRL estimates it again on each
    micro-batch, whose responses it rotates; with one micro-batch per update and the same mismatched rows, both are
    equal.) In validation, it is estimated on all rows of the pass.

    Args:
        model: Hub id or directory of a pretrained model, usually one that was fine-tuned (SFT); an adapter's too.
        config: `model_type` and values of a config to start from; with `model`, values to override.
        loss: Loss of a response; `KTOLoss` with beta 0.1 when left out.
        kl: Estimate the KL divergence. If not, it counts as 0, and an update takes less time.
        desirable_weight: Factor on the losses of desirable responses. The paper advises to choose the weights so that
            desirable rows times `desirable_weight` are 1 to 4/3 times undesirable rows times `undesirable_weight`.
        undesirable_weight: Factor on the losses of undesirable responses.
        reference: What the policy is compared with. `initial`: the model at the start of training; with LoRA the base
            with its adapters disabled, else log-probabilities that are computed before training and kept in the cache.
            `online`: the same model as a frozen copy in memory. A hub id or directory: another model, also computed
            before training.
        reference_dtype: Of a frozen copy or another model; that of the policy when left out.
        sync_every: Optimizer steps after which the reference moves towards the policy (TR-DPO); keeps a copy in memory.
        mixup: How far it moves, from 0 to 1.
        kwargs: See `LanguageModule`.
    """

    unit = "rows"
    branching = False
    details: ClassVar[tuple[str, ...]] = ("logps/chosen", "logps/rejected")
    validation_metrics = (
        *("val/loss", "val/kl"),
        *("val/rewards/chosen", "val/rewards/rejected", "val/rewards/margins", "val/rewards/sign_accuracy"),
        *(f"val/{name}" for name in details),
    )

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        *,
        loss: ResponseLoss | None = None,
        kl: bool = True,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: str = "initial",
        reference_dtype: DType | None = None,
        sync_every: int | None = None,
        mixup: float = 0.6,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-6, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, config, optimizer=optimizer, **kwargs)
        for name, weight in {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}.items():
            if not 0 <= weight < float("inf"):
                raise UserError(f"model.{name} is {weight}, but has to be 0 or more")
        self.loss = loss or KTOLoss()
        self.kl = kl and self.loss.needs_kl
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.reference: Reference = Reference(
            self, reference, reference_dtype, sync_every, mixup, user=type(self.loss).__name__
        )
        self.__estimate: tuple[Any, Tensor] | None = None

    def on_model_built(self) -> None:
        """Tells the data whether mismatched rows are needed; see `LanguageModule`.

        Raises:
            UserError: the data have no labels.
        """
        super().on_model_built()
        data: Any = self.data
        if data is None:
            return
        if any("desirable" not in part for part in data.report().values()):
            raise UserError(
                f"data: KTO trains on responses with a label, which KTOData reads; {type(data).__name__} gives none"
            )
        data.mismatches = self.kl

    # ---- the loss

    def loss_sums(self, batch: Batch, split: Split) -> Sums:
        """Sums over the rows of losses and metrics, with the rewards of desirable and undesirable rows apart."""

        def compute(states: States) -> tuple[Tensor, Tensor | None]:
            return states.logps(), states.router_loss

        kl = self.divergence(batch, split)
        logps, router_loss = self.causal_lm(batch, compute)
        responses = self.responses(batch, logps, self.reference.logps(batch, split), kl)
        rows = len(responses.desirable)
        # not for the stand-in of a rank without rows: a loss need not expect an empty batch
        losses = self.__losses(responses) if rows else logps
        sums = self.response_sums(responses) | {"loss": losses.sum()}
        return sums if router_loss is None else sums | {"objective": sums["loss"] + router_loss * rows}

    @staticmethod
    def responses(batch: Batch, logps: Tensor, ref_logps: Tensor, kl: Tensor) -> Responses:
        """The responses of a batch, from the log-probabilities `[targets]` under policy and reference."""
        desirable = batch["fields"].get("desirable", logps.new_zeros(len(batch["sample_ids"]))) > 0.5
        return Responses(logps, ref_logps, batch["target_segments"], desirable, kl)

    def __losses(self, responses: Responses) -> Tensor:
        """The weighted loss of each row.

        Raises:
            UserError: a loss of the user returns another shape, or no gradient.
        """
        losses, name, rows = self.loss(responses), type(self.loss).__name__, len(responses.desirable)
        if losses.shape != (rows,):
            raise UserError(
                f"model.loss: {name} returned a tensor of shape {list(losses.shape)} for {rows} responses; a response "
                "loss returns one loss per response, neither summed nor averaged"
            )
        if responses.logps.requires_grad and not losses.requires_grad:
            raise UserError(
                f"model.loss: {name} returned losses without a gradient: something in it detaches the responses"
            )
        return torch.where(responses.desirable, self.desirable_weight, self.undesirable_weight) * losses

    @torch.no_grad()
    def response_sums(self, responses: Responses) -> Sums:
        """Sums of everything that is logged besides the loss; `chosen` is the number of desirable rows."""
        rewards, logps = self.loss.rewards(responses).double(), responses.sums(responses.logps).double()
        chosen, rejected = responses.desirable, ~responses.desirable
        right = torch.where(chosen, rewards > 0, rewards < 0).double() + 0.5 * (rewards == 0).double()
        return {
            "rewards/chosen": torch.where(chosen, rewards, 0).sum(),
            "rewards/rejected": torch.where(rejected, rewards, 0).sum(),
            "rewards/sign_accuracy": right.sum(),
            "logps/chosen": torch.where(chosen, logps, 0).sum(),
            "logps/rejected": torch.where(rejected, logps, 0).sum(),
            "chosen": chosen.sum(),
            "kl": responses.kl * len(chosen),
        }

    def metrics(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """Means over all rows, over the desirable ones (`chosen`), and over the undesirable ones (`rejected`).

        A mean over no row is left out, and so is a KL divergence that is not estimated.
        """
        hidden = ("chosen",) if self.kl else ("chosen", "kl")
        means = super().metrics({name: value for name, value in sums.items() if name not in hidden}, split)
        counts = {"chosen": sums["chosen"], "rejected": sums["rows"] - sums["chosen"]}
        for of, count in counts.items():
            for name in (f"rewards/{of}", f"logps/{of}"):
                means[name] = sums[name] / count
                if not count:
                    del means[name]
        if all(counts.values()):
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    # ---- the KL divergence

    def on_validation_start(self) -> None:
        """Starts an estimate for this pass over held-out rows; see `LanguageModule`."""
        super().on_validation_start()
        self.__estimate = None

    def on_test_start(self) -> None:
        """Starts an estimate for this pass over test rows; see `LanguageModule`."""
        super().on_test_start()
        self.__estimate = None

    def divergence(self, batch: Batch, split: Split) -> Tensor:
        """The KL divergence of policy from reference, a scalar of at least 0, that holds for a batch.

        It is estimated on the mismatched rows of the batch's update, of all held-out rows of the pass, or, if neither
        is known, of the batch, when the first batch of these comes.
        """
        if not self.kl:
            return torch.zeros((), device=self.device)
        ids: Any = batch.get("update_ids") if split == "train" else split
        if self.__estimate is None or ids is None or self.__estimate[0] is not ids:
            if self.data is None:
                raise UserError(
                    "model.kl: the divergence is estimated on the mismatched rows of KTOData; set kl: false"
                )
            if split == "train":
                rows = batch["sample_ids"] if ids is None else ids
            else:
                rows = cast("Any", self.data).evaluated_ids(split, self.__batches_of(split))
            self.__estimate = ids, self.estimate(split, rows)
        return self.__estimate[1]

    def __batches_of(self, split: Split) -> float:
        """Batches of the current pass over held-out rows, on one rank."""
        trainer: Any = self.trainer
        if trainer.sanity_checking:
            limits = trainer.num_sanity_val_batches
        else:
            limits = trainer.num_val_batches if split == "validation" else trainer.num_test_batches
        return limits[0] if limits else float("inf")  # other engines set none, and read all

    @torch.no_grad()
    def estimate(self, split: Split, rows: Any) -> Tensor:
        """Estimates the KL divergence on the mismatched rows of some rows, divided among the ranks.

        It is the mean of the log-ratios of whole responses, and at least 0.
        """
        data, trainer = cast("Any", self.data), self.trainer
        ids = data.mismatched_ids(split, rows)
        batches = data.in_batches(split, ids)
        total = torch.zeros((), device=self.device, dtype=torch.float64 if self.device.type != "mps" else torch.float32)
        # every rank runs the model equally often, because all ranks have to gather sharded weights
        ranks = data_ranks(trainer)
        for first in range(0, len(batches), ranks.number):
            mine = first + ranks.index
            part = data.batch(split, batches[mine] if mine < len(batches) else [])
            part = trainer.strategy.batch_to_device(part)
            total += (self.causal_lm(part) - self.reference.logps(part, split)).sum(dtype=total.dtype)
        # under autocast, weights that were cast without gradient must not be read by the forward pass that follows
        torch.clear_autocast_cache()
        total = ranks.total(total, trainer.strategy)
        return (total / max(1, len(ids))).clamp(min=0).float()

    # ---- checks

    @torch.no_grad()
    def check_start(self, batch: Batch) -> None:
        """Checks that policy and reference are equal, and that the loss has its value for equal models (0.5 for KTO).

        Raises:
            UserError: either check fails.
        """
        super().check_start(batch)
        expected = self.loss.loss_at_start
        if expected is None or not self.reference.is_initial or not batch["sample_ids"]:
            return
        logps = self.reference.logps(batch, "train")
        value = float(self.loss(self.responses(batch, logps, logps, logps.new_zeros(()))).mean())
        if abs(value - expected) > 1e-4:
            name = type(self.loss).__name__
            raise UserError(f"{name} is {value:.6g} for equal policy and reference, not {expected:g}")

    @property
    def doubts(self) -> list[str]:
        """Advice on the weights, if the classes are unbalanced."""
        data = self.data
        part = {} if data is None else data.report().get("train", {})
        if "desirable" not in part:
            return []
        good = part["desirable"]
        bad = part["kept"] - good
        weights = f"desirable_weight {self.desirable_weight:g}, undesirable_weight {self.undesirable_weight:g}"
        if not (good and bad):
            return [
                f"all {good or bad:,} training rows are {'' if good else 'un'}desirable: without rows of both kinds, "
                "KTO learns to say everything or nothing more often; look at the labels"
            ]
        ratio = good * self.desirable_weight / max(1e-9, bad * self.undesirable_weight)
        if BALANCED[0] <= ratio <= BALANCED[1]:
            return []
        if good < bad:
            key, low = "desirable_weight", bad * self.undesirable_weight / good
            high = low * 4 / 3
        else:
            key, high = "undesirable_weight", good * self.desirable_weight / bad
            low = high * 3 / 4
        return [
            f"{good:,} training rows are desirable and {bad:,} are not, which are weighted {ratio:.2g} to 1 "
            f"({weights}); the paper advises 1 to 4/3 (arXiv:2402.01306): set model.{key} to {low:.2g} to {high:.2g}"
        ]
