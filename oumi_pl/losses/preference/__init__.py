"""Preference losses on pairs of responses, the better one first.

`pairwise` losses depend on the difference of the two responses' scores, `unpaired` ones on the score of each response,
`transport` ones on the sorted scores of a micro-batch. `reference_free` losses need no reference, `combined` ones wrap
other losses, and `divergences` map log-ratios to scores. An argument outside of its range raises a `UserError` when the
loss is created.
"""

from oumi_pl.losses.preference.combined import LDDPO, WeightedSum
from oumi_pl.losses.preference.divergences import Alpha, Divergence, ForwardKL, JensenShannon, ReverseKL
from oumi_pl.losses.preference.pairwise import (
    EXO,
    IPO,
    DiscoPOP,
    Hinge,
    LengthNormalizedSigmoid,
    PairwiseLoss,
    Robust,
    Sigmoid,
)
from oumi_pl.losses.preference.reference_free import CPO, ORPO, SFTTerm, SimPO
from oumi_pl.losses.preference.transport import AOT, AOTUnpaired
from oumi_pl.losses.preference.unpaired import BCO, NCA, SPPO, APODown, APOZero

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "EXO",
    "IPO",
    "LDDPO",
    "NCA",
    "ORPO",
    "SPPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "Alpha",
    "DiscoPOP",
    "Divergence",
    "ForwardKL",
    "Hinge",
    "JensenShannon",
    "LengthNormalizedSigmoid",
    "PairwiseLoss",
    "ReverseKL",
    "Robust",
    "SFTTerm",
    "Sigmoid",
    "SimPO",
    "WeightedSum",
]
