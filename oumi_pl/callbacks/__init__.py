"""Callbacks: they watch a run, write its folder and report its progress."""

from typing import Any, TypeVar

Kind = TypeVar("Kind")


def find(trainer: Any, kind: type[Kind]) -> Kind | None:
    """The trainer's first callback of a kind; None if it has none."""
    return next(iter(find_all(trainer, kind)), None)


def find_all(trainer: Any, kind: type[Kind]) -> list[Kind]:
    """The trainer's callbacks of a kind."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]
