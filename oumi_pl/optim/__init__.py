"""Optimizers, parameter groups and learning-rate schedules."""

from oumi_pl.optim.groups import fuse, parameter_groups, scale_rates
from oumi_pl.optim.muon import MuonAdamW
from oumi_pl.optim.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Linear,
    Schedule,
    ScheduledRates,
    WarmupStableDecay,
)

__all__ = [
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Linear",
    "MuonAdamW",
    "Schedule",
    "ScheduledRates",
    "WarmupStableDecay",
    "fuse",
    "parameter_groups",
    "scale_rates",
]
