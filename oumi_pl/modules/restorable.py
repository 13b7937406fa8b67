"""State in checkpoints beyond Lightning's own, and resuming from it."""

from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from oumi_pl.errors import UserError
from oumi_pl.models.sharding import is_sharded
from oumi_pl.modules.update import UpdateModule
from oumi_pl.runs.checkpoints import rng_state, set_rng_state


class RestorableModule(UpdateModule):
    """Saves and restores all that an exact resume needs, and refuses the checkpoint of another model."""

    def __init__(self) -> None:
        super().__init__()
        # not strict, since frozen pretrained weights are not in checkpoints; `__refuse_other_weights` checks the others
        self.strict_loading = False
        self.run_config = ""
        """The recipe as YAML, kept in checkpoints so that one can be exported by itself."""
        self.__rng_to_restore: dict[str, Any] | None = None
        self.__settings: list[dict[str, Any]] = []

    @property
    def keeps_trained_weights_only(self) -> bool:
        """Whether checkpoints leave out frozen weights, because they can be loaded again."""
        return False

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights of a checkpoint: only the trained ones if `keeps_trained_weights_only`."""
        state = super().state_dict(*args, **kwargs)
        if not self.keeps_trained_weights_only:
            return state
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: value for name, value in state.items() if name in trainable}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning leaves out: the random generators of every rank, tokens seen, recipe and metrics."""
        states: list[Any] = [rng_state()] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(states, rng_state())
        checkpoint["rng"] = states
        checkpoint["tokens_seen"] = dict(self.tokens_seen)
        checkpoint["micro_batches"] = self.trainer.accumulate_grad_batches
        checkpoint["config"] = self.run_config
        metrics = self.trainer.callback_metrics
        checkpoint["metrics"] = {k: float(v) for k, v in metrics.items() if k.startswith(("train/", "val/"))}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` added.

        Raises:
            UserError: the checkpoint is of another model, or holds too little to resume training.
        """
        self.__refuse_other_weights(checkpoint.get("state_dict", {}))
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        if "optimizer_states" not in checkpoint and "loops" in checkpoint and not is_sharded(self):
            raise UserError("this checkpoint holds weights only (a best.ckpt): resume from a step-*.ckpt")
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not any(isinstance(c, WeightAveraging) for c in callbacks):
            rank_zero_warn("this checkpoint's run averaged its weights; this run resumes without the average")
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        self.tokens_seen = checkpoint["tokens_seen"]
        states = checkpoint["rng"]
        # additional ranks keep the generators that they were seeded with
        self.__rng_to_restore = states[self.global_rank] if self.global_rank < len(states) else None
        _recount(checkpoint["loops"], checkpoint["micro_batches"], self.trainer.accumulate_grad_batches)

    def scheduled(self, optimizer: Optimizer, factor: Callable[[int], float]) -> dict[str, Any]:
        """Returns the value of `configure_optimizers`: the optimizer, and its schedule in optimizer steps.

        Args:
            optimizer: Its settings take precedence over those in a checkpoint.
            factor: Number of finished updates -> factor on the learning rate of the next one.
        """
        self.__settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_train_start(self) -> None:
        """Replaces the optimizer settings of the checkpoint, which Lightning has restored, by those of the recipe."""
        optimizer = cast("Optimizer", self.optimizers(use_pl_optimizer=False))
        schedule = cast("LambdaLR", self.lr_schedulers())
        before = optimizer.param_groups[0]["lr"]
        for group, values in zip(optimizer.param_groups, self.__settings, strict=True):
            group.update(values)
            group["initial_lr"] = values["lr"]
        schedule.base_lrs = [values["lr"] for values in self.__settings]
        for group, base_lr, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = base_lr * factor(schedule.last_epoch)
        now = optimizer.param_groups[0]["lr"]
        if self.global_step and abs(now - before) > 0.01 * max(now, before):
            rank_zero_warn(
                f"the checkpoint's next learning rate was {before:.3g}, and this run continues with {now:.3g}"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restores the random generators, at last: callbacks and loaders may draw from them before the first batch."""
        self.restore_generators()

    def restore_generators(self) -> None:
        """Restores the random generators from the checkpoint, once."""
        if self.__rng_to_restore is not None:
            set_rng_state(self.__rng_to_restore)
            self.__rng_to_restore = None

    def load_weights(self, saved_state: dict[str, Any]) -> None:
        """Loads the weights of a checkpoint into the model that was built.

        Raises:
            UserError: they are of another model.
        """
        self.__refuse_other_weights(saved_state)
        self.load_state_dict(saved_state, strict=False)

    def __refuse_other_weights(self, saved_state: dict[str, Any]) -> None:
        own = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        saved = {name: tuple(value.shape) for name, value in saved_state.items()}
        wrong = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        if wrong and saved:
            name = wrong[0]
            raise UserError(
                f"the checkpoint is of another model: {len(wrong)} weights differ in name or shape, first {name} "
                f"(here {own.get(name, 'absent')}, checkpoint {saved.get(name, 'absent')})"
            )


def _recount(loops: dict[str, Any], before: int, now: int) -> None:
    """Converts Lightning's counts of micro-batches if the updates now consist of another number of them."""
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    for span in ("total", "current"):
        for name in COUNTS:
            progress[span][name] = recounted(progress[span][name], before, now)


COUNTS = ("ready", "started", "processed", "completed")
"""Names of Lightning's counts of micro-batches."""


def recounted(micro_batches: int, before: int, now: int) -> int:
    """Converts a count of micro-batches at the end of an update from `before` to `now` of them per update.

    Lightning saves before it counts the last one as completed: a count short of a whole update stays short by as many.
    """
    updates, rest = divmod(micro_batches, before)
    return updates * now if not rest else (updates + 1) * now - (before - rest)
