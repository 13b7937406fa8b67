"""Supervised fine-tuning: the next-token loss on the tokens that the data mark."""

from typing import Any, cast

from torch import Tensor, nn

from oumi_pl.losses.causal import CrossEntropy, TokenLossOutput
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.sums import Sums
from oumi_pl.modules.update import LOSS_SCALE
from oumi_pl.types import Batch, TokenLoss


class SFT(LanguageModule):
    """Trains on the tokens that the data mark, normalised by their number over the whole update.

    Args:
        loss: Loss per token: `(logits [n, vocab], targets [n]) -> [n]`.
        model: Hub id or directory of a pretrained model; leave it out to start from random weights.
        config: `model_type` and values of a config to start from; with `model`, values to override.
        kwargs: As of `LanguageModule`.
    """

    validation_metrics: tuple[str, ...] = ("val/loss", "val/nll", "val/perplexity", "val/mean_token_accuracy")

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        *,
        loss: TokenLoss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, config, **kwargs)
        self.loss = loss or CrossEntropy()
        self.evaluation = nn.ModuleDict({s: Sums("loss", "nll", "targets", "correct") for s in ("validate", "test")})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum of the micro-batch's token losses, over a constant: the update's end divides by the true count."""
        out: TokenLossOutput = self.causal_lm(batch, self.loss)
        sums = {"loss": out.loss_sum, "targets": out.target_tokens, "correct": out.correct}
        self.add_to_update(batch, batch.get("sample_ids"), **sums)
        return out.loss_sum / LOSS_SCALE

    def update_metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss and accuracy per target token of the update."""
        targets = sums["targets"].clamp(min=1)
        return {"loss": sums["loss"] / targets, "mean_token_accuracy": sums["correct"] / targets}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the sums over the held-out tokens."""
        self._evaluate("validate", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the sums over the test tokens."""
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs exact means over all held-out tokens."""
        self._log_evaluation("validate", "val")

    def on_test_epoch_end(self) -> None:
        """Logs exact means over all test tokens."""
        self._log_evaluation("test", "test")

    def _evaluate(self, stage: str, batch: Batch) -> dict[str, Tensor]:
        out: TokenLossOutput = self.causal_lm(batch, self.loss)
        plain: TokenLossOutput = out if self._loss_is_nll else self.causal_lm(batch, CrossEntropy())
        sums = {"loss": out.loss_sum, "nll": plain.loss_sum, "targets": out.target_tokens, "correct": out.correct}
        cast("Sums", self.evaluation[stage]).add(sums)
        return sums

    @property
    def _loss_is_nll(self) -> bool:
        loss = self.loss
        return type(loss) is CrossEntropy and loss.label_smoothing == loss.z_loss == 0

    def _log_evaluation(self, stage: str, prefix: str) -> None:
        sums = cast("Sums", self.evaluation[stage]).take()
        per_token = {name: sums[name] / sums["targets"].clamp(min=1) for name in ("loss", "nll", "correct")}
        self.log_evaluation(
            prefix,
            {
                "loss": per_token["loss"],
                "nll": per_token["nll"],
                "perplexity": per_token["nll"].exp(),
                "mean_token_accuracy": per_token["correct"],
            },
        )
