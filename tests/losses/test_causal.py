"""Losses from hidden states against the same losses on full logits."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oumi_pl.errors import UserError
from oumi_pl.losses import devices, linear_head
from oumi_pl.losses.causal import CrossEntropy, _softmax, is_cross_entropy, token_logps, token_loss_sum

N, HIDDEN, VOCAB, CHUNK = 23, 12, 37, 5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 2e-2}


class Focal:
    """A user's own loss, without a gradient of its own: Lin et al. 2017 with gamma 2."""

    def __call__(self, logits, targets):
        logp = F.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
        return -((1 - logp.exp()) ** 2) * logp


class Wrapped(nn.Module):
    """Any head that is no plain linear layer."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden):
        return self.linear(hidden)


def soft_cap(logits):
    return 3 * torch.tanh(logits / 3)


def plain_cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


def smoothed_with_z(logits, targets):
    lse = torch.logsumexp(logits, -1)
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1) + 1e-2 * lse**2


TRANSFORMS = [None, soft_cap, torch.tanh]  # the last one's gradient reads its output, which must not be overwritten
LOSSES = {
    "plain": (CrossEntropy(), plain_cross_entropy),
    "smoothed": (
        CrossEntropy(label_smoothing=0.3),
        lambda x, t: F.cross_entropy(x, t, reduction="none", label_smoothing=0.3),
    ),
    "z": (
        CrossEntropy(z_loss=0.05),
        lambda x, t: F.cross_entropy(x, t, reduction="none") + 0.05 * x.logsumexp(-1) ** 2,
    ),
    "both": (CrossEntropy(label_smoothing=0.1, z_loss=1e-2), smoothed_with_z),
    "own": (Focal(), Focal()),
}


def make(n=N, dtype=torch.float64, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    hidden = torch.randn(n, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (n,), generator=generator)
    return hidden, targets, head.to(dtype)


def naive(hidden, targets, head, loss, transform=None):
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = transform(logits) if transform else logits
    return loss(logits, targets), (logits.argmax(-1) == targets).sum()


def gradients(value, *tensors, **keywords):
    return torch.autograd.grad(value, [t for t in tensors if t.requires_grad], **keywords)


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm(), f"off by {(a - b).norm() / b.norm():.1e}"


@pytest.mark.parametrize("wrap", [False, True], ids=["linear", "wrapped"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_full_logits(name, dtype, transform, wrap):
    ours, theirs = LOSSES[name]
    hidden, targets, head = make(dtype=dtype, bias=name in ("both", "own"))
    called = Wrapped(head) if wrap else head
    output = token_loss_sum(hidden, targets, called, ours, transform=transform, chunk_size=CHUNK)
    expected, correct = naive(hidden, targets, head, theirs, transform)
    assert output.loss_sum.dtype == dtype and output.loss_sum.shape == ()
    assert (output.target_tokens.item(), output.correct.item()) == (N, correct.item())
    assert output.target_tokens.dtype == output.correct.dtype == torch.int64
    assert_close([output.loss_sum], [expected.sum()], TOLERANCE[dtype])
    inputs = hidden, *head.parameters()
    assert_close(
        gradients(output.loss_sum * 0.37, *inputs), gradients(expected.sum() * 0.37, *inputs), TOLERANCE[dtype]
    )


@pytest.mark.parametrize("wrap", [False, True], ids=["linear", "wrapped"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logps_equal_full_logits_under_any_weights(dtype, transform, wrap):
    hidden, targets, head = make(dtype=dtype, bias=True)
    logps = token_logps(hidden, targets, Wrapped(head) if wrap else head, transform=transform, chunk_size=CHUNK)
    expected = -naive(hidden, targets, head, plain_cross_entropy, transform)[0]
    weights = torch.linspace(-1, 2, N, dtype=dtype)
    assert logps.shape == (N,) and logps.dtype == dtype
    assert_close([logps], [expected], TOLERANCE[dtype])
    inputs = hidden, *head.parameters()
    assert_close(gradients(logps @ weights, *inputs), gradients(expected @ weights, *inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("kept", [0.0, 1.5, 1e9], ids=["none", "the first chunk", "all"])
def test_what_is_kept_for_the_backward_pass_changes_nothing(kept, monkeypatch):
    monkeypatch.setitem(devices.DEVICES, "cpu", replace(devices.CPU, kept_elements=int(kept * CHUNK * VOCAB)))
    hidden, targets, head = make(bias=True)
    inputs, weights = (hidden, *head.parameters()), torch.linspace(-1, 2, N, dtype=torch.float64)
    logps = token_logps(hidden, targets, head, chunk_size=CHUNK)
    expected = gradients(-naive(hidden, targets, head, plain_cross_entropy)[0] @ weights, *inputs)
    first = gradients(logps @ weights, *inputs, retain_graph=True)
    for actual in (first, gradients(logps @ weights, *inputs)):  # a graph that is kept can be gone through again
        assert_close(actual, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("frozen", ["head", "hidden", "bias", "both"])
@pytest.mark.parametrize("function", ["loss", "logps"])
def test_only_what_needs_a_gradient_gets_one(function, frozen):
    hidden, targets, head = make(bias=True)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    head.requires_grad_(frozen not in ("head", "both"))
    if frozen == "bias":
        head.bias.requires_grad_(False)
    if function == "loss":
        value = token_loss_sum(hidden, targets, head, CrossEntropy(), chunk_size=CHUNK).loss_sum
    else:
        value = -token_logps(hidden, targets, head, chunk_size=CHUNK).sum()
    expected = naive(hidden, targets, head, plain_cross_entropy)[0].sum()
    assert value.requires_grad == expected.requires_grad
    if expected.requires_grad:
        inputs = hidden, *head.parameters()
        assert_close(gradients(value, *inputs), gradients(expected, *inputs), 1e-10)


def test_evaluation_computes_no_gradients(monkeypatch):
    hidden, targets, head = make()
    expected = token_loss_sum(hidden, targets, head, CrossEntropy(), chunk_size=CHUNK)
    monkeypatch.setattr(linear_head, "HeadGradients", None)
    with torch.no_grad():
        output = token_loss_sum(hidden, targets, head, CrossEntropy(), chunk_size=CHUNK)
    assert not output.loss_sum.requires_grad
    assert_close([output.loss_sum], [expected.loss_sum.detach()], 1e-10)
    assert output[1:] == expected[1:]


def test_frozen_head_holds_no_gradient_buffer():
    hidden, targets, head = make()
    head.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_loss_sum(hidden, targets, head, CrossEntropy(), chunk_size=CHUNK)
    inputs = {t.data_ptr() for t in (hidden, *head.parameters())}
    assert [t.shape for t in saved if t.data_ptr() not in inputs] == [hidden.shape]


@pytest.mark.parametrize("n", [0, 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("wrap", [False, True], ids=["linear", "wrapped"])
def test_any_number_of_tokens(n, wrap):
    hidden, targets, head = make(n, bias=True)
    called = Wrapped(head) if wrap else head
    output = token_loss_sum(hidden, targets, called, CrossEntropy(), chunk_size=CHUNK)
    logps = token_logps(hidden, targets, called, chunk_size=CHUNK)
    expected, correct = naive(hidden, targets, head, plain_cross_entropy)
    assert (output.target_tokens.item(), output.correct.item()) == (n, correct.item())
    assert logps.shape == (n,)
    for value in (output.loss_sum, -logps.sum()):
        assert_close([value], [expected.sum()], 1e-10)
        inputs = hidden, *head.parameters()
        wanted = gradients(expected.sum(), *inputs, retain_graph=True)
        assert_close(gradients(value, *inputs), wanted, 1e-10)


def test_tied_weights_sum_both_gradients():
    embedding, head = nn.Embedding(VOCAB, HIDDEN).double(), nn.Linear(HIDDEN, VOCAB, bias=False).double()
    head.weight = embedding.weight
    ids = torch.randint(VOCAB, (N,), generator=torch.Generator().manual_seed(1))
    ours = token_loss_sum(embedding(ids).sin(), ids.roll(-1), head, CrossEntropy(), chunk_size=CHUNK).loss_sum
    theirs = naive(embedding(ids).sin(), ids.roll(-1), head, plain_cross_entropy)[0].sum()
    ours, theirs = gradients(ours, head.weight), gradients(theirs, head.weight)
    assert_close(ours, theirs, 1e-10)
    alone = gradients(
        naive(embedding(ids).sin().detach(), ids.roll(-1), head, plain_cross_entropy)[0].sum(), head.weight
    )
    assert (ours[0] - alone[0]).norm() > 1e-2 * alone[0].norm()


def test_a_loss_may_be_used_twice_in_one_graph_and_with_a_retained_graph():
    hidden, targets, head = make()
    inputs = hidden, *head.parameters()

    def both(function):
        return 2 * function(hidden, targets) - 0.5 * function(hidden.sin(), targets.flip(0))

    ours = both(lambda h, t: token_loss_sum(h, t, head, CrossEntropy(), chunk_size=CHUNK).loss_sum)
    theirs = gradients(both(lambda h, t: naive(h, t, head, plain_cross_entropy)[0].sum()), *inputs)
    assert_close(gradients(ours, *inputs, retain_graph=True), theirs, 1e-10)
    assert_close(gradients(ours, *inputs, retain_graph=True), theirs, 1e-10)
    assert_close(gradients(ours, *inputs), theirs, 1e-10)


def test_weight_gradient_is_scaled_in_place():
    """A second tensor of the head's size would be alive at the peak of memory."""
    hidden, targets, head = make()
    loss = token_loss_sum(hidden, targets, head, CrossEntropy(), chunk_size=CHUNK).loss_sum
    buffer = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert head.weight.grad.data_ptr() == buffer


