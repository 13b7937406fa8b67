"""Divergences from a teacher, in chunks, against torch's and TRL's own formulas on full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oumi_pl.errors import UserError
from oumi_pl.losses import distillation
from oumi_pl.losses.distillation import (
    JSD,
    Divergence,
    ForwardKL,
    ReverseKL,
    TeacherHead,
    distillation_sums,
    from_columns,
    top_k,
)

N, HIDDEN, WIDE, VOCAB = 23, 8, 12, 37
BETAS = {"forward": 0, "reverse": 1, "jsd": 0.3}


class Plain(Divergence):
    """Another divergence's formula without its derivative: autograd has to give the same gradient."""

    def __init__(self, of):
        self.of = of

    def __call__(self, student, teacher):
        return self.of(student, teacher)


class WrappedLinear(nn.Module):
    """A head that is not a plain linear layer, as with LoRA."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.out_features = linear, linear.out_features

    def forward(self, states):
        return self.linear(states)


def divergence(name):
    return {"forward": ForwardKL(), "reverse": ReverseKL(), "jsd": JSD(0.3)}[name]


@pytest.fixture
def models():
    torch.manual_seed(0)
    student, teacher = nn.Linear(HIDDEN, VOCAB), nn.Linear(WIDE, VOCAB, bias=False)
    for head in (student, teacher):
        head.weight.data.mul_(4)
    hidden, theirs = torch.randn(N, HIDDEN, requires_grad=True), torch.randn(N, WIDE)
    return student, hidden, teacher, theirs, torch.randint(VOCAB, (N,))


def reference(models, name, temperature=1.0, weight=0.0, transform=None, vocab=VOCAB):
    """With full logits, as TRL's GKD computes it."""
    gkd = pytest.importorskip("trl.experimental.gkd", reason="needs TRL")
    student, hidden, teacher, theirs, targets = models
    logits = student(hidden)
    logits = logits if transform is None else transform(logits)
    value = gkd.GKDTrainer.generalized_jsd_loss(
        logits[None, :, :vocab], teacher(theirs)[None, :, :vocab], beta=BETAS[name], temperature=temperature,
        reduction="sum",
    )  # fmt: skip
    nll = F.cross_entropy(logits, targets, reduction="sum")
    return (1 - weight) * value + weight * nll, value, nll


def ours(models, of, temperature=1.0, weight=0.0, transform=None, vocab=VOCAB, chunk_size=5, k=None, head=None):
    student, hidden, teacher, theirs, targets = models
    outcomes = TeacherHead(theirs, teacher, None, temperature, vocab)
    if k is not None:
        outcomes = from_columns(top_k(outcomes, N, k, 4), vocab)
    return distillation_sums(
        hidden, targets, head or student, outcomes, of, vocab=vocab, temperature=temperature, cross_entropy=weight,
        transform=transform, chunk_size=chunk_size,
    )  # fmt: skip


def gradients(models, loss):
    student, hidden, *_ = models
    return torch.autograd.grad(loss, (hidden, student.weight, student.bias))


def assert_same(models, sums, expected, tolerance=1e-6):
    loss, value, nll = expected
    torch.testing.assert_close(sums.divergence, value.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sums.nll, nll.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sums.loss, loss, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(gradients(models, sums.loss), gradients(models, loss), strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (2.5, 0.3)])
@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_equals_full_logits(models, name, temperature, weight, chunk_size):
    sums = ours(models, divergence(name), temperature, weight, chunk_size=chunk_size)
    assert_same(models, sums, reference(models, name, temperature, weight))


@pytest.mark.parametrize("name", BETAS)
def test_a_divergence_without_a_derivative_and_another_head_give_the_same(models, name):
    for of, head in ((Plain(divergence(name)), None), (divergence(name), WrappedLinear(models[0]))):
        assert_same(models, ours(models, of, 2.0, 0.2, head=head), reference(models, name, 2.0, 0.2))


@pytest.mark.parametrize("name", BETAS)
def test_a_soft_cap_of_the_student(models, name):
    def cap(logits):
        return 3 * torch.tanh(logits / 3)

    assert_same(models, ours(models, divergence(name), 1.5, 0.2, cap), reference(models, name, 1.5, 0.2, cap))


