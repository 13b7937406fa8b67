"""Preference losses against TRL's own, on the same log-probabilities per token: values, gradients and rewards."""

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from oumi_pl.losses.preference import (
    AOT,
    BCO,
    CPO,
    EXO,
    IPO,
    LDDPO,
    NCA,
    ORPO,
    SPPO,
    Alpha,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    ForwardKL,
    Hinge,
    JensenShannon,
    LengthNormalizedSigmoid,
    ReverseKL,
    Robust,
    SFTTerm,
    Sigmoid,
    SimPO,
    WeightedSum,
)
from oumi_pl.types import Pairs

PAIRWISE = {
    "sigmoid": Sigmoid,
    "sigmoid_norm": LengthNormalizedSigmoid,
    "hinge": Hinge,
    "ipo": IPO,
    "exo_pair": EXO,
    "robust": Robust,
    "discopop": DiscoPOP,
}
SMOOTHED = {"exo_pair": EXO, "robust": Robust, "aot": AOT, "aot_unpaired": AOTUnpaired}
LOSSES = PAIRWISE | {
    "nca_pair": NCA,
    "bco_pair": BCO,
    "sppo_hard": SPPO,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "apo_zero": APOZero,
    "apo_down": APODown,
}
DIVERGENCES = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "js_divergence": JensenShannon(),
    "alpha_divergence": Alpha(0.4),
}
PROMPTS, CHOSEN, REJECTED = [3, 1, 2, 5], [4, 2, 7, 1], [2, 6, 7, 3]


@pytest.fixture(scope="module")
def trl():
    """TRL's trainers of preferences, which take seconds to import."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl import DPOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    return SimpleNamespace(dpo=DPOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


class Model(torch.nn.Module):
    """Answers with given log-probabilities of the tokens, in place of a language model."""

    is_gradient_checkpointing = False

    def __init__(self, logps):
        super().__init__()
        self.logps = logps

    def forward(self, **_):
        zeros = torch.zeros_like(self.logps)
        return SimpleNamespace(log_probs=self.logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def make(chosen=CHOSEN, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    lengths = [n for pair in zip(chosen, REJECTED, strict=True) for n in pair]
    branches = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    logps = -3 * torch.rand(len(branches), generator=generator, dtype=dtype) - 0.05
    ref_logps = logps + 0.7 * torch.randn(len(branches), generator=generator, dtype=dtype)
    return Pairs(logps.requires_grad_(), ref_logps, branches, len(chosen), torch.full((len(chosen),), torch.nan))


def padded(pairs, values):
    """Lays `values` `[targets]` out as TRL does: all chosen rows, then all rejected ones; and the mask of targets."""
    rows = torch.cat([torch.arange(0, 2 * pairs.count, 2), torch.arange(1, 2 * pairs.count, 2)])
    width = max(PROMPTS[row // 2] + int((pairs.branches == row).sum()) for row in rows)
    table, mask = values.new_zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        mine = values[pairs.branches == row]
        columns = slice(PROMPTS[row // 2], PROMPTS[row // 2] + len(mine))
        table[index, columns] = mine
        mask[index, columns] = 1
    return table[:, 1:], mask


def trl_loss(trl, pairs, loss_type, **settings):
    """What TRL's trainer makes of the same log-probabilities, and its metrics."""
    logps, mask = padded(pairs, pairs.logps)
    model = Model(logps)
    loss_types = loss_type if isinstance(loss_type, list) else [loss_type]
    defaults = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_types": loss_types,
        "loss_weights": [1.0] * len(loss_types),
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.4,
        "ld_alpha": None,
    }
    itself = lambda tensor: tensor  # noqa: E731
    trainer = SimpleNamespace(
        **(defaults | settings),
        model=model,
        ref_model=Model(padded(pairs, pairs.ref_logps)[0]),
        precompute_ref_logps=False,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        accelerator=SimpleNamespace(device="cpu", gather=itself, gather_for_metrics=itself),
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trl.dpo._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss, trainer._metrics["train"]


def assert_equal(pairs, ours, theirs):
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-8)
    ours, theirs = (torch.autograd.grad(value, pairs.logps, retain_graph=True)[0] for value in (ours, theirs))
    assert theirs.norm() > 1e-5
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def settings_of(loss_type, beta):
    return {"beta": beta} | ({"label_smoothing": 0.01} if loss_type in ("exo_pair", "robust") else {})


@pytest.mark.parametrize("beta", [0.1, 0.3])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses(trl, loss_type, beta):
    pairs, settings = make(), settings_of(loss_type, beta)
    theirs, metrics = trl_loss(trl, pairs, loss_type, **settings)
    loss = LOSSES[loss_type](**settings)
    assert_equal(pairs, loss(pairs).mean(), theirs)
    if loss_type not in ("ipo", "sigmoid_norm"):  # whose rewards are per token here
        rewards = [reward.mean().item() for reward in loss.rewards(pairs)]
        assert rewards == pytest.approx(metrics["rewards/chosen"] + metrics["rewards/rejected"])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", PAIRWISE)
