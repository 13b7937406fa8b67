"""The LightningModule inside of the trainer: one training batch is one optimizer update.

Lightning hands it a window of micro-batches (`windows.py`). It knows all of an update's targets before the first
forward pass, so gradients are right as they come; it steps by itself, and lets the flow (`flow.py`) decide when to log,
evaluate and save. Lightning never validates on its own.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from oumi_pl.core.trainers.evaluation import EvaluatingModule
from oumi_pl.core.trainers.flow import Flow
from oumi_pl.core.trainers.loss import Loss, tokens_of
from oumi_pl.core.trainers.optimizers import optimizer
from oumi_pl.core.trainers.records import MetricsFile, Timers
from oumi_pl.core.trainers.schedules import schedule
from oumi_pl.core.trainers.windows import Window, Windows
from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams


class TrainingModule(EvaluatingModule):
    """Trains any module that returns a loss.

    Args:
        model: The module.
        params: What the run was given.
        flow: State, switches and callbacks.
        windows: The training data, told of each update that is done.
        loss: What a micro-batch counts for.
        file: Where log rows go.
        save: Writes a checkpoint.
        at_start: Called when optimizer and schedule are there: restores them.
        at_end: Called when training is over, before callbacks hear of it.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        params: "TrainingParams",
        flow: Flow,
        windows: Windows,
        loss: Loss,
        file: MetricsFile,
        save: Callable[[], None],
        at_start: Callable[[], None],
        at_end: Callable[[], None],
    ) -> None:
        super().__init__(flow, loss, file)
        self.automatic_optimization = False
        self.model = model
        self.params = params
        self.windows = windows
        self.save = save
        self.at_start = at_start
        self.at_end = at_end
        self.timers = Timers(params.include_performance_metrics)
        self.unlogged = torch.zeros(())
        """Sum of this rank's parts of the losses of the updates since the last log."""
        self.last_logged = 0
        self._update = torch.zeros(())
        self._grad_norm = torch.zeros(())
        self._began = self.clock = time.time()
        self._at_begin = self._at_log = (0, 0)
        self._losses: list[float] = []
        self._waits_since: float | None = None

    def configure_optimizers(self) -> Any:
        """The optimizer that the parameters name, and its schedule in optimizer steps."""
        made = optimizer(self.model, self.params)
        return [made], [LambdaLR(made, schedule(self.params, self.flow.state.max_steps))]

    # ---- beginning and end

    def on_train_start(self) -> None:
        """Restores what has to wait for the optimizer, starts the clocks, tells callbacks."""
        self.unlogged = torch.zeros((), device=self.device)
        self.last_logged = self.flow.state.global_step
        self.at_start()
        self._losses = [-self._reduced(self.unlogged)]  # trained before the resume, and logged after it
        handler = self.flow.handler
        handler.optimizer, handler.lr_scheduler = self.trainer.optimizers[0], self.lr_schedulers()
        handler.train_dataloader, handler.eval_dataloader = self.windows, self.trainer.val_dataloaders
        self._began = self.clock = time.time()
        self._at_begin = self._at_log = (self.flow.state.global_step, self.total_tokens_seen)
        self.flow.fire("on_train_begin")
        if self.flow.args.eval_on_start and self.flow.state.global_step == 0 and self.has_eval:
            self.evaluate()

    def on_train_epoch_start(self) -> None:
        """Tells callbacks."""
        self.flow.fire("on_epoch_begin")

    def on_train_epoch_end(self) -> None:
        """Tells callbacks, and does what they or the strategies ask for at the end of an epoch."""
        if self.flow.control.should_epoch_stop:
            self.windows.end_epoch()
        self.flow.fire("on_epoch_end")
        saved = (self.flow.args.save_strategy == "steps") and self._is_at_save_step
        if self.params.save_epoch and not saved:
            self.flow.control.should_save = True
        self._log_if_asked()
        self._evaluate_and_save_if_asked()

    def on_train_end(self) -> None:
        """Logs how the run went, and tells callbacks."""
        steps = self.flow.state.global_step - self._at_begin[0]
        seconds = time.time() - self._began
        if self.flow.state.global_step > self.last_logged:
            self._collect_loss()
        mean = sum(self._losses) / max(1, steps)
        logs = {"train_runtime": seconds, "train_steps_per_second": steps / seconds, "train_loss": mean}
        self.write(self.flow.log(logs), {})
        self.at_end()
        self.flow.fire("on_train_end")

    # ---- an update

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Ends the epoch here if a callback asked for it."""
        if self._waits_since is not None:
            self.timers.add("fetching batch", time.perf_counter() - self._waits_since)
        return -1 if self.flow.should_stop else None

    def training_step(self, window: Window, batch_idx: int) -> None:
        """Runs the micro-batches of an update, and steps."""
        flow, optimizer = self.flow, cast("Any", self.optimizers())
        flow.fire("on_step_begin")
        with self.timers.time("computing tokens"):
            total, tokens = self._count(window)
        self._update = torch.zeros((), device=self.device)
        for i, batch in enumerate(window.batches):
            last = i == len(window.batches) - 1
            with self._gradients_synced(last):
                with self.timers.time("model forward"):
                    part = self.loss(batch, total, counts=not window.stands_in)
                with self.timers.time("loss backward"):
                    # the processes' gradients are averaged, but the parts have to be added up
                    self.manual_backward(part * self.trainer.world_size)
            self._update = self._update + part.detach()
            if not last:
                flow.fire("on_substep_end")
                if flow.should_stop:
                    optimizer.zero_grad()
                    return
        with self.timers.time("optimizer step"):
            optimizer.step()
        flow.fire("on_optimizer_step")
        self._finish_update(window, tokens)

    def _finish_update(self, window: Window, tokens: int) -> None:
        flow, optimizer = self.flow, self.trainer.optimizers[0]
        self._learning_rate = float(optimizer.param_groups[0]["lr"])
        if self._scaler is None or torch.isfinite(self._grad_norm):  # else the scaler has skipped the step
            cast("LambdaLR", self.lr_schedulers()).step()
        optimizer.zero_grad()
        self.unlogged = self.unlogged + self._update
        self.total_tokens_seen += tokens
        self.windows.done(window)
        flow.state.global_step += 1
        flow.state.epoch = self._epochs_done(window)
        flow.state.num_input_tokens_seen = self.total_tokens_seen
        self.log_dict({"train/loss": self._update, "train/grad_norm": self._grad_norm}, logger=False, batch_size=1)
        every = self.params.empty_device_cache_steps
        if every and flow.state.global_step % every == 0 and self.device.type == "cuda":
            torch.cuda.empty_cache()
        flow.fire("on_step_end")
        self._log_if_asked()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the gradients, checks that they are numbers, and tells callbacks."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.params.max_grad_norm:
            self._grad_norm = nn.utils.clip_grad_norm_(parameters, self.params.max_grad_norm)
        else:
            self._grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self._scaler is None and not torch.isfinite(self._grad_norm + self._update):
            raise UserError(
                f"the loss ({float(self._update)}) or the norm of its gradient ({float(self._grad_norm)}) is not a "
                f"finite number at step {self.flow.state.global_step + 1}; the last checkpoint is untouched. A lower "
                "learning_rate, a warm-up or max_grad_norm: 1.0 usually helps"
            )
        self.flow.fire("on_pre_optimizer_step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Evaluates, saves and stops, as the flow or a callback has asked for."""
        self._evaluate_and_save_if_asked()
        if self.flow.control.should_training_stop:
            self.trainer.should_stop = True
        self._waits_since = time.perf_counter()

    def _count(self, window: Window) -> tuple[Tensor, int]:
        """Targets and tokens of an update, over all its micro-batches and all processes."""
        counts = torch.zeros(2, dtype=torch.long, device=self.device)
        if not window.stands_in:
            for batch in window.batches:
                counts += torch.stack([self.loss.targets(batch).cpu(), tokens_of(batch).cpu()]).to(self.device)
        if self.trainer.world_size > 1:
            counts = cast("Tensor", self.trainer.strategy.reduce(counts, reduce_op="sum"))
        return counts[0], int(counts[1])

    def _gradients_synced(self, now: bool) -> AbstractContextManager[Any]:
        if now or self.trainer.world_size == 1:
            return nullcontext()
        return cast("Any", self.trainer.strategy).block_backward_sync()

    def _epochs_done(self, window: Window) -> float:
        layout, rows = self.windows.layout, self.windows.rows
        if window.last:
            return float(window.epoch + 1)
        if rows is None:
            return window.epoch + window.number / max(1, self.flow.state.max_steps)
        micro_batches = math.ceil(rows / (layout.batch_size * layout.ranks))
        return window.epoch + window.number * layout.micro_batches / micro_batches

    # ---- logging

    def _log_if_asked(self) -> None:
        step = self.flow.state.global_step
        if not self.flow.control.should_log or step <= self.last_logged:
            return
        updates = step - self.last_logged
        loss = self._collect_loss() / updates
        seconds, now = max(1e-9, time.time() - self.clock), (step, self.total_tokens_seen)
        tokens = now[1] - self._at_log[1]
        speed = {
            "global_steps_per_second": updates / seconds,
            "tokens_per_second": tokens / seconds,
            "tokens_per_step_per_gpu": tokens / updates / self.trainer.world_size,
        }
        self.clock, self._at_log = time.time(), now
        logs: dict[str, Any] = {"loss": loss, "grad_norm": float(self._grad_norm), "learning_rate": self._learning_rate}
        if self.params.include_performance_metrics:
            runtime = time.time() - self._began
            logs["num_input_tokens_seen"] = now[1]
            logs["train_runtime"] = runtime
            logs["train_tokens_per_second"] = (now[1] - self._at_begin[1]) / runtime
        self.write(self.flow.log(logs), speed, {"loss": "train/loss", "grad_norm": "train/grad_norm"})

    def _collect_loss(self) -> float:
        """The sum of the losses of the updates since the last log, over all processes."""
        total = self._reduced(self.unlogged)
        self._losses.append(total)
        self.unlogged = torch.zeros((), device=self.device)
        self.last_logged = self.flow.state.global_step
        return total

    def _reduced(self, value: Tensor) -> float:
        if self.trainer.world_size > 1:
            value = cast("Tensor", self.trainer.strategy.reduce(value, reduce_op="sum"))
        return float(value)

    # ---- evaluation

    def _evaluate_and_save_if_asked(self) -> None:
        control = self.flow.control
        if control.should_evaluate:
            if self.has_eval:
                self.evaluate()
            control.should_evaluate = False
        if self.flow.control.should_save:
            self.save()
            self.flow.fire("on_save")

    @property
    def _is_at_save_step(self) -> bool:
        state = self.flow.state
        return state.global_step % max(1, state.save_steps) == 0 or state.global_step >= state.max_steps

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)
