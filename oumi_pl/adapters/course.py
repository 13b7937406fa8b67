"""What happens between two updates of an engine, as between two of Lightning's: metrics, validation, checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from oumi_pl.adapters import position
from oumi_pl.adapters.batches import Batches, EngineBatch, in_our_order
from oumi_pl.adapters.refusals import WATCHERS
from oumi_pl.adapters.settings import Validations, find
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.callbacks.preemption import Preemption, Stopped
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.errors import UserError
from oumi_pl.runs import folders
from oumi_pl.types import IGNORE_INDEX, Pairs

SAME = {True: 5e-2, False: 1e-5}
"""Half precision or not -> nats by which a token's log-probability may differ between policy and reference at first."""


class Course(TrainerCallback):
    """Follows an engine's run: metrics under our names, our callbacks, validation and stops where Lightning has them.

    Args:
        trainer: Lightning's, which drives nothing here, but knows the recipe and carries callbacks and loggers.
        module: The recipe's; makes metrics of sums, and validates.
        data: The recipe's.
        batches: What the engine trains on.
        validations: After which updates to validate.
    """

    def __init__(self, trainer: Any, module: Any, data: Any, batches: Batches, validations: Validations) -> None:
        self.lightning = trainer
        self.module = module
        self.data = data
        self.batches = batches
        self.validations = validations
        self.preemption: Preemption | None = find(trainer, Preemption)
        self.checkpoints: Checkpoints | None = find(trainer, Checkpoints)
        self.row: dict[str, float] = {}
        """The metrics of the last update, and of the validation that followed."""

    def watch(self, hook: str, *args: Any) -> None:
        """Calls a hook of the callbacks that only look."""
        for callback in self.lightning.callbacks:
            if isinstance(callback, WATCHERS):
                getattr(callback, hook)(self.lightning, self.module, *args)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Takes what the module and the callbacks log, which Lightning's loops would else have to run for."""
        module = self.module
        module.log_dict = lambda metrics, **_: self.log(metrics)
        module.log = lambda name, value, **_: self.log({name: value})
        try:
            yield
        finally:
            del module.log_dict, module.log

    def log(self, metrics: dict[str, Any]) -> None:
        """Hands metrics to the callbacks and loggers, in the line of their step."""
        step = int(metrics.get("step", self.lightning.global_step))
        named = {name: float(value) for name, value in metrics.items() if name != "step"}
        if self.row.get("step") != step:
            self.row = {"step": step}
        self.row |= named
        self.lightning.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})
        validated = any(name.startswith("val/") for name in named)
        if validated or step % max(1, self.lightning.log_every_n_steps) == 0:
            for logger in self.lightning.loggers:
                logger.log_metrics(named, step)

    # ---- an update

    def measure_tokens(self, native: Any, correct: Tensor) -> None:
        """Adds a micro-batch of which the model foresaw so many targets to the sums of the update."""
        targets = (native["labels"] != IGNORE_INDEX).sum()
        self.module.add_to_update(
            native, native.get("sample_ids"), loss=torch.zeros(()), targets=targets, correct=correct
        )

    def measure_pairs(self, native: Any, inputs: EngineBatch, logps: list[Tensor]) -> None:
        """Adds a micro-batch of pairs, with what the engine found as `[policy, reference]`, `[2 pairs, seq - 1]` each.

        Raises:
            UserError: before the first update the policy does not equal its reference.
        """
        policy, reference = (in_our_order(found.float(), inputs["completion_mask"]) for found in logps)
        device = policy.device
        if self.lightning.global_step == 0 and len(policy):
            self._refuse_other_start(float((policy - reference).abs().max()))
        real = bool(native["sample_ids"])
        count = len(native["pair_lengths"])
        pairs = Pairs(policy, reference, native["branches"].to(device), count, native["margins"].to(device))
        losses = policy.new_zeros(count)  # the engine's own loss takes their place
        sums = self.module._measure(pairs, losses, native)
        self.module.add_to_update(inputs if real else native, native["sample_ids"], **sums)

    def _refuse_other_start(self, off: float) -> None:
        dtypes = (self.lightning.precision, *(p.dtype for p in self.module.parameters()))
        if off > SAME[any("16" in str(name) for name in dtypes)]:
            raise UserError(
                "before the first update the policy has to equal its reference, but log-probabilities differ by up to "
                f"{off:.2g} nats per token: dropout is still active, or an adapter doesn't start at zero "
                "(model.lora.init_lora_weights)"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets the recipe's optimizer settings win over those of a checkpoint, and begins the run folder."""
        self.module.on_train_start()
        schedule = self.module.lr_schedulers()
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]  # what the engine logs
        self.watch("on_train_start")
        folder: RunFolder | None = find(self.lightning, RunFolder)
        if folder is not None and folder.directory is not None:
            args.output_dir = str(folder.directory / folders.CHECKPOINTS)
        if self.preemption is not None:
            self.preemption.on_train_start(self.lightning, self.module)
        self.watch("on_train_batch_start", None, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says whether to validate, and to save before a stop that was asked for."""
        batches = self.batches
        due = self.validations.due(state.global_step, batches.epoch, batches.handed, batches.is_epoch_end)
        control.should_evaluate = due
        if self._is_stopping and self.checkpoints is not None:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Logs the update that has just ended: the engine's loss, norm and rate, and what was counted on the way.

        Raises:
            Stopped: the run was told to, and writes no checkpoints.
        """
        if "loss" not in logs:  # the engine's summary at the end
            return
        module = self.module
        sums = module._sums_over_ranks()
        sums["loss"] = logs["loss"] * sums[module.normalised_by]
        metrics = module.update_metrics(sums)
        module._grad_norm = torch.tensor(float(logs["grad_norm"]))
        module._refuse_non_finite(metrics["loss"], module._grad_norm)
        position.show_batches(self.lightning, self.batches)
        module._log_update(sums, metrics, logs["learning_rate"])
        position.show_step(self.lightning, state.global_step)
        self.watch("on_train_batch_end", None, None, state.global_step - 1)
        if self._is_stopping and self.checkpoints is None:
            self._stop(None)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops, now that this step is saved, if the run was told to.

        Raises:
            Stopped: it was.
        """
        if self._is_stopping:
            self._stop(Path(args.output_dir).parent)

    @property
    def _is_stopping(self) -> bool:
        return self.preemption is not None and bool(self.preemption._signal)

    def _stop(self, run: Path | None) -> None:
        assert self.preemption is not None
        raise Stopped(self.preemption._signal, self.lightning.global_step, run)

    # ---- validation

    def validate(self) -> dict[str, float]:
        """Validates by the module's own sums over all held-out tokens or pairs, and keeps the best weights."""
        module, trainer = self.module, self.lightning
        module.eval()
        with torch.no_grad():
            self.watch("on_validation_start")
            module.on_validation_start()
            for i, batch in enumerate(self.data.val_dataloader()):
                module.validation_step(trainer.strategy.batch_to_device(batch), i)
                self.watch("on_validation_batch_end", None, batch, i)
            self.watch("on_validation_epoch_end")
            module.on_validation_epoch_end()
        self.watch("on_validation_end")
        if self.checkpoints is not None:
            self.checkpoints.on_validation_end(trainer, module)
        module.train()
        return {name: value for name, value in self.row.items() if name.startswith("val/")}
