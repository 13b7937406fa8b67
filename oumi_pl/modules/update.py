"""Training, validation and test steps of all trainer types: sums, normalisation, logging.

A trainer type defines the sums of a batch (`loss_sums`) and what an update is normalised by (`unit`). Each micro-batch
carries the totals of its update over all micro-batches and ranks, so its loss is divided by the right number at once.
Gradients therefore have their final scale, for Lightning's clipping, callbacks and optimizers.
"""

import copy
import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import SumMetric

from oumi_pl.errors import UserError
from oumi_pl.models.sharding import data_ranks, is_sharded
from oumi_pl.optim import ScheduledRates
from oumi_pl.runs import checksums
from oumi_pl.runs.checkpoints import (
    WEIGHTS_ONLY,
    holds_weights_only,
    in_own_form,
    is_sharded_checkpoint,
    read_unsharded,
    rng_state,
    set_rng_state,
    sharded_as,
    sharded_optimizer_state,
    weight_names,
)
from oumi_pl.runs.received import refuse_code
from oumi_pl.types import Batch, Sums

Split = Literal["train", "validation", "test"]

ROUNDING = 1e-6
"""Largest relative difference of two sums of the same weights."""
OWN_LOSS = "the loss of a step without ours"
"""Name of the sum of the losses of a `training_step` that does not call ours."""
PREFIX: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
"""Prefix of the metrics of a split, as in `val/loss`."""


OWN_WORK = {
    "on_fit_start": "begin_fit",
    "on_train_start": "begin_training",
    "on_train_batch_start": "begin_batch",
    "on_before_backward": "before_backward",
    "on_before_optimizer_step": "before_step",
    "on_validation_start": "begin_evaluation",
    "on_test_start": "begin_evaluation",
    "on_validation_epoch_end": "end_validation",
    "on_test_epoch_end": "end_test",
    "on_save_checkpoint": "add_to_checkpoint",
    "on_load_checkpoint": "restore_from",
}
"""Hooks that are empty in Lightning -> our method that runs before each, whatever a subclass makes of the hook."""


LOSS_OF, UNITS_OF = "loss of", "units of"
"""What the names of sums over one held-out source begin with."""


