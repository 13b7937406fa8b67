"""Oumi's trainers. Importing this is light: what a trainer needs is imported with it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oumi_pl.core.trainers.base import BaseTrainer
    from oumi_pl.core.trainers.hugging_face import HuggingFaceTrainer, build_trainer
    from oumi_pl.core.trainers.hyperparameters import to_hf
    from oumi_pl.core.trainers.trainer import Trainer

_WHERE = {
    "BaseTrainer": "base",
    "HuggingFaceTrainer": "hugging_face",
    "Trainer": "trainer",
    "build_trainer": "hugging_face",
    "to_hf": "hyperparameters",
}

__all__ = ["BaseTrainer", "HuggingFaceTrainer", "Trainer", "build_trainer", "to_hf"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
