"""Training, validation and test steps of all trainer types: sums, normalisation, logging.

A trainer type defines the sums of a batch (`loss_sums`) and what an update is normalised by (`unit`). Each micro-batch
carries the totals of its update over all micro-batches and ranks, so its loss is divided by the right number at once.
Gradients therefore have their final scale, for Lightning's clipping, callbacks and optimizers.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import SumMetric

from oumi_pl.errors import UserError
from oumi_pl.models.build import is_sharded
from oumi_pl.runs.checkpoints import WEIGHTS_ONLY, rng_state, set_rng_state
from oumi_pl.types import Batch, Sums

Split = Literal["train", "validation", "test"]

ROUNDING = 1e-6
"""Largest relative difference of two sums of the same weights."""
PREFIX: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
"""Prefix of the metrics of a split, as in `val/loss`."""


class UpdateModule(L.LightningModule):
    """Implements all steps of a trainer type. Subclasses define the sums of a batch.

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
        self.__expected: float | None = None
        self.__finished = -1
        self.__evaluated = EvaluationSums()

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
        if self.trainer.accumulate_grad_batches * self.trainer.world_size > 1:
            raise UserError(
                "the batches lack the totals of their update (`update`), so a mean over several micro-batches or ranks "
                "can't be computed; use a data module of oumi_pl, or one micro-batch on one device"
            )
        units = _weight(batch, self.count(batch)) if self.unit == "targets" else self.count(batch)[self.unit]
        return 1 / (units or 1)

    # ---- training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the micro-batch's share of the update's mean loss."""
        sums = self.loss_sums(batch, "train")
        objective = sums.pop("objective", sums["loss"])
        self.add_to_update(sums | self.__counts(batch, sums["loss"].device))
        update = batch.get("update")
        self.__expected = None if update is None else update.units(self.unit)
        return objective * self.share(batch)

    def add_to_update(self, sums: Mapping[str, Tensor]) -> None:
        """Adds a micro-batch's sums to those of the update, for logging."""
        for name, value in sums.items():
            total = value.detach().to(self.device, _precise(self.device))
            self.__update[name] = self.__update[name] + total if name in self.__update else total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the update, with the norm of its gradient before it is clipped.

        Raises:
            UserError: the loss or the norm is not a finite number.
        """
        if self.__finished == self.global_step:  # the closure is called again (SAM): log the first call
            self.__update = {}
        elif self.__update:  # empty if a user's `training_step` does not call ours
            self.finish_update(total_norm(self), optimizer.param_groups[0]["lr"])

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
        trained = float(self.units(sums))
        if self.__expected is not None and not math.isclose(self.__expected, trained, rel_tol=ROUNDING):
            raise RuntimeError(
                f"update {self.global_step + 1} was divided by {self.__expected:g} {self.unit}, and {trained:g} were "
                "trained on"
            )
        self.__finished = self.global_step
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
        self.log_dict(logged, batch_size=1)

    def abandon_update(self) -> None:
        """Drops the sums and gradients of an update that will not be finished."""
        self.__update = {}
        for parameter in self.parameters():
            parameter.grad = None

    def on_after_optimizer_step(self) -> None:
        """Called after each step of the optimizer, before its gradients are freed."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and frees the gradients: Lightning would keep them through the next forward pass."""
        super().optimizer_step(*args, **kwargs)
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

    def on_validation_epoch_end(self) -> None:
        """Logs exact means over all validation rows."""
        self.__log_evaluation("validation")

    def on_test_epoch_end(self) -> None:
        """Logs exact means over all test rows."""
        self.__log_evaluation("test")

    def __evaluate(self, batch: Any, split: Split) -> None:
        sums = self.loss_sums(batch, split)
        sums.pop("objective", None)
        self.__evaluated.add(sums | self.__counts(batch, sums["loss"].device))

    def __log_evaluation(self, split: Split) -> None:
        if self.__evaluated.is_empty:  # a user's `validation_step` does not call ours, and logs for itself
            return
        metrics = self.metrics(self.__evaluated.take(), split)
        logged = {f"{PREFIX[split]}/{name}": value.float() for name, value in metrics.items()}
        if self.trainer.state.fn == "fit":  # the column of `metrics.csv`
            logged["step"] = torch.tensor(float(self.global_step))
        self.log_dict(logged)

    # ---- logging

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """As of `LightningModule`, unless `log_to` is set."""
        if self.log_to is None:
            super().log(name, value, *args, **kwargs)
        else:
            self.log_to({name: value})

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """As of `LightningModule`, unless `log_to` is set."""
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
        if self.trainer.world_size > 1:
            flat = cast("Tensor", self.trainer.strategy.reduce(flat, reduce_op="sum"))
        self.__update = {}
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

    def take(self) -> Sums:
        """Returns the sums over all batches and ranks, and starts again from zero."""
        metrics, self._metrics = self._metrics, {}
        device = next(iter(metrics.values())).device
        totals = {}
        for name in _names_on_any_rank(metrics):
            metric = metrics.get(name, _sum_metric(device))
            metric.update(torch.zeros((), device=device))  # else torchmetrics warns on a rank without batches
            totals[name] = metric.compute()
        return totals


