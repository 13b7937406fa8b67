"""Each objective against its paper's formula in a plain loop, and against enumeration of all completions."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from oumi_pl.errors import UserError
from oumi_pl.losses.policy import (
    BNPOLoss,
    CISPOLoss,
    Completions,
    DAPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    ReinforceLoss,
    kl_estimates,
    truncated_importance,
)

VOCAB, LENGTH, MOST = 3, 3, 5
EPSILON, HIGH = 0.2, 0.3


def grpo(rho, adv, old, logps):
    return sum(ppo(r, adv) for r in rho) / len(rho)


def bnpo(rho, adv, old, logps):
    return sum(ppo(r, adv) for r in rho)


def dr_grpo(rho, adv, old, logps):
    return sum(ppo(r, adv) for r in rho) / MOST


def ppo(ratio, adv):
    clipped = min(max(float(ratio), 1 - EPSILON), 1 + HIGH)
    return -(ratio * adv if float(ratio * adv) <= clipped * adv else torch.tensor(clipped * adv, dtype=torch.float64))


def gspo(rho, adv, old, logps):
    return ppo(torch.exp(sum(a - b for a, b in zip(logps, old, strict=True)) / len(rho)), adv)


def cispo(rho, adv, old, logps):
    return sum(-min(float(r), 1 + HIGH) * adv * lp for r, lp in zip(rho, logps, strict=True))


def reinforce(rho, adv, old, logps):
    return -adv * sum(logps)


FORMULAS = {
    "grpo": (GRPOLoss(EPSILON, HIGH), grpo),
    "bnpo": (BNPOLoss(EPSILON, HIGH), bnpo),
    "dapo": (DAPOLoss(EPSILON, HIGH), bnpo),
    "dr_grpo": (DrGRPOLoss(EPSILON, HIGH), dr_grpo),
    "gspo": (GSPOLoss(EPSILON, HIGH), gspo),
    "cispo": (CISPOLoss(HIGH), cispo),
    "reinforce": (ReinforceLoss(), reinforce),
}
PER_TOKEN = {"bnpo", "dapo", "cispo"}


@pytest.fixture
def completions():
    """Five completions of one to five tokens, off-policy by enough that some tokens are clipped on either side."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([1, 4, 2, 5, 3])
    owners = torch.arange(5).repeat_interleave(lengths)
    old = -torch.rand(len(owners), generator=generator, dtype=torch.float64) * 2
    logps = (old + 0.8 * torch.randn(len(owners), generator=generator, dtype=torch.float64)).requires_grad_()
    return Completions(logps, old, owners, torch.tensor([1.2, -0.7, 0.4, -1.1, 0.9], dtype=torch.float64), MOST)


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_formula_in_a_loop(completions, name):
    loss, formula = FORMULAS[name]
    expected = []
    for i in range(5):
        at = completions.owners == i
        logps, old = completions.logps[at], completions.old_logps[at]
        expected.append(formula(list((logps - old).exp()), float(completions.advantages[i]), list(old), list(logps)))
    got = loss(completions)
    torch.testing.assert_close(got, torch.stack(expected).to(got), rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x.sum(), completions.logps)[0] for x in (got, torch.stack(expected))]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert loss.unit == ("targets" if name in PER_TOKEN else "rows")


@pytest.mark.parametrize("name", FORMULAS)
def test_on_policy_each_has_the_gradient_of_reinforce_up_to_its_weights(name):
    """Over all 27 completions, weighted by their probability: the exact gradient of the expected advantage."""
    loss, _ = FORMULAS[name]
    torch.manual_seed(1)
    # a table of logits for each prefix, so that tokens depend on those before them
    table = torch.randn(1 + VOCAB + VOCAB**2, VOCAB, dtype=torch.float64, requires_grad=True)
    every = list(itertools.product(range(VOCAB), repeat=LENGTH))
    advantages = torch.randn(len(every), dtype=torch.float64)
    logps = torch.stack([torch.stack(tokens_logps(table, ids)) for ids in every])
    probabilities = logps.sum(1).exp()
    assert float(probabilities.sum().detach()) == pytest.approx(1)
    (expected,) = torch.autograd.grad((probabilities * advantages).sum(), table, retain_graph=True)
    flat = logps.flatten()
    owners = torch.arange(len(every)).repeat_interleave(LENGTH)
    losses = loss(Completions(flat, flat.detach(), owners, advantages, MOST))
    (got,) = torch.autograd.grad((probabilities.detach() * losses).sum(), table)
    weight = {"grpo": 1 / LENGTH, "gspo": 1 / LENGTH, "dr_grpo": 1 / MOST}.get(name, 1.0)
    torch.testing.assert_close(got, -weight * expected, rtol=1e-10, atol=1e-12)


def tokens_logps(table, ids):
    logps, row = [], 0
    for depth, token in enumerate(ids):
        logps.append(table[row].log_softmax(-1)[token])
        row = [1, 1 + VOCAB, 0][depth] + (token if depth == 0 else (row - 1) * VOCAB + token)
    return logps


def test_a_wrong_denominator_would_be_caught(completions, monkeypatch):
    monkeypatch.setattr(GRPOLoss, "weights", BNPOLoss.weights)
    with pytest.raises(AssertionError):
        test_equals_the_formula_in_a_loop(completions, "grpo")


