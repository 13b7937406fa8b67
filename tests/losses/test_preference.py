"""Preference losses against numbers worked out by hand, and properties that all of them share."""

import inspect
import itertools
import math
from math import e, exp, log, sqrt

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oumi_pl.errors import UserError
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
from oumi_pl.types import Pairs, PreferenceLoss


class Offset(PreferenceLoss):  # ODPO, Amini et al. 2024, arXiv:2402.10571
    def __init__(self, beta: float = 0.1, alpha: float = 1.0):
        self.beta, self.alpha = beta, alpha

    def __call__(self, pairs):
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen - rejected - self.alpha * pairs.margins.log())


def mpo():
    return WeightedSum([Sigmoid(1.0), BCO(1.0), SFTTerm()], [0.8, 0.2, 1.0])


LN2, LN3 = log(2), log(3)
# of `one_pair()`: log-ratios ln 3 and -ln 2, i.e. the policy's probability is 3 times and half of the reference's
CASES = {
    "sigmoid": (Sigmoid(1.0), log(7 / 6)),  # sigmoid(ln 6) = 6/7
    "conservative": (Sigmoid(1.0, label_smoothing=0.25), 0.75 * log(7 / 6) + 0.25 * log(7)),
    "reverse KL": (Sigmoid(1.0, divergence=ReverseKL()), log(7 / 6)),
    "forward KL": (Sigmoid(1.0, divergence=ForwardKL()), log(1 + exp(-5 / 3))),  # scores 1 - 1/3 and 1 - 2
    "Jensen-Shannon": (Sigmoid(1.0, divergence=JensenShannon()), log(13 / 9)),  # scores ln 3/2 and ln 2/3
    "alpha": (Sigmoid(1.0, divergence=Alpha(0.5)), log(1 + exp(2 / sqrt(3) - 2 * sqrt(2)))),
    "alpha above 1": (Sigmoid(1.0, divergence=Alpha(2.0)), log(1 + exp(-2.5))),  # scores 3 - 1 and 1/2 - 1
    "length-normalised": (LengthNormalizedSigmoid(6.0), log(109 / 108)),  # 6 (ln 3 / 2 + ln 2 / 3) = ln(27 4)
    "hinge": (Hinge(0.5), 1 - log(6) / 2),
    "hinge, satisfied": (Hinge(1.0), 0.0),  # ln 6 > 1
    "ipo": (IPO(1.0), (LN3 / 2 + LN2 / 3 - 0.5) ** 2),
    "exo": (EXO(1.0, label_smoothing=0.25), 6 / 7 * log(8 / 7) + 1 / 7 * log(4 / 7)),
    "robust": (Robust(1.0, label_smoothing=0.25), (0.75 * log(7 / 6) - 0.25 * log(7)) / 0.5),
    "discopop": (DiscoPOP(1.0, tau=0.5), log(7 / 6) / 37 + 36 / 37 / 6),  # m = sigmoid(ln 36)
    "nca": (NCA(1.0), log(4 / 3) + 0.5 * log(4) + 0.5 * log(3 / 2)),
    "bco": (BCO(1.0), log(4 / 3) + log(3 / 2)),
    "sppo": (SPPO(1.0), (LN3 - 0.5) ** 2 + (0.5 - LN2) ** 2),
    "apo zero": (APOZero(1.0), 1 / 4 + 1 / 3),
    "apo down": (APODown(1.0), 3 / 4 + 1 / 7),
    "aot": (AOT(1.0, label_smoothing=0.25), 0.75 * log(7 / 6) + 0.25 * log(7)),
    "aot unpaired": (AOTUnpaired(1.0), log(7 / 6)),
    "sft": (SFTTerm(), 2 * LN2),
    "simpo": (SimPO(2.0, gamma=LN2), log(9)),  # 2 (ln 1/4 - ln 1/2) - ln 2 = -ln 8
    "cpo": (CPO(1.0, sft_weight=0.5), log(3) + LN2),  # ln 1/16 - ln 1/8 = -ln 2
    "orpo": (ORPO(0.5), 2 * LN2 + 0.5 * log(4)),  # odds 1/3 and 1
    "sum": (mpo(), 0.8 * log(7 / 6) + 0.2 * LN2 + 2 * LN2),
    "ld": (LDDPO(Sigmoid(1.0), alpha=0.5), log(1 + 1 / (3 * sqrt(2)))),  # half of the third token's -ln 2
    "ld of a sum": (LDDPO(mpo(), alpha=1.0), 0.8 * log(7 / 6) + 0.2 * LN2 + 2 * LN2),
    "own": (Offset(1.0), log(1 + e / 6)),  # of a margin of e
}
SORTING = {"aot", "aot unpaired"}
losses = pytest.mark.parametrize("name", CASES)


