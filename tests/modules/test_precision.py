"""`bf16-true` and `16-true` train the model that `from_pretrained` loads in that dtype, buffers included."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from oumi_pl.commands.export import export_checkpoint
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.models.build import build_model
from oumi_pl.models.lm import LM
from oumi_pl.modules.sft import SFT
from tests.architectures import small
from tests.command_line import CommandLine
from tests.models.test_lora import run
from tests.tiny import LLAMA

MODELS = {
    "llama": LLAMA,  # RoPE's inv_freq
    "deepseek_v3": {k: v for k, v in small("deepseek_v3").items() if k != "vocab_size"},  # e_score_correction_bias
    "gemma3_text": {**LLAMA, "model_type": "gemma3_text", "head_dim": 8},  # embed_scale, and two inv_freq
}
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@pytest.fixture
def folder(tmp_path, request):
    torch.manual_seed(0)
    hf = build_model(None, config=MODELS[request.param] | {"max_position_embeddings": 4096}, tokenizer=tokenizer())
    for name, buffer in hf.named_buffers():
        if "correction_bias" in name:  # as if trained: values that bfloat16 rounds
            buffer.copy_(torch.rand(buffer.shape))
    for parameter in hf.parameters():
        if parameter.ndim > 1:  # a new tiny model hardly attends to anything
            parameter.data.mul_(5)
    hf.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def tokenizer():
    return ByteTokenizer().build()


def still(params):
    return torch.optim.SGD(params, lr=0.0)


def tensors(hf):
    return dict(hf.named_parameters()) | dict(hf.named_buffers())


def logits(hf):
    """At positions beyond a thousand, where rounded frequencies are off by whole turns."""
    hf.eval()
    with torch.no_grad():
        return hf(input_ids=torch.arange(3, 60)[None], position_ids=torch.arange(1500, 1557)[None]).logits


def trained(tmp_path, folder, precision):
    sft, _ = run(tmp_path, SFT(folder, optimizer=still), precision=precision, max_steps=1)
    return sft.causal_lm.hf, AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision])


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_every_tensor_has_the_dtype_and_value_that_it_is_loaded_with(tmp_path, folder, precision):
    live, loaded = trained(tmp_path, folder, precision)
    expected = tensors(loaded)
    assert {torch.float32, DTYPES[precision]} <= {value.dtype for value in expected.values()}
    for name, value in tensors(live).items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name
    difference = (logits(live) - logits(loaded)).float().norm()
    assert difference <= 2e-2 * logits(loaded).float().norm()
    live.set_attn_implementation("sdpa")  # ours computes attention in float32 on a CPU
    assert torch.equal(logits(live), logits(loaded))


def test_rounded_buffers_are_caught(tmp_path, monkeypatch, request):
    monkeypatch.setattr(LM, "keep_dtypes", lambda *_, **__: None)
    request.param = "llama"
    live, loaded = trained(tmp_path, folder.__wrapped__(tmp_path, request), "bf16-true")
    assert tensors(live)["model.rotary_emb.inv_freq"].dtype == torch.bfloat16
    ours, theirs = (logits(hf).float().log_softmax(-1) for hf in (live, loaded))
    assert (theirs.exp() * (theirs - ours)).sum(-1).max() > 1e-5


def test_a_run_and_its_checkpoint_export_what_was_trained(tmp_path, monkeypatch, capsys):
    """Both compare the folder with the live model, which fails if one of them has rounded frequencies."""
    cli = CommandLine(tmp_path, monkeypatch, capsys)
    cli.recipe({"trainer.precision": "bf16-true", "trainer.max_steps": 1})
    cli.works("fit", "--config", "r.yaml")
    (checkpoint,) = (cli.directory / "runs/r/checkpoints").glob("step-*.ckpt")
    export_checkpoint(checkpoint, tmp_path / "out")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (cli.directory / "runs/r/model", tmp_path / "out")]
    assert {p.dtype for p in models[0].parameters()} == {torch.bfloat16}
    assert torch.equal(*map(logits, models))