@pytest.mark.parametrize("name", BETAS)
def test_rows_that_stand_for_no_token_are_left_out(models, name):
    models[-1].clamp_(max=30)
    assert_same(models, ours(models, divergence(name), vocab=31), reference(models, name, vocab=31))


@pytest.mark.parametrize("name", BETAS)
def test_the_top_of_the_whole_vocabulary_is_exact(models, name):
    assert_same(models, ours(models, divergence(name), 2.0, 0.2, k=VOCAB), reference(models, name, 2.0, 0.2))


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("k", [1, 5, VOCAB - 1])
def test_other_tokens_are_one_outcome(models, name, k):
    student, hidden, teacher, theirs, _ = models
    mine, other = student(hidden).softmax(-1), teacher(theirs).softmax(-1)
    ids = other.topk(k).indices

    def merged(of):
        top = of.gather(-1, ids)
        return torch.cat([top, of.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], -1).log()

    expected = divergence(name)(merged(mine), merged(other).detach()).sum()
    sums = ours(models, divergence(name), k=k)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(gradients(models, sums.loss), gradients(models, expected), strict=True):
        assert (got - wanted).norm() <= 2e-5 * wanted.norm()


def test_a_dropped_tail_would_be_caught(models, monkeypatch):
    full = ours(models, ForwardKL(), k=5).divergence
    kept = distillation.from_columns

    def without_tail(columns, vocab):
        outcomes = kept(columns, vocab)
        values = outcomes.values.clone()
        values[:, -1] = -torch.inf
        return distillation.TopK(outcomes.ids, values)

    monkeypatch.setitem(globals(), "from_columns", without_tail)
    assert (ours(models, ForwardKL(), k=5).divergence - full).abs() > 0.1


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("k", [None, 5, VOCAB])
def test_a_model_does_not_differ_from_itself(models, name, k):
    student, hidden, _, _, targets = models
    itself = student, hidden, student, hidden.detach(), targets
    sums = ours(itself, divergence(name), 1.5, k=k)
    assert abs(float(sums.divergence.detach())) < 1e-5 * N
    assert max(float(g.abs().max()) for g in gradients(itself, sums.loss)) < 1e-5
    assert sums.agreed == N


def test_counts(models):
    student, hidden, teacher, theirs, targets = models
    for k in (None, 3):
        sums = ours(models, ForwardKL(), k=k)
        assert sums.correct == (student(hidden).argmax(-1) == targets).sum()
        assert sums.agreed == (student(hidden).argmax(-1) == teacher(theirs).argmax(-1)).sum()
        with torch.no_grad():
            assert torch.equal(ours(models, ForwardKL(), k=k).agreed, sums.agreed)


@pytest.mark.parametrize("wrapped", [False, True])
def test_no_targets_give_a_zero_that_depends_on_the_head(models, wrapped):
    student, hidden, teacher, theirs, targets = models
    head = WrappedLinear(student) if wrapped else student
    outcomes = TeacherHead(theirs[:0], teacher, None, 1.0, VOCAB)
    sums = distillation_sums(hidden[:0], targets[:0], head, outcomes, ForwardKL(), vocab=VOCAB)
    assert sums.loss == 0
    assert not torch.autograd.grad(sums.loss, student.weight)[0].any()
    assert top_k(outcomes, 0, 3, 4).shape == (0, 7)


def test_no_tensor_of_all_logits_is_alive(models, monkeypatch):
    sizes, original = [], torch.Tensor.log_softmax

    def log_softmax(self, *args, **kwargs):
        sizes.append(len(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "log_softmax", log_softmax)
    ours(models, JSD()).loss.backward()
    assert max(sizes) <= 5
    assert len(sizes) >= 2 * (N // 5)


@pytest.mark.parametrize("beta", [0, 1, -0.1, 2])
def test_a_mixture_needs_both(beta):
    with pytest.raises(UserError, match="above 0 and below 1; for 0 and 1 use ForwardKL, ReverseKL"):
        JSD(beta)