def test_what_is_clipped_has_no_gradient(completions):
    loss = GRPOLoss(EPSILON, HIGH)
    (gradient,) = torch.autograd.grad(loss(completions).sum(), completions.logps)
    low, high = loss.clipped(completions)
    assert low.any()
    assert high.any()
    assert not (low & high).any()
    assert torch.equal(gradient == 0, low | high)
    assert not ReinforceLoss().clipped(completions)[0].any()
    assert torch.equal(CISPOLoss(HIGH).clipped(completions)[1], completions.log_ratios.exp() > 1 + HIGH)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_sum_does_not_depend_on_micro_batches(completions, name):
    loss, _ = FORMULAS[name]
    whole, parts = loss(completions), []
    for first, last in ((0, 2), (2, 3), (3, 5)):
        at = (completions.owners >= first) & (completions.owners < last)
        part = Completions(
            completions.logps[at],
            completions.old_logps[at],
            completions.owners[at] - first,
            completions.advantages[first:last],
            MOST,
        )
        parts.append(loss(part))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


# ---- completions that another distribution sampled

TOKEN_LOSSES = {
    "grpo": lambda rho, sequence, adv, logp, n: ppo(rho, adv) / n,
    "bnpo": lambda rho, sequence, adv, logp, n: ppo(rho, adv),
    "dapo": lambda rho, sequence, adv, logp, n: ppo(rho, adv),
    "dr_grpo": lambda rho, sequence, adv, logp, n: ppo(rho, adv) / MOST,
    "gspo": lambda rho, sequence, adv, logp, n: ppo(sequence, adv) / n,
    "cispo": lambda rho, sequence, adv, logp, n: -min(float(rho), 1 + HIGH) * adv * logp,
    "reinforce": lambda rho, sequence, adv, logp, n: -adv * logp,
}
"""The loss of a token, whose sum over a completion is the completion's loss."""


@pytest.mark.parametrize("name", FORMULAS)
def test_importance_weighs_the_loss_of_each_token(completions, name):
    loss, token_loss = FORMULAS[name][0], TOKEN_LOSSES[name]
    generator = torch.Generator().manual_seed(5)
    sampled = completions.old_logps + torch.randn(len(completions.owners), generator=generator, dtype=torch.float64)
    most = 1.5
    weighted = replace(completions, importance=truncated_importance(completions.old_logps, sampled, most))
    assert 0 < int((weighted.importance == most).sum()) < len(sampled)
    expected = []
    for i in range(5):
        at = torch.nonzero(completions.owners == i).flatten().tolist()
        ratios = [(completions.logps[t] - completions.old_logps[t]).exp() for t in at]
        sequence = torch.exp(sum(completions.logps[t] - completions.old_logps[t] for t in at) / len(at))
        total = 0.0
        for t, rho in zip(at, ratios, strict=True):
            weight = min(math.exp(float(completions.old_logps[t] - sampled[t])), most)
            total += weight * token_loss(rho, sequence, float(completions.advantages[i]), completions.logps[t], len(at))
        expected.append(total)
    got, expected = loss(weighted), torch.stack(expected)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x.sum(), completions.logps)[0] for x in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(loss(completions), expected, rtol=1e-3)
    ones = replace(completions, importance=torch.ones_like(sampled))
    assert torch.equal(loss(ones), loss(completions))


def test_weighted_tokens_of_another_distribution_give_the_gradient_of_the_policy():
    """By enumeration of one token: exactly, if no weight is bounded; a bound leaves a bias."""
    torch.manual_seed(2)
    logits = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
    logps, sampled = logits.log_softmax(-1), torch.randn(VOCAB, dtype=torch.float64).log_softmax(-1)
    advantages = torch.randn(VOCAB, dtype=torch.float64)
    (expected,) = torch.autograd.grad((logps.exp() * advantages).sum(), logits, retain_graph=True)

    def gradient(most):
        weights = None if most is None else truncated_importance(logps, sampled, most)
        of_each = Completions(logps, logps.detach(), torch.arange(VOCAB), advantages, 1, weights)
        mean = (sampled.exp() * ReinforceLoss()(of_each)).sum()
        return torch.autograd.grad(mean, logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient(100.0), -expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(gradient(None), -expected, rtol=1e-2)
    assert not torch.allclose(gradient(0.5), -expected, rtol=1e-2)


# ---- the KL penalty


def test_kl_estimates_and_their_gradients_have_the_documented_expectations():
    """By enumeration of one token: k1 and k3 are unbiased values; k2 has the gradient of the reverse KL, k1 none."""
    torch.manual_seed(2)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    logps, ref = logits.log_softmax(-1), torch.randn(7, dtype=torch.float64).log_softmax(-1)
    p = logps.exp().detach()
    reverse, forward = (logps.exp() * (logps - ref)).sum(), (ref.exp() * (ref - logps)).sum()
    for estimator in ("k1", "k3"):
        assert float((p * kl_estimates(logps, ref, estimator)).sum()) == pytest.approx(float(reverse), rel=1e-12)
    assert not math.isclose(float((p * kl_estimates(logps, ref, "k2")).sum()), float(reverse), rel_tol=1e-3)

    def gradient(of):
        return torch.autograd.grad(of, logits, retain_graph=True)[0]

    means = {k: gradient((p * kl_estimates(logps, ref, k)).sum()) for k in ("k1", "k2", "k3")}
    torch.testing.assert_close(means["k1"], torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(means["k2"], gradient(reverse))
    torch.testing.assert_close(means["k3"], gradient(forward))


@pytest.mark.parametrize("values", [(0.0, 0.2), (0.2, -0.1)])
def test_invalid_ranges_are_refused(values):
    with pytest.raises(UserError, match="but has to be above 0"):
        GRPOLoss(*values)
    with pytest.raises(UserError, match="but has to be above 0"):
        CISPOLoss(0.0)