@pytest.mark.parametrize("transform", [None, soft_cap], ids=["", "capped"])
def test_gradcheck(transform):
    hidden, targets = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 1, 3, 2])
    head = nn.Linear(3, 4).double()

    def losses(h, w, b):
        linear = copy.copy(head)
        linear._parameters = {"weight": w, "bias": b}
        both = CrossEntropy(label_smoothing=0.1, z_loss=1e-2)
        total = token_loss_sum(h, targets, linear, both, transform=transform, chunk_size=3).loss_sum
        return total, token_logps(h, targets, linear, transform=transform, chunk_size=3)

    assert torch.autograd.gradcheck(losses, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("name", ["plain", "both", "own"])
@pytest.mark.parametrize("mode", ["autocast", "bf16", "mixed"])
def test_bfloat16(name, mode):
    """Against float32: no further off than full logits in the same precision, within a small factor."""
    ours, theirs = LOSSES[name]
    hidden, targets, head = make(400, torch.float32, bias=True)
    inputs = hidden, *head.parameters()
    exact = naive(*make(400, torch.float64, bias=True), theirs)[0].sum()
    if mode == "bf16":
        head.to(torch.bfloat16)
    states = hidden if mode == "autocast" else hidden.to(torch.bfloat16)
    low = copy.deepcopy(head).to(torch.bfloat16) if mode == "mixed" else head
    with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext():
        output = token_loss_sum(states, targets, head, ours, chunk_size=64)
        logps = token_logps(states, targets, head, chunk_size=64)
        full, correct = naive(states, targets, low, theirs)
    assert output.loss_sum.dtype == logps.dtype == torch.float32
    assert abs(output.loss_sum - exact) <= 3e-3 * exact
    assert abs(output.correct - correct) <= 4
    got, expected = gradients(output.loss_sum, *inputs), gradients(full.sum(), hidden, *low.parameters())
    for a, b, parameter in zip(got, expected, inputs, strict=True):
        assert a.dtype == parameter.dtype
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
    if name == "plain":
        for a, b in zip(gradients(-logps.sum(), *inputs), expected, strict=True):
            assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_columns_and_rows_at_a_time_change_nothing(dtype, monkeypatch):
    """With a vocabulary of several products, and chunks of several steps of the softmax."""
    hidden, targets, head = make(40, dtype, bias=True)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1))
    inputs = hidden, *head.parameters()

    def results():
        output = token_loss_sum(hidden, targets, head, LOSSES["both"][0], weights=weights, chunk_size=16)
        logps = token_logps(hidden, targets, head, chunk_size=16)
        graded = gradients(output.loss_sum, *inputs), gradients(logps.sum(), *inputs)
        return [output.loss_sum, output.correct, logps, *graded[0], *graded[1]]

    expected = results()
    monkeypatch.setitem(devices.DEVICES, "cpu", replace(devices.CPU, columns=4, block_elements=3 * VOCAB))
    for value, other in zip(results(), expected, strict=True):
        difference = (value.double() - other.double()).norm()
        assert difference <= (1e-10 if dtype == torch.float64 else 5e-3) * other.double().norm()


