"""Oumi's base classes of data sets, for the user's own: rows come from a file, a saved folder or the hub.

Register a subclass with `oumi_pl.core.registry.register_dataset`, and a config can name it as `dataset_name`. Unlike in
Oumi, a class for text defines its rows (`transform_conversation`, `transform_preference`), and not their tokens: chat
templates, masks and packing are those of `oumi_pl/data`.
"""

from oumi_pl.core.datasets.base import BaseMapDataset
from oumi_pl.core.datasets.text import (
    BaseDpoDataset,
    BaseExperimentalDpoDataset,
    BaseExperimentalGrpoDataset,
    BaseExperimentalKtoDataset,
    BaseIterableDataset,
    BasePretrainingDataset,
    BaseSftDataset,
)

__all__ = [
    "BaseDpoDataset", "BaseExperimentalDpoDataset", "BaseExperimentalGrpoDataset", "BaseExperimentalKtoDataset",
    "BaseIterableDataset", "BaseMapDataset", "BasePretrainingDataset", "BaseSftDataset",
]  # fmt: skip
