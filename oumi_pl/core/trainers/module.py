"""The LightningModule of the trainer: any model that returns a loss, and the events of transformers' callbacks.

All numbers are `UpdateModule`'s, all steps Lightning's. What this adds is the order of events of
`transformers.Trainer`: the flow (`flow.py`) decides when to log, evaluate and save. Lightning never validates on its
own.
"""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from oumi_pl.core.trainers.data import DatasetModule, MicroBatch
from oumi_pl.core.trainers.flow import Flow
from oumi_pl.core.trainers.folders import STATE, TRAINING, keep_last, read_state, write_state
from oumi_pl.core.trainers.loss import Loss
from oumi_pl.core.trainers.optimisation import build_optimizer, build_schedule
from oumi_pl.core.trainers.records import MetricsFile
from oumi_pl.core.trainers.saving import load_weights, save_weights
from oumi_pl.errors import UserError
from oumi_pl.modules.update import RestorableModule, Split
from oumi_pl.optim import fuse, parameter_groups
from oumi_pl.runs.checksums import write_list
from oumi_pl.runs.files import HALF, put, remove
from oumi_pl.types import Sums

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams


class LossModule(RestorableModule):
    """Trains any module that returns a loss.

    Args:
        loss: The model, and what it makes of a batch.
        params: What the run was given.
        flow: State, switches and callbacks.
        inputs: The data.
        output_dir: Where log rows and checkpoints go.
        tokenizer: Saved with each checkpoint.
        checkpoint: The folder that the run is resumed from.
    """

    clipped_by = "max_grad_norm"

    def __init__(
        self,
        loss: Loss,
        params: "TrainingParams",
        flow: Flow,
        inputs: DatasetModule,
        *,
        output_dir: Path,
        tokenizer: Any,
        checkpoint: Path | None,
    ) -> None:
        super().__init__()
        self.model = loss.model
        self.loss = loss
        self.params = params
        self.flow = flow
        self.inputs = inputs
        self.output_dir = output_dir
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.file = MetricsFile(output_dir / "metrics_rank0000.jsonl" if flow.state.is_world_process_zero else None)
        self.unlogged = 0.0
        """Sum of the losses of the updates since the last log."""
        self.last_logged = 0
        """Step of the last log."""
        self.eval_metrics: dict[str, float] = {}
        """Those of the last evaluation, named `eval_...`."""
        self._evaluated: dict[str, float] = {}
        self._is_text = False
        self._losses: list[float] = []
        self._grad_norm = self._lr = 0.0
        self._began = self._clock = time.time()
        self._at_begin = self._at_log = (0, 0)
        self._is_saving = False  # a `checkpoint-N` folder, and not a checkpoint of a callback of Lightning's

    # ---- what a batch comes to

    def loss_sums(self, batch: MicroBatch, split: Split) -> Sums:
        """The sum of the losses of its targets."""
        targets = batch["counts"]["targets"]
        total = max(1, batch["update"].targets if split == "train" else targets)
        if batch["inputs"] is None:  # an evaluation of which this rank has no rows
            return {"loss": torch.zeros((), device=self.device)}
        with self.profiler.profile("model forward"):
            sums = {"loss": self.loss(batch["inputs"], targets, total) * total}
        if split == "validation":
            self._is_text = self.loss.count.predicts_tokens(batch["inputs"])
            sums["batches"] = torch.ones((), device=self.device)
        return sums

    def count(self, batch: MicroBatch) -> dict[str, int]:
        """As it was counted on the host."""
        return batch["counts"]

    def metrics(self, sums: Sums, split: Split) -> dict[str, Tensor]:
        """The mean loss."""
        if split == "validation":
            self._evaluated = {name: float(value) for name, value in sums.items()}
        return {"loss": sums["loss"] / sums["targets"].clamp(min=1)}

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """For Lightning's callbacks only: its loggers get the rows that the flow has logged."""
        super().log_dict(dictionary, *args, **(kwargs | {"logger": False}))

    # ---- beginning and end

    def configure_optimizers(self) -> Any:
        """The optimizer that the parameters name, and its schedule."""
        optimizer, total = build_optimizer(self.model, self.params), self.flow.state.max_steps
        # a fused step unscales float16 gradients by itself, after they would have been clipped
        if self._scaler is None and self.device.type == "cuda":
            fuse(optimizer)
        factor = build_schedule(self.params, total)
        return self.scheduled(optimizer, lambda step: factor(step, total))

    def begin_training(self) -> None:
        """Starts the clocks and the log, and tells callbacks."""
        super().begin_training()
        step = self.flow.state.global_step
        self.file.open(step)
        self._losses = [-self.unlogged]  # trained before the resume, and logged after it
        handler = self.flow.handler
        handler.optimizer, handler.lr_scheduler = self.trainer.optimizers[0], self.lr_schedulers()
        handler.train_dataloader, handler.eval_dataloader = self.inputs.loader, self.trainer.val_dataloaders
        self._began = self._clock = time.time()
        self._at_begin = self._at_log = (step, self.tokens_seen["tokens"])
        self.flow.fire("on_train_begin")
        if self.flow.args.eval_on_start and step == 0 and self._has_eval:
            self.evaluate()
        if self.trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            self.flow.fire("on_epoch_begin")  # Lightning does not begin an epoch that is resumed

    def on_train_epoch_start(self) -> None:
        """Tells callbacks."""
        self.flow.fire("on_epoch_begin")

    def on_train_epoch_end(self) -> None:
        """Tells callbacks, and does what they or the strategies ask for at the end of an epoch."""
        self.flow.fire("on_epoch_end")
        state = self.flow.state
        at_save_step = state.global_step % max(1, state.save_steps) == 0 or state.global_step >= state.max_steps
        if self.params.save_epoch and not (self.flow.args.save_strategy == "steps" and at_save_step):
            self.flow.control.should_save = True
        self._log_if_asked()
        self._evaluate_and_save_if_asked()

    def on_train_end(self) -> None:
        """Logs how the run went, and tells callbacks."""
        steps = self.flow.state.global_step - self._at_begin[0]
        seconds = time.time() - self._began
        if self.flow.state.global_step > self.last_logged:
            self._take_losses()
        mean = sum(self._losses) / max(1, steps)
        logs = {"train_runtime": seconds, "train_steps_per_second": steps / seconds, "train_loss": mean}
        self.write(self.flow.log(logs), {})
        best = self.flow.state.best_model_checkpoint
        if self.flow.args.load_best_model_at_end and best is not None:
            load_weights(self.model, Path(best))
        self.flow.fire("on_train_end")

    # ---- an update, in the order of its events

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Tells callbacks of the first micro-batch of an update."""
        super().begin_batch(batch, batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.flow.fire("on_step_begin")

    def before_step(self, optimizer: Optimizer) -> None:
        """Logs the update."""
        self.profiler.start("optimizer step")
        super().before_step(optimizer)

    def finish_update(self, grad_norm: Tensor, lr: float, **instead: float) -> None:
        """Keeps what the flow may log."""
        super().finish_update(grad_norm, lr, **instead)
        self.unlogged += self.last_update["loss"] / max(1.0, self.last_update["targets"])
        self._grad_norm, self._lr = float(grad_norm), lr

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clips, and tells callbacks."""
        super().configure_gradient_clipping(*args, **kwargs)
        self.flow.fire("on_pre_optimizer_step")

    def on_after_optimizer_step(self) -> None:
        """Tells callbacks."""
        self.profiler.stop("optimizer step")
        self.flow.fire("on_optimizer_step")

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Moves the schedule, unless the scaler of float16 has skipped the step."""
        if self._scaler is None or math.isfinite(self._grad_norm):
            scheduler.step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tells callbacks; after an update logs, evaluates, saves and stops, as the flow or a callback asks for."""
        flow, loop = self.flow, self.trainer.fit_loop
        if loop._should_accumulate():
            flow.fire("on_substep_end")
            if flow.should_stop:
                self.abandon_update()
        else:
            flow.state.global_step = self.trainer.global_step
            flow.state.epoch = self._epochs_done()
            flow.state.num_input_tokens_seen = self.tokens_seen["tokens"]
            every = self.params.empty_device_cache_steps
            if every and flow.state.global_step % every == 0 and self.device.type == "cuda":
                torch.cuda.empty_cache()
            flow.fire("on_step_end")
            self._log_if_asked()
            self._evaluate_and_save_if_asked()
        if flow.control.should_epoch_stop:
            loop.epoch_loop.batch_progress.is_last_batch = True  # Lightning then ends the epoch, and fetches no more
        if flow.control.should_training_stop:
            self.trainer.should_stop = True

    def _epochs_done(self) -> float:
        loop = self.trainer.fit_loop
        if self.inputs.epoch_is_done:
            return self.current_epoch + 1.0
        length = loop.max_batches
        if math.isinf(length):  # as transformers does
            length = max(1, self.flow.state.max_steps) * self.trainer.accumulate_grad_batches
        return self.current_epoch + loop.epoch_loop.batch_progress.current.ready / length

    # ---- logging

    def _log_if_asked(self) -> None:
        step, tokens = self.flow.state.global_step, self.tokens_seen["tokens"]
        if not self.flow.control.should_log or step <= self.last_logged:
            return
        updates = step - self.last_logged
        logs: dict[str, Any] = {"loss": self._take_losses() / updates}
        logs |= {"grad_norm": self._grad_norm, "learning_rate": self._lr}
        seconds, new = max(1e-9, time.time() - self._clock), tokens - self._at_log[1]
        speed = {
            "global_steps_per_second": updates / seconds,
            "tokens_per_second": new / seconds,
            "tokens_per_step_per_gpu": new / updates / self.trainer.world_size,
        }
        self._clock, self._at_log = time.time(), (step, tokens)
        if self.params.include_performance_metrics:
            runtime = time.time() - self._began
            logs |= {"num_input_tokens_seen": tokens, "train_runtime": runtime}
            logs["train_tokens_per_second"] = (tokens - self._at_begin[1]) / runtime
        self.write(self.flow.log(logs), speed, {"loss": "train/loss", "grad_norm": "train/grad_norm"})

    def _take_losses(self) -> float:
        total, self.unlogged = self.unlogged, 0.0
        self._losses.append(total)
        self.last_logged = self.flow.state.global_step
        return total

    def write(self, row: dict[str, Any], more: dict[str, Any], names: dict[str, str] | None = None) -> None:
        """Writes a log row to the file and to Lightning's loggers, renamed and with more beside it."""
        row = {(names or {}).get(name, name): value for name, value in row.items()} | more
        step = self.flow.state.global_step
        row |= {"global_step": step, "total_tokens_seen": self.tokens_seen["tokens"]}
        self.file.write(row)
        for logger in self.trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)

    # ---- evaluation

    def evaluate(self) -> None:
        """Goes through the evaluation data by Lightning's own loop, which its callbacks see, then informs the flow."""
        trainer, started = self.trainer, time.time()
        first = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first
        seconds, sums = time.time() - started, self._evaluated
        metrics = {"eval_loss": sums["loss"] / max(1.0, sums["targets"])}
        if self._is_text:
            metrics["eval_perplexity"] = math.exp(min(metrics["eval_loss"], 700))
        metrics |= {"eval_runtime": seconds, "eval_samples_per_second": sums["rows"] / seconds}
        metrics["eval_steps_per_second"] = sums["batches"] / seconds
        row = self.flow.log(metrics)
        self.eval_metrics = dict(row)
        self.write(row, {}, {"eval_loss": "val/loss", "eval_perplexity": "val/perplexity"})
        self.flow.fire("on_evaluate", metrics=row)
        self.flow.note_best(row)
        self._clock = time.time()

    def _evaluate_and_save_if_asked(self) -> None:
        control = self.flow.control
        if control.should_evaluate:
            if self._has_eval:
                self.evaluate()
            control.should_evaluate = False
        if self.flow.control.should_save:
            self.save_folder()
            self.flow.fire("on_save")

    @property
    def profiler(self) -> Any:
        """Lightning's profiler, which times the parts of an update if `include_performance_metrics` says so."""
        return cast("Any", self.trainer).profiler

    @property
    def _has_eval(self) -> bool:
        return self.inputs.evaluation is not None

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    # ---- checkpoints

    def save_folder(self) -> None:
        """Writes `checkpoint-N`; the folder appears when it is complete. All processes have to call this."""
        state = self.flow.state
        folder = self.output_dir / f"checkpoint-{state.global_step}"
        half = folder.with_name(folder.name + HALF)
        if self.trainer.is_global_zero:
            remove(half)
            save_weights(self.model, half, self.tokenizer)
        self._is_saving = True
        self.trainer.save_checkpoint(half / TRAINING)
        self._is_saving = False
        if self.trainer.is_global_zero:
            self.flow.export_callbacks()
            best = self.output_dir / f"checkpoint-{state.best_global_step}"
            if best == folder or best.is_dir():
                state.best_model_checkpoint = str(best)
            write_state(half / STATE, state)
            write_list(half)
            put(half, folder)
            keep_last(self.output_dir, self.flow.args.save_total_limit, state.best_model_checkpoint)
        self.trainer.strategy.barrier("checkpoint written")

    def add_to_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the losses that are not logged yet; leaves out what a `checkpoint-N` folder has in other files."""
        super().add_to_checkpoint(checkpoint)
        checkpoint |= {"unlogged": self.unlogged, "last_logged": self.last_logged}
        if self._is_saving:
            checkpoint["state_dict"] = {}
            del checkpoint["loops"]

    def restore_from(self, checkpoint: dict[str, Any]) -> None:
        """Restores what is in the files of the folder, and Lightning's counters from the position in the data."""
        folder, position = cast("Path", self.checkpoint), checkpoint[type(self.inputs).__qualname__]
        load_weights(self.model, folder)
        self.flow.restore(read_state(folder))
        micro_batches = self.trainer.accumulate_grad_batches
        checkpoint["micro_batches"] = micro_batches
        checkpoint["loops"] = self._loops(position["epoch"], position["update"] * micro_batches)
        super().restore_from(checkpoint)
        saved = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
        own = [len(group["params"]) for group in parameter_groups(self.named_parameters())]
        if saved != own:
            raise UserError(
                f"the checkpoint is of another optimizer or model: {sum(saved)} weights were trained, "
                f"in groups of {saved}; here it is {own}"
            )
        self.unlogged, self.last_logged = checkpoint["unlogged"], checkpoint["last_logged"]

    def _loops(self, epoch: int, micro_batches: int) -> dict[str, Any]:
        """The state of Lightning's loops between two updates, so many micro-batches into an epoch.

        What Lightning itself would save depends on the hook that it is saved in, and at the end of an epoch can't be
        resumed from.
        """
        names, step = ("ready", "started", "processed", "completed"), self.flow.state.global_step
        fit = self.trainer.fit_loop.state_dict()
        begun = epoch + bool(micro_batches)
        for span in ("total", "current"):
            fit["epoch_progress"][span] |= dict(zip(names, (begun, begun, epoch, epoch), strict=True))
            fit["epoch_loop.batch_progress"][span] |= dict.fromkeys(names, micro_batches)
        steps = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
        steps |= {"ready": step, "completed": step}
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] = step
        return {"fit_loop": fit}