def pairs_of(responses, margins=None, dtype=torch.float64):
    """Pairs of `responses`: chosen, rejected, chosen, ..., each a list of tokens' (policy, reference) log-probs."""
    tokens = torch.tensor([token for response in responses for token in response], dtype=dtype)
    branches = torch.tensor([branch for branch, response in enumerate(responses) for _ in response])
    count = len(responses) // 2
    margins = torch.tensor(margins or [math.nan] * count, dtype=dtype)
    return Pairs(tokens[:, 0].clone().requires_grad_(), tokens[:, 1], branches, count, margins)


def one_pair():
    chosen = [(-LN2, -LN2 - LN3), (-3 * LN2, -3 * LN2)]  # probabilities 1/2 and 1/8
    rejected = [(-LN2, -LN2), (-LN2, -LN2), (-LN2, 0.0)]
    return pairs_of([chosen, rejected], margins=[e])


def random_pairs(lengths, seed=0, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    logps = [-torch.rand(n, generator=generator) * 3 - 0.1 for n in lengths]
    responses = [
        list(zip(p.tolist(), (p + torch.randn(len(p), generator=generator) * spread).tolist(), strict=True))
        for p in logps
    ]
    return pairs_of(responses, margins=[1.0] * (len(lengths) // 2))


@losses
def test_values_by_hand(name):
    loss, expected = CASES[name]
    result = loss(one_pair())
    assert result.shape == (1,)
    assert result.item() == pytest.approx(expected, rel=1e-12)


@losses
def test_the_loss_of_equal_policy_and_reference_is_loss_at_start(name):
    loss = CASES[name][0]
    pairs = random_pairs([3, 5, 1, 4], spread=0.0)
    if loss.loss_at_start is None:
        assert (loss(pairs)[0] - loss(pairs)[1]).abs() > 1e-3 or name == "own"
    else:
        assert loss(pairs).tolist() == pytest.approx([loss.loss_at_start] * 2)


def test_which_losses_have_a_loss_at_start():
    unknown = {name for name, (loss, _) in CASES.items() if loss.loss_at_start is None}
    assert unknown == {"sft", "simpo", "cpo", "orpo", "sum", "ld of a sum", "own"}
    assert WeightedSum([Sigmoid(), Hinge()], [2, 0.5]).loss_at_start == pytest.approx(2 * LN2 + 0.5)
    assert LDDPO(IPO(0.2), 0.5).loss_at_start == IPO(0.2).loss_at_start == pytest.approx(6.25)


@losses
def test_descending_from_the_reference_raises_chosen_over_rejected(name):
    loss, pairs = CASES[name][0], random_pairs([3, 5, 1, 4, 2, 2], spread=1e-3)
    (gradient,) = torch.autograd.grad(loss(pairs).sum(), pairs.logps)
    chosen, rejected = pairs.sums(-gradient)
    assert (chosen > rejected).all()
    if name != "apo down":  # which lowers both
        assert (chosen >= 0).all()
    assert (rejected <= 0).all()


@pytest.mark.parametrize(
    ("loss", "moves"),
    [(APOZero(1.0), (0.25, -0.25)), (APODown(1.0), (0.0, -0.25)), (NCA(1.0), (0.25, -0.25)), (BCO(1.0), (0.5, -0.5))],
)
def test_how_far_each_response_moves(loss, moves):
    pairs = random_pairs([1, 1], spread=0.0)
    (gradient,) = torch.autograd.grad(loss(pairs).sum(), pairs.logps)
    assert (-gradient).tolist() == pytest.approx(moves)


@losses
def test_micro_batches_make_no_difference_unless_a_loss_sorts(name):
    lengths = [3, 5, 1, 4, 2, 2, 4, 1] * 2
    loss, whole = CASES[name][0], random_pairs(lengths, spread=1.0)
    border = len(whole.logps) // 2
    halves = [
        Pairs(whole.logps[:border], whole.ref_logps[:border], whole.branches[:border], 4, whole.margins[:4]),
        Pairs(whole.logps[border:], whole.ref_logps[border:], whole.branches[border:] - 8, 4, whole.margins[4:]),
    ]
    together, apart = loss(whole).sum(), sum(loss(half).sum() for half in halves)
    gradients = [torch.autograd.grad(total, whole.logps)[0] for total in (together, apart)]
    same = torch.allclose(together, apart, rtol=1e-12) and torch.allclose(*gradients, rtol=1e-12)
    assert same == (name not in SORTING)


def test_optimal_transport_compares_quantiles():
    """Log-ratios 1 and 3 of the chosen, 2 and 0 of the rejected responses: sorted, each is ahead by one."""
    pairs = pairs_of([[(-1.0, -2.0)], [(-1.0, -3.0)], [(-1.0, -4.0)], [(-2.0, -2.0)]])
    assert AOTUnpaired(1.0)(pairs).tolist() == pytest.approx([log(1 + 1 / e)] * 2)
    # the policy's gaps 0 and 1, the reference's 1 and -2: sorted, ahead by two and by none
    assert AOT(1.0)(pairs).tolist() == pytest.approx([log(1 + exp(-2)), LN2])
    assert Sigmoid(1.0)(pairs).tolist() == pytest.approx([log(1 + e), log(1 + exp(-3))])


PAIRWISE = [Sigmoid, LengthNormalizedSigmoid, Hinge, IPO, EXO, Robust, DiscoPOP]
DIVERGENCES = [ForwardKL(), JensenShannon(), Alpha(0.5), Alpha(3.0)]
DIVERGING = {f"{of.__name__} {by}": of(1.0, divergence=d) for of in PAIRWISE for by, d in enumerate(DIVERGENCES)}


@pytest.mark.parametrize(
    "loss", [loss for loss, _ in CASES.values()] + list(DIVERGING.values()), ids=[*CASES, *DIVERGING]
)
def test_extreme_log_ratios_stay_finite_in_float32(loss):
    for chosen, rejected, tokens in itertools.product((-1e3, 0.0, 1e3), (-1e3, 0.0, 1e3), (1, 2)):
        responses = [
            [(min(0.0, ratio), min(0.0, -ratio))] + [(0.0, 0.0)] * (tokens - 1) for ratio in (chosen, rejected)
        ]
        pairs = pairs_of(responses, margins=[1.0], dtype=torch.float32)
        result = loss(pairs)
        (gradient,) = torch.autograd.grad(result.sum(), pairs.logps)
        assert result.dtype == torch.float32
        assert result.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JensenShannon(), Alpha(0.5), Alpha(0.0), Alpha(2.0)])
def test_scores_rise_with_the_log_ratio_and_are_zero_at_zero(divergence):
    logratios = torch.linspace(-60, 60, 1201, dtype=torch.float64).requires_grad_()
    scores = divergence(logratios)
    (slopes,) = torch.autograd.grad(scores.sum(), logratios)
    assert divergence(torch.zeros(1)).item() == 0
    assert (slopes > 0).all()
    # the slopes are those of the scores, across the border of the tangent too
    assert torch.allclose(scores.diff(), (slopes[1:] + slopes[:-1]) / 2 * 0.1, rtol=1e-2, atol=1e-12)


def test_alpha_runs_from_the_forward_to_the_reverse_kl():
    logratios = torch.linspace(-3, 3, 13, dtype=torch.float64)
    assert torch.allclose(Alpha(0.0)(logratios), ForwardKL()(logratios))
    assert torch.equal(Alpha(1.0)(logratios), logratios)
    assert torch.allclose(Alpha(1.0 + 1e-5)(logratios), logratios, rtol=1e-4)


def test_rewards_are_what_the_loss_compares():
    pairs = one_pair()

    def rewards(loss):
        return [reward.item() for reward in loss.rewards(pairs)]

    assert rewards(Sigmoid(0.5)) == pytest.approx([LN3 / 2, -LN2 / 2])
    assert rewards(Sigmoid(0.5, divergence=ForwardKL())) == pytest.approx([1 / 3, -1 / 2])
    assert rewards(IPO(0.5)) == rewards(LengthNormalizedSigmoid(0.5)) == pytest.approx([LN3 / 4, -LN2 / 6])
    assert rewards(NCA(0.5)) == rewards(AOT(0.5)) == pytest.approx([LN3 / 2, -LN2 / 2])
    assert rewards(SimPO(0.5)) == rewards(ORPO(0.5)) == pytest.approx([-LN2, -LN2 / 2])
    assert rewards(CPO(0.5)) == pytest.approx([-2 * LN2, -1.5 * LN2])
    assert rewards(SFTTerm()) == rewards(WeightedSum([SFTTerm()], [1.0])) == [0, 0]
    assert rewards(LDDPO(Sigmoid(0.5), 0.0)) == pytest.approx([LN3 / 2, 0])
    assert rewards(WeightedSum([SFTTerm(), SimPO(0.5), Sigmoid(3.0)], [1, 1, 1])) == rewards(SimPO(0.5))


def test_a_sum_of_losses_has_the_properties_of_its_parts():
    free, bound = WeightedSum([SFTTerm(), SimPO(3.0)], [1, 0]), WeightedSum([SFTTerm(), IPO(0.3)], [1, 1])
    assert (free.needs_reference, free.beta) == (False, 3.0)
    assert (bound.needs_reference, bound.beta) == (True, 0.3)
    assert LDDPO(free, 0.5).needs_reference is False and LDDPO(bound, 0.5).beta == 0.3


def test_a_part_that_keeps_state_is_saved_with_the_whole():
    class Shifted(PreferenceLoss, nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.tensor(1.0))

        def __call__(self, pairs):
            return self.shift - pairs.chosen_logratios

    whole = LDDPO(WeightedSum([Sigmoid(), Shifted()], [1, 1]), 0.5)
    assert list(whole.state_dict()) == ["loss.1.shift"]
    assert whole(one_pair()).shape == (1,)


def test_length_desensitising_weighs_what_lies_beyond_the_shorter_response():
    pairs = random_pairs([4, 2, 1, 3, 2, 2], spread=1.0)
    kept = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
    weights = kept + 0.25 * (1 - kept)
    chosen, rejected = pairs.sums((pairs.logps - pairs.ref_logps) * weights)
    assert torch.allclose(LDDPO(Sigmoid(1.0), 0.25)(pairs), torch.log1p(torch.exp(rejected - chosen)))
    # the policy's log-probabilities are weighed in losses without reference, and numbers of tokens are not
    (gradient,) = torch.autograd.grad(LDDPO(SFTTerm(), 0.25)(pairs).sum(), pairs.logps)
    assert gradient[:4].tolist() == [-0.25, -0.25, -0.0625, -0.0625]


def test_one_wrong_label_in_four_is_undone_by_robust_dpo():
    """Its expectation under flipped labels is DPO's loss on the right ones."""
    pairs = random_pairs([3, 2, 1, 4], spread=1.0)
    flipped = Pairs(pairs.logps, pairs.ref_logps, pairs.branches ^ 1, pairs.count, pairs.margins)
    loss = Robust(1.0, label_smoothing=0.25)
    assert torch.allclose(0.75 * loss(pairs) + 0.25 * loss(flipped), Sigmoid(1.0)(pairs))


@pytest.mark.parametrize("loss", [Sigmoid(1.0, label_smoothing=0.25), EXO(1.0, label_smoothing=0.25)])
def test_smoothed_losses_are_minimal_where_the_policy_matches_the_label_noise(loss):
    pairs = pairs_of([[(-1.0, -1.0 - LN3)], [(-1.0, -1.0)]])  # sigmoid(ln 3) = 3/4
    (gradient,) = torch.autograd.grad(loss(pairs).sum(), pairs.logps)
    assert gradient.abs().max() < 1e-12


def test_a_certain_response_has_finite_odds():
    for responses in ([[(0.0, 0.0)], [(-1.0, 0.0)]], [[(-1.0, 0.0)], [(0.0, 0.0)]]):
        pairs = pairs_of(responses, dtype=torch.float32)
        result = ORPO()(pairs)
        assert result.isfinite().all() and torch.autograd.grad(result.sum(), pairs.logps)[0].isfinite().all()


def test_a_user_defined_loss_in_ten_lines():
    assert len(inspect.getsource(Offset).splitlines()) <= 10


def test_constructors_are_the_schema_of_recipes():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--loss", type=PreferenceLoss)
    package = "oumi_pl.losses.preference"
    sigmoid = {
        "class_path": f"{package}.Sigmoid",
        "init_args": {"beta": 0.3, "divergence": {"class_path": f"{package}.Alpha", "init_args": {"alpha": 0.2}}},
    }
    both = {"losses": [sigmoid, {"class_path": f"{package}.SFTTerm"}], "weights": [1, 0.5]}
    config = parser.parse_object({"loss": {"class_path": f"{package}.WeightedSum", "init_args": both}})
    loss = parser.instantiate_classes(config).loss
    assert (loss.beta, loss.losses[0].divergence.alpha, loss.weights) == (0.3, 0.2, [1, 0.5])


WITH_BETA = [type(loss) for loss, _ in CASES.values() if hasattr(loss, "beta") and not isinstance(loss, nn.Module)]


@pytest.mark.parametrize("loss", sorted(set(WITH_BETA) - {Offset, SFTTerm}, key=lambda loss: loss.__name__))
@pytest.mark.parametrize("beta", [-0.1, 0, math.nan, math.inf])
def test_beta_is_positive(loss, beta):
    expected = "finite" if beta == math.inf else "above 0"
    with pytest.raises(UserError, match=f"^model.loss: beta is {beta}, but has to be {expected}$"):
        loss(beta=beta)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sigmoid(label_smoothing=0.5), "label_smoothing is 0.5, but has to be from 0 to below 0.5"),
        (lambda: LengthNormalizedSigmoid(label_smoothing=-0.1), "label_smoothing is -0.1"),
        (lambda: Robust(label_smoothing=0.5), "label_smoothing is 0.5"),
        (lambda: EXO(label_smoothing=0.0), "label_smoothing is 0.0, but has to be above 0 and below 0.5"),
        (lambda: AOT(label_smoothing=math.nan), "label_smoothing is nan"),
        (lambda: AOTUnpaired(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: SimPO(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: CPO(label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: SimPO(gamma=-1.0), "gamma is -1.0, but has to be 0 or more"),
        (lambda: CPO(sft_weight=-1.0), "sft_weight is -1.0"),
        (lambda: ORPO(sft_weight=math.inf), "sft_weight is inf, but has to be finite"),
        (lambda: DiscoPOP(tau=0.0), "tau is 0.0, but has to be above 0 and at most 1"),
        (lambda: DiscoPOP(tau=2.0), "tau is 2.0"),
        (lambda: Alpha(math.nan), "alpha is nan, but has to be finite"),
        (lambda: LDDPO(Sigmoid(), 1.5), "alpha is 1.5, but has to be from 0 to 1"),
        (lambda: WeightedSum([Sigmoid(), IPO()], [1.0, -2.0]), r"weights\[1\] is -2.0, but has to be 0 or more"),
        (lambda: WeightedSum([Sigmoid()], [1.0, 2.0]), "losses has 1 entries and weights 2"),
        (lambda: WeightedSum([], []), "losses has 0 entries"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(UserError, match=f"^model.loss: {message}"):
        make()
