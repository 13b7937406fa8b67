"""Gives a run its folder: rank 0 chooses the name, everything that writes is told, and `run.json` follows the state."""

import contextlib
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl import __version__
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.preemption import Stopped
from oumi_pl.errors import UserError
from oumi_pl.report.clock import Clock
from oumi_pl.report.environment import environment
from oumi_pl.runs import folders
from oumi_pl.runs.metrics import MetricsCSV


class RunFolder(L.Callback):
    """Creates or continues `runs/<name>` and keeps `run.json`, `config.yaml` and `data.json` in it.

    Args:
        root: Directory of all runs.
        name: Name of the run; a number is added when it is taken.
        recipe: What the run is found by when it is resumed.
        config: The whole config as YAML.
        resume: Folder of the run to continue.
        recipe_text: The recipe as it was written, with its comments.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        recipe: str,
        config: str,
        resume: Path | None = None,
        *,
        recipe_text: bytes | None = None,
    ) -> None:
        self.root = root
        self.name = name
        self.recipe = recipe
        self.config = config
        self.resume = resume
        self.recipe_text = recipe_text
        self.directory: Path | None = None
        self.clock = Clock()
        self._before: dict[str, float] = {}
        self._row: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks whether a folder can be made; it is made when all else stands, so that no mistake leaves one behind."""
        self.clock.enter("model")
        pl_module.run_config = self.config  # type: ignore[assignment]
        if stage in ("fit", "predict") and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folders.refuse_unwritable(self.resume or self.root)

    def _make(self, trainer: L.Trainer) -> None:
        """Rank 0 makes the folder, the others are told."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        chosen = (self.resume or folders.create(self.root, self.name)) if trainer.is_global_zero else None
        self.directory = Path(trainer.strategy.broadcast(str(chosen)))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.directory = self.directory / folders.CHECKPOINTS

    def _describe(self, trainer: Any, pl_module: Any, directory: Path) -> None:
        (directory / folders.CONFIG).write_text(self.config, encoding="utf-8")
        report = json.dumps(trainer.datamodule.report(), indent=1)
        (directory / "data.json").write_text(report + "\n", encoding="utf-8")
        earlier = folders.read_state(directory) if self.resume else {}
        told: dict[str, Any]
        if self.resume:
            stood = [step for step in earlier.get("resumed", []) if step < trainer.global_step]
            told = {"resumed": [*stood, trainer.global_step], "resumed_by": _command(), "reason": None}
        else:
            now = {"created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "created_ns": time.time_ns()}
            told = {"command": _command(), **now}
            if self.recipe_text is not None:
                (directory / folders.RECIPE).write_bytes(self.recipe_text)
        self._before = dict(earlier.get("times", {}))
        unnoted = (folders.seconds(directory, earlier) or 0.0) - sum(self._before.values())
        if unnoted > 0:
            self._before["killed"] = self._before.get("killed", 0.0) + unnoted
        folders.write_state(
            directory,
            recipe=self.recipe,
            status="running",
            pid=os.getpid(),
            process=folders.process(),
            oumi_pl=__version__,
            steps=pl_module.total_steps(),
            model=_model(trainer, pl_module),
            environment=environment() | _devices(pl_module.device, trainer.world_size),
            begun=time.time() - sum(self.clock.read().values()),
            before=sum(self._before.values()),
            **told,
        )

    @rank_zero_only
    def note(self, **values: Any) -> None:
        """Writes down where the time has gone so far, and what else is to be known, if there is a folder."""
        if self.directory is not None:
            folders.write_state(self.directory, times=self.clock.read(self._before), **values)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time: the model is made."""
        self.clock.enter("checks")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the folder, says in it what runs, and opens the metrics file where the run stands."""
        self.clock.enter("start")
        self._make(trainer)
        if self.directory is not None and trainer.is_global_zero:
            self._describe(trainer, pl_module, self.directory)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV) and self.directory is not None and trainer.is_global_zero:
                logger.open(self.directory / folders.METRICS, trainer.global_step, self._row)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Time: what was done between two updates is done."""
        if self.clock.phase != "training":
            self.clock.enter("training")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time: validation begins."""
        self.clock.enter("validation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time: validation is done, and what it took is written down, for a run may be killed."""
        self.clock.enter("training")
        self.note(step=trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the metrics of this step in the checkpoint: a kill may come before they are in the file."""
        self.clock.enter("saving")
        kinds = ("train/", "val/", "epoch") if trainer.validating else ("train/", "epoch")
        row = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith(kinds)}
        checkpoint["metrics_row"] = row | {"step": trainer.global_step}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes up the metrics of the checkpoint's step."""
        self._row = checkpoint.get("metrics_row")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the folder."""
        self._make(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says so if there was nothing to train: the checkpoint stands where the run ends, or beyond.

        Raises:
            UserError: if no update was due.
        """
        if self.directory is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise nothing_left(trainer.global_step)

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Marks the run as finished."""
        self.clock.enter("end")
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("train/", "val/"))}
        self.note(status="finished", step=trainer.global_step, metrics=metrics)

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Marks the run as stopped or failed, and writes the metrics that are still in memory."""
        with contextlib.suppress(OSError):  # a disk that is full: what went wrong first is what is told
            for logger in trainer.loggers:
                logger.finalize("failed")
        stopped = isinstance(exception, Stopped | KeyboardInterrupt)
        with contextlib.suppress(OSError):
            self.note(status="stopped" if stopped else "failed", step=trainer.global_step, reason=_reason(exception))


def nothing_left(step: int) -> UserError:
    """What is said of a run whose checkpoint stands at its end, or beyond."""
    return UserError(
        f"nothing is left to train: the run ends at step {step}, where the checkpoint stands; "
        "raise trainer.max_steps or trainer.max_epochs"
    )


def _command() -> str:
    """The command line, ready to be pasted."""
    program = Path(sys.argv[0])
    # python -m oumi_pl, or the script of whichever environment
    is_ours = program.name == "oumi_pl" or (program.name == "__main__.py" and program.parent.name == "oumi_pl")
    return shlex.join(["oumi_pl" if is_ours else sys.argv[0], *sys.argv[1:]])


def _reason(error: BaseException) -> str | None:
    """What ended a run, in a line or two."""
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C"
    text = str(error).strip()[:500]
    return text if isinstance(error, Stopped | UserError) else f"{type(error).__name__}: {text}"


def _model(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """What is trained, for the run's record."""
    parameters = list(pl_module.parameters())
    return {
        "trainer": type(pl_module).__name__,
        "architecture": type(pl_module.causal_lm.base).__name__,
        "name": pl_module.model_name,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "loss": type(getattr(pl_module, "loss", None)).__name__,
        "precision": str(trainer.precision),
    }


def _devices(device: torch.device, count: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "devices": count}