def test_autocast_leaves_float64_alone():
    hidden, targets, head = make()
    with torch.autocast("cpu", torch.bfloat16):
        output = token_loss_sum(hidden, targets, head, CrossEntropy(), chunk_size=CHUNK)
    assert_close([output.loss_sum], [naive(hidden, targets, head, plain_cross_entropy)[0].sum()], 1e-10)


def test_small_head_gradients_are_summed_in_float32():
    """Sixty-four equal chunks: rounding after each one would lose more than rounding once."""
    hidden, targets, head = make(1, torch.bfloat16)
    hidden, targets = hidden.detach().expand(64, -1).contiguous().requires_grad_(), targets.expand(64).contiguous()
    one = gradients(token_loss_sum(hidden[:1], targets[:1], head, CrossEntropy()).loss_sum, head.weight)[0]
    many = gradients(token_loss_sum(hidden, targets, head, CrossEntropy(), chunk_size=1).loss_sum, head.weight)[0]
    assert torch.equal(many, one * 64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_computations_of_the_softmax_agree(dtype):
    logits = (torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    logits[:, 3] = -math.inf  # as padded vocabularies have it
    targets = torch.arange(6) + 4
    full = logits if dtype == torch.float64 else logits.float()
    expected = full.softmax(-1), full.logsumexp(-1)
    picked = full.gather(-1, targets[:, None])[:, 0]
    in_place = _softmax(logits.clone(), targets, picked)

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    fused = _softmax(logits.clone().as_subclass(Elsewhere), targets, picked)
    for got in (in_place, fused):
        assert_close([t.as_subclass(torch.Tensor) for t in got], expected, 1e-6)


def test_a_subclass_with_another_loss_is_not_given_the_old_gradient():
    class Doubled(CrossEntropy):
        def __call__(self, logits, targets):
            return 2 * super().__call__(logits, targets)

    hidden, targets, head = make()
    doubled = token_loss_sum(hidden, targets, head, Doubled(), chunk_size=CHUNK).loss_sum
    single = token_loss_sum(hidden, targets, head, CrossEntropy(), chunk_size=CHUNK).loss_sum
    assert_close([doubled], [2 * single], 1e-10)
    assert_close(gradients(doubled, hidden), gradients(2 * single, hidden), 1e-10)


def test_hooks_on_the_head_are_called():
    hidden, targets, head = make()
    head.register_forward_hook(lambda module, inputs, output: output * 2)
    ours = token_loss_sum(hidden, targets, head, CrossEntropy(), chunk_size=CHUNK).loss_sum
    assert_close([ours], [naive(hidden, targets, head, plain_cross_entropy)[0].sum()], 1e-10)


def test_lora_on_the_head():
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.lm_head = head

    hidden, targets, head = make(dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(Model(head), config).base_model.model.lm_head
    inputs = [hidden, *(p for p in wrapped.parameters() if p.requires_grad)]
    assert len(inputs) == 3
    ours = token_loss_sum(hidden, targets, wrapped, CrossEntropy(), chunk_size=CHUNK).loss_sum
    theirs = naive(hidden, targets, wrapped, plain_cross_entropy)[0].sum()
    assert_close(gradients(ours, *inputs), gradients(theirs, *inputs), 1e-6)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", [CrossEntropy(label_smoothing=0.1, z_loss=1e-3), Focal()], ids=["ours", "own"])
@pytest.mark.parametrize("way", ["linear", "capped", "wrapped", "logps", "logps wrapped", "naive"])
def test_no_tensor_of_all_logits(way, loss, training, monkeypatch):
    n, vocab = 512, 2048
    monkeypatch.setitem(devices.DEVICES, "cpu", replace(devices.CPU, chunk_elements=2 * linear_head.MIN_ROWS * vocab))
    head = nn.Linear(8, vocab)
    called = Wrapped(head) if "wrapped" in way else head
    hidden, targets = torch.randn(n, 8, requires_grad=True), torch.randint(vocab, (n,))
    with Largest() as largest, torch.set_grad_enabled(training):
        if way == "naive":
            value = naive(hidden, targets, head, loss)[0].sum()
        elif "logps" in way:
            value = token_logps(hidden, targets, called, chunk_size=128 if "wrapped" in way else None).sum()
        else:
            value = token_loss_sum(
                hidden,
                targets,
                called,
                loss,
                transform=soft_cap if way == "capped" else None,
                chunk_size=128 if way == "wrapped" else None,
            ).loss_sum
        if training:
            value.backward()
    assert (largest.numel >= n * vocab) == (way == "naive")


def test_chunks_cover_every_row_once_and_evenly():
    hidden = torch.empty(0)
    for n in (0, 1, 5, 1000):
        for size in (1, 7, 1000, None):
            rows = linear_head.chunks(n, 50_000, hidden, size)
            assert [i for r in rows for i in range(r.start, r.stop)] == list(range(n))
            lengths = [r.stop - r.start for r in rows] or [0]
            if size is None:  # but for the last, a multiple of 64
                assert max(lengths) <= 2**24 // 50_000 and min(lengths) > max(lengths) - 64 * len(lengths)
                assert all(length % 64 == 0 for length in lengths[:-1])
            else:
                assert max(lengths) - min(lengths) <= 1 and max(lengths) <= size
    for like, lengths in ((hidden, [256, 256, 256, 233]), (hidden.to("meta"), [1001])):
        assert [rows.stop - rows.start for rows in linear_head.chunks(1001, 50_000, like, None)] == lengths
    gpu = linear_head.chunks(3001, 50_000, hidden.to("meta"), None)
    assert [rows.stop - rows.start for rows in gpu] == [1001, 1001, 999]
    assert len(linear_head.chunks(1024, 2**20, hidden, None)) == 1024 // linear_head.MIN_ROWS


def test_only_cross_entropy_without_options_is_the_likelihood():
    """Evaluation computes the likelihood once more wherever the loss is another one."""

    class Halved(CrossEntropy):
        def __call__(self, logits, targets):
            return super().__call__(logits, targets) / 2

    assert is_cross_entropy(CrossEntropy())
    for loss in (CrossEntropy(label_smoothing=0.1), CrossEntropy(z_loss=1e-4), Halved()):
        assert not is_cross_entropy(loss)


def test_wrong_arguments_are_refused():
    hidden, targets, head = make()
    for keywords in ({"label_smoothing": -0.1}, {"label_smoothing": 1.5}, {"z_loss": -1}, {"z_loss": math.nan}):
        with pytest.raises(UserError, match=next(iter(keywords))):
            CrossEntropy(**keywords)
    for called in (head, Wrapped(head)):
        with pytest.raises(UserError, match="one loss per token"):
            token_loss_sum(hidden, targets, called, F.cross_entropy)
        with pytest.raises(UserError, match="chunk_size"):
            token_logps(hidden, targets, called, chunk_size=0)
    with pytest.raises(ValueError, match="hidden is"):
        token_loss_sum(hidden[None], targets[None], head, CrossEntropy())
