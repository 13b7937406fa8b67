"""QLoRA on a CPU: a base in fewer bits computes as its dequantized weights do, and trains, resumes and exports."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from oumi_pl.errors import UserError
from oumi_pl.models.build import build_model
from oumi_pl.models.export import export_model
from oumi_pl.models.lm import LM
from oumi_pl.modules.sft import SFT
from tests.command_line import CommandLine
from tests.models.test_export import assert_same, logits, names
from tests.models.test_lora import adamw, batch, loss_of, moved, pretrained, read, run, trainable

bitsandbytes = pytest.importorskip("bitsandbytes", "0.50")
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Rows of whole blocks: 64 weights share a scale."""
LORA = {"r": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("base"), **WIDE)


def dequantized(hf):
    """The weights of the quantized layers by name, in full precision."""
    weights = {}
    for name, module in hf.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weights[name] = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
            weights[name] = module.weight.data.float() * scale[:, None] / 127
    return weights


def with_adapters(base, quantization):
    """A quantized model and one in full precision with the same adapters, which PEFT rounds on a 4-bit base."""
    quantized, plain = (moved(base, lora=LORA, quantization=kind) for kind in (quantization, None))
    for ours, theirs in zip(trainable(plain).values(), trainable(quantized).values(), strict=True):
        ours.data.copy_(theirs)
    return quantized, plain


def both(base, quantization, exact=True):
    """A quantized model with adapters, and one with its dequantized weights; the same adapters."""
    quantized, plain = with_adapters(base, quantization)
    with torch.no_grad():
        for name, weight in dequantized(quantized).items():
            plain.get_submodule(name).weight.copy_(weight)
    for module in quantized.modules():
        if exact and isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    return quantized, plain


def gradients(hf):
    loss = loss_of(hf, batch())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainable(hf).items()}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_loss_and_gradients_are_those_of_the_dequantized_weights(base, quantization):
    quantized, plain = both(base, quantization)
    assert len(dequantized(quantized)) == 14
    (ours, our_gradients), (theirs, their_gradients) = gradients(quantized), gradients(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for name, gradient in their_gradients.items():
        assert (our_gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_named_layers_and_the_head_are_not_quantized(base, quantization):
    original = dict(AutoModelForCausalLM.from_pretrained(base).named_modules())
    hf = build_model(base, quantization=quantization, unquantized=["o_proj", "model.layers.1.mlp"])
    left = {name for name, layer in hf.named_modules() if type(layer) is torch.nn.Linear}
    second = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert left == {"lm_head", *second, *(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))}
    assert all(torch.equal(hf.get_submodule(name).weight, original[name].weight) for name in left)


def test_a_layer_that_the_model_does_not_have_is_refused(base):
    with pytest.raises(UserError, match=r"model\.unquantized: .* no linear layer 'o_prj'; did you mean 'o_proj'"):
        build_model(base, quantization="nf4", unquantized=["o_prj"])
    with pytest.raises(UserError, match=r"model\.unquantized: nothing is quantized"):
        SFT(base, unquantized=["o_proj"])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_loss_in_the_precision_of_a_run(base, quantization):
    """4-bit weights are multiplied in bfloat16."""
    quantized, plain = both(base, quantization, exact=False)
    torch.testing.assert_close(gradients(quantized)[0], gradients(plain)[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("quantization", "error"), [("nf4", 0.12), ("int8", 0.01)])
def test_the_error_of_the_base(base, quantization, error):
    original = dict(AutoModelForCausalLM.from_pretrained(base).named_modules())
    for name, weight in dequantized(build_model(base, quantization=quantization)).items():
        off = (weight - original[name].weight).norm() / original[name].weight.norm()
        assert 0 < off < error


def test_training_goes_on_with_the_same_gradients_after_an_evaluation(base):
    """On CPUs with AVX512-BF16, bitsandbytes packs the weights in an evaluation for a kernel without gradients."""
    fresh, evaluated = (moved(base, lora=LORA, quantization="nf4") for _ in range(2))
    with torch.no_grad():
        evaluated.eval()(torch.arange(20)[None])
    evaluated.train()
    (loss, expected), (again, actual) = gradients(fresh), gradients(evaluated)
    assert torch.equal(loss, again)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


def test_a_run_trains_and_resumes(tmp_path):
    folder = pretrained(tmp_path / "base", room=4000, **WIDE)

    def make():
        return SFT(folder, lora=LORA, quantization="nf4", optimizer=adamw)

    whole, _ = run(tmp_path, make(), directory=tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "step-00000002.ckpt"
    assert {name.removeprefix("model.hf.") for name in read(checkpoint)} == trainable(whole.causal_lm.hf).keys()
    resumed, _ = run(tmp_path, make(), resume=checkpoint, directory=tmp_path / "resumed")
    expected = trainable(whole.causal_lm.hf)
    before = trainable(make().build(None).hf)
    for name, parameter in trainable(resumed.causal_lm.hf).items():
        assert torch.equal(parameter, expected[name])
        assert not torch.equal(parameter, before[name])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_adapter_alone_is_that_of_the_quantized_base(tmp_path, base, quantization):
    quantized, plain = with_adapters(base, quantization)
    model = LM(quantized)
    export_model(model, tmp_path / "out")
    assert_same(tmp_path / "out", plain, 1e-6)  # on the base on disk, which is in full precision
    with pytest.raises(UserError, match="quantised weights can't be merged in place"):
        export_model(model, tmp_path / "merged", merge=True)


@pytest.mark.parametrize("merge", [False, True])
def test_a_run_exports_its_adapter(tmp_path, monkeypatch, capsys, merge):
    """Merged into the full-precision base, by the run and by the command."""
    cli = CommandLine(tmp_path, monkeypatch, capsys)
    folder = pretrained(cli.directory / "base", **WIDE)
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    model = {"model": folder, "lora": LORA, "quantization": "nf4", "optimizer": adamw, "config": None}
    cli.recipe(
        {"model.init_args": model, "data.init_args.tokenizer": None, "export.merge": merge, "trainer.max_steps": 2}
    )
    cli.works("fit", "--config", "r.yaml")
    exported = cli.directory / "runs/r/model"
    assert ("model.safetensors" in names(exported)) is merge
    live = AutoModelForCausalLM.from_pretrained(exported)
    assert (logits(live) - logits(AutoModelForCausalLM.from_pretrained(folder))).abs().max() > 1e-4
    cli.works("export", "--checkpoint", "runs/r", "--output", "out", *["--merge"] * merge)
    assert_same(cli.directory / "out", live)


def test_a_copy_has_its_own_weights(base):
    """References are copies."""
    hf = moved(base, lora=LORA, quantization="nf4")
    assert torch.equal(logits(copy.deepcopy(hf)), logits(hf))
