"""Supervised fine-tuning: the next-token loss on the tokens that carry loss."""

from typing import Any

from torch import Tensor

from oumi_pl.errors import UserError
from oumi_pl.losses.causal import CrossEntropy, is_cross_entropy
from oumi_pl.models.lm import States
from oumi_pl.modules.base import LanguageModule, ModelName
from oumi_pl.modules.update import Split
from oumi_pl.types import Batch, Sums, TokenLoss


class SFT(LanguageModule):
    """Trains on the tokens that carry loss, normalised by their number (or weight) over the whole update.

    Args:
        loss: Loss per token: `(logits [n, vocab], targets [n]) -> [n]`. Its `metrics` are logged as well.
        kwargs: See `LanguageModule`.
    """

    branching = False
    weighs_targets = True
    validation_metrics: tuple[str, ...] = ("val/loss", "val/nll", "val/perplexity", "val/mean_token_accuracy")

    def __init__(
        self,
        model: ModelName | None = None,
        config: dict[str, Any] | None = None,
        *,
        loss: TokenLoss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, config, **kwargs)
        self.loss = loss or CrossEntropy()
        if isinstance(self.loss, TokenLoss) and type(self.loss).metrics is not TokenLoss.metrics:
            self.validation_metrics = ()  # the loss has names of its own

    def on_model_built(self) -> None:
        """Refuses rows that must not be imitated; see `LanguageModule`.

        Raises:
            UserError: some rows of the data are labelled as bad answers, or the model samples them itself.
        """
        super().on_model_built()
        refuse_bad_answers(self)
        if self.data is not None and self.data.samples:
            raise UserError(
                f"data: {type(self.data).__name__} samples completions, and {type(self).__name__} imitates answers; "
                "use SFTData, or train with GRPO or Distill"
            )

    def loss_sums(self, batch: Batch, split: Split) -> Sums:
        """Sums over the targets: `loss`, `correct` (targets with the largest logit), and in evaluation `nll`.

        `loss` and `nll` are sums by weight.
        """
        with_nll = split != "train" and not is_cross_entropy(self.loss)

        def compute(states: States) -> Sums:
            out = states.loss_sum(self.loss)
            sums = out.metrics | {"loss": out.loss_sum, "correct": out.correct}
            if split != "train":
                sums["nll"] = states.loss_sum(CrossEntropy()).loss_sum if with_nll else out.loss_sum
            return sums

        return self.causal_lm(batch, compute)

    def metrics(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """Means by weight, accuracy over the targets, and in evaluation perplexity."""
        means = super().metrics({name: value for name, value in sums.items() if name != "correct"}, split)
        means["mean_token_accuracy"] = sums["correct"] / sums["targets"].clamp(min=1)
        return means if split == "train" else means | {"perplexity": means["nll"].exp()}


def refuse_bad_answers(module: LanguageModule) -> None:
    """Refuses labelled data for a trainer type that imitates every answer.

    Raises:
        UserError: the data have labels (the count `desirable` in their report).
    """
    data = module.data
    if data is not None and any("desirable" in part for part in data.report().values()):
        raise UserError(
            f"data: {type(data).__name__} gives good and bad answers, and {type(module).__name__} would imitate both; "
            "use SFTData, with `label: keep_good` on the source if its rows have labels"
        )
