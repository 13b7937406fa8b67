"""What is looked for in the datasets, models and tokenizers of users."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class MapStyle(Protocol):
    """A dataset whose rows can be read in any order."""

    def __getitem__(self, row: int) -> Any:
        """A row."""

    def __len__(self) -> int:
        """Number of rows."""


@runtime_checkable
class HasEpochs(Protocol):
    """A dataset that wants to know the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch."""


@runtime_checkable
class HasState(Protocol):
    """An iterable dataset that knows where it is."""

    def state_dict(self) -> Any:
        """Where it is."""

    def load_state_dict(self, state: Any) -> None:
        """Goes there."""


@runtime_checkable
class Pretrained(Protocol):
    """A model or a tokenizer of transformers."""

    def save_pretrained(self, directory: Any) -> Any:
        """Writes it to a folder."""


@runtime_checkable
class Adapted(Protocol):
    """A model in PEFT's wrapper."""

    peft_config: Any

    def get_base_model(self) -> Any:
        """The model inside."""


@runtime_checkable
class Recomputing(Protocol):
    """A model that can compute activations again in the backward pass."""

    def gradient_checkpointing_enable(self, kwargs: Any) -> None:
        """Makes it do so."""


def bare(model: Any) -> Any:
    """The model inside of PEFT's wrapper; itself if it is in none."""
    return model.get_base_model() if isinstance(model, Adapted) else model
