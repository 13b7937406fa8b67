"""The classes that recipes name by their short name. Being imported here is what makes a class known."""

from itertools import chain

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from oumi_pl.callbacks.answers import Answers
from oumi_pl.callbacks.ema import EMA
from oumi_pl.callbacks.samples import Samples
from oumi_pl.callbacks.trigram import TrigramBaseline
from oumi_pl.config.explain import subclasses
from oumi_pl.data.base import TextData
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.sources import Source
from oumi_pl.data.tokenizers import TokenizerFactory
from oumi_pl.losses.preference import Divergence
from oumi_pl.modules.base import LanguageModule
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.modules.sft import SFT
from oumi_pl.optim.muon import MuonAdamW
from oumi_pl.optim.schedules import Schedule
from oumi_pl.types import PreferenceLoss, TokenLoss

__all__ = [
    "DPO",
    "EMA",
    "SFT",
    "Answers",
    "DPOData",
    "MuonAdamW",
    "Pretrain",
    "PretrainData",
    "SFTData",
    "Samples",
    "TrigramBaseline",
    "known_classes",
]

ACCIDENTAL = ("accelerate", "transformers")
"""Packages that happen to be imported, and define optimizers of the same names as torch's."""


def known_classes() -> dict[str, dict[str, type]]:
    """Classes that recipes name by their short name, by their place in a recipe."""
    bases: dict[str, tuple[type, ...]] = {
        "model": (LanguageModule,),
        "model.optimizer": (Optimizer,),
        "model.schedule": (Schedule,),
        "model.loss": (TokenLoss, PreferenceLoss),
        "model.loss.loss": (PreferenceLoss,),
        "model.loss.losses": (PreferenceLoss,),
        "model.loss.divergence": (Divergence,),
        "data": (TextData,),
        "data.tokenizer": (TokenizerFactory,),
        "trainer.callbacks": (Callback,),
        "trainer.logger": (Logger,),
        "trainer.strategy": (Strategy,),
    }
    known = {
        place: {
            cls.__name__: cls
            for cls in chain.from_iterable(map(subclasses, alternatives))
            if not cls.__name__.startswith("_") and cls.__module__.split(".")[0] not in ACCIDENTAL
        }
        for place, alternatives in bases.items()
    }
    return known | {f"data.{split}": {"Source": Source} for split in ("train", "validation", "test", "predict")}
