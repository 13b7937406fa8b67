"""What every trainer of Oumi's can be asked to do."""

from abc import ABC, abstractmethod
from typing import Any


class BaseTrainer(ABC):
    """Trains a model, and writes the result."""

    @abstractmethod
    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Trains to the end, from the start or from a `checkpoint-N` folder.

        Args:
            resume_from_checkpoint: The folder to resume from.
        """

    @abstractmethod
    def save_state(self) -> None:
        """Writes `trainer_state.json` into the output folder: where the run stands, and what it logged."""

    @abstractmethod
    def save_model(self, config: Any = None, final: bool = True) -> None:
        """Writes the model, its config and its tokenizer at the top of the output folder.

        Args:
            config: The `TrainingConfig` of the run; of it, `peft.peft_save_mode` is read.
            final: Whether training is over. Before that an adapter is never merged into its base.
        """

    @abstractmethod
    def get_last_eval_metrics(self) -> dict[str, Any]:
        """The metrics of the last evaluation, named `eval_...`; empty before the first."""
