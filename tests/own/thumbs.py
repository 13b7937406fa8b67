"""A trainer type that the package does not have: good and bad answers, each by itself, against a reference."""

from typing import Any

from torch import nn
from torch.nn.functional import logsigmoid

from oumi_pl.models.lm import LM
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.reference import Reference


class Thumbs(LanguageModule):
    """Raises the log-ratio of good answers above a threshold that a head predicts, and lowers that of bad ones below.

    Args:
        beta: Scale of the log-ratios.
        kwargs: See `LanguageModule`.
    """

    unit = "rows"

    def __init__(self, *args: Any, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = beta
        self.reference = Reference(self)

    def make_heads(self, model: LM) -> None:
        self.threshold = nn.Linear(model.base.config.hidden_size, 1)

    def loss_sums(self, batch, split):
        rows = len(batch["sample_ids"])
        logps, ends = self.causal_lm(batch, lambda states: (states.logps(), states.ends))
        ratios = logps - self.reference.logps(batch, split)
        sums = logps.new_zeros(len(batch["segments"])).index_add(0, batch["target_segments"], ratios)
        over = (self.beta * sums - self.threshold(ends.float())[:, 0])[:rows]
        good = batch["fields"].get("good", over)  # the stand-in of a rank without rows has no fields
        losses = -logsigmoid((2 * good - 1) * over)
        return {"loss": losses.sum(), "accuracy": ((over > 0) == (good > 0.5)).sum()}
