"""Derivatives of any order and mode through the chunked head, and losses with parameters and metrics of their own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from oumi_pl.errors import UserError
from oumi_pl.losses import devices, linear_head
from oumi_pl.losses.causal import CrossEntropy, token_logps, token_loss_sum, token_losses
from oumi_pl.types import TokenLoss
from tests.losses.test_causal import CHUNK, Focal, Largest, N, Wrapped, assert_close, make, soft_cap

SCALES = torch.linspace(-1, 2, N, dtype=torch.float64)


def of_loss(hidden, targets, head, transform):
    return token_loss_sum(hidden, targets, head, Focal(), transform=transform, chunk_size=CHUNK).loss_sum


def of_logps(hidden, targets, head, transform):
    return token_logps(hidden, targets, head, transform=transform, chunk_size=CHUNK) @ SCALES


def plain_loss(hidden, targets, head, transform):
    logits = head(hidden)
    return Focal()(transform(logits) if transform else logits, targets).sum()


def plain_logps(hidden, targets, head, transform):
    logits = head(hidden)
    logits = transform(logits) if transform else logits
    return -F.cross_entropy(logits, targets, reduction="none") @ SCALES


FUNCTIONS = {"loss": (of_loss, plain_loss), "logps": (of_logps, plain_logps)}


def hessian_product(function, hidden, targets, head, transform):
    """The product of the Hessian and a fixed vector, and the gradient, by hidden states and weights."""
    inputs = hidden, *head.parameters()
    value = function(hidden.sin(), targets, head, transform) * 0.37  # a function before and after it
    gradients = torch.autograd.grad(value, inputs, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradients]
    product = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
    return *torch.autograd.grad(product, inputs), *(g.detach() for g in gradients)


@pytest.mark.parametrize("wrap", [False, True], ids=["linear", "wrapped"])
@pytest.mark.parametrize("transform", [None, soft_cap])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_hessian_vector_products_equal_those_of_full_logits(name, transform, wrap):
    ours, theirs = FUNCTIONS[name]
    hidden, targets, head = make(bias=True)
    called = Wrapped(head) if wrap else head
    expected = hessian_product(theirs, hidden, targets, called, transform)
    assert_close(hessian_product(ours, hidden, targets, called, transform), expected, 1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_third_derivatives(name):
    ours, theirs = FUNCTIONS[name]
    hidden, targets, head = make()

    def third(function):
        value = function(hidden, targets, head, None)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(value, head.weight, create_graph=True)
            value = (gradient**2).sum()
        return torch.autograd.grad(value, [hidden, head.weight])

    assert_close(third(ours), third(theirs), 1e-9)


def test_second_derivatives_hold_no_tensor_of_all_logits(monkeypatch):
    n, vocab = 512, 2048
    monkeypatch.setitem(devices.DEVICES, "cpu", replace(devices.CPU, chunk_elements=2 * linear_head.MIN_ROWS * vocab))
    head, targets = nn.Linear(8, vocab), torch.randint(vocab, (n,))
    hidden = torch.randn(n, 8, requires_grad=True)
    with Largest() as largest:
        loss = token_loss_sum(hidden, targets, head, CrossEntropy()).loss_sum
        (gradient,) = torch.autograd.grad(loss, head.weight, create_graph=True)
        torch.autograd.grad((gradient**2).sum(), head.weight)
    assert largest.numel < n * vocab


def perturbed(function, hidden, targets, head):
    """As a function of hidden states and a dictionary of the head's parameters."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, states):
            return function(states, targets, self.head, soft_cap)

    return lambda states, parameters: functional_call(Whole(), parameters, states)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func_equals_full_logits(name):
    hidden, targets, head = make(bias=True)
    states = hidden.detach()
    parameters = {f"head.{n}": p.detach() for n, p in head.named_parameters()}
    tangents = {n: torch.ones_like(p) for n, p in parameters.items()}
    several = {n: torch.stack([p, 2 * p]) for n, p in parameters.items()}
    results = []
    for function in FUNCTIONS[name]:
        called = perturbed(function, states, targets, head)
        gradient = torch.func.grad(called, argnums=1)(states, parameters)
        value, along = torch.func.jvp(called, (states, parameters), (torch.ones_like(states), tangents))
        ensemble = torch.func.vmap(torch.func.grad(called), in_dims=(None, 0))(states, several)
        hessian = torch.func.hessian(called)(states[:, :2].repeat(1, states.shape[1] // 2), parameters)
        results.append([*gradient.values(), value, along, ensemble, hessian])
    assert_close(*results, 1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_equals_full_logits(name):
    hidden, targets, head = make()
    actual = []
    for function in FUNCTIONS[name]:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(hidden.detach(), torch.ones_like(hidden))
            actual.append(forward_ad.unpack_dual(function(dual, targets, head, None)).tangent)
    assert_close([actual[0]], [actual[1]], 1e-10)


class Learned(TokenLoss, nn.Module):
    """Cross entropy at a temperature that is learned, counting its calls."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.seen = 0

    def __call__(self, logits, targets):
        self.seen += len(targets)
        return F.cross_entropy(logits / self.temperature, targets, reduction="none")

    def metrics(self, logits, targets):
        probabilities = logits.softmax(-1)
        return {"entropy": torch.distributions.Categorical(probabilities).entropy(), "one": probabilities.sum(-1)}


HEADS = {
    "linear": lambda head: head,
    "wrapped": Wrapped,
    "lora": lambda head: with_lora(head),
    "hooked": lambda head: hooked(Wrapped(head)),
}


def hooked(head):
    head.register_forward_hook(lambda module, inputs, output: None)
    return head


def with_lora(head):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(nn.Sequential(head), config).base_model.model[0].double()


@pytest.mark.parametrize("kind", HEADS)
def test_parameters_of_a_loss_get_gradients(kind):
    hidden, targets, head = make(bias=True)
    loss, called = Learned(), HEADS[kind](head)
    inputs = [hidden, loss.temperature, *(p for p in called.parameters() if p.requires_grad)]
    ours = token_loss_sum(hidden, targets, called, loss, chunk_size=CHUNK)
    theirs = F.cross_entropy(called(hidden) / loss.temperature, targets, reduction="sum")
    assert_close(torch.autograd.grad(ours.loss_sum * 0.37, inputs), torch.autograd.grad(theirs * 0.37, inputs), 1e-10)
    none = token_loss_sum(hidden[:0], targets[:0], called, loss)
    assert float(torch.autograd.grad(none.loss_sum, loss.temperature)[0]) == 0


def hooked_lora(head):
    """A head of every kind of forward hook: before and after, within and outside, with dropout."""
    head = with_lora(head)
    head.register_forward_hook(lambda module, inputs, output: 2 * output)
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].tanh(),))
    head.lora_B["default"].register_forward_hook(lambda module, inputs, output: output.sin())
    return head


@pytest.mark.parametrize("kind", [*HEADS, "hooked lora"])
@pytest.mark.parametrize("training", [True, False])
def test_a_loss_is_called_once_per_token(kind, training):
    hidden, targets, head = make()
    loss, called = Learned(), (HEADS | {"hooked lora": hooked_lora})[kind](head)
    with torch.set_grad_enabled(training):
        out = token_loss_sum(hidden, targets, called, loss, chunk_size=CHUNK)
    if training:
        inputs = [hidden, *(p for p in called.parameters() if p.requires_grad)]
        ours = torch.autograd.grad(out.loss_sum * 0.37, inputs)
        whole = F.cross_entropy(called(hidden) / loss.temperature, targets, reduction="sum")
        assert_close(ours, torch.autograd.grad(whole * 0.37, inputs), 1e-10)
    assert loss.seen == N


@pytest.mark.parametrize("source", ["a parameter", "an earlier result"])
def test_hooks_of_a_head_that_use_other_tensors_do_not_lose_their_gradients(source):
    """The head's own parameters are not all that is trained in it: the loss is then called again, which is exact."""
    hidden, targets, head = make()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    used = scale if source == "a parameter" else scale.exp()
    head.register_forward_hook(lambda module, inputs, output: output * used)
    loss, inputs = Learned(), [hidden, head.weight, scale]
    out = token_loss_sum(hidden, targets, head, loss, chunk_size=CHUNK)
    ours = torch.autograd.grad(out.loss_sum * 0.37, inputs, retain_graph=True)
    whole = F.cross_entropy(head(hidden) / loss.temperature, targets, reduction="sum")
    assert_close(ours, torch.autograd.grad(whole * 0.37, inputs), 1e-10)
    assert loss.seen == 2 * N


def test_backward_hooks_of_a_head_see_the_scaled_gradients():
    hidden, targets, head = make()
    seen = []
    head.register_full_backward_hook(lambda module, of_inputs, of_outputs: seen.append(of_outputs[0]))
    loss = Learned()
    (token_loss_sum(hidden, targets, head, loss).loss_sum * 0.37).backward()
    logits = head(hidden).detach().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(logits / 1.5, targets, reduction="sum") * 0.37, logits)
    assert_close(seen, expected, 1e-10)
    assert loss.seen == 2 * N


@pytest.mark.parametrize("kind", HEADS)
def test_metrics_of_a_loss_are_summed(kind):
    hidden, targets, head = make()
    called, loss = HEADS[kind](head), Learned()
    out = token_loss_sum(hidden, targets, called, loss, chunk_size=CHUNK)
    out.loss_sum.backward()  # a recomputed chunk adds nothing
    expected = torch.distributions.Categorical(logits=called(hidden)).entropy().sum()
    assert_close([out.metrics["entropy"]], [expected.detach()], 1e-10)
    assert float(out.metrics["one"]) == pytest.approx(N)
    assert token_loss_sum(hidden[:0], targets[:0], called, loss).metrics == {"entropy": 0.0, "one": 0.0}


def test_a_metric_of_another_shape_is_refused():
    class Summed(CrossEntropy):
        def metrics(self, logits, targets):
            return {"size": logits.square().sum()}

    hidden, targets, head = make()
    with pytest.raises(UserError, match=r"the metric size of Summed has shape \[\] for 5 tokens"):
        token_loss_sum(hidden[:5], targets[:5], head, Summed())


@pytest.mark.parametrize("kind", HEADS)
def test_losses_per_token_equal_full_logits(kind):
    hidden, targets, head = make(bias=True)
    called = HEADS[kind](head)
    ours = token_losses(hidden, targets, called, Focal(), chunk_size=CHUNK)
    theirs = Focal()(called(hidden), targets)
    assert_close([ours], [theirs], 1e-10)
    inputs = [hidden, *(p for p in called.parameters() if p.requires_grad)]
    assert_close(torch.autograd.grad(ours @ SCALES, inputs), torch.autograd.grad(theirs @ SCALES, inputs), 1e-10)


@pytest.mark.parametrize("kind", HEADS)
def test_weights_of_tokens_are_in_sum_metrics_and_all_derivatives(kind):
    hidden, targets, head = make(bias=True)
    loss, called, weights = Learned(), HEADS[kind](head), torch.rand(N, dtype=torch.float64) + 0.5
    inputs = [hidden, loss.temperature, *(p for p in called.parameters() if p.requires_grad)]

    def derivatives(total):
        gradients = torch.autograd.grad(total, inputs, create_graph=True)
        return *gradients, *torch.autograd.grad(sum(g.sum() for g in gradients), inputs)

    out = token_loss_sum(hidden, targets, called, loss, weights=weights, chunk_size=CHUNK)
    losses = F.cross_entropy(called(hidden) / loss.temperature, targets, reduction="none")
    assert_close(derivatives(out.loss_sum), derivatives(losses @ weights), 1e-10)
    assert float(out.metrics["one"]) == pytest.approx(float(weights.sum()))
    first = token_loss_sum(hidden, targets, called, CrossEntropy(), weights=weights, chunk_size=CHUNK).loss_sum
    plain = F.cross_entropy(called(hidden), targets, reduction="none") @ weights
    del inputs[1]
    assert_close(torch.autograd.grad(first, inputs), torch.autograd.grad(plain, inputs), 1e-10)
