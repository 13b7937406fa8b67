"""Products in fp8: which layers, how they round, and that weights, checkpoints and exports are of a plain model."""

import functools

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from oumi_pl.adapters.refusals import refuse_engine
from oumi_pl.callbacks.checkpoint import Checkpoints
from oumi_pl.errors import UserError
from oumi_pl.models import fp8
from oumi_pl.models.build import build_model
from oumi_pl.models.fp8 import convert, exact_products, fp8_layers
from oumi_pl.models.lm import LM, padded
from oumi_pl.models.sharding import Sharded, decoder_layers
from oumi_pl.modules.sft import SFT
from oumi_pl.runs.checkpoints import AtomicCheckpointIO
from tests.models.test_lora import pretrained
from tests.tiny import LLAMA, data, distance, dpo, dpo_data, fit, module, trainer, weights
from tests.trees import batch_of_rows

pytest.importorskip("torchao.float8")


def test_adapters_routers_and_odd_sizes_are_not_converted():
    layer, odd = torch.nn.Linear(32, 64), torch.nn.Linear(32, 40)
    names = ("self_attn.q_proj", "mlp.gate_proj", "mlp.gate", "moe.router", "q_proj.lora_A.default")
    assert [fp8._is_converted(layer, name) for name in names] == [True, True, False, False, False]
    assert not fp8._is_converted(odd, "mlp.up_proj")


def test_exact_products_may_be_nested():
    hf = torch.nn.Sequential(torch.nn.Linear(32, 32))
    convert([hf], "emulated")
    with exact_products(hf):
        with exact_products(hf):
            assert all("forward" in vars(layer) for layer in fp8_layers(hf))
        assert all("forward" in vars(layer) for layer in fp8_layers(hf))
    assert not any("forward" in vars(layer) for layer in fp8_layers(hf))


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
emulated = functools.partial(module, fp8="emulated")
LAYER = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def rounded(x, dtype):
    """A tensor after a round trip through fp8, with the scale that takes its largest value to that of the dtype."""
    scale = torch.finfo(dtype).max / x.abs().max().double().clamp(min=1e-12)
    return (x * scale.float()).to(dtype).float() / scale.float()


