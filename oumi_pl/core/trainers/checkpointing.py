"""A checkpoint of a run, and going on from one to the bit: weights, optimizer, generators, data, callbacks."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from oumi_pl.core.trainers.folders import (
    STATE,
    TRAINING,
    begin_folder,
    finish_folder,
    keep_last,
    read_state,
    read_training,
    write_state,
)
from oumi_pl.core.trainers.module import TrainingModule
from oumi_pl.core.trainers.saving import load_weights, save_weights
from oumi_pl.errors import UserError
from oumi_pl.runs.checkpoints import rng_state, set_rng_state


class Checkpointer:
    """Writes and reads the `checkpoint-N` folders of a run.

    Args:
        output_dir: Where they are.
        tokenizer: Written beside the weights.
    """

    def __init__(self, output_dir: Path, tokenizer: Any) -> None:
        self.output_dir = output_dir
        self.tokenizer = tokenizer
        self._to_restore: dict[str, Any] | None = None

    # ---- writing

    def save(self, module: TrainingModule) -> None:
        """Writes the checkpoint of this step; the folder appears when it is whole. All processes have to call this."""
        trainer, flow = module.trainer, module.flow
        folder = self.output_dir / f"checkpoint-{flow.state.global_step}"
        ranks = _gathered(trainer, {"rng": rng_state(), "unlogged": module.unlogged.cpu()})
        if trainer.is_global_zero:
            state = flow.state
            flow.export_callbacks()
            best = self.output_dir / f"checkpoint-{state.best_global_step}"
            if best == folder or best.is_dir():
                state.best_model_checkpoint = str(best)
            half = begin_folder(folder)
            save_weights(module.model, half, self.tokenizer)
            torch.save(_training_state(module) | {"ranks": ranks}, half / TRAINING)
            write_state(half / STATE, state, module.total_tokens_seen)
            finish_folder(half, folder)
            keep_last(self.output_dir, flow.args.save_total_limit, state.best_model_checkpoint)
        trainer.strategy.barrier("checkpoint written")

    # ---- reading

    def restore_before(self, module: TrainingModule, trainer: L.Trainer, folder: Path) -> None:
        """Takes up all that does not wait for the optimizer: weights, state, counters, the place in the data."""
        load_weights(module.model, folder)
        state, module.total_tokens_seen = read_state(folder)
        module.flow.restore(state)
        self._to_restore = read_training(folder)
        module.windows.load_state_dict(self._to_restore["position"])
        epoch, step = self._to_restore["position"]["epoch"], module.flow.state.global_step
        for progress in (trainer.fit_loop.epoch_progress.total, trainer.fit_loop.epoch_progress.current):
            progress.ready = progress.started = progress.processed = progress.completed = epoch  # type: ignore[attr-defined]
        steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        steps.ready = steps.completed = step
        if module.windows.rows is not None:
            # rows are read right when they are needed, and may draw from the generators
            module.windows.on_first_fetch = lambda: self.restore_generators(trainer)

    def restore_after(self, module: TrainingModule) -> None:
        """Takes up the rest, now that optimizer and schedule are there. What the parameters say now wins over then."""
        saved, trainer = self._to_restore, module.trainer
        if saved is None:
            return
        optimizer, schedule = trainer.optimizers[0], module.lr_schedulers()
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(saved["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"the checkpoint is of another optimizer or model: {error}") from error
        step = schedule.last_epoch = saved["schedule_step"]  # type: ignore[union-attr]
        for group, values, factor in zip(optimizer.param_groups, settings, schedule.lr_lambdas, strict=True):  # type: ignore[union-attr]
            group.update(values)
            group["lr"] = values["initial_lr"] * factor(step)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]  # type: ignore[union-attr]
        if saved["precision"]:
            trainer.precision_plugin.load_state_dict(saved["precision"])
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback.state_key in saved["callbacks"]:
                callback.load_state_dict(saved["callbacks"][callback.state_key])
        module.last_logged = saved["last_logged"]
        if trainer.global_rank < len(saved["ranks"]):
            module.unlogged = saved["ranks"][trainer.global_rank]["unlogged"].to(module.device)
        if module.windows.rows is None:
            self.restore_generators(trainer)

    def restore_generators(self, trainer: L.Trainer) -> None:
        """Puts the generators back. With more processes than before, the new ones keep the seeds they began with."""
        if self._to_restore is not None and trainer.global_rank < len(self._to_restore["ranks"]):
            set_rng_state(self._to_restore["ranks"][trainer.global_rank]["rng"])


def _training_state(module: TrainingModule) -> dict[str, Any]:
    trainer = module.trainer
    states = {c.state_key: c.state_dict() for c in trainer.callbacks}  # type: ignore[attr-defined]
    return {
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule_step": module.lr_schedulers().last_epoch,  # type: ignore[union-attr]
        "position": module.windows.state_dict(),
        "precision": trainer.precision_plugin.state_dict(),
        "callbacks": {key: state for key, state in states.items() if state},
        "last_logged": module.last_logged,
    }


def _gathered(trainer: L.Trainer, value: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [value]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, value)
    return found
