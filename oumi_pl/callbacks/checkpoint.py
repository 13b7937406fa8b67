"""Writes checkpoints between two updates, and removes an old one only after the new one is complete."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, Timer, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save
from torch.distributed.checkpoint.utils import _DistWrapper

from oumi_pl.callbacks import find_all
from oumi_pl.errors import UserError, nearest
from oumi_pl.runs import checksums
from oumi_pl.runs.background import Background, snapshot
from oumi_pl.runs.checkpoints import META, saved_at
from oumi_pl.runs.files import HALF, put, remove
from oumi_pl.runs.folders import TIME, checkpoint_name, saved_steps
from oumi_pl.runs.metrics import MetricsCSV
from oumi_pl.terminal.screen import working
from oumi_pl.terminal.text import echo
from oumi_pl.types import RunModule


class Checkpoints(Checkpoint):
    """Writes `step-*.ckpt` to resume from, and `best.ckpt` with the best weights so far.

    Args:
        every: Optimizer steps between checkpoints; one is always written at the end.
        keep: How many of the newest to keep.
        monitor: Metric that decides what is best, `val/loss` for example; without it no `best.ckpt` is written.
        mode: Whether lower (`min`) or higher (`max`) values are better.
        enabled: Whether to write checkpoints at all. A run without them can't be resumed.
        asynchronous: Train on while a checkpoint is written. Training waits only while weights and optimizer state are
            copied, which takes as much host memory as a checkpoint takes on disk, until that is written.
    """

    def __init__(
        self,
        every: int = 500,
        keep: int = 1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        enabled: bool = True,
        *,
        asynchronous: bool = False,
    ) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"checkpoint: every ({every}) and keep ({keep}) have to be at least 1")
        if monitor is not None and not enabled:
            raise UserError(f"checkpoint.monitor: without checkpoints the best by {monitor!r} can't be kept; drop one")
        self.enabled = enabled
        self.asynchronous = asynchronous
        self.every = every
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.directory: Path | None = None
        """Where checkpoints are written; set when the run folder exists. None writes none."""
        self.best_score: float | None = None
        self.best_model_path = ""
        """Path of `best.ckpt`; empty if there is none. Not saved in checkpoints, because the folder may be moved."""
        self.validation_due = False
        """Whether the checkpoint to resume from was saved before the validation of its step."""
        self.ending: dict[str, Any] | None = None
        """Total steps of the run and what ended it, if the checkpoint is that of the last update."""
        self._saved_step = -1
        self._due = False
        self._background = Background()
        self._group: torch.distributed.ProcessGroup | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a strategy whose checkpoints can't be written while it trains on.

        Raises:
            UserError: names it.
        """
        known = (Strategy.save_checkpoint, ModelParallelStrategy.save_checkpoint)
        if self.asynchronous and type(trainer.strategy).save_checkpoint not in known:
            name = type(trainer.strategy).__name__
            raise UserError(
                f"checkpoint.asynchronous: {name} writes checkpoints in its own way, while training waits; leave it "
                "out, or train with strategy ddp or fsdp2"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the best score of the checkpoint unless its weights are those of `best.ckpt` in this run's folder.

        They are not if the checkpoint is of another run, or if `best.ckpt` was written later than the checkpoint.
        """
        if self.asynchronous and _writes_shards(trainer) and trainer.world_size > 1:
            # the threads that write must not meet those that train in one group, and NCCL has one order of operations
            self._group = torch.distributed.new_group(backend="gloo")
        if self.directory is not None and (self.directory / checkpoint_name(trainer.global_step)).exists():
            self._saved_step = trainer.global_step
        best = None if self.directory is None else self.directory / "best.ckpt"
        damage = None
        if best is not None and best.exists():
            damage = trainer.strategy.broadcast(checksums.damage(best) if trainer.is_global_zero else None)
        if damage:
            if trainer.is_global_zero:
                echo(f"note: {best} is damaged ({damage}); the best from here on replaces it", file=sys.stderr)
        elif best is not None and best.exists() and saved_at(best) <= trainer.global_step:
            self.best_model_path = str(best)
        else:
            self.best_score, self.best_model_path = None, ""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves after every n-th update and after the last, never within one: a run can't be resumed from there.

        If validation follows, saves after it. The last update is saved before and after: a run that is killed in its
        last validation repeats only that.
        """
        self._background.raise_error()
        if trainer.fit_loop._should_accumulate() or (trainer.global_step % self.every and not ends(trainer)):
            return
        self._due = validation_follows(trainer)
        if not self._due or ends(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last step if that has not been done.

        By now Lightning counts an epoch that was cut short as complete, so a longer run can't resume from here exactly:
        `LastStep` makes the save happen earlier, in `on_train_batch_end`.
        """
        self.save(trainer)
        self._remove_old(trainer)  # a kill after the last checkpoint can leave too many

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the weights if the monitored metric is the best so far, and saves if a checkpoint is due."""
        if trainer.sanity_checking or self.directory is None:
            return
        is_best = self.monitor is not None and self._keep_best(trainer, self.directory, self.monitor)
        if self._due or ends(trainer):
            self._saved_step = -1  # the checkpoint from before the validation is replaced
            self._save(trainer, beside_best=is_best)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Waits for the checkpoint that is being written. The error that ended the run is the one to report."""
        with suppress(Exception):
            self._background.wait()

    def _keep_best(self, trainer: L.Trainer, directory: Path, monitor: str) -> bool:
        """Writes `best.ckpt` if the metric is the best so far; whether it is."""
        if monitor not in trainer.callback_metrics:
            hint = nearest(monitor, trainer.callback_metrics)
            raise UserError(f"checkpoint.monitor: unknown metric {monitor!r}{hint}")
        score = float(trainer.callback_metrics[monitor])
        best = self.best_score
        if best is not None and (score >= best if self.mode == "min" else score <= best):
            return False
        self.best_score = score
        self.best_model_path = str(directory / "best.ckpt")
        self.finish(trainer)
        with _validated_weights(trainer):
            self._write(trainer, Path(self.best_model_path), weights_only=True)
        return True

    def save(self, trainer: L.Trainer) -> None:
        """Writes a checkpoint of this step unless there is one, then removes the oldest beyond `keep`.

        The rows of `metrics.csv` up to this step are on disk before the checkpoint. All of it is when this returns.
        """
        self._save(trainer)
        self.finish(trainer)

    def finish(self, trainer: L.Trainer) -> None:
        """Waits until what was saved is on disk, on all ranks; raises the error if that failed."""
        if self.asynchronous:
            with working("waiting for the last checkpoint"):
                self._background.wait()
                trainer.strategy.barrier("checkpoint written in the background")

    def _save(self, trainer: L.Trainer, beside_best: bool = False) -> None:
        """As `save`; if asynchronous, the files are written afterwards.

        Args:
            trainer: The trainer.
            beside_best: Whether `best.ckpt` of this step may still be being written. Otherwise, this waits for an
                earlier checkpoint, so that host memory holds one at most.
        """
        step = trainer.global_step
        if self.directory is None or step == self._saved_step:
            return
        if not beside_best:
            self.finish(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()
        self._saved_step = step
        # on_train_batch_end runs before the validation of a step, all other hooks that save run after it
        self.validation_due = not trainer.validating and trainer.state.fn == "fit" and validation_follows(trainer)
        self._due = self._due and self.validation_due
        self.ending = None
        if ends(trainer):
            self.ending = {"steps": _total_steps(trainer), "by": ended_by(trainer)}
        self._write(trainer, self.directory / checkpoint_name(step))

    def _write(self, trainer: L.Trainer, path: Path, weights_only: bool = False) -> None:
        """Writes a checkpoint and removes old ones, or starts a thread that does."""
        remove_old = partial(self._remove_old, trainer, is_replaced=self.validation_due and ends(trainer))
        if not self.asynchronous:
            _save_whole(trainer, path, weights_only)
            remove_old()
            return
        with working(f"copying {path.name}"):
            write = _copied(trainer, path, weights_only, self._group)

        def work() -> None:
            write()
            remove_old()

        self._background.start(work)

    def _remove_old(self, trainer: L.Trainer, is_replaced: bool = False) -> None:
        """Removes the oldest checkpoints beyond `keep`; one less if the newest is a folder that is soon replaced.

        A folder can't be replaced in one step. A kill between two leaves the one before it to go on from.
        """
        if self.directory is not None and trainer.is_global_zero:
            steps = saved_steps(self.directory)
            keep = self.keep + (is_replaced and bool(steps) and steps[-1].is_dir())
            for old in steps[:-keep]:
                remove(old)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best score so far, whether a validation is due, and how the run ended."""
        return {"best_score": self.best_score, "validation_due": self.validation_due, "ending": self.ending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self.best_score = state_dict["best_score"]
        self.validation_due = bool(state_dict.get("validation_due"))
        self.ending = state_dict.get("ending")

    def has_ended(self, trainer: L.Trainer) -> bool:
        """Whether the last update is done, by the current length of the run or by how the resumed run had ended.

        A resumed run that had ended is not at its end if its length was raised.
        """
        total = _total_steps(trainer)
        if trainer.global_step >= total:
            return True
        if self.ending is None or total > self.ending["steps"]:
            return False
        return self.ending["by"] is None or ended_by(trainer) is not None


def enabled_checkpoints(trainer: Any) -> Checkpoints | None:
    """The `Checkpoints` of a trainer; None if it has none, or if they are disabled."""
    return next((checkpoints for checkpoints in find_all(trainer, Checkpoints) if checkpoints.enabled), None)


def _total_steps(trainer: Any) -> int:
    """Optimizer steps of the whole run."""
    module: RunModule = trainer.lightning_module
    return module.total_steps()


def ends(trainer: L.Trainer) -> bool:
    """Whether the run ends now. With `min_steps` or `min_epochs`, it may continue after a request to stop."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def ended_by(trainer: Any) -> str | None:
    """Returns `trainer.max_time` if that has run out; None if steps, epochs or a callback end the run."""
    left = [timer.time_remaining() for timer in find_all(trainer, Timer)]
    return TIME if any(seconds is not None and seconds <= 0 for seconds in left) else None


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether a validation follows the update that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or not sum(trainer.num_val_batches):  # Lightning may say yes without held-out rows
        return False
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


@contextmanager
def _validated_weights(trainer: L.Trainer) -> Iterator[None]:
    """Swaps in the averaged weights, if any: Lightning leaves them out of `weights_only` checkpoints."""
    averages = find_all(trainer, WeightAveraging)
    for average in averages:
        average._swap_models(trainer.lightning_module)
    try:
        yield
    finally:
        for average in averages:
            average._swap_models(trainer.lightning_module)


def _writes_shards(trainer: L.Trainer) -> bool:
    """Whether checkpoints are folders, to which each rank writes its part."""
    strategy = trainer.strategy
    is_known = type(strategy).save_checkpoint is ModelParallelStrategy.save_checkpoint
    return is_known and bool(cast("ModelParallelStrategy", strategy)._save_distributed_checkpoint)


def _save_whole(trainer: Any, path: Path, weights_only: bool = False) -> None:
    """Saves under a temporary name, syncs and renames: a kill may leave half of a sharded checkpoint's directory."""
    half = path.with_name(path.name + HALF)
    with working(f"saving {path.name}"):
        if _writes_shards(trainer):
            with trainer.profiler.profile("save_checkpoint"):
                content = trainer._checkpoint_connector.dump_checkpoint(weights_only)
                _write_shards(content, half, path, _DistWrapper(None, trainer.world_size > 1, 0))
        else:
            trainer.save_checkpoint(half, weights_only=weights_only)
            trainer.strategy.barrier("checkpoint written")
            if trainer.is_global_zero:
                put(half, path)
    trainer.strategy.barrier("checkpoint in place")
    _free_gathered()


def _copied(
    trainer: Any, path: Path, weights_only: bool, group: torch.distributed.ProcessGroup | None
) -> Callable[[], None]:
    """Copies what `_save_whole` would save; returns a function that writes it, without the trainer.

    Args:
        trainer: The trainer; all ranks have to call this.
        path: Of the checkpoint.
        weights_only: Leave out what only training needs.
        group: A group of all ranks that only these functions use, if each writes its part.
    """
    half = path.with_name(path.name + HALF)
    with trainer.profiler.profile("save_checkpoint"):
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only)
        write: Callable[[], None] = _nothing
        if _writes_shards(trainer):
            write = partial(_write_shards, snapshot(content), half, path, _DistWrapper(group, group is not None, 0))
        elif trainer.is_global_zero:
            write = partial(_write_file, trainer.strategy.checkpoint_io, snapshot(content), half, path)
    _free_gathered()
    return write


def _nothing() -> None:
    """What a rank writes if another one has everything."""


def _write_file(checkpoint_io: Any, content: dict[str, Any], half: Path, path: Path) -> None:
    checkpoint_io.save_checkpoint(content, half)
    put(half, path)


class _Shards(FileSystemWriter):
    """Writes the shards of a rank. Its error is the one of the file system, such as a full disk."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As of the base class; torch's writer of tensors fails again on closing, with an error that hides the cause.

        Errors are sent to the other ranks, and what caused them is not.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise OSError(error.__context__.errno, error.__context__.strerror, str(self.path)) from error
            raise


def _write_shards(content: dict[str, Any], half: Path, path: Path, ranks: _DistWrapper) -> None:
    """Writes a folder, as `ModelParallelStrategy` does, with checksums. An error of one rank is raised on all.

    Args:
        content: The checkpoint, without the parts of other ranks; emptied.
        half: Where it is written.
        path: The name that it gets when it is complete.
        ranks: The ranks that call this.
    """
    shards = {"state_dict": content.pop("state_dict")}
    shards |= {f"optimizer_{i}": state for i, state in enumerate(content.pop("optimizer_states", []))}
    try:
        ranks.broadcast("folder", lambda: half.mkdir(parents=True, exist_ok=True))
        save(
            shards,
            storage_writer=_Shards(half, single_file_per_rank=True),
            process_group=ranks.group,
            no_dist=not ranks.use_dist,
        )
        ranks.broadcast("meta", lambda: torch.save(content, half / META))
        _write_checksums(half, ranks)
        ranks.broadcast("name", lambda: put(half, path))
    except CheckpointException as failed:  # torch's summary, which is no `Exception`
        raise failed.failures[min(failed.failures)][0] from failed


def _write_checksums(folder: Path, ranks: _DistWrapper) -> None:
    """Writes the checksums of a sharded checkpoint, of which each rank reads its share."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    own = paths[ranks.get_rank() :: ranks.get_world_size()]
    shares = ranks.all_gather("checksums", lambda: checksums.of_files(own))
    listed = {name: sums for share in shares for name, sums in share.items()}
    ranks.broadcast("list", lambda: checksums.write_list(folder, listed))


def _free_gathered() -> None:
    """Returns the device memory that gathering weights and optimizer state allocated."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