class Rounded(torch.autograd.Function):
    """A linear layer, written out: the reference."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return rounded(x, E4M3) @ rounded(weight, E4M3).T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        flat, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        return (
            (rounded(flat, E5M2) @ rounded(weight, E4M3)).view_as(x),
            rounded(flat, E5M2).T @ rounded(inputs, E4M3),
        )


def a_model(**settings):
    torch.manual_seed(0)
    hf = build_model(None, config=LLAMA | {"vocab_size": 64} | settings.pop("config", {}), **settings)
    model = LM(hf)
    convert(decoder_layers(model), "emulated")
    return model


def gradients(model):
    ids = torch.arange(46).view(2, 23) % 60
    model.zero_grad()
    logps = model(batch_of_rows(ids, ids))
    (-logps.sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("lora", [None, {"r": 16}], ids=["all weights", "lora"])
def test_the_linear_layers_of_blocks_are_converted_but_no_head_or_adapter(lora):
    names = {name for name, m in a_model(lora=lora).named_modules() if m in fp8_layers(m)}
    assert {name.removesuffix(".base_layer").rpartition(".")[2] for name in names} == LAYER
    assert len(names) == 2 * len(LAYER)
    assert not any("lora_" in name or "head" in name for name in names)


def test_a_layer_whose_sizes_are_no_multiples_of_16_is_left_as_it_is():
    layers = fp8_layers(a_model(config={"intermediate_size": 72}))
    assert len(layers) == 2 * 4  # those of attention
    with pytest.raises(UserError, match="has no linear layer whose sizes are multiples of 16"):
        a_model(config={"hidden_size": 40, "intermediate_size": 72})


def test_products_are_those_of_rounded_values(monkeypatch):
    model = a_model()
    ours = gradients(model)
    with exact_products(model):
        exact = gradients(model)
    for layer in fp8_layers(model):
        monkeypatch.setattr(layer, "forward", lambda x, layer=layer: Rounded.apply(x, layer.weight))
    expected = gradients(model)
    assert distance_of(ours, expected) < 1e-4
    assert 1e-2 < distance_of(exact, expected) < 0.3, "nothing was rounded, or everything"


@pytest.mark.parametrize("fault", ["gradients in e4m3", "a scale of 1"])
def test_another_rounding_would_be_caught(monkeypatch, fault):
    """Planted fault."""
    model = a_model()
    ours = gradients(model)
    for layer in fp8_layers(model):
        monkeypatch.setattr(layer, "forward", lambda x, layer=layer: Rounded.apply(x, layer.weight))
    here = globals()
    if fault == "a scale of 1":
        monkeypatch.setitem(here, "rounded", lambda x, dtype: x.to(dtype).float())
    else:
        monkeypatch.setitem(here, "E5M2", E4M3)
    assert distance_of(ours, gradients(model)) > 1e-2


def distance_of(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("policy", [False, True])
def test_a_run_resumes_exactly_and_exports_plain_weights(tmp_path, policy):
    checkpoints = Checkpoints(every=2, keep=5)
    checkpoints.directory = tmp_path / "checkpoints"
    checkpoints.directory.mkdir()
    results = []
    for resume, callbacks in ((None, [checkpoints]), (checkpoints.directory / "step-00000002.ckpt", [])):
        L.seed_everything(0)
        sft = emulated(gradient_checkpointing=policy)
        plugins = [AtomicCheckpointIO()]
        loop = trainer(max_steps=4, callbacks=callbacks, enable_checkpointing=bool(callbacks), plugins=plugins)
        rows = data(tmp_path, 16, batch_size=2, packing=True, max_length=64)
        loop.fit(sft, rows, ckpt_path=resume)
        results.append(sft)
    whole_run, resumed = results
    assert whole_run.causal_lm.layout is not padded, "documents share scales, but are kept apart"
    assert len(fp8_layers(resumed)) == 14
    for name, value in whole_run.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert type(value) is torch.Tensor
        assert value.dtype == torch.float32
    resumed.save(tmp_path / "model")  # which compares the logits of the folder with the model's
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not fp8_layers(exported)
    assert {
        n.removeprefix("model.hf."): v for n, v in resumed.state_dict().items()
    }.keys() == exported.state_dict().keys()
    plain = fit(module(), data(tmp_path, 16, batch_size=2, packing=True, max_length=64), seed=0, max_steps=4)
    assert 0 < distance(plain, weights(whole_run)) < 0.1


@pytest.mark.parametrize("settings", [{}, {"reference": "online"}, {"lora": {"r": 2}}])
def test_a_policy_starts_as_its_reference(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache"))
    base = pretrained(tmp_path / "base", **LLAMA)
    policy = dpo(base, fp8="emulated", **settings)
    fit(policy, dpo_data(tmp_path), max_steps=1)  # which compares them
    assert fp8_layers(policy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8": True}, "model.fp8 needs a GPU of compute capability 8.9 or more .*, and the run is on a CPU"),
        ({"fp8": "emulated", "config": {"intermediate_size": 72, "hidden_size": 40}}, "multiples of 16"),
    ],
)
def test_what_can_not_multiply_in_fp8_is_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        fit(module(**settings), data(tmp_path), max_steps=1)


def test_an_older_card_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="and the run is on NVIDIA A100"):
        fp8.refuse_unfit_device(True, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    fp8.refuse_unfit_device(True, torch.device("cuda"))


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(UserError, match=r"model\.fp8 can't be had with model\.quantization"):
        SFT("no/such-model", fp8=True, quantization="nf4", lora={"r": 2})
    with pytest.raises(UserError, match=r"model\.fp8: hf would multiply as without it"):
        refuse_engine("hf", module(fp8=True))
    divided = SFT("no/such-model", fp8=True)
    divided.trainer = trainer(devices=2, strategy=Sharded(tensor=2))
    with pytest.raises(UserError, match=r"model\.fp8 can't be had with trainer\.strategy\.tensor"):
        divided.configure_model()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, {"compile": True}])
def test_a_gpu_multiplies_as_the_emulation(tmp_path, settings):
    wide = {"hidden_size": 256, "intermediate_size": 512}
    options = {"accelerator": "gpu", "precision": "bf16-mixed", "max_steps": 4}
    results = []
    for setting in (True, "emulated", False):
        L.seed_everything(0)
        sft = module(config=wide, fp8=setting, **settings)
        weights = fit(sft, data(tmp_path, 16, batch_size=2, packing=True), **options)
        results.append({name: value.cpu() for name, value in weights.items()})
    on_gpu, emulated_there, plain = results
    assert distance(on_gpu, emulated_there) < distance(plain, emulated_there)
