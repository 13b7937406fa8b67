"""Keeps what a run logs in memory, for notebooks: a table of numbers, and curves where it is displayed."""

from typing import Any

import lightning as L

from oumi_pl.report import curves
from oumi_pl.report.page import inline
from oumi_pl.runs.folders import Column

SHOWN = 3
"""Panels that are displayed."""


class History(L.Callback):
    """Keeps the metrics of a run that is started from Python. At the end of a notebook's cell it shows their curves.

    `history["val/loss"]` are the steps and the values of a metric.

    Args:
        panels: How many panels to show, the most informative first.
    """

    def __init__(self, panels: int = SHOWN) -> None:
        self.panels = panels
        self.metrics: dict[str, Column] = {}
        """Name -> steps and values."""

    def __getitem__(self, name: str) -> Column:
        return self.metrics[name]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Keeps the metrics of an update, once."""
        self._keep(trainer, "train/")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the metrics of a validation during training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._keep(trainer, "val/")

    def _keep(self, trainer: Any, prefix: str) -> None:
        step = trainer.global_step
        for name, value in trainer.callback_metrics.items():
            if name.startswith(prefix):
                steps, values = self.metrics.setdefault(name, ([], []))
                if steps[-1:] != [step]:
                    steps.append(step)
                    values.append(float(value))

    def _repr_html_(self) -> str:
        shown = curves.panels(self.metrics)[: self.panels]
        return inline(
            f"{len(self.metrics)} metrics, {max((steps[-1] for steps, _ in self.metrics.values()), default=0):,} steps",
            [curves.legend(self.metrics)] if shown else ["nothing was logged yet"],
            curves=[curves.svg(panel, self.metrics) for panel in shown],
            height=290 * -(-len(shown) // 3) + 90,
        )
