"""Creates the run folder, shares its path with all that write to it, and keeps `run.json` up to date."""

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from oumi_pl import __version__
from oumi_pl.callbacks import find, find_all
from oumi_pl.callbacks.checkpoint import Checkpoints, ended_by
from oumi_pl.callbacks.stopping import Stopped
from oumi_pl.errors import UserError
from oumi_pl.report.clock import Clock
from oumi_pl.report.environment import environment
from oumi_pl.runs import files, folders, lock
from oumi_pl.runs.lineage import parent_of
from oumi_pl.runs.metrics import MetricsCSV
from oumi_pl.terminal.text import echo
from oumi_pl.types import RunData, RunModule


def is_due(trainer: Any, phase: str) -> bool:
    """Whether a phase still has to run: a resumed run may have completed it before."""
    folder = find(trainer, RunFolder)
    return folder is None or phase not in folder.phases


def completed(trainer: Any, *phases: str) -> None:
    """Records phases as complete, in `run.json`."""
    if (folder := find(trainer, RunFolder)) is not None:
        folder.phases = folders.in_order([*folder.phases, *phases])
        folder.record(phases=folder.phases)


def run_directory(trainer: Any) -> Path | None:
    """The folder of the run; None if it has none, or none yet."""
    folder = find(trainer, RunFolder)
    return None if folder is None else folder.directory