def _sum_metric(device: torch.device) -> SumMetric:
    metric = SumMetric().to(device)
    metric.set_dtype(torch.float64)
    return metric


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
        self.__rng_to_restore: dict[str, Any] | None = None
        self.__settings: list[dict[str, Any]] = []
        self.__loaded: dict[str, Any] = {}
        self.__learning_rate: float | None = None
        self.__restored_rate: float | None = None
        self.__schedule: LambdaLR | None = None

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
        """Adds what Lightning leaves out: the random generators of every rank, tokens seen, recipe and metrics.

        The state of optimizers is saved by the names of weights, not by numbers: other ranks, another strategy or
        another `model.freeze` may number them differently.
        """
        names = self.__optimized_names()
        if "optimizer_states" in checkpoint:
            by_number = zip(checkpoint["optimizer_states"], names, strict=True)
            checkpoint["optimizer_states"] = [_keyed(state, dict(enumerate(order))) for state, order in by_number]
        states: list[Any] = [rng_state()] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(states, rng_state())
        checkpoint["rng"] = states
        checkpoint["tokens_seen"] = dict(self.tokens_seen)
        checkpoint["micro_batches"] = self.trainer.accumulate_grad_batches
        checkpoint["learning_rate"] = self.__learning_rate
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
            raise UserError(WEIGHTS_ONLY)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not any(isinstance(c, WeightAveraging) for c in callbacks):
            rank_zero_warn("this checkpoint's run averaged its weights; this run resumes without the average")
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        self.__loaded = checkpoint
        self.__restored_rate = checkpoint.get("learning_rate") or self.__restored_rate
        self.tokens_seen = checkpoint["tokens_seen"]
        states = checkpoint["rng"]
        # additional ranks keep the generators that they were seeded with
        self.__rng_to_restore = states[self.global_rank] if self.global_rank < len(states) else None
        _recount(checkpoint["loops"], checkpoint["micro_batches"], self.__micro_batches(checkpoint["loops"]))

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
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        orders = [[p for group in o.param_groups for p in group["params"]] for o in self.trainer.optimizers]
        return [[names.get(id(p), f"weight {i}") for i, p in enumerate(order)] for order in orders]

    def on_fit_start(self) -> None:
        """Matches the state of optimizers in a checkpoint with their weights by name, before Lightning restores it."""
        checkpoint, self.__loaded = self.__loaded, {}
        states = checkpoint.get("optimizer_states", [])
        # of sharded weights, the strategy has restored it
        if is_sharded(self) or len(states) != len(self.trainer.optimizers):
            return
        matched = zip(states, self.trainer.optimizers, self.__optimized_names(), strict=True)
        checkpoint["optimizer_states"] = [_matched(state, optimizer, names) for state, optimizer, names in matched]

    def scheduled(self, optimizer: Optimizer, factor: Callable[[int], float]) -> dict[str, Any]:
        """Returns the value of `configure_optimizers`: the optimizer, and its schedule in optimizer steps.

        Args:
            optimizer: Its settings take precedence over those in a checkpoint.
            factor: Number of finished updates -> factor on the learning rate of the next one.
        """
        if self.__learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.__learning_rate
        self.__settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.__schedule = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.__schedule, "interval": "step"}}

    @property
    def learning_rate(self) -> float | None:
        """The highest rate of the schedule; setting it sets that of all parameter groups, now and in later runs.

        Lightning's `LearningRateFinder` and `Tuner.lr_find` look for it.
        """
        return self.__settings[0]["lr"] if self.__settings else self.__learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.__learning_rate = value
        for group in self.__settings:
            group["lr"] = value

    def on_train_start(self) -> None:
        """Replaces the optimizer settings of the checkpoint, which Lightning has restored, by those of the recipe."""
        optimizer = cast("Optimizer", self.optimizers(use_pl_optimizer=False))
        schedule = cast("LambdaLR", self.lr_schedulers())
        if schedule is not self.__schedule:  # `LearningRateFinder` tries rates with a schedule of its own
            return
        if self.__restored_rate is not None:  # a resumed run keeps the rate that was found for it, and not a new one
            self.learning_rate, self.__restored_rate = self.__restored_rate, None
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
        own = self.state_dict()
        self.load_state_dict({name: _placed(value, own[name]) for name, value in saved_state.items()}, strict=False)

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


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole weight, sharded as `like` is; all ranks have to call this."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _keyed(state: dict[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """The state of an optimizer by the names of its weights instead of their numbers; names stay as they are."""
    if not state:
        return state  # of another rank, if rank 0 saves the whole state
    groups = [group | {"params": [names.get(p, p) for p in group["params"]]} for group in state["param_groups"]]
    return state | {
        "state": {names.get(key, key): value for key, value in state["state"].items()},
        "param_groups": groups,
    }


def _matched(state: dict[str, Any], optimizer: Optimizer, names: Sequence[str]) -> dict[str, Any]:
    """The state of an optimizer by the numbers that its weights have now; weights that it does not know start anew.

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
