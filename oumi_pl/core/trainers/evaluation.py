"""Evaluation within training: the mean loss over all targets of the evaluation data, and who is told of it."""

import math
import time
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from oumi_pl.core.trainers.flow import Flow
from oumi_pl.core.trainers.loss import Loss, rows_of
from oumi_pl.core.trainers.records import MetricsFile


class EvaluatingModule(L.LightningModule):
    """Evaluates, and writes log rows.

    Args:
        flow: State, switches and callbacks.
        loss: What a micro-batch counts for.
        file: Where log rows go.
    """

    def __init__(self, flow: Flow, loss: Loss, file: MetricsFile) -> None:
        super().__init__()
        self.flow = flow
        self.loss = loss
        self.file = file
        self.total_tokens_seen = 0
        self.eval_metrics: dict[str, float] = {}
        """Those of the last evaluation, named `eval_...`."""
        self.clock = time.time()
        """Since when the updates that are not logged yet took; evaluation does not count."""
        self._sums = torch.zeros(4, dtype=torch.float64)
        self._of_text = False

    @property
    def has_eval(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()

    def evaluate(self) -> None:
        """Goes through the evaluation data by Lightning's own loop, which its callbacks see, then tells the flow."""
        trainer, started = self.trainer, time.time()
        first = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first
        seconds = time.time() - started
        loss, _, rows, batches = (self._sums / torch.tensor([self._sums[1].clamp(min=1), 1, 1, 1])).tolist()
        metrics = {"eval_loss": loss}
        if self._of_text:
            metrics["eval_perplexity"] = math.exp(min(loss, 700))
        metrics |= {"eval_runtime": seconds, "eval_samples_per_second": rows / seconds}
        metrics["eval_steps_per_second"] = batches / seconds
        row = self.flow.log(metrics)
        self.eval_metrics = dict(row)
        self.write(row, {}, {"eval_loss": "val/loss", "eval_perplexity": "val/perplexity"})
        self.flow.fire("on_evaluate", metrics=row)
        self.flow.note_best(row)
        self.clock = time.time()

    def on_validation_epoch_start(self) -> None:
        """Starts to count."""
        self._sums = torch.zeros(4, dtype=torch.float64)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds up losses over targets, so that how the rows are cut does not matter."""
        targets = self.loss.targets(batch)
        loss = self.loss(batch, targets.to(self.device))
        self._of_text = self.loss.predicts_tokens(batch)
        self._sums += torch.tensor([float(loss) * float(targets), float(targets), rows_of(batch), 1.0])

    def on_validation_epoch_end(self) -> None:
        """Adds up over the processes, and gives Lightning's callbacks `val/loss`."""
        if self.trainer.world_size > 1:
            sums = self._sums.to(self.device)
            self._sums = cast("Tensor", self.trainer.strategy.reduce(sums, reduce_op="sum")).cpu()
        self.log("val/loss", (self._sums[0] / self._sums[1].clamp(min=1)).float(), logger=False)

    def write(self, row: dict[str, Any], more: dict[str, Any], names: dict[str, str] | None = None) -> None:
        """Writes a log row to the file and to Lightning's loggers, renamed and with more beside it."""
        row = {(names or {}).get(name, name): value for name, value in row.items()} | more
        step = self.flow.state.global_step
        row |= {"global_step": step, "total_tokens_seen": self.total_tokens_seen}
        self.file.write(row)
        for logger in self.trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)
