"""A module that keeps its arguments, so that a folder of it can be loaded again."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from oumi_pl.errors import UserError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class BaseModel(nn.Module, ABC):
    """A model of the user's: `forward(**batch)` returns a dictionary, with a `loss` where the batch has labels.

    Args:
        kwargs: The arguments of the subclass, which `config.json` keeps.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._init_kwargs = kwargs

    @abstractmethod
    def forward(self, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The outputs of a batch."""

    @property
    @abstractmethod
    def criterion(self) -> Callable[..., Any]:
        """The loss function."""

    def save_pretrained(self, save_directory: str | Path, *, save_config: bool = True) -> None:
        """Writes `model.safetensors`, and `config.json` with the arguments and the name of the class."""
        from safetensors.torch import save_model

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / WEIGHTS))
        if save_config:
            config = {"model_type": type(self).__name__, "init_kwargs": self._init_kwargs}
            (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        load_directory: str | Path,
        *,
        map_location: str | torch.device | None = None,
        strict: bool = True,
        override_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Loads a folder of `save_pretrained`.

        Raises:
            UserError: there is no such folder.
        """
        from safetensors.torch import load_model

        folder = Path(load_directory)
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder}: no {CONFIG} and {WEIGHTS} of {cls.__name__} in this folder")
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model = cls(**config.get("init_kwargs", {}) | (override_kwargs or {}))
        load_model(model, str(folder / WEIGHTS), strict=strict, device=str(map_location or "cpu"))
        return model