def test_divergences(trl, loss_type, divergence):
    # TRL's alpha divergence knows no float64
    pairs = make(dtype=torch.float32 if divergence == "alpha_divergence" else torch.float64)
    settings = settings_of(loss_type, 0.3)
    theirs, _ = trl_loss(trl, pairs, loss_type, f_divergence_type=divergence, **settings)
    assert_equal(pairs, PAIRWISE[loss_type](**settings, divergence=DIVERGENCES[divergence])(pairs).mean(), theirs)


@pytest.mark.parametrize("loss_type", SMOOTHED)
def test_smoothing(trl, loss_type):
    pairs = make()
    theirs, _ = trl_loss(trl, pairs, loss_type, label_smoothing=0.2)
    assert_equal(pairs, SMOOTHED[loss_type](beta=0.1, label_smoothing=0.2)(pairs).mean(), theirs)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_length_desensitising(trl, loss_type, alpha):
    pairs, settings = make(), settings_of(loss_type, 0.1)
    theirs, _ = trl_loss(trl, pairs, loss_type, ld_alpha=alpha, **settings)
    assert_equal(pairs, LDDPO(LOSSES[loss_type](**settings), alpha)(pairs).mean(), theirs)


def test_sft_on_chosen_responses_of_one_length(trl):
    pairs = make(chosen=[4] * 4)
    assert_equal(pairs, SFTTerm()(pairs).mean(), trl_loss(trl, pairs, "sft")[0])


def test_sft_on_chosen_responses_of_any_length_weighs_pairs_and_not_tokens(trl):
    pairs = make()
    lengths = torch.tensor(CHOSEN, dtype=torch.float64)
    assert_equal(pairs, (SFTTerm()(pairs) * lengths).sum() / lengths.sum(), trl_loss(trl, pairs, "sft")[0])
    assert SFTTerm()(pairs).mean().item() != pytest.approx(trl_loss(trl, pairs, "sft")[0].item(), rel=1e-3)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_weighted_sums(trl, alpha):
    pairs, weights = make(chosen=[4] * 4), [0.8, 0.2, 1.0]
    theirs, metrics = trl_loss(trl, pairs, ["sigmoid", "bco_pair", "sft"], loss_weights=weights, ld_alpha=alpha)
    terms = [Sigmoid(0.1), BCO(0.1)]
    loss = WeightedSum([*([LDDPO(term, alpha) for term in terms] if alpha else terms), SFTTerm()], weights)
    assert_equal(pairs, loss(pairs).mean(), theirs)
    rewards = [reward.mean().item() for reward in loss.rewards(pairs)]
    assert rewards == pytest.approx(metrics["rewards/chosen"] + metrics["rewards/rejected"])


def assert_rewards(loss, pairs, theirs):
    for ours, expected in zip(loss.rewards(pairs), theirs, strict=True):
        assert torch.allclose(ours, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("loss_type", ["simpo", "sigmoid"])
def test_simpo_and_cpo(trl, loss_type, beta, smoothing):
    pairs = make()
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=beta,
        loss_type=loss_type,
        simpo_gamma=0.5,
        label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    loss, logps = CPO(beta, smoothing, sft_weight=0.0), [pairs.chosen_logps, pairs.rejected_logps]
    if loss_type == "simpo":
        loss = SimPO(beta, 0.5, smoothing)
        lengths = [torch.tensor(lengths) for lengths in (CHOSEN, REJECTED)]
        logps = [sums / count for sums, count in zip(logps, lengths, strict=True)]
    theirs, *rewards = trl.cpo.cpo_loss(trainer, *logps)
    assert torch.allclose(loss(pairs), theirs)
    assert_equal(pairs, loss(pairs).mean(), theirs.mean())
    assert_rewards(loss, pairs, rewards)


@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_orpo(trl, beta):
    """TRL computes odds in float32, and counts the prompt into its likelihood term, which is left out here."""
    pairs = make(dtype=torch.float32)
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = pairs.chosen_logps / torch.tensor(CHOSEN), pairs.rejected_logps / torch.tensor(REJECTED)
    theirs, *rewards = trl.orpo.odds_ratio_loss(trainer, chosen, rejected)
    loss = ORPO(beta, sft_weight=0.0)
    assert_equal(pairs, loss(pairs).mean(), -theirs.mean())
    assert_rewards(loss, pairs, rewards[:2])
    assert torch.allclose((ORPO(beta)(pairs) - loss(pairs)), SFTTerm()(pairs))
