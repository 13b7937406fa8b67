"""Preference training: DPO and its family, on pairs of responses of which one is better."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from oumi_pl.errors import UserError
from oumi_pl.losses.preference import Sigmoid
from oumi_pl.models.build import DType
from oumi_pl.models.preference import PairOutput, PreferenceLM, choose_layout, shared, with_layout
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.reference_setup import ReferenceSetup
from oumi_pl.modules.sums import Sums
from oumi_pl.modules.update import LOSS_SCALE
from oumi_pl.types import Pairs, PreferenceBatch, PreferenceLoss

SPLIT = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
"""Command -> the splits whose pairs it compares."""
PER_PAIR = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "lengths/chosen",
    "lengths/rejected",
)
"""Metrics that are means over pairs."""


class DPO(LanguageModule):
    """Trains on pairs of responses, normalised by their number over the whole update. Dropout is off.

    Args:
        loss: Loss of a pair; `Sigmoid` (DPO with beta 0.1) when left out.
        reference: What the policy is compared with. `initial`: the model as it is when training starts; with LoRA that
            is the base without its adapters, without LoRA its log-probabilities are computed once, before training, and
            kept in the cache. `online`: the same, as a frozen copy in memory. A hub id or directory: another model,
            computed before training as well. `none`: for losses that need no reference.
        reference_dtype: Of a frozen copy or another model; that of the policy when left out.
        sync_every: Optimizer steps after which the reference moves towards the policy (TR-DPO); keeps a copy in memory.
        mixup: How far it moves, from 0 to 1.
        share_prompt: Compute the prompt of a pair once for both responses. `auto`: where the model can do so exactly.
        model: Hub id or directory of a pretrained model, usually one that was fine-tuned (SFT); an adapter's too.
        config: `model_type` and values of a config to start from; with `model`, values to override.
        kwargs: As of `LanguageModule`.
    """

    normalised_by = "pairs"
    reads = "pairs"
    wrapper: ClassVar = PreferenceLM
    details = ("logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected")
    validation_metrics = (*(f"val/{name}" for name in PER_PAIR), "val/kl")

    def __init__(
        self,
        model: str | None = None,
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
        self.share_prompt = share_prompt
        self.reference = ReferenceSetup(self, reference, reference_dtype, sync_every, mixup)
        self.notes: list[str] = []
        """What the run says about itself before the first update."""
        names = (*PER_PAIR, "pairs", "targets", "kl")
        self.evaluation = nn.ModuleDict({stage: Sums(*names) for stage in ("validate", "test")})
        self._check_start = False
        self._lacks_margins: Tensor | bool = False

    # ---- model

    def build(self, tokenizer: Any, added_tokens: Sequence[int] = (), packing: bool = False) -> PreferenceLM:
        """The model that the arguments describe, with the layout of pairs that has the least work and is exact.

        Raises:
            UserError: `share_prompt: true`, and the model can't.
        """
        build = partial(super().build, tokenizer, added_tokens)
        model = with_layout(cast("Any", build), self.share_prompt is not False)
        if self.share_prompt is True and model.layout is not shared:
            raise UserError(f"model.share_prompt: {model.layout_reason}; leave it out to compute prompts twice")
        return model

    def on_model_built(self) -> None:
        """Remembers the weights that training starts from, as far as the reference needs them."""
        self.reference.remember(self.policy)

    @property
    def policy(self) -> PreferenceLM:
        """The model that is trained."""
        return cast("PreferenceLM", self.causal_lm)

    def refuse_inexact_packing(self) -> None:
        """Looks again at what the attention does, now that the model is on its device."""
        if self.device.type != "cpu" and self.policy.layout is shared:
            self.policy.layout, self.policy.layout_reason = choose_layout(self.policy)

    def on_fit_start(self) -> None:
        """Makes the reference ready."""
        super().on_fit_start()
        self._open_reference()

    def on_train_start(self) -> None:
        """Notes whether this is where training starts: only there policy and reference have to be equal."""
        super().on_train_start()
        self._check_start = self.trainer.global_step == 0

    def on_validation_start(self) -> None:
        """Makes the reference ready, where validation is all that runs."""
        self._open_reference()

    def on_test_start(self) -> None:
        """Makes the reference ready."""
        self._open_reference()

    def _open_reference(self) -> None:
        splits = SPLIT[str(cast("Any", self.trainer.state.fn).value)]
        if not self.reference.covers(splits):
            self.reference.open(splits)
            self.notes = [self.reference.description, self._layout_note()]

    def _layout_note(self) -> str:
        if self.policy.layout is shared:
            return "prompts are computed once per pair"
        return f"prompts are computed twice per pair: {self.policy.layout_reason}"

    # ---- training

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Sum of the micro-batch's losses, over a constant: the update's end divides by the true number of pairs."""
        pairs, losses, out = self._compare(batch, "train")
        if self._check_start:
            self._check_start = False
            self.reference.check_start(batch, pairs)
        self._lacks_margins = self._lacks_margins | batch["margins"].isnan().any()
        sums = self._measure(pairs, losses, batch)
        self.add_to_update(out.inputs, batch["sample_ids"], **sums)
        # the stand-in of a rank without rows has no targets: their sum is 0, and every parameter takes part in it
        loss_sum = losses.sum() if batch["sample_ids"] else out.logps.sum()
        if out.router_loss is not None:
            loss_sum = loss_sum + out.router_loss * len(batch["sample_ids"])
        return loss_sum / LOSS_SCALE

    def _compare(self, batch: PreferenceBatch, split: str) -> tuple[Pairs, Tensor, PairOutput]:
        """Log-probabilities under policy and reference, and the losses, `[pairs]`."""
        out: PairOutput = self.policy(batch)
        assert self.reference.opened is not None
        reference = self.reference.opened.logps(batch, split)
        pairs = Pairs(out.logps, reference.float(), batch["branches"], len(batch["pair_lengths"]), batch["margins"])
        # a stand-in is no pair: a loss that keeps a running mean must not see it
        losses = self._losses(pairs) if batch["sample_ids"] else pairs.logps.new_zeros(pairs.count)
        return pairs, losses, out

    def _losses(self, pairs: Pairs) -> Tensor:
        """The loss of each pair.

        Raises:
            UserError: a loss of the user's gives something else.
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
    def _measure(self, pairs: Pairs, losses: Tensor, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Sums over the pairs of a batch, of all that is logged."""
        chosen, rejected = self.loss.rewards(pairs)
        margins = chosen - rejected
        per_pair = (
            losses,
            chosen,
            rejected,
            margins,
            (margins > 0).double() + 0.5 * (margins == 0).double(),
            pairs.chosen_logps,
            pairs.rejected_logps,
            pairs.chosen_tokens,
            pairs.rejected_tokens,
        )
        real = 1.0 if batch["sample_ids"] else 0.0
        sums = {
            name: value.double().sum() if real else value.new_zeros(())
            for name, value in zip(PER_PAIR, per_pair, strict=True)
        }
        sums["pairs"] = losses.new_tensor(float(len(batch["sample_ids"])))
        sums["targets"] = losses.new_tensor(float(len(batch["targets"])))
        sums["kl"] = 0.5 * (pairs.logps - pairs.ref_logps).double().square().sum()
        return sums

    def update_metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the pairs of the update, and the KL estimate per token."""
        means = {name: sums[name] / sums["pairs"].clamp(min=1) for name in PER_PAIR}
        if self.reference.kind == "none":
            return means
        return means | {"kl": sums["kl"] / sums["targets"].clamp(min=1)}

    def _refuse_non_finite(self, loss: Tensor, grad_norm: Tensor) -> None:
        try:
            super()._refuse_non_finite(loss, grad_norm)
        except UserError as error:
            if self._lacks_margins:
                raise UserError(
                    "the loss is not a number, and there are rows without a margin, which is NaN for them: give all "
                    "rows one, or let the loss do without (pairs.margins.nan_to_num())"
                ) from error
            raise

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, then moves the reference if it is time: before anything of this step is saved."""
        super().optimizer_step(*args, **kwargs)
        self.reference.after_step(self.global_step + 1)

    # ---- evaluation

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds a batch to the sums over the held-out pairs."""
        self._evaluate("validate", "validation", batch)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds a batch to the sums over the test pairs."""
        self._evaluate("test", "test", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs exact means over all held-out pairs."""
        self._log_evaluation("validate", "val")

    def on_test_epoch_end(self) -> None:
        """Logs exact means over all test pairs."""
        self._log_evaluation("test", "test")

    def _evaluate(self, stage: str, split: str, batch: PreferenceBatch) -> None:
        pairs, losses, _ = self._compare(batch, split)
        cast("Sums", self.evaluation[stage]).add(self._measure(pairs, losses, batch))

    def _log_evaluation(self, stage: str, prefix: str) -> None:
        self.log_evaluation(prefix, self.update_metrics(cast("Sums", self.evaluation[stage]).take()))

    # ---- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Weights as of `LanguageModule`, and what the loss keeps from batch to batch."""
        state = super().state_dict(*args, **kwargs)
        return state | (self.loss.state_dict(prefix="loss.") if isinstance(self.loss, nn.Module) else {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds which weights training started from, and the reference if it moves."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference"] = self.reference.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what `on_save_checkpoint` added."""
        super().on_load_checkpoint(checkpoint)
        self.reference.load_state(checkpoint.get("reference") or {})
