"""What happens when: the events of transformers' callbacks, and the state and switches that they read and set.

transformers' own `TrainerState`, `TrainerControl` and `CallbackHandler` are used, and its `DefaultFlowCallback` decides
when to log, evaluate, save and stop. The order of events is that of `transformers.Trainer`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from oumi_pl.core.trainers.hyperparameters import callback_arguments
from oumi_pl.errors import UserError, nearest

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams


class Flow:
    """State, switches and callbacks of a run.

    Args:
        params: What the run was given.
        callbacks: transformers' callbacks, called after the one that decides on the flow.
        model: Handed to callbacks, as is the tokenizer.
        tokenizer: The tokenizer or processor, if there is one.
    """

    def __init__(
        self, params: "TrainingParams", callbacks: Sequence[TrainerCallback], model: torch.nn.Module, tokenizer: Any
    ) -> None:
        self.params = params
        self.args = callback_arguments(params)
        self.handler = CallbackHandler([DefaultFlowCallback(), *callbacks], model, tokenizer, None, None)
        self.state = TrainerState()
        self.control = TrainerControl()
        self.fire("on_init_end")

    def begin(self, total: int, epochs: int, is_first_process: bool = True) -> None:
        """Starts a run over: so many optimizer steps, so many epochs."""
        self.state = TrainerState()
        self.state.train_batch_size = self.params.per_device_train_batch_size
        self.state.compute_steps(self.args, total)
        self.state.max_steps, self.state.num_train_epochs = total, epochs
        self.state.is_world_process_zero = self.state.is_local_process_zero = is_first_process
        self.control = TrainerControl()

    def fire(self, event: str, **kwargs: Any) -> None:
        """Calls every callback; what one returns is the control from then on."""
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, **kwargs)

    @property
    def should_stop(self) -> bool:
        """Whether the epoch or the run is to end here."""
        return self.control.should_training_stop or self.control.should_epoch_stop

    def log(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Adds a row to the history and tells callbacks, which may add to it.

        Returns:
            The row, with what callbacks added.
        """
        row = logs | {"epoch": self.state.epoch}
        self.state.log_history.append(row | {"step": self.state.global_step})
        self.fire("on_log", logs=row)
        return row

    def note_best(self, metrics: dict[str, float]) -> None:
        """Keeps the best value of `metric_for_best_model`, and at which step it was.

        Raises:
            UserError: if evaluation gives no such metric.
        """
        name = self.args.metric_for_best_model
        if name is None:
            return
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            hint = nearest(name, metrics)
            raise UserError(f"training.trainer_kwargs.metric_for_best_model: evaluation gives no {name!r}{hint}")
        value, best = metrics[name], self.state.best_metric
        if best is None or (value > best if self.args.greater_is_better else value < best):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    def export_callbacks(self) -> None:
        """Puts the state of those callbacks that have one into the run's, by class name, as transformers does."""
        states: dict[str, Any] = {}
        for callback in self._stateful:
            states.setdefault(type(callback).__name__, []).append(callback.state())
        exported: Any = {name: own if len(own) > 1 else own[0] for name, own in states.items()}
        self.state.stateful_callbacks = exported

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state; how long the run is and how often it logs are this run's own."""
        now = self.state
        self.state = TrainerState(**state)
        for name in ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "train_batch_size"):
            setattr(self.state, name, getattr(now, name))
        self.state.is_world_process_zero = now.is_world_process_zero
        self.state.is_local_process_zero = now.is_local_process_zero
        best = self.state.best_model_checkpoint
        if best is not None and not Path(best).is_dir():
            self.state.best_model_checkpoint = None
        saved_states: Any = self.state.stateful_callbacks or {}
        waiting = {k: list(v) if isinstance(v, list) else [v] for k, v in saved_states.items()}
        for callback in self._stateful:
            if waiting.get(type(callback).__name__):
                saved = waiting[type(callback).__name__].pop(0)
                callback.__dict__.update(type(callback).from_state(saved).__dict__)

    @property
    def _stateful(self) -> list[Any]:
        return [callback for callback in self.handler.callbacks if isinstance(callback, ExportableState)]
