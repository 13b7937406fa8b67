"""Preference training: DPO and related losses, on pairs of a better and a worse response."""

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from oumi_pl.errors import UserError
from oumi_pl.losses.preference import LDDPO, Sigmoid, WeightedSum
from oumi_pl.models.build import DType
from oumi_pl.models.lm import States
from oumi_pl.modules.base import LanguageModule, ModelName
from oumi_pl.modules.reference import Reference
from oumi_pl.modules.update import Split
from oumi_pl.types import Batch, Pairs, PreferenceLoss, Sums


class DPO(LanguageModule):
    """Trains on pairs of responses, normalised by their number over the whole update. Dropout is off.

    Args:
        model: Hub id or directory of a pretrained model, usually one that was fine-tuned (SFT); an adapter's too.
        config: `model_type` and values of a config to start from; with `model`, values to override.
        loss: Loss of a pair; `Sigmoid` (DPO with beta 0.1) when left out. Its `metrics` are logged as well.
        reference: What the policy is compared with. `initial`: the model at the start of training; with LoRA the base
            with its adapters disabled, else log-probabilities that are computed before training and kept in the cache.
            `online`: the same model as a frozen copy in memory. A hub id or directory: another model, also computed
            before training. `none`: for losses that need no reference.
        reference_dtype: Of a frozen copy or another model; that of the policy when left out.
        sync_every: Optimizer steps after which the reference moves towards the policy (TR-DPO); keeps a copy in memory.
        mixup: How far it moves, from 0 to 1.
        share_prompt: Compute the prompt of a pair once for both responses. `auto`: if the model can do so exactly.
        kwargs: See `LanguageModule`.
    """

    unit = "rows"
    branching = True
    details: ClassVar[tuple[str, ...]] = ("logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected")
    validation_metrics = (
        *("val/loss", "val/kl"),
        *("val/rewards/chosen", "val/rewards/rejected", "val/rewards/margins", "val/rewards/accuracies"),
        *(f"val/{name}" for name in details),
    )

    def __init__(
        self,
        model: ModelName | None = None,
        config: dict[str, Any] | None = None,
        *,
        loss: PreferenceLoss | None = None,
        reference: str = "initial",
        reference_dtype: DType | None = None,
        sync_every: int | None = None,
        mixup: float = 0.6,
        share_prompt: Literal["auto"] | bool = "auto",
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-6, weight_decay=0.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, config, optimizer=optimizer, **kwargs)
        self.loss = loss or Sigmoid()
        if isinstance(self.loss, WeightedSum | LDDPO) or type(self.loss).metrics is not PreferenceLoss.metrics:
            self.validation_metrics = ()  # the loss has names of its own
        self.share_prompt = share_prompt
        self.reference: Reference = Reference(
            self,
            reference,
            reference_dtype,
            sync_every,
            mixup,
            share_prompt=share_prompt is not False,
            needed=self.loss.needs_reference,
            user=type(self.loss).__name__,
        )
        if self.reference.kind == "none":
            self.validation_metrics = tuple(name for name in self.validation_metrics if name != "val/kl")
        self.__lacks_margins: Tensor | bool = False

    def loss_sums(self, batch: Batch, split: Split) -> Sums:
        """Sums over the pairs of losses and metrics."""

        def compute(states: States) -> tuple[Tensor, Tensor | None]:
            return states.logps(), states.router_loss

        logps, router_loss = self.causal_lm(batch, compute)
        pairs = self.pairs(batch, logps, self.reference.logps(batch, split))
        self.__lacks_margins = self.__lacks_margins | pairs.margins.isnan().any()
        # not for the stand-in of a rank without rows: a loss with a running mean must not see an empty batch
        losses = self.__losses(pairs) if pairs.count else logps
        sums = self.pair_sums(pairs, losses) | {"loss": losses.sum()}
        return sums if router_loss is None else sums | {"objective": sums["loss"] + router_loss * pairs.count}

    @staticmethod
    def pairs(batch: Batch, logps: Tensor, ref_logps: Tensor) -> Pairs:
        """The pairs of a batch, from the log-probabilities `[targets]` under policy and reference."""
        count = len(batch["sample_ids"])
        margins = batch["fields"].get("margin", logps.new_full((count,), float("nan")))
        return Pairs(logps, ref_logps, batch["target_segments"], count, margins)

    @torch.no_grad()
    def pair_sums(self, pairs: Pairs, losses: Tensor) -> Sums:
        """Sums over the pairs of everything that is logged."""
        chosen, rejected = self.loss.rewards(pairs)
        margins = chosen - rejected
        of_pairs = {
            "loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).double() + 0.5 * (margins == 0).double(),
            "logps/chosen": pairs.chosen_logps,
            "logps/rejected": pairs.rejected_logps,
            "lengths/chosen": pairs.chosen_tokens,
            "lengths/rejected": pairs.rejected_tokens,
        }
        sums = {name: values.double().sum() for name, values in (self.loss.metrics(pairs) | of_pairs).items()}
        return sums | {"kl": 0.5 * (pairs.logps - pairs.ref_logps).double().square().sum()}

    def metrics(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """Means over the pairs, and the KL estimate per token."""
        metrics = super().metrics(sums, split)
        if self.reference.kind == "none":
            del metrics["kl"]
        else:
            metrics["kl"] = sums["kl"] / sums["targets"].clamp(min=1)
        return metrics

    def __losses(self, pairs: Pairs) -> Tensor:
        """The loss of each pair.

        Raises:
            UserError: a loss of the user returns another shape, or no gradient.
        """
        losses, name = self.loss(pairs), type(self.loss).__name__
        if losses.shape != (pairs.count,):
            raise UserError(
                f"model.loss: {name} returned a tensor of shape {list(losses.shape)} for {pairs.count} pairs; a "
                "preference loss returns one loss per pair, neither summed nor averaged"
            )
        if pairs.logps.requires_grad and not losses.requires_grad:
            raise UserError(
                f"model.loss: {name} returned losses without a gradient: something in it detaches the pairs"
            )
        return losses

    @torch.no_grad()
    def check_start(self, batch: Batch) -> None:
        """Checks that policy and reference are equal, and that the loss has its value for equal models (ln 2 for DPO).

        Raises:
            UserError: either check fails.
        """
        super().check_start(batch)
        loss, expected = self.loss, self.loss.loss_at_start
        keeps_state = isinstance(loss, nn.Module) and next(loss.buffers(), None) is not None
        if expected is None or keeps_state or not self.reference.is_initial or not batch["sample_ids"]:
            return
        logps = self.reference.logps(batch, "train")
        value = float(loss(self.pairs(batch, logps, logps)).mean())
        if abs(value - expected) > (1e-1 if self.reference.is_half_precision else 1e-4) * max(1.0, abs(expected)):
            raise UserError(f"{type(loss).__name__} is {value:.6g} for equal policy and reference, not {expected:g}")

    def refuse_non_finite(self, loss: Tensor, grad_norm: Tensor) -> None:
        """See `UpdateModule`; of a loss of the user's, names rows without a margin as a possible cause.

        Raises:
            UserError: the loss or the norm is not a finite number.
        """
        try:
            super().refuse_non_finite(loss, grad_norm)
        except UserError as error:
            # no loss of the package reads margins, but these two may contain one that does
            may_read = isinstance(self.loss, WeightedSum | LDDPO) or not type(self.loss).__module__.startswith(
                "oumi_pl."
            )
            if not (may_read and self.__lacks_margins):
                raise
            raise UserError(
                f"{error}. If the loss reads pairs.margins: there are rows without a margin, which is NaN for them; "
                "give all rows one, or let the loss do without (pairs.margins.nan_to_num())"
            ) from error

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights that `LanguageModule` saves, and the buffers of the loss."""
        state = super().state_dict(*args, **kwargs)
        return state | (self.loss.state_dict(prefix="loss.") if isinstance(self.loss, nn.Module) else {})
