"""An optimizer update, a validation and a test, for all trainer types: steps, sums, normalisation, logging.

A trainer type says what a batch's sums are (`loss_sums`) and what an update is normalised by (`unit`). Each micro-batch
carries what its update comes to over all micro-batches and ranks, so its loss is divided by the right number at once:
gradients are true as they come, for Lightning's clipping, for callbacks and for optimizers.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import SumMetric

from oumi_pl.errors import UserError
from oumi_pl.types import Batch, Sums

Split = Literal["train", "validation", "test"]

PREFIX: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
"""What the metrics of a split are called by: `val/loss`."""


class UpdateModule(L.LightningModule):
    """Does all steps of a trainer type. Subclasses say what the sums of a batch are.

    Names that begin with two underscores are this class's own; every other name of its own is documented, and a
    subclass is free to use what is not.
    """

    unit: ClassVar[str] = "targets"
    """The sum that an update is divided by: `targets` (tokens that carry loss), or `rows` (examples)."""
    clipped_by: ClassVar[str] = "trainer.gradient_clip_val"
    """The key that clips gradients, for messages."""

    def __init__(self) -> None:
        super().__init__()
        self.last_update: dict[str, float] = {}
        """Sums of the last update over all micro-batches and ranks, for callbacks to read."""
        self.tokens_seen = {"tokens": 0, "targets": 0}
        """What was trained on so far, without padding."""
        self.log_to: Callable[[dict[str, Any]], None] | None = None
        """Called with all that `log` and `log_dict` are given, in place of Lightning, which only logs within its own
        loops. Set by an engine that runs another loop."""
        self.__update: Sums = {}
        self.__expected: int | None = None
        self.__finished = -1
        self.__evaluated = EvaluationSums()

    # ---- what a trainer type says

    @abstractmethod
    def loss_sums(self, batch: Any, split: Split) -> Sums:
        """Sums over a batch, scalars by name.

        `loss` is needed; in training it is differentiable. `objective` is what is minimised where that is more than the
        loss that is logged, the router loss of a mixture of experts for example. The names are the same for every
        batch. The counts of `count` are added by the caller. The stand-in of a rank that ran out of rows has no
        targets, and its loss is a differentiable 0 that the model took part in.
        """

    def metrics(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """Metrics from sums over an update or a whole split; each sum over the number of units when not overridden."""
        counts = {"targets", "rows", "tokens", "positions"}
        units = sums[self.unit].clamp(min=1)
        return {name: value / units for name, value in sums.items() if name not in counts}

    def count(self, batch: Any) -> dict[str, int]:
        """What a batch comes to: `targets`, `rows`, `tokens`, and `positions`, which are tokens with padding."""
        forest: Batch = batch
        real = bool(forest["sample_ids"])  # else the stand-in of a rank that ran out of rows
        tokens = forest["input_ids"].numel() if real else 0
        return {
            "targets": len(forest["targets"]),
            "rows": len(forest["sample_ids"]),
            "tokens": tokens,
            "positions": tokens,
        }

    def share(self, batch: Any) -> float:
        """What a micro-batch's sum of losses is multiplied by: its update's gradient is then that of the mean.

        That is one over the units of the update, times its micro-batches over all ranks: Lightning divides by the
        micro-batches of a rank, and the strategy averages over the ranks.

        Raises:
            UserError: the batch does not say what its update comes to, and it is not all of it.
        """
        update = batch.get("update")
        if update is not None:
            return update.parts / max(1, getattr(update, self.unit))
        if self.trainer.accumulate_grad_batches * self.trainer.world_size > 1:
            raise UserError(
                "the batches do not say what their update comes to (`update`), so a mean over several micro-batches or "
                "ranks can't be taken; use a data module of oumi_pl, or one micro-batch on one device"
            )
        return 1 / max(1, self.count(batch)[self.unit])

    # ---- training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The micro-batch's share of the update's mean loss."""
        sums = self.loss_sums(batch, "train")
        objective = sums.pop("objective", sums["loss"])
        self.add_to_update(sums | self.__counts(batch, sums["loss"].device))
        update = batch.get("update")
        self.__expected = None if update is None else getattr(update, self.unit)
        return objective * self.share(batch)

    def add_to_update(self, sums: Mapping[str, Tensor]) -> None:
        """Adds a micro-batch's sums to those that are logged of the update."""
        for name, value in sums.items():
            total = value.detach().to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)
            self.__update[name] = self.__update[name] + total if name in self.__update else total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the update, with the norm of its gradient before it is clipped.

        Raises:
            UserError: the loss or the norm is not a finite number.
        """
        if self.__finished == self.global_step:  # a closure that is called again (SAM): the first point counts
            self.__update = {}
        elif self.__update:  # empty if a `training_step` of the user's does without ours
            self.finish_update(total_norm(self), optimizer.param_groups[0]["lr"])

    def finish_update(self, grad_norm: Tensor, lr: float, **instead: float) -> None:
        """Logs what was added to the update, and starts the next.

        Args:
            grad_norm: Norm of the update's gradient.
            lr: Learning rate.
            instead: Means of the update that take the place of those that were added, by name; sums of `unit` stay.

        Raises:
            UserError: the loss or the norm is not a finite number.
        """
        sums = self.__over_ranks()
        if self.__expected not in (None, int(sums[self.unit])):
            raise RuntimeError(
                f"update {self.global_step + 1} was divided by {self.__expected} {self.unit}, and "
                f"{int(sums[self.unit])} were trained on"
            )
        self.__finished = self.global_step
        sums |= {name: mean * sums[self.unit] for name, mean in instead.items()}
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
        """Forgets what was added to an update that will not be finished, and its gradients."""
        self.__update = {}
        for parameter in self.parameters():
            parameter.grad = None

    def on_after_optimizer_step(self) -> None:
        """Called after each step of the optimizer, while the gradients are still there."""

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
            return  # float16: the scaler skips such updates and lowers its scale
        for name, value in {"train/loss": loss, "train/grad_norm": grad_norm}.items():
            if not torch.isfinite(value):
                raise UserError(
                    f"{name} became {float(value)} at step {self.global_step + 1}; the last checkpoint is untouched. "
                    f"A lower learning rate, a warm-up or {self.clipped_by}: 1.0 usually helps"
                )

    # ---- evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the sums over the held-out rows."""
        self.__evaluate(batch, "validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the sums over the test rows."""
        self.__evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Logs exact means over all held-out rows."""
        self.__log_evaluation("validation")

    def on_test_epoch_end(self) -> None:
        """Logs exact means over all test rows."""
        self.__log_evaluation("test")

    def __evaluate(self, batch: Any, split: Split) -> None:
        sums = self.loss_sums(batch, split)
        sums.pop("objective", None)
        self.__evaluated.add(sums | self.__counts(batch, sums["loss"].device))

    def __log_evaluation(self, split: Split) -> None:
        metrics = self.metrics(self.__evaluated.take(), split)
        logged = {f"{PREFIX[split]}/{name}": value.float() for name, value in metrics.items()}
        if self.trainer.state.fn == "fit":  # where `metrics.csv` puts it
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
        return {name: torch.tensor(value, device=device) for name, value in self.count(batch).items()}

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


class EvaluationSums:
    """Named sums over batches and ranks, in float64: a mean of millions of terms must not depend on their order."""

    def __init__(self) -> None:
        self._metrics: dict[str, SumMetric] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Adds a batch."""
        for name, value in sums.items():
            if name not in self._metrics:
                self._metrics[name] = _sum_metric(value.device)
            self._metrics[name].update(value.detach())

    def take(self) -> Sums:
        """The sums over all batches and ranks; the next pass starts from zero."""
        metrics, self._metrics = self._metrics, {}
        device = next(iter(metrics.values())).device
        totals = {}
        for name in _names_on_any_rank(metrics):
            metric = metrics.get(name, _sum_metric(device))
            metric.update(torch.zeros((), device=device))  # of a rank that saw none, torchmetrics warns
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
    """Ranks may have seen different sources; all have to take part in each sum, in the same order."""
    if not torch.distributed.is_initialized():
        return list(metrics)
    names: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, list(metrics))
    return sorted(set().union(*names))