class RunFolder(L.Callback):
    """Creates or continues `runs/<name>` and keeps `run.json`, `config.yaml` and `data.json` in it.

    Args:
        root: Directory of all runs.
        name: Name of the run; a number is added if the folder exists.
        recipe: Name of the recipe, by which `--resume` finds the run.
        config: The whole config as YAML.
        resume: Folder of the run to continue.
        recipe_text: The recipe as its author wrote it, with comments.
        ckpt_path: Checkpoint of another run that this one continues from.
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
        ckpt_path: str | None = None,
    ) -> None:
        self.root = root
        self.name = name
        self.recipe = recipe
        self.config = config
        self.resume = resume
        self.recipe_text = recipe_text
        self.ckpt_path = ckpt_path
        self.directory: Path | None = None
        self.clock = Clock()
        self.phases: list[str] = []
        """The phases of `folders.PHASES` that are complete."""
        self._before: dict[str, float] = {}
        self._without_folder: list[ModelCheckpoint] = []
        self.checkpoint_row: dict[str, Any] | None = None
        """The metrics of the checkpoint's step, in a resumed run."""

    def setup(self, trainer: Any, pl_module: RunModule, stage: str) -> None:
        """Checks that the run folder can be created. It is created after setup succeeds, so that a mistake leaves no
        folder behind.

        Raises:
            UserError: the folder can't be created.
        """
        self.clock.enter("model")
        pl_module.run_config = self.config
        # those without a folder of their own, before Lightning chooses one in their `setup`, outside of the run folder
        self._without_folder = [c for c in find_all(trainer, ModelCheckpoint) if c.dirpath is None]
        if self.resume is not None:
            self._set_folders(self.resume / folders.CHECKPOINTS)
        if stage in ("fit", "predict") and trainer.is_global_zero and not trainer.fast_dev_run:
            folders.refuse_unwritable(self.resume or self.root)

    def resumes_unfinished(self) -> bool:
        """Whether this resumes a run that was not finished, rather than extending a finished one or starting over."""
        return self.resume is not None and folders.read_state(self.resume).get("status") != "finished"

    def _create(self, trainer: Any, fill: Callable[[Path], None] = lambda run: None) -> None:
        """Creates the folder on rank 0, and sends its path and the complete phases to the other ranks."""
        if trainer.fast_dev_run:
            return
        chosen = None
        if trainer.is_global_zero:
            if self.resume is None:
                chosen = folders.create(self.root, self.name, fill)
            else:
                lock.acquire(self.resume)
                folders.remove_leftovers(self.resume)
                fill(self.resume)
                chosen = self.resume
        chosen, self.phases = trainer.strategy.broadcast((str(chosen), self.phases))
        self.directory = Path(chosen)
        for checkpoints in find_all(trainer, Checkpoints):
            if checkpoints.enabled:
                checkpoints.directory = self.directory / folders.CHECKPOINTS
        self._set_folders(self.directory / folders.CHECKPOINTS)

    def _set_folders(self, directory: Path) -> None:
        """Lets the recipe's own checkpoint callbacks write to the run folder, unless they name another one."""
        for callback in self._without_folder:
            callback.dirpath = str(directory.absolute())
            if self.resume is None:
                callback.best_model_path = ""  # from a checkpoint of another run

    def _describe(self, trainer: Any, pl_module: RunModule, directory: Path) -> None:
        data: RunData = trainer.datamodule
        report = data.report()
        earlier = folders.read_state(directory) if self.resume else {}
        date = next((part["template_date"] for part in report.values() if "template_date" in part), None)
        refuse_other_date(earlier.get("template_date"), date)
        config = directory / folders.CONFIG
        if not config.is_file() or config.read_bytes() != self.config.encode():  # unchanged files are left alone
            files.write(config, self.config)
        files.write(directory / "data.json", json.dumps(report, indent=1) + "\n")
        held_out = [json.dumps({"source": source, "row": row}) + "\n" for source, row in data.held_out_rows()]
        if held_out:
            files.write(directory / folders.HELD_OUT, "".join(held_out))
        start: dict[str, Any]
        if self.resume:
            # drop earlier resumes at steps that this one trains again
            resumed = [step for step in earlier.get("resumed", []) if step < trainer.global_step]
            start = {"resumed": [*resumed, trainer.global_step], "resumed_by": _command(), "reason": None, "why": None}
        else:
            now = {"created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "created_ns": time.time_ns()}
            start = {"command": _command(), **now}
            if (parent := parent_of(self.ckpt_path, pl_module.model_name)) is not None:
                if self.ckpt_path is not None:
                    parent["step"] = trainer.global_step
                start["parent"] = parent
            if self.recipe_text is not None:
                files.write(directory / folders.RECIPE, self.recipe_text)
        checkpoints = find(trainer, Checkpoints) if self.resumes_unfinished() else None
        has_ended = checkpoints is not None and checkpoints.has_ended(trainer)
        self.phases = ["prepare", "reference"]
        if has_ended:
            self.phases = folders.in_order([*self.phases, *earlier.get("phases", [])])
        self._before = dict(earlier.get("times", {}))
        unrecorded = (folders.seconds(directory, earlier) or 0.0) - sum(self._before.values())
        if unrecorded > 0:
            self._before["killed"] = self._before.get("killed", 0.0) + unrecorded
        device = pl_module.device.type
        if device == "cuda":
            device = torch.cuda.get_device_name(pl_module.device)
        folders.write_state(
            directory,
            recipe=self.recipe,
            status="running",
            phases=self.phases,
            pid=os.getpid(),
            process=lock.process(),
            oumi_pl=__version__,
            steps=pl_module.total_steps(),
            **({} if date is None else {"template_date": date}),
            model=_model(trainer, pl_module),
            environment=environment() | {"device": device, "devices": trainer.world_size},
            begun=time.time() - sum(self.clock.read().values()),
            before=sum(self._before.values()),
            **start,
        )

    @rank_zero_only
    def record(self, **values: Any) -> None:
        """Writes the time spent so far in each phase, and `values`, to `run.json`; does nothing without a folder."""
        if self.directory is not None:
            folders.write_state(self.directory, times=self.clock.read(self._before), **values)

    def on_fit_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Ends the phase that builds the model; the time until training counts as checks."""
        self.clock.enter("checks")

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Creates the folder, writes the files that describe the run, and opens `metrics.csv` at the current step."""
        self.clock.enter("start")
        pl_module.apply_changed_settings()  # the header and the checks of settings come before the module's own hook
        self._create(trainer, partial(self._describe, trainer, pl_module))
        if self.directory is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.open(self.directory / folders.METRICS, trainer.global_step, self.checkpoint_row)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Starts the phase of training with the first micro-batch, and again after a checkpoint."""
        if self.clock.phase != "training":
            self.clock.enter("training")

    def on_validation_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Starts the phase of validation."""
        self.clock.enter("validation")

    def on_validation_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Ends the phase of validation, and writes the times now, because the run may be killed later."""
        self.clock.enter("training")
        self.record(step=trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: RunModule, checkpoint: dict[str, Any]) -> None:
        """Adds the metrics of this step to the checkpoint: a kill may come before they are written to `metrics.csv`."""
        self.clock.enter("saving")
        kinds = ("train/", "val/", "epoch") if trainer.validating else ("train/", "epoch")
        row = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith(kinds)}
        resumed = self.checkpoint_row or {}
        if resumed.get("step") == trainer.global_step:  # validated or saved again after a resume, without an update
            row = resumed | row
        checkpoint["metrics_row"] = row | {"step": trainer.global_step}

    def on_load_checkpoint(self, trainer: Any, pl_module: RunModule, checkpoint: dict[str, Any]) -> None:
        """Reads the metrics of the checkpoint, and the paths that the recipe's own checkpoint callbacks saved.

        These paths are absolute. If the run folder was moved or copied, they are changed to its current place.
        """
        self.checkpoint_row = checkpoint.get("metrics_row")
        for callback in self._without_folder:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if self.resume is not None and state is not None:
                _move(state, str((self.resume / folders.CHECKPOINTS).absolute()))

    def on_predict_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Creates the folder for the predictions."""
        self._create(trainer)

    def on_fit_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Marks the run as finished; if `max_time` ended it, prints how to extend it.

        Raises:
            UserError: no update was made, because the checkpoint is at the last step or beyond.
        """
        if self.directory is None and not trainer.fast_dev_run:
            raise nothing_left(trainer.global_step)
        self.record(status="finished")
        self._print_how_to_extend()

    @rank_zero_only
    def on_train_end(self, trainer: Any, pl_module: RunModule) -> None:
        """Records that training is complete; prints and stores how much of each streamed source was read.

        Samples, export and report follow; then `on_fit_end` marks the run as finished.
        """
        self.clock.enter("end")
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("train/", "val/"))}
        self._report_consumed(trainer.datamodule)
        self.record(
            step=trainer.global_step,
            metrics=metrics,
            ended_by=ended_by(trainer),
            why=why_ended(trainer, pl_module.total_steps()),
        )
        completed(trainer, "train", "validate")

    @rank_zero_only
    def _print_how_to_extend(self) -> None:
        state = folders.read_state(self.directory) if self.directory is not None else {}
        if self.directory is not None and state.get("ended_by") == folders.TIME:
            arguments = folders.how_to_extend(self.directory, state)
            echo(f"ended by {folders.TIME} after step {state['step']} of {state['steps']}")
            echo(f"to train it further: oumi_pl fit {arguments}")

    def _report_consumed(self, data: RunData) -> None:
        """Prints the shares of a mixture that was streamed, and adds what was read of each source to `data.json`."""
        consumed = data.consumed()
        for source in consumed:
            if "wanted" in source and source["tokens"]:
                echo(
                    f"read from {source['source']}: {source['share']:.2%} of the tokens ({source['wanted']:.2%} "
                    "wanted), including what is still in the shuffle buffer"
                )
        if consumed and self.directory is not None:
            file = self.directory / "data.json"
            report = json.loads(file.read_text(encoding="utf-8")) | {"consumed": consumed}
            files.write(file, json.dumps(report, indent=1) + "\n")

    @rank_zero_only
    def on_exception(self, trainer: Any, pl_module: RunModule, exception: BaseException) -> None:
        """Marks the run as stopped or failed, and writes the metrics that are still in memory."""
        with contextlib.suppress(OSError):  # on a full disk, the first error is reported and not this one
            for logger in trainer.loggers:
                logger.finalize("failed")
        stopped = isinstance(exception, Stopped | KeyboardInterrupt)
        with contextlib.suppress(OSError):
            self.record(
                status="stopped" if stopped else "failed",
                step=trainer.global_step,
                reason=_reason(exception),
                why="Ctrl-C" if isinstance(exception, KeyboardInterrupt) else getattr(exception, "signal", None),
            )

    def teardown(self, trainer: Any, pl_module: RunModule, stage: str) -> None:
        """Releases the run folder's lock."""
        lock.release_all()


def why_ended(trainer: Any, steps: int) -> str | None:
    """What ended a run before its last update; None if nothing did."""
    if trainer.global_step >= steps:
        return None
    for callback in find_all(trainer, EarlyStopping):
        if callback.stopped_epoch or callback.stopping_reason_message:
            return f"early stopping on {callback.monitor}"
    return ended_by(trainer) or "a callback"


def _move(state: dict[str, Any], directory: str) -> None:
    """Moves the paths in the state of a `ModelCheckpoint` to `directory`."""
    before = state.get("dirpath")
    if not before:
        return

    def moved(path: str) -> str:
        return path.replace(before, directory, 1) if path.startswith(before) else path

    state["dirpath"] = directory
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = moved(state.get(name, ""))
    state["best_k_models"] = {moved(path): score for path, score in state.get("best_k_models", {}).items()}


def refuse_other_date(before: str | None, now: str | None) -> None:
    """Refuses to resume if the chat template would now write another date than before.

    Raises:
        UserError: the dates differ, because the cache that held the first one is gone.
    """
    if before is None or now == before:
        return
    if now is None:
        raise UserError(
            f"--resume: the chat template of this run wrote a date ({before}), and writes none now; restore it"
        )
    raise UserError(
        f"--resume: the chat template writes today's date, which was {before} in this run and would be {now} now; "
        f"set data.template_variables.date: {before}"
    )


def nothing_left(step: int) -> UserError:
    """The error for a run whose checkpoint is at its last step or beyond."""
    return UserError(
        f"nothing is left to train: the run ends at step {step}, which the checkpoint has reached; "
        "raise trainer.max_steps or trainer.max_epochs"
    )


def _command() -> str:
    """The command line, quoted for a shell."""
    program = Path(sys.argv[0])
    # `python -m oumi_pl`, or the console script of some environment: both are written as `oumi_pl`
    is_ours = program.name == "oumi_pl" or (program.name == "__main__.py" and program.parent.name == "oumi_pl")
    return shlex.join(["oumi_pl" if is_ours else sys.argv[0], *sys.argv[1:]])


def _reason(error: BaseException) -> str | None:
    """What ended a run, shortened to a line or two."""
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C"
    text = str(error).strip()[:500]
    return text if isinstance(error, Stopped | UserError) else f"{type(error).__name__}: {text}"


def _model(trainer: Any, pl_module: RunModule) -> dict[str, Any]:
    """What is trained, for `run.json`."""
    parameters = list(pl_module.parameters())
    return {
        "trainer": type(pl_module).__name__,
        "architecture": type(pl_module.causal_lm.base).__name__,
        "name": pl_module.model_name,
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "loss": None if pl_module.loss is None else type(pl_module.loss).__name__,
        "precision": str(trainer.precision),
    }