class UpdateModule(L.LightningModule):
    """Implements all steps of a trainer type. Subclasses define the sums of a batch.

    The hooks of Lightning that are empty in Lightning belong to subclasses, which need not call `super()` in them. What
    has to happen there for us is in methods of other names (`OWN_WORK`), which run before the hooks.

    Private names begin with two underscores, so that Python mangles them: a subclass may use any name that is not
    documented here without overriding something by accident.
    """

    unit: ClassVar[str] = "targets"
    """What an update is divided by: `targets` (tokens that carry loss, by weight), or `rows` (examples)."""
    weighs_targets: ClassVar[bool] = False
    """Whether `loss_sums` honours `Batch.weights`, as `States.loss_sum` does. If not, weighted rows are refused."""
    clipped_by: ClassVar[str] = "trainer.gradient_clip_val"
    """The key that clips gradients, for messages."""

    def __init__(self) -> None:
        super().__init__()
        self.last_update: dict[str, float] = {}
        """Sums of the last update over all micro-batches and ranks, for callbacks to read."""
        self.tokens_seen = {"tokens": 0, "targets": 0}
        """Counts of what the run has trained on, without padding."""
        self.log_to: Callable[[dict[str, Any]], None] | None = None
        """Called with all that is logged, instead of Lightning's logging, which works only within its own loops. Set by
        engines that run another loop."""
        self.__update: Sums = {}
        self.__divisor, self.__counted_batches, self.__of_update = 0.0, 0, 1
        self.__batch: Any = None
        self.__is_counted = False
        self.__finished = self.__stepped = -1
        self.__logged: set[str] = set()
        self.__restored_metrics: dict[str, float] = {}
        self.__evaluated = EvaluationSums()
        self.__running: set[str] = set()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the hooks of a subclass run our own work first."""
        super().__init_subclass__(**kwargs)
        for hook, own in OWN_WORK.items():
            if not hasattr(getattr(cls, hook), "own_work"):
                setattr(cls, hook, UpdateModule.__with_own_work(hook, own, getattr(cls, hook)))

    @staticmethod
    def __with_own_work(name: str, own: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def run(self: UpdateModule, *args: Any, **kwargs: Any) -> Any:
            if name in self.__running:  # called by `super()` in the hook of a subclass
                return hook(self, *args, **kwargs)
            self.__running.add(name)
            try:
                getattr(self, own)(*args, **kwargs)
                return hook(self, *args, **kwargs)
            finally:
                self.__running.discard(name)

        run.own_work = own  # type: ignore[attr-defined]
        return run

    # ---- what a trainer type defines

    @abstractmethod
    def loss_sums(self, batch: Any, split: Split) -> Sums:
        """Sums over a batch, scalars by name.

        `loss` is required, and differentiable in training. `objective` is minimised instead of `loss` if it is present,
        for example to add the router loss of a mixture of experts without logging it. The names are the same for every
        batch. The caller adds the counts of `count`. The stand-in of a rank that ran out of rows has no targets; its
        loss has to be a 0 that depends on the model, so that all ranks take part in the backward pass.
        """

    def units(self, sums: Mapping[str, Any]) -> Any:
        """What the sums of an update or a split are divided by: its targets by weight, or its rows."""
        return sums["weight"] if self.unit == "targets" and "weight" in sums else sums[self.unit]

    def metrics(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """Metrics from sums over an update or a whole split; by default, each sum divided by the number of units."""
        counts = {"targets", "rows", "tokens", "positions", "weight"}
        units = self.units(sums)
        units = units.where(units > 0, 1)
        return {name: value / units for name, value in sums.items() if name not in counts}

    def count(self, batch: Any) -> dict[str, int]:
        """Counts of a batch: `targets`, `rows`, `tokens`, and `positions` (tokens and padding)."""
        forest: Batch = batch
        real = bool(forest["sample_ids"])  # False for the stand-in of a rank that ran out of rows
        tokens = forest["input_ids"].numel() if real else 0
        return {
            "targets": len(forest["targets"]),
            "rows": len(forest["sample_ids"]),
            "tokens": tokens,
            "positions": tokens,
        }

    def share(self, batch: Any) -> float:
        """The factor on a micro-batch's sum of losses with which the update's gradient is that of the mean.

        It is the number of micro-batches over all ranks, divided by the units of the update: Lightning divides by the
        micro-batches of a rank, and the strategy averages over the ranks.

        Raises:
            UserError: the batch lacks the totals of its update, and is not the whole update.
        """
        update = batch.get("update")
        if update is not None:
            return update.parts / (update.units(self.unit) or 1)
        if self.trainer.accumulate_grad_batches * data_ranks(self.trainer).number > 1:
            raise UserError(
                "the batches lack the totals of their update (`update`), so a mean over several micro-batches or ranks "
                "can't be computed; use a data module of oumi_pl, or one micro-batch on one device"
            )
        units = _weight(batch, self.count(batch)) if self.unit == "targets" else self.count(batch)[self.unit]
        return 1 / (units or 1)

    # ---- training

    def begin_fit(self) -> None:
        """Runs when the optimizers are set up, before a checkpoint is restored into them."""

    def begin_training(self) -> None:
        """Runs before the first update, once a checkpoint is restored.

        Restores the metrics of the checkpoint, which Lightning would drop at an earlier hook. A callback may read them
        before they are logged again, for example `EarlyStopping` at the end of an epoch.
        """
        metrics, self.__restored_metrics = self.__restored_metrics, {}
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        self.__finished = self.__stepped = -1  # another trainer counts its steps from 0 again
        self.__update = {}
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, Optimizer):  # `optimizer_step` is not called in manual optimisation
                optimizer.register_step_post_hook(lambda *_: self.__after_step())

    def add_to_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the metrics that callbacks see, and which of them the last update has logged."""
        checkpoint["metrics"] = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        checkpoint["logged"] = sorted(self.__logged)

    def restore_from(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the metrics of a checkpoint until training begins."""
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        self.__restored_metrics = checkpoint.get("metrics", {})
        self.__logged = {*checkpoint.get("logged", [])}

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Runs before each micro-batch."""
        self.__batch, self.__is_counted = batch, False
        epochs = self.trainer.fit_loop.epoch_progress
        if epochs.total.ready == epochs.total.completed:
            # The run was resumed at the end of an epoch: Lightning does not count the next one as begun, and a resume
            # from a checkpoint within that one would begin it again.
            epochs.increment_ready()
            epochs.increment_started()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the micro-batch's share of the update's mean loss.

        A subclass may return something else: what it returns is minimised, averaged over micro-batches and ranks. If it
        calls this method and adds a penalty, the penalty has the weight that it is added with, and `train/loss` is the
        loss without it. If it does not call this method, `train/loss` is what it returns.
        """
        sums = self.loss_sums(batch, "train")
        objective = sums.pop("objective", sums["loss"])
        if not self.__is_counted:  # a micro-batch that is computed twice (SAM) counts once
            self.__is_counted, self.__batch = True, None
            self.add_to_update(sums | self.__counts(batch, sums["loss"].device))
            if (update := batch.get("update")) is not None:
                self.__of_update = update.parts // data_ranks(self.trainer).number
                self.__divisor += update.units(self.unit) / self.__of_update
                self.__counted_batches += 1
        return objective * self.share(batch)

    def before_backward(self, loss: Tensor) -> None:
        """Counts a micro-batch whose `training_step` did not call ours."""
        if self.__is_counted:
            return
        batch, self.__batch, self.__is_counted = self.__batch, None, True
        try:
            counts = self.__counts(batch, loss.device)
        except (KeyError, TypeError, AttributeError):  # of another loader: override `count` to have its tokens counted
            nothing = torch.zeros((), device=loss.device)
            counts = dict.fromkeys(("targets", "rows", "tokens", "positions"), nothing)
        self.add_to_update({OWN_LOSS: loss} | counts)

    def add_to_update(self, sums: Mapping[str, Tensor]) -> None:
        """Adds a micro-batch's sums to those of the update, for logging."""
        for name, value in sums.items():
            total = value.detach().to(self.device, _precise(self.device))
            self.__update[name] = self.__update[name] + total if name in self.__update else total

    def before_step(self, optimizer: Optimizer) -> None:
        """Logs the update, with the norm of its gradient before it is clipped.

        An optimizer that calls its closure several times (SAM, LBFGS) has its first call logged.

        Raises:
            UserError: the loss or the norm is not a finite number, or a closure is called again after several
                micro-batches.
        """
        if self.__finished == self.global_step:
            if self.trainer.accumulate_grad_batches > 1:
                raise UserError(
                    f"{type(optimizer).__name__} computes the gradient several times in a step, and Lightning would "
                    "compute it again for the last micro-batch alone: set trainer.accumulate_grad_batches to 1"
                )
            self.__forget_update()
        elif self.__update:
            self.finish_update(total_norm(self), current_rate(optimizer))

    def finish_update(self, grad_norm: Tensor, lr: float, **instead: float) -> None:
        """Logs what was added to the update, and starts the next.

        Args:
            grad_norm: Norm of the update's gradient.
            lr: Learning rate.
            instead: Means of the update by name, which replace the accumulated ones.

        Raises:
            UserError: the loss or the norm is not a finite number.
        """
        sums = self.__over_ranks()
        self.__refuse_other_divisor(sums)
        self.__forget_update()
        self.__finished, self.__is_counted = self.global_step, False
        if OWN_LOSS in sums:
            metrics = {"loss": sums.pop(OWN_LOSS) / data_ranks(self.trainer).number}
            sums["loss"] = metrics["loss"] * (self.units(sums) or 1)
        else:
            sums |= {name: mean * self.units(sums) for name, mean in instead.items()}
            metrics = self.metrics(sums, "train")
        self.refuse_non_finite(metrics["loss"], grad_norm)
        self.last_update = {name: float(value) for name, value in sums.items()}
        for name in self.tokens_seen:
            self.tokens_seen[name] += int(self.last_update[name])
        logged: dict[str, Any] = {f"train/{name}": value.float() for name, value in metrics.items()}
        logged |= {
            "train/grad_norm": grad_norm.float(),
            "train/lr": lr,
            "train/num_tokens": float(self.tokens_seen["tokens"]),
            "train/target_tokens": float(self.tokens_seen["targets"]),
            "step": float(self.global_step + 1),
            "epoch": self.__epochs_done(),
        }
        self.__forget_metrics(self.__logged - logged.keys())
        self.__logged = {*logged}
        self.log_dict(logged, batch_size=1)

    def __forget_metrics(self, names: set[str]) -> None:
        """Drops metrics that the update before had and this one lacks: Lightning would log them again, until an epoch
        ends. KTO has none of undesirable rows, for example, in an update without such rows.
        """
        trainer: Any = self.trainer
        if not names or self.log_to is not None or trainer._results is None:
            return
        for key in [key for key in trainer._results if key.partition(".")[2] in names]:
            del trainer._results[key]
        for metrics in (trainer._logger_connector._logged_metrics, trainer._logger_connector._callback_metrics):
            for name in names & metrics.keys():
                del metrics[name]

    def __refuse_other_divisor(self, sums: Sums) -> None:
        """Checks that an update was divided by what it was trained on, unless some micro-batches did without our step.

        Raises:
            RuntimeError: it was not.
        """
        trained = float(self.units(sums))
        is_whole = self.__counted_batches % self.__of_update == 0 < self.__counted_batches
        if is_whole and not math.isclose(self.__divisor, trained, rel_tol=ROUNDING):
            raise RuntimeError(
                f"update {self.global_step + 1} was divided by {self.__divisor:g} {self.unit}, and {trained:g} were "
                "trained on"
            )

    def abandon_update(self) -> None:
        """Drops the sums and gradients of an update that will not be finished."""
        self.__forget_update()
        for parameter in self.parameters():
            parameter.grad = None

    def __forget_update(self) -> None:
        self.__update = {}
        self.__divisor, self.__counted_batches = 0.0, 0

    def after_update(self, step: int) -> None:
        """Runs after each step of an optimizer, before a checkpoint of this step is saved.

        Args:
            step: Steps of the run so far, this one included.
        """

    def __after_step(self) -> None:
        if self.__stepped != self.global_step:
            self.__stepped = self.global_step
            self.after_update(self.global_step + 1)  # Lightning has not counted it yet

    def on_after_optimizer_step(self) -> None:
        """Called after each step of the optimizer, before its gradients are freed."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and frees the gradients: Lightning would keep them through the next forward pass."""
        super().optimizer_step(*args, **kwargs)
        self.__after_step()
        self.on_after_optimizer_step()
        for parameter in self.parameters():
            parameter.grad = None

    def refuse_non_finite(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Stops the run before an update that would ruin the weights.

        Raises:
            UserError: the loss or the norm is not a finite number.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # float16: the gradient scaler skips such updates and lowers its scale
        for name, value in {"train/loss": loss, "train/grad_norm": grad_norm}.items():
            if not torch.isfinite(value):
                raise UserError(
                    f"{name} became {float(value)} at step {self.global_step + 1}; the last checkpoint is untouched. "
                    f"A lower learning rate, a warm-up or {self.clipped_by}: 1.0 usually helps"
                )

    # ---- evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the sums over the validation rows."""
        self.__evaluate(batch, "validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the sums over the test rows."""
        self.__evaluate(batch, "test")

    def begin_evaluation(self) -> None:
        """Runs before validation and test."""

    def end_validation(self) -> None:
        """Logs exact means over all validation rows."""
        self.__log_evaluation("validation")

    def end_test(self) -> None:
        """Logs exact means over all test rows."""
        self.__log_evaluation("test")

    def __evaluate(self, batch: Any, split: Split) -> None:
        sums = self.loss_sums(batch, split)
        sums.pop("objective", None)
        counted = sums | self.__counts(batch, sums["loss"].device)
        if "source" in batch:  # of several: its loss by itself
            source = f"source {batch['source']}: "
            counted |= {f"{LOSS_OF} {source}": sums["loss"], f"{UNITS_OF} {source}": self.units(counted)}
        self.__evaluated.add(counted)

    def __log_evaluation(self, split: Split) -> None:
        if self.__evaluated.is_empty:  # a user's `validation_step` does not call ours, and logs for itself
            return
        sums = self.__evaluated.take(data_ranks(self.trainer).group)
        of_sources = {name: sums.pop(name) for name in list(sums) if name.startswith((LOSS_OF, UNITS_OF))}
        metrics = self.metrics(sums, split) | self.__losses_of_sources(of_sources, split)
        logged = {f"{PREFIX[split]}/{name}": value.float() for name, value in metrics.items()}
        if self.trainer.state.fn == "fit":  # the column of `metrics.csv`
            logged["step"] = torch.tensor(float(self.global_step))
        self.log_dict(logged)

    def __losses_of_sources(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """The loss of each held-out source, `loss/NAME`."""
        data = getattr(self.trainer, "datamodule", None) if sums else None
        names = data.source_names(split) if data is not None else []
        losses = {}
        for i, name in enumerate(names if len(names) > 1 else ()):
            source = f"source {i}: "
            if (units := sums.get(f"{UNITS_OF} {source}")) is not None and units > 0:
                losses[f"loss/{name}"] = sums[f"{LOSS_OF} {source}"] / units
        return losses

    # ---- logging

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Logs as `LightningModule` does, unless `log_to` is set."""
        if self.log_to is None:
            super().log(name, value, *args, **kwargs)
        else:
            self.log_to({name: value})

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """Logs as `LightningModule` does, unless `log_to` is set."""
        if self.log_to is None:
            super().log_dict(dictionary, *args, **kwargs)
        else:
            self.log_to(dict(dictionary))

    # ---- sums

    def __counts(self, batch: Any, device: torch.device) -> Sums:
        if not self.weighs_targets and "weights" in batch:
            raise UserError(
                f"{type(self).__name__} doesn't weigh tokens, and rows say how much they count in the loss; leave that "
                "out with `ignore: [weight]`, or set the weights of turns to 0 or 1"
            )
        counts = self.count(batch)
        weight = torch.tensor(_weight(batch, counts), dtype=_precise(device), device=device)
        return {"weight": weight} | {name: torch.tensor(value, device=device) for name, value in counts.items()}

    def __over_ranks(self) -> Sums:
        names = sorted(self.__update)
        flat = torch.stack([self.__update[name] for name in names])
        flat = data_ranks(self.trainer).total(flat, self.trainer.strategy)
        return dict(zip(names, flat, strict=True))

    def __epochs_done(self) -> float:
        loop = self.trainer.fit_loop
        return self.current_epoch + min(1.0, loop.epoch_loop.batch_progress.current.ready / max(1, loop.max_batches))


def _precise(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64, so that they do not depend on the number of micro-batches; MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _weight(batch: Any, counts: Mapping[str, int]) -> float:
    """The weight of a batch's targets."""
    return float(batch.get("weight", counts["targets"]))


class EvaluationSums:
    """Named sums over batches and ranks, in float64, so that a mean over millions does not depend on the order."""

    def __init__(self) -> None:
        self._metrics: dict[str, SumMetric] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no batch was added since the sums were taken."""
        return not self._metrics

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Adds a batch."""
        for name, value in sums.items():
            if name not in self._metrics:
                self._metrics[name] = _sum_metric(value.device)
            self._metrics[name].update(value.detach())

    def take(self, group: Any = None) -> Sums:
        """Returns the sums over all batches and the ranks of a group (None: all), and starts again from zero."""
        metrics, self._metrics = self._metrics, {}
        device = next(iter(metrics.values())).device
        totals = {}
        for name in _names_on_any_rank(metrics):
            metric = metrics.get(name, _sum_metric(device))
            metric.update(torch.zeros((), device=device))  # else torchmetrics warns on a rank without batches
            metric.process_group = group
            totals[name] = metric.compute()
        return totals


def _sum_metric(device: torch.device) -> SumMetric:
    metric = SumMetric().to(device)
    metric.set_dtype(torch.float64)
    return metric


def current_rate(optimizer: Optimizer) -> float:
    """The rate of the first group; NaN if the optimizer has none."""
    return next((float(group["lr"]) for group in optimizer.param_groups if "lr" in group), math.nan)


def total_norm(module: torch.nn.Module) -> Tensor:
    """The norm of all gradients of a module, sharded ones included."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm


def _names_on_any_rank(metrics: Mapping[str, Any]) -> list[str]:
    """All ranks have to reduce the same sums in the same order, although they may have seen different sources."""
    if not torch.distributed.is_initialized():
        return list(metrics)
    names: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, list(metrics))
    return sorted(set().union(*names))


class RestorableModule(UpdateModule):
    """Saves and restores all that an exact resume needs, and refuses the checkpoint of another model."""

    def __init__(self) -> None:
        super().__init__()
        # not strict, since frozen pretrained weights are not in checkpoints; `__refuse_other_weights` checks the others
        self.strict_loading = False
        self.run_config = ""
        """The recipe as YAML, kept in checkpoints so that one can be exported by itself."""
        self.optimizer_settings: list[list[dict[str, Any]]] = []
        """For each optimizer and group, the settings that it was created with, without the learning rate's schedule."""
        self.saved_optimizer_settings: list[list[dict[str, Any]]] | None = None
        """The same in the run that wrote the checkpoint; None if this run starts over."""
        self.__trained_at_start: list[str] = []
        self.__rng_to_restore: dict[str, Any] | None = None
        self.__loaded: dict[str, Any] = {}
        self.__learning_rate: float | None = None
        self.__restored_rate: float | None = None
        self.__plateau_metrics: list[Tensor | None] = []
        self.__scheduler_steps = 0
        self.__saved_weights: set[str] = set()

    @property
    def keeps_trained_weights_only(self) -> bool:
        """Whether checkpoints leave out weights that were never trained, because they can be loaded again."""
        return False

    @property
    def adapter_weights(self) -> set[str]:
        """Names of weights that pretrained weights lack, such as those of LoRA, whether they are trained or not."""
        return set()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights of a checkpoint; if `keeps_trained_weights_only`, without those of the pretrained model."""
        state = super().state_dict(*args, **kwargs)
        if not self.keeps_trained_weights_only:
            return state
        # also what is frozen now, but was trained by a run before or earlier in this one
        self.__saved_weights |= {*self.__trained()} | self.adapter_weights
        return {name: value for name, value in state.items() if name in self.__saved_weights}

    def add_to_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning leaves out: the random generators of every rank, tokens seen, recipe and metrics.

        The state of optimizers is saved by the names of weights, not by numbers: other ranks, another strategy or
        another `model.freeze` may number them differently.
        """
        super().add_to_checkpoint(checkpoint)
        names = self.__optimized_names()
        if "optimizer_states" in checkpoint:
            by_number = zip(checkpoint["optimizer_states"], names, strict=True)
            checkpoint["optimizer_states"] = [_keyed(state, dict(enumerate(order))) for state, order in by_number]
        states: list[Any] = [rng_state()] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(states, rng_state())
        # ranks that read the same rows have the same generators
        checkpoint["rng"] = states[:: self.trainer.world_size // data_ranks(self.trainer).number]
        checkpoint["tokens_seen"] = dict(self.tokens_seen)
        checkpoint["micro_batches"] = self.trainer.accumulate_grad_batches
        checkpoint["learning_rate"] = self.__learning_rate
        checkpoint["config"] = self.run_config
        # of a run that has not begun to train (`LearningRateFinder` saves and restores one), those it will begin with
        pending = self.saved_optimizer_settings
        checkpoint["optimizer_settings"] = self.optimizer_settings if pending is None else pending
        checkpoint["trained"] = {"at_start": self.__trained_at_start, "now": self.__trained()}
        checkpoint["plateau_metrics"] = self.__metrics_of_due_plateaus()

    def restore_from(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `add_to_checkpoint` added.

        Raises:
            UserError: the checkpoint is of another model, or holds too little to resume training.
        """
        super().restore_from(checkpoint)
        is_fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if not (is_fitting and is_sharded(self)):  # else `__load_sharded` has done it
            self.__thaw(checkpoint.get("trained", {}))
            self.__saved_weights |= checkpoint.get("state_dict", {}).keys()
        self.__refuse_other_weights(checkpoint.get("state_dict", {}))
        if not is_fitting:
            return
        if "optimizer_states" not in checkpoint and "loops" in checkpoint and not is_sharded(self):
            raise UserError(WEIGHTS_ONLY)
        self.__refuse_incomplete(checkpoint)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not any(isinstance(c, WeightAveraging) for c in callbacks):
            rank_zero_warn("this checkpoint's run averaged its weights; this run resumes without the average")
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        self.__loaded = checkpoint
        self.__restored_rate = checkpoint.get("learning_rate") or self.__restored_rate
        self.tokens_seen = checkpoint["tokens_seen"]
        self.saved_optimizer_settings = checkpoint.get("optimizer_settings", [])
        self.__plateau_metrics = checkpoint.get("plateau_metrics", [])
        self.abandon_update()  # `lr_find` trains, and then restores the state from before
        states = checkpoint["rng"]
        # additional ranks keep the generators that they were seeded with
        rank = data_ranks(self.trainer).index
        self.__rng_to_restore = states[rank] if rank < len(states) else None
        _recount(checkpoint["loops"], checkpoint["micro_batches"], self.__micro_batches(checkpoint["loops"]))

    def __refuse_incomplete(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint with too little to go on from, or with something else in its place.

        Lightning would go on without: from the start of the data, or with an optimizer that starts over.

        Raises:
            UserError: names what is missing or of another kind.
        """
        trainer: Any = self.trainer
        needed = {"loops": dict, "rng": list, "tokens_seen": dict, "micro_batches": int, "callbacks": dict}
        if not is_sharded(self):  # else `__load_sharded` has read it
            needed |= {"optimizer_states": list, "lr_schedulers": list}
        data = getattr(trainer, "datamodule", None)
        if data is not None and type(data).state_dict is not L.LightningDataModule.state_dict:
            needed |= {type(data).__qualname__: dict} if checkpoint.get("global_step") else {}
        for name, kind in needed.items():
            if not isinstance(checkpoint.get(name), kind) or (name == "rng" and not checkpoint[name]):
                is_data = data is not None and name == type(data).__qualname__
                raise _not_resumable(f"its position in the data ({name})" if is_data else name, name in checkpoint)
        loops = trainer._checkpoint_connector._get_loops_state_dict()["fit_loop"]
        if wrong := _other_structure(loops, checkpoint["loops"].get("fit_loop"), "loops.fit_loop"):
            raise _not_resumable(wrong)
        try:
            state = rng_state()
            set_rng_state(checkpoint["rng"][0])
            set_rng_state(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError, IndexError) as error:
            raise _not_resumable("rng") from error

    def __micro_batches(self, loops: dict[str, Any]) -> int:
        """Micro-batches per update in the epoch at which Lightning's loops were saved."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            return self.trainer.accumulate_grad_batches
        # counted at the beginning of an epoch, while the others may already count this one as finished
        epoch = max(0, loops["fit_loop"]["epoch_progress"]["current"]["started"] - 1)
        return data.layout.at(epoch).micro_batches

    def __optimized_names(self) -> list[list[str]]:
        """For each optimizer, the names of its weights, in the order in which its state numbers them."""
        if is_sharded(self):  # `ModelParallelStrategy` numbers all weights of the module
            return [[name for name, _ in self.named_parameters()] for _ in self.trainer.optimizers]
        return self.__names_by_optimizer()

    def __names_by_optimizer(self) -> list[list[str]]:
        """For each optimizer, the names of its weights, in its order."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        orders = [[p for group in o.param_groups for p in group["params"]] for o in self.trainer.optimizers]
        return [[names.get(id(p), f"weight {i}") for i, p in enumerate(order)] for order in orders]

    def __metrics_of_due_plateaus(self) -> list[Tensor | None]:
        """For each schedule, the metric that it is about to be stepped with; None if it is not.

        Lightning steps a `ReduceLROnPlateau` after callbacks have saved the update or the epoch.
        """
        epochs: Any = self.trainer.fit_loop.epoch_progress.current
        loop = self.trainer.fit_loop.epoch_loop
        batches: Any = loop.batch_progress.current
        # callbacks save after a batch before Lightning counts it as completed, or during the validation after it
        after_batch = batches.completed < batches.processed or bool(self.trainer.validating)
        after_epoch = epochs.completed < epochs.processed

        def is_due(config: LRSchedulerConfig) -> bool:
            if not (config.reduce_on_plateau and self.automatic_optimization):
                return False
            if config.interval == "step":
                return after_batch and not loop._should_accumulate() and not batches.ready % config.frequency
            ends = (after_batch and loop._num_ready_batches_reached()) or after_epoch
            return ends and not (self.current_epoch + 1) % config.frequency

        metrics = self.trainer.callback_metrics
        return [metrics.get(c.monitor or "") if is_due(c) else None for c in self.trainer.lr_scheduler_configs]

    def __step_due_plateaus(self) -> None:
        """Steps the schedules that were due when the checkpoint was saved, unless Lightning has.

        Lightning itself does not step a `ReduceLROnPlateau` at the ends of epochs as long as the loop is restarting,
        which it would be to the end of the run.
        """
        self.trainer.fit_loop._restarting = False
        metrics, self.__plateau_metrics = self.__plateau_metrics, []
        if self.__scheduler_steps == self.trainer.fit_loop.epoch_loop.scheduler_progress.total.ready:
            for config, metric in zip(self.trainer.lr_scheduler_configs, metrics, strict=False):
                if metric is not None:
                    self.lr_scheduler_step(config.scheduler, metric)

    def scheduled(self, optimizer: Optimizer, factor: Callable[[int], float]) -> dict[str, Any]:
        """Returns the value of `configure_optimizers`: the optimizer, and its schedule in optimizer steps.

        Args:
            optimizer: Settings that were changed since a checkpoint was written take precedence over the checkpoint's.
            factor: Number of finished updates -> factor on the learning rate of the next one.
        """
        schedule = ScheduledRates(optimizer, factor)
        self.optimizer_settings = [_settings(optimizer)]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def learning_rate(self) -> float | None:
        """The highest rate of the schedule; setting it sets that of all parameter groups, now and in later runs.

        Groups with a factor (`lr_factor`) have that multiple of it. Lightning's `LearningRateFinder` and
        `Tuner.lr_find` look for it.
        """
        settings = self.optimizer_settings[0][0] if self.optimizer_settings else {}
        if self.__learning_rate is not None or "lr" not in settings:
            return self.__learning_rate
        return settings["lr"] / settings.get("lr_factor", 1.0)

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.__learning_rate = value

    def __apply_learning_rate(self) -> None:
        """Sets the base rates of all groups, if one was set for the module."""
        if self.__learning_rate is not None:
            for optimizer in self.trainer.optimizers:
                for group in optimizer.param_groups:
                    _set_rate(group, self.__learning_rate * group.get("lr_factor", 1.0))
            self.__follow_schedule()

    def __trained(self) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def __thaw(self, saved: dict[str, list[str]]) -> None:
        """Restores which weights are trained, unless this run would train others at its start than that run."""
        self.__trained_at_start = self.__trained()
        if saved.get("at_start") != self.__trained_at_start:
            return
        for name, parameter in self.named_parameters():
            if (name in saved["now"]) != parameter.requires_grad:
                parameter.requires_grad_(name in saved["now"])

    def begin_fit(self) -> None:
        """Keeps the settings of the optimizers before those of a checkpoint are restored.

        Matches the state of optimizers in a checkpoint with their weights by name, before Lightning restores it.
        """
        super().begin_fit()
        if self.saved_optimizer_settings is None:  # else set when the checkpoint was restored
            self.__trained_at_start = self.__trained()
        self.__apply_learning_rate()  # of a module that was tuned, or by a callback after the optimizers were created
        self.optimizer_settings = [_settings(optimizer) for optimizer in self.trainer.optimizers]
        if is_sharded(self):  # a checkpoint is loaded after this
            cast("Any", self.trainer.strategy).load_checkpoint = self.__load_sharded
            return
        checkpoint, self.__loaded = self.__loaded, {}
        if not checkpoint:
            return
        states, schedules = checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", [])
        if len(states) != len(self.trainer.optimizers):
            raise _not_resumable(f"optimizer_states: {len(states)} of {len(self.trainer.optimizers)} optimizers")
        if len(schedules) < len(self.trainer.lr_scheduler_configs):
            raise _not_resumable(f"lr_schedulers: {len(schedules)} of {len(self.trainer.lr_scheduler_configs)}")
        try:
            checkpoint["optimizer_states"] = [
                in_own_form(state, self, optimizer)
                for state, optimizer in zip(states, self.trainer.optimizers, strict=True)
            ]
            self.__match_optimizer_states(checkpoint)
            for state, optimizer in zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True):
                _refuse_other_shapes(state, optimizer)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise _not_resumable("optimizer_states") from error

    def __match_optimizer_states(self, checkpoint: dict[str, Any]) -> None:
        """Makes the state of optimizers, which is by the names of weights, one by the numbers that they have now."""
        # weights that are frozen since have no use for their state
        refrozen = {*checkpoint.get("trained", {}).get("now", [])} - {*self.__trained()}
        orders = self.__names_by_optimizer()
        matched = zip(checkpoint["optimizer_states"], self.trainer.optimizers, orders, strict=True)
        checkpoint["optimizer_states"] = [
            _matched(_without(state, refrozen), optimizer, names) for state, optimizer, names in matched
        ]

    def __load_sharded(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint into sharded weights and optimizers, also if other weights are trained than at its time.

        Lightning's method, which this replaces, needs a state of each trained weight. All ranks have to call it.

        Raises:
            UserError: the checkpoint holds weights only, and training is to go on from it.
        """
        strategy: Any = self.trainer.strategy
        load = functools.partial(type(strategy).load_checkpoint, strategy)
        path = Path(strategy.broadcast(path))
        if damage := strategy.broadcast(checksums.damage(path) if self.global_rank == 0 else None):
            raise UserError(f"{path} is damaged: {damage}")
        if is_sharded_checkpoint(path):
            refuse_code(path)
        if self.trainer.state.fn != "fit":
            return load(path, *args, **kwargs)
        if holds_weights_only(path):
            raise UserError(f"{path}: {WEIGHTS_ONLY}")
        self.__thaw(read_unsharded(path).get("trained", {}))
        self.__saved_weights |= weight_names(path)
        optimizers, strategy.optimizers = strategy.optimizers, []
        try:
            content = load(path, *args, **kwargs)
        finally:
            strategy.optimizers = optimizers
        content["optimizer_states"] = [
            sharded_optimizer_state(path, i, self, optimizer) for i, optimizer in enumerate(optimizers)
        ]
        self.__match_optimizer_states(content)
        for optimizer, state in zip(optimizers, content.pop("optimizer_states"), strict=True):
            optimizer.load_state_dict(state)
        return content

    def begin_training(self) -> None:
        """Applies the optimizer settings that were changed since the checkpoint was written, unless a callback has."""
        super().begin_training()
        self.apply_changed_settings()

    def apply_changed_settings(self) -> None:
        """Applies the optimizer settings that were changed since the checkpoint was written; once.

        Lightning has restored all that is in the groups: the settings of that run, and what an optimizer keeps there of
        its own (counters, estimates). A setting is changed if the optimizer was created with another value then.
        """
        if any(type(c).__module__ == LR_FINDER for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            return  # it tries rates with a schedule of its own
        self.__scheduler_steps = self.trainer.fit_loop.epoch_loop.scheduler_progress.total.ready
        for config, metric in zip(self.trainer.lr_scheduler_configs, self.__plateau_metrics, strict=False):
            if metric is not None:  # Lightning steps with it before the first batch, or not at all
                self.trainer.callback_metrics[config.monitor or ""] = metric
        before = [current_rate(optimizer) for optimizer in self.trainer.optimizers]
        self.__apply_changed_groups()
        if self.__restored_rate is not None:  # a resumed run keeps the rate that was found for it, and not a new one
            self.learning_rate, self.__restored_rate = self.__restored_rate, None
            self.__apply_learning_rate()
            self.optimizer_settings = [_settings(optimizer) for optimizer in self.trainer.optimizers]
        for was, optimizer in zip(before, self.trainer.optimizers, strict=True):
            now = current_rate(optimizer)
            if self.global_step and abs(now - was) > 0.01 * max(now, was):
                rank_zero_warn(
                    f"the checkpoint's next learning rate was {was:.3g}, and this run continues with {now:.3g}"
                )

    def __apply_changed_groups(self) -> None:
        if self.saved_optimizer_settings is None:
            return
        for i, optimizer in enumerate(self.trainer.optimizers):
            saved = self.saved_optimizer_settings[i] if i < len(self.saved_optimizer_settings) else []
            # groups that callbacks add later come last
            for j, (group, now) in enumerate(zip(optimizer.param_groups, self.optimizer_settings[i], strict=False)):
                self.__apply_changes(group, now, saved[j] if j < len(saved) else {})
        self.saved_optimizer_settings = None  # a second `fit` of this module starts over
        self.__follow_schedule()

    def __apply_changes(self, group: dict[str, Any], now: dict[str, Any], saved: dict[str, Any]) -> None:
        changed = {name: value for name, value in now.items() if not _equal(value, saved.get(name, NOTHING))}
        lr = changed.pop("lr", None)
        group.update(changed)
        if lr is not None:
            _set_rate(group, lr)

    def __follow_schedule(self) -> None:
        """Sets the rates of our own schedule from the groups' base rates; the schedule may have changed as well."""
        for config in self.trainer.lr_scheduler_configs:
            groups = config.scheduler.optimizer.param_groups
            if isinstance(config.scheduler, ScheduledRates):
                config.scheduler.follow()
            elif all("initial_lr" in group for group in groups):  # the base rates that torch's schedules multiply
                config.scheduler.base_lrs = [group["initial_lr"] for group in groups]

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Restores the random generators, at last: callbacks and loaders may draw from them before the first batch.

        Steps the schedules that are due since the checkpoint was saved.
        """
        super().begin_batch(batch, batch_idx)
        self.restore_generators()
        self.__step_due_plateaus()

    def restore_generators(self, keep: bool = False) -> None:
        """Restores the random generators from the checkpoint, once; with `keep`, they will be restored again."""
        if self.__rng_to_restore is not None:
            set_rng_state(self.__rng_to_restore)
            if not keep:
                self.__rng_to_restore = None

    def load_weights(self, saved_state: dict[str, Any]) -> None:
        """Loads the weights of a checkpoint into the model that was built.

        Raises:
            UserError: they are of another model.
        """
        self.__refuse_other_weights(saved_state)
        own = self.state_dict()
        self.load_state_dict({name: sharded_as(value, own[name]) for name, value in saved_state.items()}, strict=False)

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


def _not_resumable(what: str, is_there: bool = True) -> UserError:
    """The error for a checkpoint that training can't go on from."""
    problem = "holds something else as" if is_there else "lacks"
    return UserError(f"the checkpoint {problem} {what}, so training can't go on from it; resume from another one")


def _other_structure(own: Any, saved: Any, place: str) -> str:
    """Where a saved state has no mapping or number, and this run's own state has one; empty if nowhere."""
    if isinstance(own, dict):
        if not isinstance(saved, dict):
            return place
        wrong = (_other_structure(value, saved[key], f"{place}.{key}") for key, value in own.items() if key in saved)
        return next((name for name in wrong if name), "")
    is_number = isinstance(own, int | float)
    return place if is_number and not (isinstance(saved, int | float) and saved >= 0) else ""


PLAIN = (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam)
"""Optimizers whose state tensors are all single numbers, or of the shape of their weight. AdamW is an Adam."""


def _refuse_other_shapes(state: dict[str, Any], optimizer: Optimizer) -> None:
    """Refuses a state whose tensors don't fit the weights: fused optimizers would read past their ends.

    Raises:
        UserError: names the first.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, values in state["state"].items():
        shape = weights[number].shape
        for name, value in values.items():
            is_other = isinstance(value, Tensor) and value.numel() != 1 and value.shape != shape
            if isinstance(optimizer, PLAIN) and is_other:
                raise _not_resumable(f"optimizer_states: {name} of shape {[*value.shape]} for a weight of {[*shape]}")
    kinds = {frozenset(values) for values in state["state"].values()}
    if isinstance(optimizer, torch.optim.Adam) and any(not {"step", "exp_avg", "exp_avg_sq"} <= kind for kind in kinds):
        raise _not_resumable("optimizer_states: averages are missing")


NOTHING = object()
LR_FINDER = "lightning.pytorch.tuner.lr_finder"
"""Lightning's module whose callback replaces all others while it tries learning rates."""


def _settings(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each group, with the base rate as `lr`; without the weights."""
    groups = []
    for group in optimizer.param_groups:
        settings = {k: copy.copy(v) for k, v in group.items() if k not in ("params", "param_names", "initial_lr")}
        groups.append(settings | ({"lr": group["initial_lr"]} if "initial_lr" in group else {}))
    return groups


def _set_rate(group: dict[str, Any], lr: float) -> None:
    """Sets the base rate of a group, and the current one in the same proportion."""
    base = group.get("initial_lr", group["lr"])
    group["lr"] = group["lr"] * (lr / base) if base else lr
    if "initial_lr" in group:
        group["initial_lr"] = lr


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.cpu(), b.cpu())
    return bool(a == b)


def _keyed(state: dict[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """The state of an optimizer by the names of its weights instead of their numbers; names stay as they are."""
    if not state:
        return state  # of another rank, if rank 0 saves the whole state
    groups = [group | {"params": [names.get(p, p) for p in group["params"]]} for group in state["param_groups"]]
    return state | {
        "state": {names.get(key, key): value for key, value in state["state"].items()},
        "param_groups": groups,
    }


def _without(state: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The state of an optimizer without that of some weights; they stay in their groups."""
    return state | {"state": {key: value for key, value in state.get("state", {}).items() if key not in names}}


def _matched(state: dict[str, Any], optimizer: Optimizer, names: Sequence[str]) -> dict[str, Any]:
    """The state of an optimizer by the numbers that its weights have now; unknown weights start from zero.

    Args:
        state: By name, from a checkpoint.
        optimizer: The optimizer to restore.
        names: Of its weights, in order.
    """
    if any(isinstance(p, int) for group in state["param_groups"] for p in group["params"]):
        return state  # of an engine or a version that does not name weights
    own, first = optimizer.state_dict()["param_groups"], 0
    groups = []
    for group in own:
        of_group = names[first : first + len(group["params"])]
        first += len(of_group)
        saved = next((g for g in state["param_groups"] if not {*of_group}.isdisjoint(g["params"])), group)
        groups.append(group | saved | {"params": group["params"]})
    numbers = {name: number for number, name in enumerate(names)}
    known = {numbers[name]: value for name, value in state["state"].items() if name in numbers}
    return state | {"state": known, "param_groups": groups}


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
