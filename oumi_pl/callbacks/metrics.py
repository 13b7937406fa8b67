"""Completes held-out prompts at each validation, and logs metrics of the completions."""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import lightning as L

from oumi_pl.callbacks.pass_at_k import prompts_with_rows
from oumi_pl.callbacks.samples import generation, refuse_sharded, say_why_not
from oumi_pl.data.examples import ChatData
from oumi_pl.data.prompts import Prompt
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.errors import UserError
from oumi_pl.models.generation import complete
from oumi_pl.rollouts.metrics import Metric, resolve_all, scores
from oumi_pl.terminal.screen import working
from oumi_pl.types import RunModule

KEY = "Metrics.metrics"


class Metrics(L.Callback):
    """Completes held-out prompts greedily at each validation (`val_every`), and logs the mean of metrics, `val/NAME`.

    `checkpoint.monitor: val/NAME` keeps the best checkpoint by one of them. A metric that returns a mapping is logged
    as `val/NAME/KEY`. They are the functions of `generate --metric`: they get the row, with the text of the answer as
    the column `answer` unless it has such a column. Does nothing for models that don't complete prompts.

    Args:
        metrics: Paths of functions `(completion, row) -> number or mapping`, or built-in ones: `exact_match`,
            `rouge_l`, `chrf`, `regex:PATTERN` (1 if the whole completion matches), and the rewards.
        rows: Number of held-out rows to complete: the first ones whose prompts leave room.
        max_new_tokens: Longest completion.
        batch_size: Prompts per batch.
    """

    needs_validation = True

    def __init__(
        self, metrics: str | list[str], *, rows: int = 100, max_new_tokens: int = 256, batch_size: int = 64
    ) -> None:
        for name, value in (("rows", rows), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"Metrics: {name} is {value}, but has to be at least 1")
        self.metrics: dict[str, Metric] = resolve_all(metrics, KEY)
        if not self.metrics:
            raise UserError(f"{KEY}: name at least one")
        self.rows = rows
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self._generates = True
        self._prompts: list[Prompt] | None = None

    @property
    def validation_metrics(self) -> list[str]:
        """Names of the logged metrics; of those that return a mapping, what their names begin with."""
        return [f"val/{name}" for name in self.metrics]

    @property
    def validation_groups(self) -> list[str]:
        """Names that may be followed by `/KEY`."""
        return self.validation_metrics

    def setup(self, trainer: Any, pl_module: RunModule, stage: str) -> None:
        """Drops the prompts of an earlier data module; prints a note if the model can't complete prompts.

        Raises:
            UserError: the data have no prompts with answers, or the weights are divided over devices.
        """
        refuse_sharded(trainer, "Metrics")
        self._prompts = None
        self._generates = pl_module.generates
        data = trainer.datamodule
        is_rewarded = isinstance(data, RolloutData) and bool(data.rewards.names)
        if not isinstance(data, ChatData) or is_rewarded:
            instead = "set data.metrics" if is_rewarded else "it needs rows with answers"
            raise UserError(f"Metrics does not fit {type(data).__name__}: {instead}")
        if not self._generates:
            say_why_not("completions", pl_module)

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Calls the metrics once, with the answer of the first row: a mistake in one shows now.

        Raises:
            UserError: a metric fails, or returns something else than numbers.
        """
        if self._generates:
            self._prompts = self._fitting(pl_module, trainer.datamodule)
            row, origin = self._prompts[0].row, self._prompts[0].origin
            scores(self.metrics, str(row.get("answer", "")), row, KEY, f"the row {origin}")

    def on_validation_epoch_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Completes the prompts and logs the means."""
        if trainer.sanity_checking or not self._generates:
            return
        for name, value in self.means(trainer, pl_module).items():
            pl_module.log(f"val/{name}", value, rank_zero_only=False, sync_dist=False)

    def means(self, trainer: Any, pl_module: RunModule) -> dict[str, float]:
        """Completes the prompts; returns the mean of each metric by name."""
        data: ChatData = trainer.datamodule
        if self._prompts is None:
            self._prompts = self._fitting(pl_module, data)
        texts = self._completions(trainer, pl_module, self._prompts)
        means: dict[str, float] | UserError = {}
        if trainer.is_global_zero:  # a metric may differ between two calls, and the best checkpoint is chosen by it
            try:
                means = self._means_of(texts, self._prompts)
            except UserError as error:
                means = error
        means = trainer.strategy.broadcast(means)
        if isinstance(means, UserError):
            raise means
        return means

    def _means_of(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, float]:
        values: defaultdict[str, list[float]] = defaultdict(list)
        for prompt, text in zip(prompts, texts, strict=True):
            for name, value in scores(self.metrics, text, prompt.row, KEY, f"the row {prompt.origin}").items():
                values[name].append(value)
        return {name: math.fsum(numbers) / len(numbers) for name, numbers in values.items()}

    def _completions(self, trainer: Any, pl_module: RunModule, prompts: Sequence[Prompt]) -> list[str]:
        data: ChatData = trainer.datamodule
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))  # similar lengths share a batch
        texts = [""] * len(prompts)
        with working(f"completing {len(prompts)} held-out prompts"), generation(trainer, pl_module):
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                ids = [prompts[i].ids for i in places]
                settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop": data.stop_tokens}
                completed = complete(pl_module.causal_lm.hf, data.tokenizer, ids, **settings)
                for i, text in zip(places, completed, strict=True):
                    texts[i] = text
        return texts

    def _fitting(self, module: RunModule, data: ChatData) -> list[Prompt]:
        """The first prompts that leave room for a completion.

        Raises:
            UserError: there is none.
        """
        config = module.causal_lm.base.config.get_text_config()
        most = (getattr(config, "max_position_embeddings", None) or math.inf) - self.max_new_tokens
        fitting = (prompt for prompt in prompts_with_rows(data) if 0 < len(prompt.ids) <= most)
        prompts = list(itertools.islice(fitting, self.rows))
        if not prompts:
            raise UserError(
                f"Metrics: no held-out prompt leaves room for {self.max_new_tokens} new tokens in the positions of the "
                "model; lower max_new_tokens"
            )
        return prompts
