"""The end of an update, for all trainer types.

It happens here and in this order: the norm of the gradients is taken, of what they will be once they are rescaled by
the true count of targets over all micro-batches and ranks; it is checked, the metrics are logged; then gradients are
rescaled and clipped in one pass over memory. Callbacks' own `on_before_optimizer_step` run before that and would see
gradients that are not rescaled yet: they read `last_update` and the logged metrics instead.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from oumi_pl.errors import UserError
from oumi_pl.types import Inputs

LOSS_SCALE = 1024.0
"""What each micro-batch's summed loss is divided by until the true count is known: any constant gives the same update;
a power of two near a micro-batch's token count rounds nothing and keeps float16 gradients in range."""


class UpdateModule(L.LightningModule):
    """Normalises each update by its number of targets. Subclasses add up sums in `training_step`."""

    normalised_by: ClassVar[str] = "targets"
    """The sum that the gradient of an update is divided by: target tokens, or pairs of responses."""

    def __init__(self) -> None:
        super().__init__()
        self.last_update: dict[str, float] = {}
        """Sums of the last update over all micro-batches and ranks, for callbacks to read."""
        self.tokens_seen = {"tokens": 0, "targets": 0}
        self._sums: dict[str, Tensor] = {}

    def add_to_update(self, inputs: Inputs, sample_ids: Sequence[int] | None, **sums: Tensor) -> None:
        """Adds a micro-batch's sums to those of the update.

        Args:
            inputs: What the model read.
            sample_ids: Which examples these are; empty for the stand-in of a rank that ran out of rows.
            sums: By name; `targets`, the tokens that carry loss, and `normalised_by` are needed.
        """
        mask = inputs.get("attention_mask")
        positions = torch.tensor(inputs["input_ids"].numel() if sample_ids != [] else 0)
        tokens = positions if mask is None or sample_ids == [] else mask.sum()
        sums |= {"tokens": tokens, "positions": positions}
        for name, value in sums.items():
            total = value.detach().to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    @abstractmethod
    def update_metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics of an update from its sums over all micro-batches and ranks."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Finds by what the gradients have to be scaled to be those of the mean over all targets; logs the update."""
        sums = self._sums_over_ranks()
        metrics = self.update_metrics(sums)
        # Lightning has divided by the micro-batches, and the strategy has averaged over the ranks
        micro_batches, ranks = self.trainer.accumulate_grad_batches, self._data_parallel_ranks
        self._scale = LOSS_SCALE * micro_batches * ranks / max(1.0, float(sums[self.normalised_by]))
        norm = torch.nn.utils.get_total_norm(self._gradients())
        self._grad_norm = self._scale * (norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self._refuse_non_finite(metrics["loss"], self._grad_norm)
        self._log_update(sums, metrics, optimizer.param_groups[0]["lr"])

    def _log_update(self, sums: dict[str, Tensor], metrics: dict[str, Tensor], lr: float) -> None:
        self.last_update = {name: float(value) for name, value in sums.items()}
        for name in self.tokens_seen:
            self.tokens_seen[name] += int(self.last_update[name])
        logged: dict[str, Any] = {f"train/{name}": value.float() for name, value in metrics.items()}
        logged |= {
            "train/grad_norm": self._grad_norm.float(),
            "train/lr": lr,
            "train/num_tokens": float(self.tokens_seen["tokens"]),
            "train/target_tokens": float(self.tokens_seen["targets"]),
            "step": float(self.global_step + 1),
            "epoch": self._epochs_done(),
        }
        self.log_dict(logged, batch_size=1)

    def _epochs_done(self) -> float:
        loop = self.trainer.fit_loop
        return self.current_epoch + min(1.0, loop.epoch_loop.batch_progress.current.ready / max(1, loop.max_batches))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Rescales the gradients, and clips them by the norm that was logged, in the same pass."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":  # 0 is Lightning's way to say: not at all
            torch._foreach_mul_(self._gradients(), self._scale)
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        # as `clip_grads_with_norm_` does; the small number keeps a norm of 0 from dividing
        clip = (gradient_clip_val / (self._grad_norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(self._gradients(), float(clip) * self._scale)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and frees the gradients: Lightning would keep them through the next forward pass."""
        super().optimizer_step(*args, **kwargs)
        for gradient in self.parameters():
            gradient.grad = None

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]

    def _sums_over_ranks(self) -> dict[str, Tensor]:
        names = sorted(self._sums)
        flat = torch.stack([self._sums[name] for name in names])
        if self._data_parallel_ranks > 1:
            flat = cast("Tensor", self.trainer.strategy.reduce(flat, reduce_op="sum"))
        self._sums = {}
        return dict(zip(names, flat, strict=True))

    @property
    def _data_parallel_ranks(self) -> int:
        return int((self.trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"])

    def _refuse_non_finite(self, loss: Tensor, grad_norm: Tensor) -> None:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # float16: the scaler skips such updates and lowers its scale
        for name, value in {"train/loss": loss, "train/grad_norm": grad_norm}.items():
            if not torch.isfinite(value):
                raise UserError(
                    f"{name} became {float(value)} at step {self.global_step + 1}; the last checkpoint is untouched. "
                    "A lower learning rate, a warm-up or trainer.gradient_clip_val: 1.0 usually helps"
                )
